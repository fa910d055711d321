"""The search of a grid: each trial is one fit with other options, scored on validation records alone."""

from __future__ import annotations

import gc
import json
import random
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any

import yaml

from instructedit.console import console, report_error
from instructedit.errors import UserError
from instructedit.experiments.fingerprint import fingerprint
from instructedit.locks import one_at_a_time
from instructedit.stores import database_uri

if TYPE_CHECKING:
    from optuna import Study, Trial
    from optuna.trial import FrozenTrial
    from pandas import DataFrame

    from instructedit.experiments.plan import Plan
    from instructedit.experiments.spec import Search
    from instructedit.tracking import MLflowTracker

#: File in the store's folder with the trials so far, to resume an interrupted search.
DATABASE = "searches.db"

#: Lock file beside it, held while searching: a second process would mistake running trials for interrupted ones.
_LOCK = "searches.lock"

_ERROR, _STEPS, _RUN, _AGAIN = "error", "steps", "run_id", "run_again"  # attributes stored with a trial or its study
_WHOLE = {"COMPLETE": "complete", "PRUNED": "pruned"}


def search(experiment: Plan, parent: MLflowTracker) -> DataFrame:
    """Runs the trials that are not yet in the store.

    A trial that was killed or failed is run again, like a row; a failing trial does not stop the others.

    Returns:
        The trials as in `Results.trials`, the best first.

    Raises:
        UserError: If no trial was completed.
    """
    assert experiment.grid.search is not None
    searching = _Searching(experiment, experiment.grid.search, parent)
    root = experiment.root.expanduser().absolute()
    with one_at_a_time(root / _LOCK, f"another process searches in {experiment.root}: waiting until it is through"):
        return _searched(searching)


def _searched(searching: _Searching) -> DataFrame:
    study = searching.study()
    left = max(searching.search.count - sum(trial.state.name in _WHOLE for trial in study.trials), 0)
    console().rule(f"search: {left} of {searching.search.count} trials to run")
    study.optimize(searching.trial, n_trials=left, catch=(Exception,))
    table = _table(study, searching.search)
    if (table["state"] != "complete").all():
        reasons = [trial.user_attrs.get(_ERROR) for trial in study.trials]
        raise UserError(f"no trial of {len(table)} came to an end: {next(filter(None, reasons), 'all pruned')}")
    return table


def best_options(trials: DataFrame, parameters: list[str]) -> list[str]:
    """Returns the options of the best trial as command-line arguments."""
    best = trials[trials["state"] == "complete"].sort_values("score", ascending=False, kind="stable").iloc[0]
    return [f"{option}={_text(best[option])}" for option in parameters]


def best_config(options: list[str]) -> str:
    """Converts command-line options, such as those of `best_options`, to a config file."""
    config: dict[str, Any] = {}
    for option in options:
        path, _, value = option.removeprefix("--").partition("=")
        *parents, last = path.split(".")
        inner = config
        for key in parents:
            inner = inner.setdefault(key, {})
        inner[last] = _value(value)
    return yaml.safe_dump(config, sort_keys=False)


