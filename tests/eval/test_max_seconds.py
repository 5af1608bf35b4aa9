"""``data.max_seconds`` reaches every loader that reads clips."""

import gzip

import pytest

from bat.cli import probe
from bat.train.pretrain_data import open_stream


@pytest.mark.parametrize("packed", [False, True])
def test_pretraining__max_seconds_reaches_the_loader(small, tmp_path, packed) -> None:
    words = ["data.max_seconds=77.5"]
    if packed:
        (tmp_path / "a.tar.gz").write_bytes(gzip.compress(bytes(1024)))
        words.append(f"data.shards={tmp_path}")
    stream = open_stream(small(*words, out=tmp_path / "run")).data
    assert stream.train_dataloader().dataset.max_seconds == 77.5


def test_probing__longer_clips_are_unreadable(tmp_path, capsys) -> None:
    words = ["recipe=toy", "checkpoint=random", "data.max_seconds=0.5", f"data.cache={tmp_path}"]
    assert probe.main([*words, "data.workers=0", "--dry-run"]) == 2
    assert "can be read" in capsys.readouterr().err
