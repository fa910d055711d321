"""Records in CSV files: a header with the fields' names, then one record per line."""

from __future__ import annotations

import csv
import io
from collections.abc import Collection

from instructedit.errors import UserError
from instructedit.tasks.raw import Raw

#: Separates the texts of one cell.
SEPARATOR = "|"


def rows(text: str, name: str, lists: Collection[str] = ()) -> list[dict[str, object]]:
    """Parses the records of a CSV text; an empty cell is a missing field.

    Args:
        text: The whole file.
        name: Name of the file, for error messages.
        lists: Columns whose cells hold several texts, separated by ``|``.

    Raises:
        UserError: If it is not CSV, a column occurs twice, or a line has another number of cells than the header.
    """
    lines = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        found = [row for row in lines if any(map(str.strip, row))]
    except csv.Error as error:
        raise UserError(f"{name}: wrong CSV at line {lines.line_num}: {error}") from error
    header = [column.strip() for column in found[0]] if found else []
    if twice := {column for column in header if header.count(column) > 1}:
        raise UserError(f"{name}: column {min(twice)!r} stands twice in the header")
    return [_record(Raw({}, name, number), header, row, lists) for number, row in enumerate(found[1:])]


def _record(raw: Raw, header: list[str], row: list[str], lists: Collection[str]) -> dict[str, object]:
    if len(row) != len(header):
        raise raw.error(f"has {len(row)} cells where the header has {len(header)}; quote a cell that holds a comma")
    filled = {name: cell for name, cell in zip(header, row, strict=True) if cell.strip()}
    return {n: [t for t in cell.split(SEPARATOR) if t.strip()] if n in lists else cell for n, cell in filled.items()}
