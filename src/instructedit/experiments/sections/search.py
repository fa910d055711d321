"""The trials of a search, the effect of each option, and the best options, ready for use."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar

from instructedit.experiments.results import Results
from instructedit.experiments.sections.base import Panel, Section

if TYPE_CHECKING:
    from instructedit.experiments.spec import Search


class SearchSection(Section):
    """Section on a search: the best options, a table of trials, and a figure of the options' effects."""

    name: ClassVar[str] = "search"

    def show(self, results: Results) -> Iterator[Panel]:
        """Yields the best options, trials and effects, or nothing for a grid without a search."""
        from instructedit.analysis.figures import parameter_effects
        from instructedit.experiments.search import best_config, best_options

        search, trials = results.grid.search, results.trials
        if search is None or trials is None:
            return
        parameters = list(search.parameters)
        options = best_options(trials, parameters)
        command = shlex.join(["instructedit", "experiment", results.name, "--scale", results.scale.option])
        command += f" --overrides {shlex.quote(json.dumps(options))}"
        yield Panel(
            "best",
            f"Best options for {search.base}",
            f"The trial with the highest {search.metric}. As a config file: best.yaml.",
            markdown=_fenced(" ".join(options)) + "\nThis experiment with them:\n\n" + _fenced(command),
            terminal=f"best options ({search.metric}): {' '.join(options)}",
            files={"best.yaml": best_config(options)},
        )
        # A column of the table's file has one type.
        mixed = [option for option in parameters if trials[option].map(type).nunique() > 1]
        listed = trials.assign(**{option: trials[option].map(str) for option in mixed})
        yield Panel("trials", "Trials", _note(search, trials["state"].value_counts().to_dict()), frame=listed)
        yield Panel(
            "effects",
            "What each option does",
            "Each dot is a trial; the line joins the means of the trials that came to an end.",
            figure=parameter_effects(trials, parameters, search.metric),
        )


def _fenced(text: str) -> str:
    return f"```\n{text}\n```\n"


def _note(search: Search, states: dict[str, int]) -> str:
    counts = ", ".join(f"{count} {state}" for state, count in states.items())
    pruned = "; one below the median of the others at the same step is stopped" if search.pruner == "median" else ""
    return (
        f"{counts}. Each trial is one fit of {search.base}, scored by its best {search.metric} on validation records; "
        f"test records are not touched{pruned}."
    )
