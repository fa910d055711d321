"""Statistics of the datasets (Table 5): numbers of records, edits, probes and tokens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from instructedit.records import KINDS, EditRecord

if TYPE_CHECKING:
    import pandas as pd

#: Kinds of probes to count; the request itself is the reliability probe, and no dataset has neighborhood probes.
PROBES = tuple(kind for kind in KINDS if kind not in ("reliability", "neighborhood"))


def dataset_statistics(
    records: Mapping[tuple[str, str], Sequence[EditRecord]], tokens: Callable[[str], int]
) -> pd.DataFrame:
    """Counts the records, edits, probes and tokens of each task and split.

    Args:
        records: (task, split) to the edit records.
        tokens: Counts the tokens of a text.

    Returns:
        One row for each task and split: ``task, split, records, edits``, a column with the number of probes of each
        kind, and the tokens of a request (prompt and target): ``tokens`` on average and ``longest``. A record of the
        dataset may give several edits (ConvSent: the cases of a topic); probes that they share count once.
    """
    import pandas as pd

    rows = []
    for (task, split), own in records.items():
        probes: Counter[str] = Counter(
            probe.kind for _, probe in {(r.cluster, probe) for r in own for probe in r.probes}
        )
        lengths = [tokens(f"{r.request.prompt} {r.request.target}") for r in own]
        counts = [len({r.cluster for r in own}), len(own), *(probes[kind] for kind in PROBES)]
        rows.append((task, split, *counts, sum(lengths) / len(lengths), max(lengths)))
    return pd.DataFrame(rows, columns=["task", "split", "records", "edits", *PROBES, "tokens", "longest"])
