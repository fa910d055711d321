"""The layers of a frozen model that edits may change, and the blocks that hold them."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from instructedit.errors import UserError
from instructedit.lm import hooks, tryout
from instructedit.lm.forward import Forward
from instructedit.lm.sites import (
    Layout,
    Site,
    find_layout,
    find_linear_layers,
    select_feed_forward,
    select_sites,
)


class EditSites:
    """Finds and chooses the edit sites of a model.

    Args:
        forward: The model's forward passes.
        name: Name of the model in messages.
    """

    def __init__(self, forward: Forward, name: str) -> None:
        self.forward = forward
        self.name = name

    @functools.cached_property
    def layout(self) -> Layout:
        """All edit sites and the blocks that hold them, found by trying the model out."""
        with hooks.bare(self.forward.model.modules()):
            layout = find_layout(self.forward.model)
            tryout.check(self.forward.model, self.forward.blocks, self.forward.head)
        return layout

    @functools.cached_property
    def sites(self) -> tuple[Site, ...]:
        """All edit sites, from the bottom up."""
        return self.layout.sites

    @property
    def width(self) -> int:
        """Size of the hidden states between blocks (the embedding may be narrower)."""
        return self.layout.width

    def select(
        self, names: Sequence[str] | None = None, blocks: Sequence[int] | None = None, every: bool = False
    ) -> tuple[Site, ...]:
        """Chooses the edit sites that match module names or patterns, and block numbers (see `select_sites`).

        Args:
            names: Names or patterns.
            blocks: Block numbers.
            every: Choose among all linear layers of the blocks, not only those of MLPs.

        Raises:
            UserError: If a name or a block matches nothing, or a chosen block's experts are routed.
        """
        if every:
            return select_sites(
                find_linear_layers(self.forward.model, self.width), names, blocks, len(self.forward.blocks)
            )
        return select_feed_forward(self.layout, names, blocks, len(self.forward.blocks))

    def first_block(self, sites: Sequence[str]) -> int:
        """Finds the lowest block that holds one of the sites (0 without any): everything below it is the prefix.

        Raises:
            UserError: If a name is neither a block nor a module within one.
        """
        if unknown := [s for s in sites if s not in self._block_of]:
            raise UserError(f"{self.name} has no edit site {unknown[0]!r}; its last one is {self.sites[-1].name!r}")
        return min((self._block_of[s] for s in sites), default=0)

    @functools.cached_property
    def _block_of(self) -> dict[str, int]:
        """Block number of each block and of every module within one, by module name."""
        blocks = [(i, self.forward.block_name(i), block) for i, block in enumerate(self.forward.blocks)]
        return {f"{n}.{part}".rstrip("."): i for i, n, block in blocks for part, _ in block.named_modules()}
