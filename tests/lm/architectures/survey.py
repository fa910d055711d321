"""Finds out what can be edited in each architecture; ``python -m tests.lm.architectures.survey`` writes it down."""

from pathlib import Path

import yaml
from tests.lm.architectures.tiny import CLASSES, NAMES, NOT_TRIED, tiny_lm

from instructedit.errors import UserError
from instructedit.lm.architectures import FILE, markdown

PAGE = Path("docs/architectures.md")
HEAD = """# What can be edited in each causal LM that transformers knows (see architectures.py). Written by
# python -m tests.lm.architectures.survey; it is what the engine finds; tests compare it with transformers' own
# plans of tensor parallelism where there are any. Look at the difference before you commit a new version.
"""


def found(name, lm):
    """The row of one architecture."""
    row = {"model": CLASSES[name]}
    try:
        layout = lm.applied.sites.layout
    except UserError as refusal:
        return row | {"refused": str(refusal).partition(": ")[2]}
    prefix = lm.forward.block_name(0).removesuffix(".0")
    row["blocks"] = prefix
    by_block = {}
    for site in layout.sites:
        by_block.setdefault(site.block, []).append(site.name.removeprefix(f"{prefix}.{site.block}."))
    if by_block:
        assert len({tuple(names) for names in by_block.values()}) == 1, f"{name}: blocks differ: {by_block}"
        row["sites"] = next(iter(by_block.values()))
    if layout.routed:
        row["experts"] = next(module.removeprefix(f"{prefix}.{i}.") for i, module in layout.routed.items())
    return row


def main():
    rows = {name: {"model": CLASSES[name], "not_tried": why} for name, why in NOT_TRIED.items()}
    rows |= {name: found(name, tiny_lm(name)) for name in NAMES}
    FILE.write_text(
        HEAD + yaml.safe_dump(dict(sorted(rows.items())), sort_keys=False, width=120, default_flow_style=None)
    )
    PAGE.write_text(markdown())


if __name__ == "__main__":
    main()
