"""The model card of a saved editor: its purpose, scores and config, and how to load it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from instructedit.lm import FrozenLM
from instructedit.lm.pretrained import known

if TYPE_CHECKING:
    from pandas import DataFrame

#: Placeholder for a hub id, a folder or a run in the lines that load an editor.
HERE = "path/or/owner/name"


def model_card(lm: FrozenLM, name: str, options: Mapping[str, Any], results: DataFrame | None, place: str = "") -> str:
    """Writes a model card in the hub's Markdown format.

    Args:
        lm: The base model.
        name: Name of the editor's method.
        options: Its hyper-parameters.
        results: Its scores, from `Scores.summary` or a test run's table ``summary``; None if there are none.
        place: The source to load it from; a placeholder if empty.
    """
    return "\n".join([*_front(lm, results), *_body(lm, name, options, results, place or HERE), ""])


def _front(lm: FrozenLM, results: DataFrame | None) -> Iterator[str]:
    facts: dict[str, Any] = {"library_name": "instructedit", "tags": ["knowledge-editing"]}
    if lm.name.count("/") == 1 and not Path(lm.name).exists():  # a hub id
        facts["base_model"] = lm.name
    if results is not None:
        facts["metrics"] = sorted(set(results["metric"]))
    yield f"---\n{yaml.safe_dump(facts, sort_keys=False).strip()}\n---"


def _body(lm: FrozenLM, name: str, options: Mapping[str, Any], results: DataFrame | None, place: str) -> Iterator[str]:
    yield f"\n# {name} for {lm.name}\n"
    yield f"A knowledge editor for `{lm.name}`; the language model itself is not included.\n"
    base = known().get(lm.name)
    terms = f"{base.licence} ({base.licence_url}): {base.terms}" if base else "see where that model comes from"
    yield f"Licence of the base model: {terms}.\n"
    yield "```python\nimport instructedit as ie\n"
    yield f'lm = ie.FrozenLM.from_pretrained("{lm.name}")\neditor = ie.load_editor("{place}", lm)'
    yield 'edit = editor.edit([ie.EditRequest("The capital of France is", "Rome", task="counterfact")])\n```'
    if results is not None:
        tasks = ", ".join(dict.fromkeys(results["task"]))
        yield f"\n## Results\n\nTasks: {tasks}. × 100, with 95 % bootstrap intervals.\n"
        yield "| task | metric | mean | interval | n |\n| --- | --- | ---: | ---: | ---: |"
        for row in results.itertuples():
            ends = f"{row.low:.1f} to {row.high:.1f}" if not math.isnan(row.low) else "–"
            yield f"| {row.task} | {row.metric} | {row.mean:.1f} | {ends} | {row.n} |"
    yield f"\n## Config\n\n```yaml\n{yaml.safe_dump({name: dict(options)}, sort_keys=False).strip()}\n```"
