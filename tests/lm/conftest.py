"""What tests of the LM share."""

import pytest


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """Covariances are kept here."""
    monkeypatch.setenv("INSTRUCTEDIT_CACHE", str(tmp_path / "cache"))
