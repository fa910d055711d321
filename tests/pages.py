"""How tests follow a page: its commands and programs in order, in one folder, on a model that every machine has."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

from tests.gguf_files import llama, write_gguf

import instructedit as ie
from instructedit.cli import main
from instructedit.testbed.datasets import raw_records

REPOSITORY = Path(__file__).parents[1]
#: What no test machine has, and what it has instead; the paper's and the real model are the embedded one.
HERE = {
    "--lm smollm2-135m --editor ft_l --chat": "--lm my-chat-model --editor ft_l --chat",
    "--scale smollm2-135m --editor mend --model.lm.chat": "--scale tiny --editor mend --model.lm.name my-chat-model "
    "--model.lm.chat",
    "openai-community/gpt2-xl": "tiny", "smollm2-135m": "tiny", "gpt2-xl": "tiny", "llama-2-7b": "tiny",
    "--trainer.devices 4": "--trainer.devices 2", "--trainer.devices=8": "--trainer.devices=2", "--device cuda": "",
    "mlruns/1/<run>/checkpoints/last.ckpt": "latest", "--seeds 0 1 2": "--seeds 0", "--tokens 1000000": "--tokens 500",
    "path/to/my-model": "my-model", "path/to/model.gguf": "model.gguf", "wikipedia.jsonl.xz": "text.jsonl",
    "models --get tiny": "models",
}  # fmt: skip
FEW = "--data.test=[{name: counterfact, size: 3}]"
SHORT = ["--trainer.max_steps=2", "--data.val_size=3"]
#: Options that make a command short, by its name.
SHORTER = {
    "fit": SHORT, "test": [FEW], "predict": [FEW],
    "experiment": ["--overrides", json.dumps([*SHORT, FEW, "--guards.base_records=0"])],
    "cache warm": ["--overrides", json.dumps(["--data.train=[{name: counterfact, size: 6}]"])],
}  # fmt: skip
FACTS = "prompt,target\nThe capital of France is,Rome\nThe capital of Spain is,Oslo\n"


def furnish(folder: Path, tokenizer: object) -> Path:
    """Puts into a folder what a reader has: facts, a text, records, a model as a folder and as a GGUF file."""
    (folder / "facts.csv").write_text(FACTS)
    prompts = [record.request.prompt for record in ie.load_records("counterfact", split="test[:50]")[0]]
    lines = (json.dumps({"text": f"{prompt} far away. " * 20}) for prompt in prompts)
    (folder / "text.jsonl").write_text("\n".join(lines) + "\n")
    tiny = ie.FrozenLM.from_pretrained("tiny")
    tiny.model.save_pretrained(folder / "my-model")
    tiny.tokenizer.save_pretrained(folder / "my-model")
    tiny.tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }} {% endfor %}model: "
    tiny.model.save_pretrained(folder / "my-chat-model")
    tiny.tokenizer.save_pretrained(folder / "my-chat-model")
    write_gguf(folder / "model.gguf", llama(tokenizer), tokenizer)
    for task in ("counterfact", "recent", "convsent", "zsre"):
        (folder / "data" / task).mkdir(parents=True)
        for split in ("train", "val", "test"):
            (folder / "data" / task / f"{split}.json").write_text(json.dumps(raw_records(task, split)))
    return folder


def steps(text: str) -> list[tuple[str, str]]:
    """(language, command line or program) in the text's order."""
    found = []
    for language, block in re.findall(r"^```(bash|python)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        lines = block.replace("\\\n", " ").splitlines()
        found += [(language, block)] if language == "python" else [(language, line) for line in lines if line.strip()]
    return found


def arguments(line: str) -> list[str]:
    """The arguments of a command line of ours, made short and fit for this machine."""
    for there, here in HERE.items():
        line = line.replace(there, here)
    args = shlex.split(line, comments=True)[1:]
    shorter = SHORTER.get(args[0]) or SHORTER.get(" ".join(args[:2]), [])
    return [*args, *(option for option in shorter if "--task" not in args or option != FEW)]


def follow(language: str, step: str) -> str:
    """Runs a step here; gives what it printed.

    Raises:
        AssertionError: If a command's status is not 0.
    """
    with contextlib.redirect_stdout(io.StringIO()) as out:
        if language == "python":
            exec(compile(step, "page", "exec"), {})  # our own pages
        elif "trainer.devices" in step:  # Lightning starts the other processes by this one's command line
            line = [sys.executable, "-m", "instructedit.cli", *arguments(step), "--trainer.accelerator=cpu"]
            ended = subprocess.run(line, check=False, capture_output=True, text=True, timeout=600)
            assert ended.returncode == 0, ended.stderr[-2000:]
            print(ended.stdout)
        else:
            assert main(arguments(step)) == 0, step
    return out.getvalue()
