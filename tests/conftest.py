"""Fixtures shared by all tests: where the golden vectors and the real data set lie, if they do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(autouse=True, scope="session")
def _threads() -> None:
    torch.set_num_threads(2)


@pytest.fixture(scope="session")
def golden() -> Path:
    """Folder of golden vectors; tests that need it skip where it is absent."""
    folder = SHARED / "golden"
    if not folder.is_dir():
        pytest.skip("the golden vectors (../shared/golden) are not on this machine")
    return folder


@pytest.fixture(scope="session")
def esc10() -> Path:
    """Folder of ESC-10; tests that need it skip where it is absent."""
    folder = SHARED / "data" / "esc10"
    if not folder.is_dir():
        pytest.skip("ESC-10 (../shared/data/esc10) is not on this machine")
    return folder