@dataclass(frozen=True)
class _Searching:
    experiment: Plan
    search: Search
    parent: MLflowTracker

    @property
    def arguments(self) -> list[str]:
        """Command-line arguments that all trials share."""
        return self.experiment.arguments(self.search.base, self.experiment.seeds[0])

    def study(self) -> Study:
        """Opens the study for this search, identified by a fingerprint, and queues its interrupted trials again."""
        import optuna
        from optuna.pruners import MedianPruner, NopPruner
        from optuna.samplers import TPESampler

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        choices = {option: [_choice(value) for value in values] for option, values in self.search.parameters.items()}
        asked = [self.search.metric, self.search.sampler, self.search.pruner, json.dumps(choices)]
        name = f"{self.experiment.name}/{self.experiment.scale.name}/{fingerprint([*self.arguments, *asked])}"
        storage = database_uri(self.experiment.root.expanduser().absolute() / DATABASE)
        if self.experiment.force and name in optuna.get_all_study_names(storage):
            optuna.delete_study(study_name=name, storage=storage)
        seed = self.experiment.seeds[0]
        study = optuna.create_study(
            study_name=name, storage=storage, direction="maximize", load_if_exists=True,
            pruner=MedianPruner(n_startup_trials=3) if self.search.pruner == "median" else NopPruner(),
        )  # fmt: skip
        study.sampler = TPESampler(seed=seed + len(study.trials))  # a resumed search must not repeat earlier draws
        _again(study)
        if self.search.sampler == "grid":
            # Queued here because optuna's own grid sampler counts a failed trial as done.
            every = [dict(zip(choices, values, strict=True)) for values in product(*choices.values())]
            for chosen in random.Random(seed).sample(every, len(every))[: self.search.count]:
                study.enqueue_trial(chosen, skip_if_exists=True)
        return study

    def trial(self, trial: Trial) -> float:
        """Runs one fit and returns its best validation score."""
        from optuna import TrialPruned

        from instructedit.callbacks.pruning import Pruning

        chosen = {
            option: trial.suggest_categorical(option, [_choice(value) for value in values])
            for option, values in self.search.parameters.items()
        }
        options = [f"{option}={_text(value)}" for option, value in chosen.items()]
        console().print(f"trial {trial.number}: {' '.join(options)}", highlight=False, markup=False)

        def report(value: float, step: int) -> bool:
            trial.report(value, step)
            trial.set_user_attr(_STEPS, step)
            return trial.should_prune()

        watch = Pruning(self.search.metric, report)
        try:
            run_id = self._fit(trial.number, options, watch)
            if watch.best == float("-inf"):
                raise UserError(f"its fit logged no {self.search.metric}: it ended before its first validation")
        except Exception as error:
            trial.set_user_attr(_ERROR, " ".join(str(error).split()))
            report_error(f"trial {trial.number}", error)
            raise
        trial.set_user_attr(_RUN, run_id)
        self.parent.experiment.log_metric(run_id, "search/score", watch.best)
        if watch.stopped:
            self.parent.experiment.set_tag(run_id, "search.pruned", "true")
            raise TrialPruned
        return watch.best

    def _fit(self, number: int, options: list[str], watch: Any) -> str:
        from instructedit.experiments.runner import logger_options
        from instructedit.lightning_cli import run

        gc.collect()
        here = self.experiment
        tags = {
            "experiment": here.name,
            "method": self.search.base,
            "scale": here.scale.name,
            "seed": str(here.seeds[0]),
        }
        tags |= {"search.trial": str(number)}
        tags |= {f"search.{name.lstrip('-')}": value for name, _, value in (each.partition("=") for each in options)}
        logger = logger_options(f"{here.name}/search/trial-{number}", tags, self.parent, here.root)
        trainer: Any = run([*self.arguments, *options, *logger, "--editor_model.log=false"], callbacks=[watch]).trainer
        return str(trainer.logger.run_id)


def _again(study: Study) -> None:
    """Queues trials again that failed, or that were running when the search was killed."""
    from optuna.trial import TrialState

    for trial in study.get_trials(states=[TrialState.RUNNING, TrialState.FAIL]):
        if trial.number in _replaced(study):
            continue
        if trial.state == TrialState.RUNNING:
            study.tell(trial.number, state=TrialState.FAIL)
        if trial.params:
            study.enqueue_trial(trial.params)
        study.set_user_attr(_AGAIN, [*_replaced(study), trial.number])


def _replaced(study: Study) -> list[int]:
    """Returns the numbers of the trials that were run again or are queued to be."""
    return list(study.user_attrs.get(_AGAIN, []))


def _table(study: Study, search: Search) -> DataFrame:
    import pandas as pd

    states = _WHOLE | {"FAIL": "failed"}
    again = _replaced(study)
    rows = [
        {"trial": trial.number}
        | {option: trial.params[option] for option in search.parameters}
        | {"score": _score(trial), "state": states[trial.state.name], "steps": trial.user_attrs.get(_STEPS)}
        | {"seconds": trial.duration.total_seconds() if trial.duration else None}
        | {"run_id": trial.user_attrs.get(_RUN), "reason": trial.user_attrs.get(_ERROR, "")}
        for trial in study.trials
        if trial.state.name in states and trial.number not in again
    ]
    frame = pd.DataFrame(rows)
    for option in search.parameters:  # as they were chosen: in a column of numbers None would be nan, and 8 be 8.0
        frame[option] = pd.Series([row[option] for row in rows], dtype=object)
    frame = frame.sort_values(["score", "trial"], ascending=[False, True], ignore_index=True)
    return frame if frame["reason"].any() else frame.drop(columns="reason")


def _score(trial: FrozenTrial) -> float | None:
    """Returns the best value of a trial so far, also of a pruned one."""
    return max([*trial.intermediate_values.values(), *([trial.value] if trial.value is not None else [])], default=None)


def _choice(value: Any) -> Any:
    """Converts a value to one that the study can store: plain values stay, others become JSON."""
    return value if value is None or isinstance(value, bool | int | float | str) else json.dumps(value)


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _text(value: Any) -> str:
    if hasattr(value, "item"):  # a numpy number from a table
        value = value.item()
    return value if isinstance(value, str) else json.dumps(value)
