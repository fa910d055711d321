"""Writing figures to files."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure


#: Pixels per inch.
DPI = 150


def save_figure(figure: Figure, path_without_suffix: str | Path) -> tuple[Path, Path]:
    """Writes a figure as PNG and SVG, and returns both paths; the same figure gives the same bytes."""
    import matplotlib

    png, svg = (Path(f"{path_without_suffix}.{suffix}") for suffix in ("png", "svg"))
    png.parent.mkdir(parents=True, exist_ok=True)
    with laid_out(figure), matplotlib.rc_context({"svg.hashsalt": "instructedit"}):
        figure.savefig(png, dpi=DPI)
        figure.savefig(svg, metadata={"Date": None})
    return png, svg


@contextmanager
def laid_out(figure: Figure) -> Iterator[None]:
    """Computes a figure's layout once for all files written within the context: layout takes longer than drawing."""
    engine, dpi = figure.get_layout_engine(), figure.dpi
    figure.set_dpi(DPI)
    if engine is not None:
        engine.execute(figure)
        figure.set_layout_engine("none")
    try:
        yield
    finally:
        figure.set_dpi(dpi)
        figure.set_layout_engine(engine)
