"""The prefix cache: hidden states below the first edited block, which no edit ever changes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor

from instructedit.lm.tokens import TokenBatch


class PrefixCache:
    """Hidden states by token row, the least recently used thrown out first.

    Causal attention makes a row's states independent of what stands beside or after it, so a row is computed once
    whatever batch it comes in.

    Args:
        max_bytes: Room for the states; 0 keeps nothing.
    """

    def __init__(self, max_bytes: int = 2 << 30) -> None:
        self.max_bytes = max_bytes
        self.bytes = 0
        self.hits = 0
        self.misses = 0
        self._rows: OrderedDict[tuple[int, bytes], Tensor] = OrderedDict()

    def __len__(self) -> int:
        return len(self._rows)

    def clear(self) -> None:
        """Forgets everything."""
        self._rows.clear()
        self.bytes = 0

    def states(self, batch: TokenBatch, block: int, compute: Callable[[TokenBatch], Tensor]) -> Tensor:
        """The hidden states that enter a block.

        Args:
            batch: Rows of tokens.
            block: Number of the block.
            compute: Gives the states of a batch, [rows, seq, hidden]; called for the rows that are not cached.

        Returns:
            [rows, seq, hidden]; padding positions hold zeros or the states of padding, which nothing attends to.
        """
        if not self.max_bytes:
            return compute(batch)
        lengths = batch.attention_mask.sum(-1).tolist()
        ids = batch.input_ids.cpu().numpy()
        keys = [(block, ids[i, :size].tobytes()) for i, size in enumerate(lengths)]
        missing = list({key: i for i, key in enumerate(keys) if key not in self._rows}.values())
        self.hits += len(keys) - len(missing)
        self.misses += len(missing)
        fresh: dict[tuple[int, bytes], Tensor] = {}
        if missing:
            width = max(lengths[i] for i in missing)
            part = TokenBatch(
                batch.input_ids[missing, :width], batch.attention_mask[missing, :width], batch.labels[missing, :width]
            )
            states = compute(part)
            fresh = {keys[i]: row[: lengths[i]].clone() for i, row in zip(missing, states, strict=True)}
        rows = [fresh[key] if key in fresh else self._rows[key] for key in keys]
        self._keep(keys, fresh)
        padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        return torch.nn.functional.pad(padded, (0, 0, 0, batch.input_ids.shape[1] - padded.shape[1]))

    def _keep(self, used: list[tuple[int, bytes]], fresh: dict[tuple[int, bytes], Tensor]) -> None:
        for key, row in fresh.items():
            self._rows[key] = row
            self.bytes += row.nbytes
        for key in used:
            self._rows.move_to_end(key)
        while self.bytes > self.max_bytes:
            _, row = self._rows.popitem(last=False)
            self.bytes -= row.nbytes
