"""Where a run comes from: versions, the commit, and no host's name."""

from __future__ import annotations

import platform
import re
import sys
from pathlib import Path

import pytest
import torch

import instructedit.provenance
from instructedit.provenance import provenance


def test_provenance_names_versions_and_no_host() -> None:
    facts = provenance()
    assert facts["python"] == platform.python_version()
    assert facts["torch"] == torch.__version__
    assert {"lightning", "transformers", "mlflow", "instructedit", "platform", "device"} <= facts.keys()
    assert re.fullmatch(r"[0-9a-f]{40}|unknown", facts["git.commit"])
    assert facts["git.dirty"] in {"true", "false", "unknown"}
    assert not platform.node() or platform.node() not in facts.values()


def test_provenance_of_the_pinned_versions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "constraints.txt").write_bytes(b"")
    assert provenance()["constraints"] == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


@pytest.mark.parametrize("where", ["no git", "no repository", "installed"])
def test_provenance_without_a_commit(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if where == "no git":
        monkeypatch.setenv("PATH", str(tmp_path))
    else:
        folder = tmp_path if where == "no repository" else Path(sys.prefix, "site-packages", "instructedit")
        monkeypatch.setattr(instructedit.provenance, "_HERE", folder)
    facts = provenance()
    assert (facts["git.commit"], facts["git.dirty"]) == ("unknown", "unknown")
