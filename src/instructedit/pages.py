"""Self-contained HTML pages in one style: they need neither network nor other files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

_STYLE = Path(__file__).with_name("pages.css")


def render(template: str | Path, **values: Any) -> str:
    """Fills a template; every text among the values is escaped.

    Args:
        template: A Jinja file, in which ``{{ style }}`` stands for the common style.
        values: Values that the template shows.
    """
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    house = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return house.from_string(Path(template).read_text()).render(style=Markup(_STYLE.read_text()), **values)
