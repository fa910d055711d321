"""The frozen LM: loading, edit sites, capture of (u, δ), edits worn row by row, prefix and suffix, merging."""

from instructedit.lm.capture import Captured, Seen
from instructedit.lm.frozen import FrozenLM
from instructedit.lm.reading import Loading
from instructedit.lm.scores import Judged
from instructedit.lm.sites import Site
from instructedit.lm.text import Text
from instructedit.lm.tokens import IGNORE, TokenBatch

__all__ = ["IGNORE", "Captured", "FrozenLM", "Judged", "Loading", "Seen", "Site", "Text", "TokenBatch"]
