"""List, show, ask, compare, undo, combine and export the edits that you keep."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from instructedit.console import console
from instructedit.errors import UserError
from instructedit.paths import check_writable, check_writable_file

if TYPE_CHECKING:
    from instructedit.editors import Editor
    from instructedit.edits import Edit
    from instructedit.lm import FrozenLM
    from instructedit.reports.store import KeptEdit

POSITIONAL = True


def list_edits(store: str | None = None) -> None:
    """Lists the kept edits.

    Args:
        store: Folder of the store; by default $INSTRUCTEDIT_EDITS, or edits/.
    """
    from rich.table import Table
    from rich.text import Text

    from instructedit.reports.store import kept_edits, store_folder

    folder = store_folder(store)
    kept = kept_edits(folder)
    if not kept:
        print(f"{folder}: no edits here; `instructedit edit … --keep NAME` puts one there")
        return
    table = Table("name", "model", "editor", "requests", "verdict")
    for each in kept:
        report = each.report
        requests = [f"{one['request']['prompt']} → {one['request']['target']}" for one in report["requests"]]
        verdicts = "\n".join(one["verdict"]["words"] for one in report["requests"])
        table.add_row(*map(Text, (each.name, each.model["name"], report["editor"], "\n".join(requests), verdicts)))
    console().print(table)


def show(name: str, store: str | None = None) -> None:
    """Shows the report of a kept edit.

    Args:
        name: Name of the edit, or its folder.
        store: Folder of the store; by default $INSTRUCTEDIT_EDITS, or edits/.
    """
    kept = _kept(name, store)
    for request in kept.report["requests"]:
        asked, words = request["request"], request["verdict"]["words"]
        _answers(f"{asked['prompt']} → {asked['target']}: {words}", "before", "after", _words(request))


def ask(
    name: str, prompts: list[str] | None = None, lm: str | None = None, max_new_tokens: int = 12,
    store: str | None = None,
) -> None:  # fmt: skip
    """Asks a model before and after a kept edit.

    Args:
        name: Name of the edit, or its folder.
        prompts: What to ask; by default what the edit was asked when it was made.
        lm: The model; by default the one that the edit was made for.
        max_new_tokens: Length of the answers.
        store: Folder of the store; by default $INSTRUCTEDIT_EDITS, or edits/.
    """
    kept = _kept(name, store)
    model = _model(kept, lm)
    edit = kept.load(model)
    prompts = prompts or list(dict.fromkeys(prompt for prompt, _ in _probes(kept)))
    both = [
        model.generate(prompts, max_new_tokens, each, None if each is None else [0] * len(prompts))
        for each in (None, edit)
    ]
    _answers(kept.name, "before", "after", dict(zip(prompts, zip(*both, strict=True), strict=True)))


def diff(first: str, second: str, store: str | None = None) -> None:
    """Shows where the models with one edit and with another say different things, among what both were asked.

    Args:
        first: Name of an edit, or its folder.
        second: Name of another, or its folder.
        store: Folder of the store; by default $INSTRUCTEDIT_EDITS, or edits/.
    """
    one, other = (
        {p: w for r in _kept(n, store).report["requests"] for p, w in _words(r).items()} for n in (first, second)
    )
    shared = [prompt for prompt in one if prompt in other]
    found = {prompt: (one[prompt][1], other[prompt][1]) for prompt in shared if one[prompt][1] != other[prompt][1]}
    _answers(f"{len(found)} of the {len(shared)} prompts that both were asked", first, second, found)


def undo(name: str, store: str | None = None) -> None:
    """Removes a kept edit. The model itself was never changed.

    Args:
        name: Name of the edit.
        store: Folder of the store; by default $INSTRUCTEDIT_EDITS, or edits/.
    """
    from instructedit.reports import store as edits

    print(f"{edits.undo(name, edits.store_folder(store))} is removed; the model is what it was")


def combine(
    first: str, second: str, keep: str, more: list[str] | None = None, solve: str | None = None,
    store: str | None = None,
) -> None:  # fmt: skip
    """Adds edits up to one, or makes one of all their requests; asks it all that they were asked, and keeps it.

    Args:
        first: Name of an edit, or its folder.
        second: Name of another, or its folder.
        keep: Name of the new edit.
        more: Names of further edits, or their folders.
        solve: An editor that makes one edit of all requests together instead, such as memit: the name of a method, with
            the options that the first edit was made with if that is its method, or a trained editor.
        store: Folder of the store; by default $INSTRUCTEDIT_EDITS, or edits/.
    """
    from instructedit.reports import edit
    from instructedit.reports import store as edits
    from instructedit.reports.table import tables

    folder = edits.store_folder(store)
    edits.free_place(keep, check_writable(folder, "--store"))
    parts = [_kept(name, store) for name in (first, second, *(more or []))]
    model = _model(parts[0], None)
    each = [part.load(model) for part in parts]  # refused if one was made for another model
    cases = [case for part in parts for case in part.cases]
    if solve:
        report = edit(model, _editor(solve, model, parts[0]), cases, joint=True)
    else:
        report = edits.report_on(model, edits.combined(each), cases, "sum", {"of": [part.name for part in parts]})
    for table in tables(report):
        console().print(table)
    print(f"kept as {edits.keep(model, report, keep, folder)}")


def export(
    name: str, adapter: str | None = None, merge: str | None = None, gguf: str | None = None,
    rank: int | Literal["auto"] = "auto", lm: str | None = None, store: str | None = None,
) -> None:  # fmt: skip
    """Writes a kept edit for others to load: a LoRA adapter, a whole model, or a GGUF file.

    Args:
        name: Name of the edit, or its folder.
        adapter: Folder for a LoRA adapter in PEFT's layout, of a rank that can be served.
        merge: Folder for a plain transformers model with the edit in its weights.
        gguf: File for a copy of the GGUF file that the model came from, with the edit in its weights, for llama.cpp
            and Ollama. The file of a model that was installed with pip is downloaded again.
        rank: The adapter's largest rank; auto is the smallest of 8, 16, 32, 64, … that leaves all predicted tokens
            on what the edit was asked unchanged.
        lm: The model; by default the one that the edit was made for.
        store: Folder of the store; by default $INSTRUCTEDIT_EDITS, or edits/.
    """
    from instructedit.reports.ranks import trimmed

    if not (adapter or merge or gguf):
        raise UserError("edits export: say where to, by --adapter FOLDER, --merge FOLDER or --gguf FILE")
    if gguf and check_writable_file(gguf, "--gguf").exists():
        raise UserError(f"--gguf {gguf}: there is such a file already: another name")
    adapter, merge = (str(Path(place).expanduser()) if place else None for place in (adapter, merge))
    for folder, option in ((adapter, "--adapter"), (merge, "--merge")):
        if folder and any(check_writable(folder, option).glob("*.json")):
            raise UserError(f"{option} {folder}: holds a model or an adapter already: another folder")
    kept = _kept(name, store)
    model = _model(kept, lm)
    edit = kept.load(model)
    if adapter:
        small = trimmed(model, edit, _probes(kept), rank)
        model.save(small.edit, adapter)
        print(f"{adapter}: a LoRA adapter, {small}")
    if merge:
        model.merge(edit).save_pretrained(merge)
        model.tokenizer.save_pretrained(merge)
        print(f"{merge}: {model.name} with the edit in its weights")
    if gguf:
        _export_gguf(model, edit, lm or kept.model["name"], Path(gguf).expanduser())
        print(f"{gguf}: the model's GGUF file with the edit in its weights")


def _export_gguf(model: FrozenLM, edit: Edit, source: str, out: Path) -> None:
    from instructedit.lm import pretrained
    from instructedit.lm.gguf_export import write_edited

    out.parent.mkdir(parents=True, exist_ok=True)
    if known := pretrained.known().get(source):
        with tempfile.TemporaryDirectory(dir=out.parent) as folder:
            file, _ = pretrained.download_gguf(known, Path(folder))
            write_edited(model, edit, file, out)
    elif source.endswith(".gguf"):
        write_edited(model, edit, source, out)
    else:
        raise UserError(f"--gguf: {source} came from no GGUF file; --lm FILE.gguf names one of the same weights")


def _kept(name: str, store: str | None) -> KeptEdit:
    from instructedit.reports.store import kept_edit, store_folder

    return kept_edit(name, store_folder(store))


def _model(kept: KeptEdit, lm: str | None) -> FrozenLM:
    """Loads the model of an edit, by default under the name with which the edit was made."""
    import instructedit as ie

    return ie.FrozenLM.from_pretrained(lm or kept.model["name"])


def _editor(source: str, lm: FrozenLM, kept: KeptEdit) -> Editor:
    """Returns a trained editor, or a method by its name, with a kept edit's options if it made that edit."""
    from instructedit.editors import any_editor

    return any_editor(source, lm, kept.report["options"] if kept.report["editor"] == source else None)


def _probes(kept: KeptEdit) -> list[tuple[str, str]]:
    """Lists all prompts that an edit was asked, each with its target."""
    return [
        (prompt, case.request.target)
        for case in kept.cases
        for prompt in (case.request.prompt, *case.paraphrases, *case.neighbours, *case.ask)
    ]


def _words(request: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """Returns the words before and after the edit for each prompt of one request's report."""
    return {each["prompt"]: (each["before"]["words"], each["after"]["words"]) for each in request["answers"]}


def _answers(title: str, before: str, after: str, words: dict[str, tuple[str, str]]) -> None:
    from rich.markup import escape
    from rich.table import Table
    from rich.text import Text

    terminal = console()
    terminal.print(Text(title, "bold"))
    table = Table("prompt", escape(before), escape(after))
    for prompt, both in words.items():
        table.add_row(*(Text(" ".join(text.split())) for text in (prompt, *both)))
    terminal.print(table)


main = {
    "list": list_edits, "show": show, "ask": ask, "diff": diff, "undo": undo, "combine": combine, "export": export
}  # fmt: skip
