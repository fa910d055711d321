"""What strangers' files are given to, and what must come of each: what is read, or one line that names the file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

import instructedit as ie
from instructedit.configs import Scale, located
from instructedit.editors.saved import read_checkpoint, read_folder, seal_checkpoint
from instructedit.edits import Factors, LowRankEdit
from instructedit.edits.checksums import CHECKSUM, file_checksum
from instructedit.errors import one_line
from instructedit.instructions.bank import InstructionBank
from instructedit.reports.cases import read_cases
from instructedit.tasks import load_records

CORPUS = Path(__file__).parent / "corpus"
#: Characters that a message may have: longer ones are no line that somebody reads.
LONGEST = 2000
Read = Callable[[Path], Any]
#: Words that the readers know.
FIELDS = (
    "prompt", "target_new", "subject", "ground_truth", "rephrase", "rephrase_prompt", "portability", "locality", "src",
    "alt", "answers", "loc", "loc_ans", "New Question", "New Answer", "ent", "pos", "neg", "target", "task", "slots",
    "neighbours", "ask", "version", "descriptions", "id", "split", "text", "provenance", "date", "seed", "lm", "data",
    "trainer", "editors", "editor", "options", "sha256", "edit", "tensors", "edits",
)  # fmt: skip


def _records(task: str) -> Read:
    return lambda file: load_records(task, str(file))


#: Name → (the names of what is read, what reads it). The last one is the file that is changed.
TARGETS: dict[str, tuple[str, Read]] = {
    "counterfact": ("records.json", _records("counterfact")),
    "recent": ("records.json", _records("recent")),
    "zsre": ("records.json", _records("zsre")),
    "convsent": ("records.jsonl", _records("convsent")),
    "packed records": ("records.json.gz", _records("counterfact")),
    "requests": ("requests.json", read_cases),
    "requests in a table": ("requests.csv", read_cases),
    "bank": ("bank.yaml", InstructionBank.load),
    "scale": ("scale.yaml", Scale.load),
    "config": ("config.yaml", lambda file: located(["fit", f"--config={file}"])),
    "editor's card": ("editor.json", lambda file: read_folder(file.parent)),
    "editor's weights": ("editor.safetensors", lambda file: read_folder(file.parent)),
    "edit's card": ("edit.json", lambda file: ie.load_edit(file.parent)),
    "edit's tensors": ("edit.safetensors", lambda file: ie.load_edit(file.parent)),
    "checkpoint": ("last.ckpt", read_checkpoint),
}


def saved(folder: Path) -> None:
    """Puts an editor, an edit and a checkpoint into a folder; a test changes one file of it."""
    weights = {"log_alpha": torch.zeros(2), "up.0": torch.ones(3, 2)}
    save_file(weights, folder / "editor.safetensors")
    card = {"editor": "mend", "options": {"rank": 2}, CHECKSUM: file_checksum(folder / "editor.safetensors")}
    (folder / "editor.json").write_text(json.dumps(card))
    LowRankEdit({"site": Factors(torch.ones(1, 1, 3), torch.ones(1, 1, 2))}).save_pretrained(folder)
    config = {"class_path": "instructedit.editors.mend.Mend", "init_args": {"rank": 2}}
    state = {f"editor.{name}": tensor for name, tensor in weights.items()}
    checkpoint = {"state_dict": state, "hyper_parameters": {"editor": config}}
    seal_checkpoint(checkpoint)
    torch.save(checkpoint, folder / "last.ckpt")


def seeds(name: str, folder: Path) -> list[bytes]:
    """The files that the changed ones are made from."""
    file, _ = TARGETS[name]
    if (folder / file).is_file():
        return [(folder / file).read_bytes()]
    kind = {".yaml": "*.yaml", ".csv": "*.csv"}.get(Path(file).suffix, "*.json*")
    return [each.read_bytes() for each in sorted(CORPUS.glob(kind))]


def outcome(read: Read, file: Path) -> str:
    """What came of a file: "read", or the error's line; whatever else it is raises."""
    try:
        read(file)
    except ie.UserError as error:
        line = one_line(error)
        assert file.name in line or str(file.parent) in line, f"names no file: {line}"
        assert "\n" not in line
        assert len(line) <= LONGEST, f"{len(line)} characters: {line[:200]}"
        return line
    return "read"
