"""Where an edit lies on the map of editing areas, among the same editor's edits of known tasks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from instructedit.analysis import EditingAreas, area_maps
from instructedit.editors import Editor
from instructedit.edits import Edit, LowRankEdit
from instructedit.errors import UserError
from instructedit.tasks import load_records, task_title

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: The embedded test records that stand for their tasks, and how many of each; ConvSent's are of different topics.
LANDMARKS, OF_EACH = ("counterfact", "recent", "convsent", "zsre"), 15
#: What the map calls the edit that it was made for.
YOURS = "your edit"
_RANK = 8  # leading directions of an area that are kept


def landmarks(editor: Editor) -> EditingAreas:
    """Makes the editor's edits of the embedded records, and gives their areas.

    Raises:
        UserError: If its edits have no areas, or are found by optimisation, one after another.
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
    """Draws an edit's area among known ones: t-SNE of each edited matrix.

    Args:
        known: What `landmarks` gives.
        edit: One edit of the same editor.
        editor: What the map calls it.

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
