"""The frozen LM: loading, edit sites, capture of (u, δ), edits worn row by row, prefix and suffix, merging."""

from instructedit.lm.frozen import Captured, FrozenLM, Judged, Seen
from instructedit.lm.sites import Site
from instructedit.lm.text import Text
from instructedit.lm.tokens import IGNORE, TokenBatch

__all__ = ["IGNORE", "Captured", "FrozenLM", "Judged", "Seen", "Site", "Text", "TokenBatch"]
