"""A table of the editable architectures, found on a tiny random model of each causal LM that transformers knows.

``architectures.yaml`` holds the results; tests reproduce them on the installed transformers, together with every
guarantee that an edit gives. The engine itself never reads the table: it inspects the model that is loaded.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

FILE = Path(__file__).with_suffix(".yaml")
#: Possible statuses of an architecture in the table.
STATUS = ("supported", "dense blocks only", "refused", "not tried")


@dataclass(frozen=True)
class Architecture:
    """One architecture: its names in transformers, and whether it can be edited.

    Attributes:
        name: Its name in transformers (``model_type``).
        model: The class of its causal LM.
        blocks: Module name of the list of its blocks.
        sites: Names of the feed-forward matrices within a block.
        experts: Module that holds the routed experts, in blocks that have some (these blocks cannot be edited).
        refused: Reason why it cannot be edited.
        not_tried: Reason why no tiny model of it could be made.
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
        """Status of the architecture, one of `STATUS`."""
        if self.not_tried:
            return STATUS[3]
        if self.refused or not self.sites:
            return STATUS[2]
        return STATUS[1] if self.experts else STATUS[0]

    @property
    def remark(self) -> str:
        """Names of the edited matrices, or the reason why there are none."""
        if self.sites:
            named = ", ".join(f"{self.blocks}.N.{site}" for site in self.sites)
            return named + (f" (blocks with routed experts in {self.experts} are refused)" if self.experts else "")
        return self.not_tried or self.refused or f"routed experts in every block ({self.experts})"


def architectures() -> dict[str, Architecture]:
    """Returns all known architectures by name."""
    rows: dict[str, dict[str, Any]] = yaml.safe_load(FILE.read_text())
    return {name: Architecture(name, **row | {"sites": tuple(row.get("sites", ()))}) for name, row in rows.items()}


def markdown() -> str:
    """Renders the table as a Markdown page."""
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
