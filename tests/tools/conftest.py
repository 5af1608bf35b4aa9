"""No time is judged here."""

from __future__ import annotations

import gc

import pytest


@pytest.fixture(autouse=True)
def _no_collections(monkeypatch: pytest.MonkeyPatch) -> None:
    """The benchmarks collect garbage before each call: over all that tests import, 0.4 s a time."""
    monkeypatch.setattr(gc, "collect", lambda *generation: 0)
