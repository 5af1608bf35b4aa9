"""Fixtures that tests of evaluation share: a toy index, a narrow encoder, its export."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from bat.data.index import Index, open_index
from bat.encoders.bat import BAT
from bat.eval.features import FeatureBank
from bat.types import Grid
from bat.weights import export
from tests.toy import make_toy_shards

SECONDS = 0.3
"""Length of the clips of ``index``."""


def bank_of(
    patches: Tensor, cls: Tensor | None, targets: Tensor, ids: np.ndarray | None = None
) -> FeatureBank:
    """A bank of clips called by their numbers."""
    return FeatureBank(
        patches=patches,
        cls=cls,
        targets=targets,
        ids=np.arange(len(targets)) if ids is None else ids,
        keys=[str(i) for i in range(len(targets))],
        skipped={},
    )


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    return open_index(make_toy_shards(tmp_path_factory.mktemp("toy"), seconds=SECONDS))


@pytest.fixture(scope="module")
def backbone() -> BAT:
    torch.manual_seed(0)
    return BAT(width=16, depth=3, heads=2, grid=Grid(2, 8), drop_path=0.5).eval()


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The export of a narrow encoder with random weights."""
    torch.manual_seed(0)
    model = BAT(width=16, depth=2, heads=2, grid=Grid(8, 8))
    return export(
        tmp_path_factory.mktemp("run") / "export",
        backbone="bat",
        encoder=model.config(),
        weights={"student": model.state_dict()},
        meta={},
    )
