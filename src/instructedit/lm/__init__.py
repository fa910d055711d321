"""The frozen LM: loading, edit sites, capture of (u, δ), edits applied row by row, prefix and suffix, merging."""

from instructedit.lm.capture import LayerGradients, LayerIO
from instructedit.lm.frozen import FrozenLM
from instructedit.lm.reading import Loading
from instructedit.lm.scores import TokenScores
from instructedit.lm.sites import Site
from instructedit.lm.text import Text
from instructedit.lm.tokens import IGNORE, TokenBatch

__all__ = ["IGNORE", "LayerGradients", "FrozenLM", "TokenScores", "Loading", "Seen", "Site", "Text", "TokenBatch"]
