"""Show versions, the machine, and the folders and variables that the program uses: what a bug report needs."""

from __future__ import annotations


def main() -> None:
    """Prints software versions, the device, threads, folders and the variables that are set, one a line."""
    import os

    import torch

    from instructedit.paths import SHARED, cache_folder
    from instructedit.provenance import provenance

    facts = provenance() | {
        "threads": str(torch.get_num_threads()),
        "configs": str(SHARED / "configs"),
        "cache": str(cache_folder()),
    }
    facts |= {name: value for name, value in sorted(os.environ.items()) if name.startswith("INSTRUCTEDIT_")}
    width = max(map(len, facts))
    for name, value in facts.items():
        print(f"{name:<{width}}  {value}")
