"""Which architectures can be edited, as found on a tiny random model of each causal LM that transformers knows.

``architectures.yaml`` holds what was found; tests find it again on the installed transformers, with every promise that
an edit makes. The engine itself never reads it: it looks at the model in hand.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

FILE = Path(__file__).with_suffix(".yaml")
#: What a row of the table may say.
STATUS = ("supported", "dense blocks only", "refused", "not tried")


@dataclass(frozen=True)
class Architecture:
    """What is known of one architecture.

    Attributes:
        name: As transformers names it (``model_type``).
        model: The class of its causal LM.
        blocks: Module name of the list of its blocks.
        sites: Names of the feed-forward matrices within a block.
        experts: Module that holds the routed experts of the blocks that have such (they cannot be edited).
        refused: Why it cannot be edited.
        not_tried: Why no tiny model of it could be made.
    """

    name: str
    model: str
    blocks: str = ""
    sites: tuple[str, ...] = ()
    experts: str = ""
    refused: str = ""
    not_tried: str = ""

    @property
    def status(self) -> str:
        """One of `STATUS`."""
        if self.not_tried:
            return STATUS[3]
        if self.refused or not self.sites:
            return STATUS[2]
        return STATUS[1] if self.experts else STATUS[0]

    @property
    def remark(self) -> str:
        """What is edited, or why nothing is."""
        if self.sites:
            named = ", ".join(f"{self.blocks}.N.{site}" for site in self.sites)
            return named + (f" (blocks with routed experts in {self.experts} are refused)" if self.experts else "")
        return self.not_tried or self.refused or f"routed experts in every block ({self.experts})"


def architectures() -> dict[str, Architecture]:
    """Everything that is known, by name."""
    rows: dict[str, dict[str, Any]] = yaml.safe_load(FILE.read_text())
    return {name: Architecture(name, **row | {"sites": tuple(row.get("sites", ()))}) for name, row in rows.items()}


def markdown() -> str:
    """The page that shows it."""
    known = architectures().values()
    counts = ", ".join(f"{sum(a.status == status for a in known)} {status}" for status in STATUS)
    rows = [f"| `{a.name}` | {a.model} | {a.status} | {a.remark} |" for a in known]
    return "\n".join([_HEAD.format(counts=counts), *rows]) + "\n"


_HEAD = """# Architectures

Every causal LM that transformers knows, tried on a tiny random model of each: {counts}.
The edit sites are the feed-forward matrices of the language tower's blocks (N). This page is made from
`src/instructedit/lm/architectures.yaml` by `python -m tests.lm.architectures.survey`; the tests compare both with what
they find. An architecture that is not listed is looked at in the same way when it is loaded.

| name | class | status | what is edited, or why nothing is |
| --- | --- | --- | --- |"""
