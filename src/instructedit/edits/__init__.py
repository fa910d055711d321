"""What an edit is: values that change the outputs of a model's sites. Knows no model."""

from instructedit.edits.base import Edit, load_edit
from instructedit.edits.low_rank import Factors, LowRankEdit, stack
from instructedit.edits.nothing import NoEdit

__all__ = ["Edit", "Factors", "LowRankEdit", "NoEdit", "load_edit", "stack"]
