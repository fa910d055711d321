"""What tests of editors share."""

import pytest


@pytest.fixture(scope="module")
def covariance_folder(tmp_path_factory):
    """A cache folder of the test module's own."""
    return tmp_path_factory.mktemp("covariances")


@pytest.fixture
def kept_covariances(covariance_folder, monkeypatch):
    """Covariances are computed once for the module's tests."""
    monkeypatch.setenv("INSTRUCTEDIT_CACHE", str(covariance_folder))
