"""Agreement on the host; children of Lightning's launcher leave quietly."""

import os

import pytest

from bat.train.ranks import LAUNCHER, Ranks, leave_quietly


def test_one_process_agrees_with_itself() -> None:
    ranks = Ranks()
    assert ranks.maximum([3, 1]) == [3, 1]
    assert ranks.total([0.5]) == [0.5]
    assert ranks.gather("x") == ["x"]


def test_only_a_child_of_the_launcher_leaves_quietly(monkeypatch: pytest.MonkeyPatch) -> None:
    leave_quietly()
    monkeypatch.setenv(LAUNCHER, str(os.getpid()))  # the launcher itself
    leave_quietly()
    monkeypatch.setenv(LAUNCHER, str(os.getppid()))
    with pytest.raises(SystemExit) as left:
        leave_quietly()
    assert left.value.code == 0
