"""Show versions, the machine, and the folders and variables that the program uses: what a bug report needs."""

from __future__ import annotations


def main(licences: bool = False) -> None:
    """Prints software versions, the device, threads, folders and the variables that are set, one per line.

    Args:
        licences: Print instead the installed packages with their versions and licences.
    """
    if licences:
        _licences()
        return
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


def _licences() -> None:
    """Prints one package per line, with its licence as the package itself names it."""
    from importlib.metadata import distributions

    for found in sorted(distributions(), key=lambda each: each.name.lower()):
        classified = [c.split(" :: ")[-1] for c in found.metadata.get_all("Classifier", []) if c.startswith("License")]
        own = {name: found.metadata[name] for name in ("License-Expression", "License") if name in found.metadata}
        said = own.get("License-Expression") or ", ".join(classified) or own.get("License") or "?"
        print(f"{found.name} {found.version}: {said.splitlines()[0]}")
