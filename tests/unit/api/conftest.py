"""What the tests of the API share."""

from __future__ import annotations

import pytest


@pytest.fixture
def fast_watch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Deadlines and workers are looked at often."""
    monkeypatch.setattr("api.core._WATCH_S", 0.01)
