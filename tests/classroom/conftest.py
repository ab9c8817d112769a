"""Keep the progress of whoever runs the tests out of them."""

import pytest


@pytest.fixture(autouse=True)
def own_progress(tmp_path, monkeypatch):
    monkeypatch.setenv("ANNOTATED_SRC_PROGRESS", str(tmp_path / "progress.json"))
