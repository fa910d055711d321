"""The evaluation loop, which edits, probes and scores; `test`, `evaluate` and every experiment use it."""

from instructedit.evaluation.runner import Outcome, Scores, Watcher, evaluate, evaluate_batch
from instructedit.evaluation.scoring import Row
from instructedit.evaluation.sequence import EditSequence, edit_sequence
from instructedit.evaluation.settings import Evaluation

__all__ = [
    "EditSequence", "Evaluation", "Outcome", "Row", "Scores", "Watcher", "edit_sequence", "evaluate", "evaluate_batch",
]  # fmt: skip
