"""Analysis of edits and results: editing areas, summaries, figures and tables."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from instructedit.analysis.areas import (
        EditingAreas,
        cosines,
        embed,
        fitting_perplexity,
        principal_components,
        separation,
    )
    from instructedit.analysis.figures import (
        area_map,
        area_maps,
        many_edits_figure,
        metric_bars,
        metric_dots,
    )
    from instructedit.analysis.summary import summarise
    from instructedit.analysis.tables import html_table, markdown_table, rich_table
    from instructedit.drawing import save_figure

_MODULES = {
    "areas": ("EditingAreas", "cosines", "embed", "fitting_perplexity", "principal_components", "separation"),
    "figures": ("area_map", "area_maps", "many_edits_figure", "metric_bars", "metric_dots"),
    "summary": ("summarise",),
    "tables": ("html_table", "markdown_table", "rich_table"),
}

__all__ = [
    "EditingAreas",
    "area_map",
    "area_maps",
    "cosines",
    "embed",
    "fitting_perplexity",
    "html_table",
    "many_edits_figure",
    "markdown_table",
    "metric_bars",
    "metric_dots",
    "principal_components",
    "rich_table",
    "save_figure",
    "separation",
    "summarise",
]


def __getattr__(name: str) -> object:
    if name == "save_figure":
        return getattr(import_module("instructedit.drawing"), name)
    # Imported at first use: a table needs no torch, and a training run needs neither figures nor tables.
    for module, names in _MODULES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
