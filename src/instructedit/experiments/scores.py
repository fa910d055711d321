"""Scores by record as a file: what tests measured, without the words of the records, to compare with elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from instructedit.errors import UserError

if TYPE_CHECKING:
    from pandas import DataFrame

#: Its name in an experiment's folder of results.
FILE = "scores.csv.gz"

_KEYS = ("method", "seed", "title", "task", "record", "cluster", "probe", "kind", "group", "view", "main")
_TEXTS = {"method": str, "title": str, "task": str, "record": str, "cluster": str, "kind": str, "group": str}
_INTERNAL = ("request_index",)  # position in a batch


def write_scores(tables: Mapping[str, DataFrame], titles: Mapping[str, str], file: Path) -> None:
    """Writes the probe rows of several methods to one file, without the words of records and models.

    Equal tables give equal bytes at the same file name. Numbers have seven digits. Scores are numbers: no other column
    is written, be it prompts, answers, or the text of a metric of one's own.

    Args:
        tables: Method to its probe rows, with a column ``seed`` (see `Results.tables`).
        titles: Task to its title in tables.
        file: Where to write, a gzipped CSV file with ``method, seed, title, task, record, cluster, probe, kind, group,
            view, main`` and a column for each score.
    """
    import pandas as pd

    parts = [table.assign(method=name, title=table["task"].map(titles)) for name, table in tables.items()]
    every = pd.concat(parts or [pd.DataFrame(columns=_KEYS)], ignore_index=True)
    scores = every.drop(columns=[*_KEYS, *_INTERNAL], errors="ignore").select_dtypes(["number", "bool"])
    every[[*_KEYS, *scores]].to_csv(
        file, index=False, float_format="%.7g", compression={"method": "gzip", "compresslevel": 9, "mtime": 0}
    )


def read_scores(files: Sequence[str | Path]) -> dict[str, DataFrame]:
    """Reads files that `write_scores` wrote, on this machine or another.

    Args:
        files: The files, or folders of results that hold one.

    Returns:
        Method to its probe rows of all files, with the columns ``seed`` and ``title``.

    Raises:
        UserError: If a file is missing, is not such a file, lacks a column, or holds a method and seed that another
            holds too.
    """
    import pandas as pd

    found: dict[str, list[DataFrame]] = {}
    origin: dict[tuple[str, int], str | Path] = {}
    for file in files:
        path = Path(file).expanduser()
        table = _read(path / FILE if path.is_dir() else path)
        for (method, seed), rows in table.groupby(["method", "seed"], sort=False):
            key = (str(method), int(seed))
            if key in origin:
                raise UserError(f"{file}: {method}, seed {seed}, is in {origin[key]} too")
            origin[key] = file
            found.setdefault(key[0], []).append(rows.drop(columns="method"))
    return {method: pd.concat(parts, ignore_index=True) for method, parts in found.items()}


def _read(file: Path) -> DataFrame:
    import pandas as pd

    if not file.is_file():
        raise UserError(f"{file}: no such file; experiments write {FILE} to their folder of results")
    try:
        names = pd.read_csv(file, nrows=0).columns
        blank = {name: [""] for name in names if name not in _TEXTS}  # an empty text is one, an empty score is none
        table = pd.read_csv(file, dtype=_TEXTS, keep_default_na=False, na_values=blank)
    except (ValueError, OSError, EOFError) as error:  # not CSV, not gzip, or cut short
        raise UserError(f"{file}: cannot be read as scores: {error}") from error
    if missing := [name for name in _KEYS if name not in table]:
        raise UserError(f"{file}: no column {missing[0]!r}")
    for name in ("seed", "probe"):
        if not pd.api.types.is_integer_dtype(table[name]):
            raise UserError(f"{file}: column {name!r}: expected whole numbers")
    if not pd.api.types.is_bool_dtype(table["main"]):
        raise UserError(f"{file}: column 'main': expected True or False")
    for name in table.columns.difference(_KEYS):
        if not pd.api.types.is_numeric_dtype(table[name]):
            raise UserError(f"{file}: column {name!r}: expected numbers")
    return table
