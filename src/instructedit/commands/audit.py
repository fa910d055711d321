"""Check whether a run's results still follow from what it logged, its editor and its data."""

from __future__ import annotations

POSITIONAL = True


def main(run: str, root: str = "mlruns") -> None:
    """Recomputes the tables of a run, and compares its editor and its data with the files as they are now.

    Prints a line for each check. The exit status is 1 if something differs.

    Args:
        run: Id of a run of `test`, or of an experiment's row; or its name.
        root: Folder of the store.
    """
    from instructedit.audit import audit

    findings = audit(run, root)
    for finding in findings:
        print(finding)
    differing = sum(not finding.agrees for finding in findings)
    print(f"{len(findings)} things looked at, {differing or 'nothing'} {'differ' if differing > 1 else 'differs'}")
    if differing:
        raise SystemExit(1)
