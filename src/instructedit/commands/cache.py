"""The prefix cache on disk: warm it before training, list it, clear it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from instructedit.console import console
from instructedit.errors import UserError, at_least

if TYPE_CHECKING:
    from instructedit.data.module import EditData
    from instructedit.editors import Editor
    from instructedit.instructions import RenderedRecord
    from instructedit.records import EditRecord


def warm(
    configs: list[str] | None = None,
    scale: str | None = None,
    editor: str | None = None,
    overrides: list[str] | None = None,
    cache_dir: str | None = None,
    batch_size: int = 32,
    shard: str = "1/1",
) -> None:
    """Computes the states that training with these configs can need, once; those in the cache already are skipped.

    They are the states below the first edited block, for each record's request, rephrases and replies after every
    training description of its task (alone, if the editor takes no instructions) and for its locality prompts alone;
    and for the latter also what leaves the last block of the unedited LM. An interrupted run goes on where it stopped.
    Training finds them if its model.lm.cache_dir is the same folder.

    Args:
        configs: The config files that fit is given, e.g. '[lm.yaml, editor.yaml, data.yaml]'.
        scale: The scale that fit is given, a name or a file; configs and overrides come after it.
        editor: The name of the editor's config that fit is given.
        overrides: Further options that fit is given, e.g. '["--model.lm.cache_dtype=bfloat16"]'.
        cache_dir: Folder of the cache; by default the configs' model.lm.cache_dir, else "prefix" in $INSTRUCTEDIT_CACHE
            (~/.cache/instructedit).
        batch_size: Rows in one forward pass.
        shard: Which part of the rows to compute, out of how many: 1/4, and 2/4, 3/4, 4/4 in further processes, at once
            or one after another, with the same folder.
    """
    import torch
    from tqdm import tqdm

    from instructedit.configs import config_files
    from instructedit.lightning_cli import Built, run

    at_least(1, batch_size=batch_size)
    part, parts = _shard(shard)
    first, last = [_option(_folder(None))], [_option(Path(cache_dir))] if cache_dir else []
    files = [*config_files(scale, editor), *(configs or ())]
    options = [*first, *(f"--config={path}" for path in files), *(overrides or ()), *last]
    cli = run(["fit", *options, "--trainer.logger=false"], Built)
    made: Editor = cli.model.editor
    lm = made.lm.to(cli.trainer.strategy.root_device)
    block, disk = lm.first_block([site.name for site in made.sites]), lm.cache.disk
    if disk is None:
        raise UserError("model.lm.cache_dir is null: name a folder, or give cache_dir")
    cli.datamodule.setup("fit")
    pairs, locality = _training_pairs(made, cli.datamodule)
    text = lm.text.within(cli.datamodule.hparams["max_length"])
    work = [(len(lm.forward.blocks), locality, lambda batch: lm.scores.unedited_states(batch, block))]
    work += [(block, pairs, lambda batch: lm.prefixes.of(batch, block))] if block else []  # else nothing lies below it
    rows = tokens = there = 0
    for entered, wanted, compute in reversed(work):  # what leaves the last block is computed from the prefix
        wanted = sorted(wanted, key=lambda pair: sum(map(len, pair)))[part - 1 :: parts]
        bar = tqdm(range(0, len(wanted), batch_size), desc=f"{lm.name} below block {entered}", unit=" batches")
        for start in bar:
            batch = text.encode(wanted[start : start + batch_size]).to(lm.device)
            known = torch.tensor(lm.cache.on_disk(batch, entered))
            there += int(known.sum())
            if not known.all():
                new = batch.select((~known).nonzero().squeeze(-1))
                with torch.no_grad():
                    compute(new)
                rows, tokens = rows + len(new), tokens + sum(new.lengths)
    lm.cache.flush()
    if disk.broken:
        raise UserError(f"{disk.root}: the disk took no more; run again when there is room")
    print(f"{rows} rows of {tokens} tokens computed, {_size(disk.written)} written; {there} rows were there")
    if disk.evicted:
        print(f"{_size(disk.evicted)} were thrown out to keep to cache_disk_bytes = {_size(disk.max_bytes)}")
    print(f"training finds them with {_option(disk.root)}")


def listing(cache_dir: str | None = None) -> None:
    """Shows what the cache holds: models, blocks, rows, bytes, last use.

    Args:
        cache_dir: Folder of the cache; by default "prefix" in $INSTRUCTEDIT_CACHE (~/.cache/instructedit).
    """
    from datetime import datetime

    from rich.table import Table
    from rich.text import Text

    from instructedit.lm.cache.folder import partitions

    root = _folder(cache_dir)
    found = partitions(root)
    table = Table("LM", "model", "block", "forward pass", "dtype", "rows", "size", "last use")
    for partition in found:
        about = [str(partition.meta.get(name, "?")) for name in ("lm", "model", "block", "forward", "dtype")]
        used = datetime.fromtimestamp(partition.used).isoformat(" ", "minutes") if partition.used else "never"
        cells = (about[0], about[1][:8], *about[2:], str(partition.rows), _size(partition.bytes), used)
        table.add_row(*map(Text, cells))
    console().print(table)
    print(f"{root}: {_size(sum(partition.bytes for partition in found))} in all")
    for partition in found:
        if partition.corrupt:
            print(f"{partition.folder}: {partition.corrupt} corrupt shards, which the next run removes")


def clear(cache_dir: str | None = None, lm: str | None = None) -> None:
    """Removes what the cache holds. A folder that also holds anything else is left as it is.

    Args:
        cache_dir: Folder of the cache; by default "prefix" in $INSTRUCTEDIT_CACHE (~/.cache/instructedit).
        lm: Remove the states of this LM alone, by its name in the list.
    """
    from instructedit.lm.cache.folder import clear as remove
    from instructedit.lm.cache.folder import partitions

    root = _folder(cache_dir)
    names = {str(partition.meta.get("lm")) for partition in partitions(root)}
    if lm is not None and lm not in names:
        raise UserError(f"{root}: holds nothing of an LM {lm!r}; there are: {', '.join(sorted(names)) or 'none'}")
    gone = remove(root, lm)
    print(
        f"{root}: {sum(partition.rows for partition in gone)} rows removed, {_size(sum(s.bytes for s in gone))} freed"
    )


main = {"warm": warm, "list": listing, "clear": clear}


def _folder(given: str | None) -> Path:
    from instructedit.paths import cache_folder

    return Path(given).expanduser() if given else cache_folder() / "prefix"


def _shard(text: str) -> tuple[int, int]:
    """Parses the option ``--shard``: ``2/4`` → (2, 4).

    Raises:
        UserError: If it is not a part of a whole.
    """
    part, _, parts = text.partition("/")
    if not (part.isdecimal() and parts.isdecimal() and 1 <= int(part) <= int(parts)):
        raise UserError(f"--shard {text!r}: expected a part of a whole, such as 1/4 or 4/4")
    return int(part), int(parts)


def _option(folder: Path) -> str:
    return f"--model.lm.cache_dir={folder}"


def _size(count: float) -> str:
    return f"{count / 1e6:.1f} MB" if count < 1e9 else f"{count / 1e9:.2f} GB"


def _training_pairs(editor: Editor, data: EditData) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Lists each (prompt, answer) that a training batch of these records can hold; then the locality ones alone.

    They are those that `data.batch.Collator` draws.
    """
    scope = {"generalization": "rephrases", "wanted": "replies", "opposite": "replies"}
    kinds = [kind for kind, most in scope.items() if data.hparams[most]]
    records = [record for task in data.records["fit"].values() for record in task]
    locality = dict.fromkeys(
        (probe.prompt, probe.answers[0]) for r in records for probe in r.of("locality") if data.hparams["locality"]
    )
    pairs = dict.fromkeys(
        (rendered.ask(probe), probe.answers[0])
        for record in records
        for rendered in _renderings(editor, record)
        for probe in record.of("reliability", *kinds)
    )
    return list(pairs | locality), list(locality)


def _renderings(editor: Editor, record: EditRecord) -> list[RenderedRecord]:
    """Renders a record with every instruction that training can draw for it."""
    from instructedit.instructions import InstructionBank, render_records

    if not editor.instructions:
        return render_records([record], None)
    descriptions = InstructionBank.for_task(record.task).split("train")
    instructors = [editor.instructor(description=description.id) for description in descriptions]
    return [rendered for instructor in instructors for rendered in render_records([record], instructor)]
