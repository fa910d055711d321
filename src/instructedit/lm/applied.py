"""The edits that are applied to a model now, and the rows that they are applied to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from instructedit.edits import Edit, PromptEdit
from instructedit.errors import UserError
from instructedit.lm import hooks
from instructedit.lm.edit_sites import EditSites


class Applied:
    """Tracks the edits that are applied to a model now, and applies edits to it.

    Attributes:
        blocks: Lowest edited block of each edit that is applied to layers now; the number of blocks for an edit without
            sites.
        prompt_edit: The applied edit that depends on prompts, with the index of each row's edit; None without one.
    """

    def __init__(self, sites: EditSites) -> None:
        self.sites, self.forward = sites, sites.forward
        self.blocks: list[int] = []
        self.prompt_edit: tuple[PromptEdit, Tensor | None] | None = None

    def __bool__(self) -> bool:
        """True while an edit is applied."""
        return bool(self.layers) or self.prompt_edit is not None

    @property
    def layers(self) -> int:
        """Number of edits that are applied to the model's layers now."""
        return len(self.blocks)

    def reach_below(self, block: int) -> bool:
        """True if an edit that is applied to layers now may change the states that enter a block."""
        return any(lowest < block for lowest in self.blocks)

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        return self.forward.device

    @contextmanager
    def edited(self, edit: Edit | None, rows: Sequence[int] | Tensor | None = None) -> Iterator[None]:
        """Applies edits inside a ``with`` block, at layers or by the prompt (see `FrozenLM.edited`)."""
        index = self.named(edit, rows)
        if not isinstance(edit, PromptEdit):
            with self.at_layers(edit, index):
                yield
            return
        if self.prompt_edit is not None:
            raise UserError("an edit that depends on the prompt is applied already; join the two")
        self.prompt_edit = (edit, index)
        try:
            yield
        finally:
            self.prompt_edit = None

    @contextmanager
    def at_layers(self, edit: Edit | None, rows: Tensor | None) -> Iterator[None]:
        """Applies edits to the layers alone inside a ``with`` block."""
        changes = edit is not None and edit.sites
        lowest = self.sites.first_block(edit.sites) if edit is not None and changes else len(self.forward.blocks)
        _ = self.forward.outputs_of_a_block  # determined while no edit is applied
        with hooks.applied(self.forward.model, edit, rows):
            self.blocks.append(lowest)
            try:
                yield
            finally:
                self.blocks.pop()

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Makes the model the unedited one inside a ``with`` block, whatever is applied outside of it."""
        applied = self.blocks, self.prompt_edit
        self.blocks, self.prompt_edit = [], None
        try:
            with hooks.bare(self.forward.model.modules()):
                yield
        finally:
            self.blocks, self.prompt_edit = applied

    def index(self, edit: Edit, rows: Tensor | None, count: int) -> Tensor:
        """Returns the index of each row's edit, [rows]."""
        hooks.check_rows(edit, rows, count)
        return torch.arange(len(edit), device=self.device).expand(count) if rows is None else rows

    def named(self, edit: Edit | None, rows: Sequence[int] | Tensor | None) -> Tensor | None:
        """Moves a caller's index of each row's edit to the model's device; None stays None.

        Raises:
            UserError: If an index names no edit.
        """
        if rows is None:
            return None
        index = torch.as_tensor(rows)  # checked on its own device: an index on the host needs no device sync
        if edit is not None and not ((index >= 0) & (index < len(edit))).all():
            raise UserError(f"rows must name edits 0 to {len(edit) - 1}, got {index.tolist()}")
        return index.to(self.device)
