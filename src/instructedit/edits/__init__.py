"""Edits: values that change the outputs of a model's sites, independent of any model."""

from instructedit.edits.adding import add, to_dense
from instructedit.edits.base import ADAPTER, Edit, load_edit
from instructedit.edits.by_prompt import PromptEdit
from instructedit.edits.codebook import CodebookEdit
from instructedit.edits.context import ContextEdit
from instructedit.edits.dense import DenseEdit
from instructedit.edits.gates import Gate, MatchGate, Prompts
from instructedit.edits.identity import IdentityEdit
from instructedit.edits.low_rank import Factors, LowRankEdit, stack
from instructedit.edits.scoped import ScopedEdit
from instructedit.edits.slots import SlotEdit, Slots
from instructedit.renamed import renamed_names

__all__ = [
    "ADAPTER", "CodebookEdit", "ContextEdit", "DenseEdit", "Edit", "Factors", "Gate", "IdentityEdit", "LowRankEdit",
    "MatchGate", "PromptEdit", "Prompts", "ScopedEdit", "SlotEdit", "Slots", "add", "load_edit", "stack", "to_dense",
]  # fmt: skip

__getattr__ = renamed_names(__name__, NoEdit=IdentityEdit)
