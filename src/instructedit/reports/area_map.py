"""Map of editing areas that shows an edit among the same editor's edits of known tasks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from instructedit.analysis import EditingAreas, area_maps
from instructedit.editors import Editor
from instructedit.edits import Edit, LowRankEdit
from instructedit.errors import UserError
from instructedit.tasks import load_records, task_title

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: The tasks whose embedded test records represent them on the map, and how many of each; one per topic for ConvSent.
LANDMARKS, OF_EACH = ("counterfact", "recent", "convsent", "zsre"), 15
#: Label of the user's edit on the map.
YOURS = "your edit"
_RANK = 8  # leading directions of an area that are kept


def landmarks(editor: Editor) -> EditingAreas:
    """Computes the areas of the editor's edits of the embedded records.

    Raises:
        UserError: If its edits have no areas, or are not made by a trained editor in one pass.
    """
    if not editor.trainable:
        raise UserError(f"a map needs a trained editor, whose edits take one pass; {editor.name!r} is none")
    parts = []
    for task in LANDMARKS:
        records, _ = load_records(task, "tiny", "test")
        chosen = list({record.cluster: record for record in records}.values())[:OF_EACH]
        edit = editor.edit([record.request for record in chosen])
        parts.append(_areas(edit, [record.id for record in chosen], task_title(task)))
    return EditingAreas.concat(parts)


def map_among(known: EditingAreas, edit: Edit, editor: str) -> Figure:
    """Draws an edit's area among known ones, with t-SNE for each edited matrix.

    Args:
        known: The areas that `landmarks` returns.
        edit: One edit of the same editor.
        editor: Name of the editor on the map.

    Raises:
        UserError: If the edit has no area.
    """
    figure = area_maps({editor: EditingAreas.concat([known, _areas(edit, [YOURS], YOURS)])})
    drawn = [*(each for axes in figure.axes for each in axes.collections), *figure.legends[0].legend_handles]
    for each in drawn:
        if each is not None and each.get_label() == YOURS:
            each.set(color="black", sizes=[60], zorder=9)
    return figure


def _areas(edit: Edit, ids: list[str], task: str) -> EditingAreas:
    if not isinstance(edit, LowRankEdit):
        raise UserError(f"only edits of low rank have an editing area; this one is of the kind {edit.name!r}")
    return EditingAreas.of_edits(ids, [task] * len(ids), edit, _RANK)
