"""A fit that is killed again and again gives what it gives undisturbed; `make faults` does it a thousand times."""

from __future__ import annotations

import pytest
from tests.faults import harness


@pytest.mark.parametrize("kills", [1, 20])
def test_kills(tmp_path, kills, monkeypatch):
    from instructedit import stores
    from instructedit.lm.cache import partition

    for owner, name in ((stores, "make_database"), (partition, "SHARD_BYTES")):
        monkeypatch.setattr(owner, name, getattr(owner, name))  # what the harness sets is taken back
    assert harness.main(kills, 0, tmp_path).total() == kills
