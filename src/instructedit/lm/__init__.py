"""The frozen LM: loading, edit sites, layer gradients, edits applied row by row, prefix cache, generation, merging."""

from instructedit.lm.capture import LayerGradients, LayerIO
from instructedit.lm.frozen import FrozenLM
from instructedit.lm.reading import Loading
from instructedit.lm.scores import TokenScores
from instructedit.lm.sites import Site
from instructedit.lm.text import Text
from instructedit.lm.tokens import IGNORE, TokenBatch
from instructedit.renamed import Renamed, renamed_names

__all__ = ["IGNORE", "FrozenLM", "LayerGradients", "LayerIO", "Loading", "Site", "Text", "TokenBatch", "TokenScores"]

Renamed.keep(
    FrozenLM,
    words="token_ids", observe="record_activations", query="context.scope_embedding",
    prefix="prefixes.of", takes_trees="prefixes.takes_trees", beginnings="prefixes.prompt_prefixes",
    judged="scores.token_scores", unedited_judged="scores.unedited_predictions", read="scores.chunked_logits",
    unedited_states="scores.unedited_states", states="scores.states", predictions="scores.predictions",
    head="forward.head", blocks="forward.blocks", block_name="forward.block_name", width="applied.sites.width",
    checkpoint="forward.activation_checkpointing", decoder="generation.decoder", row_tokens="generation.row_tokens",
    decodes_trees="generation.shares_prompts",
)  # fmt: skip
Renamed.keep(Text, words="token_ids")
Renamed.keep(TokenScores, said="predicted")
Renamed.keep(LayerGradients, said="predicted")
__getattr__ = renamed_names(__name__, Captured=LayerGradients, Seen=LayerIO, Judged=TokenScores)
