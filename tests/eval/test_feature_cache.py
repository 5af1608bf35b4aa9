"""Features in memory, on disk or made anew: the same training, and what may go wrong on a disk."""

import json
import logging
import os
import re
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock

from bat.config.probing import FeatureStore
from bat.data.bad_clips import BadClips
from bat.encoders.bat import BAT
from bat.errors import UserError
from bat.eval import feature_cache, feature_disk
from bat.eval.feature_cache import Opened, open_features, storage_for
from bat.eval.features import FeatureBank, FeatureStream
from bat.eval.loading import weights_digest
from bat.types import Grid, Needs
from tests.eval.conftest import SECONDS

GB = 1_000_000_000


@pytest.fixture
def get(backbone, index, tmp_path):
    """``get(cache, ...)`` opens the features of all ten clips."""

    def open_them(cache: str = "disk", **settings) -> Opened:
        store = {"cache": cache, "folder": str(tmp_path / "features")}
        store |= {k: settings.pop(k) for k in list(settings) if k in vars(FeatureStore())}
        ids, batch = settings.pop("ids", np.arange(len(index))), settings.pop("batch", 4)
        encoder, digest = settings.pop("encoder", backbone), settings.pop("digest", None)
        words = {"frames": 32, "clip_seconds": SECONDS, "bad_clips": BadClips(max_bad=0.5)}
        return open_features(
            FeatureStream(encoder, index, **words | settings),
            ids,
            batch=batch,
            store=FeatureStore(**store),
            digest=digest or weights_digest(backbone),
            progress=False,
        )

    return open_them


@pytest.fixture
def asleep(backbone, monkeypatch):
    """An encoder that must not run from here on."""

    def rest() -> None:
        def runs(*_, **__):
            raise AssertionError("the encoder ran")

        monkeypatch.setattr(backbone, "features", runs)

    return rest


def _folder(tmp_path: Path) -> Path:
    """The one cache that there is."""
    (found,) = (p for p in (tmp_path / "features").iterdir() if p.is_dir())
    return found


@pytest.mark.parametrize(
    ("autocast", "needs"), [(None, Needs()), (torch.bfloat16, Needs()), (None, Needs("none"))]
)
def test_open_features__same_batches_from_memory_disk_and_stream(get, autocast, needs):
    opened = [get(cache, autocast=autocast, needs=needs) for cache in ("memory", "disk", "off")]
    assert [o.cache for o in opened] == ["memory", "disk", "off"]
    kinds = [type(o.source) for o in opened]
    assert kinds == [FeatureBank, FeatureBank, FeatureStream]
    assert len({o.gb for o in opened}) == 1
    ids = np.array([0, 3, 4, 6, 7, 8])
    for kind, words in (("training", {"steps": 3, "seed": 5}), ("once", {})):
        three = [getattr(o.source, kind)(ids, batch=4, **words) for o in opened]
        for (memory, a), (disk, b), (stream, c) in zip(*three, strict=True):
            assert torch.equal(a, b)
            assert torch.equal(a, c)
            assert torch.equal(memory.patches, disk.patches)
            assert torch.equal(memory.cls, disk.cls)
            # the encoder gets clips in other batches: bfloat16 splits by a last place
            near = 1e-4 if autocast is None else 0.03
            torch.testing.assert_close(stream.patches, memory.patches, atol=near, rtol=near)


def test_open_features__same_order_over_remote_shards(get, index, monkeypatch):
    sources = [get(cache).source for cache in ("memory", "disk", "off")]
    words = {"batch": 3, "steps": 4, "seed": 1}

    def order(source) -> torch.Tensor:
        batches = source.training(np.arange(10), **words)
        return torch.cat([features.cls[-1] for features, _ in batches])

    even = [order(source) for source in sources]
    monkeypatch.setattr(type(index), "remote", True)
    windowed = [order(source) for source in sources]
    for orders in (even, windowed):
        assert torch.equal(orders[0], orders[1])
        torch.testing.assert_close(orders[0], orders[2], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(even[0], windowed[0], atol=1e-2)


def test_open_features__size_is_that_of_the_files(get, index, tmp_path):
    opened = get("disk", needs=Needs("last", entry=True))
    files = {f.name: f.stat().st_size for f in _folder(tmp_path).glob("*.bin")}
    tokens, labels = 2 * 8 * 16 * 4, 10 * index.classes * 4
    assert files["patches.bin"] == files["entry.bin"] == 10 * tokens
    assert files["cls.bin"] == 10 * 3 * 16 * 4
    assert opened.gb == (2 * files["patches.bin"] + files["cls.bin"] + labels) / GB
    assert get("off", needs=Needs("last", entry=True)).gb == opened.gb
    assert get("off", needs=Needs("none")).gb == (files["cls.bin"] + labels) / GB


def test_disk__second_run_does_not_encode(get, asleep, caplog, tmp_path):
    first = get("disk")
    before = [f.stat().st_mtime_ns for f in sorted(_folder(tmp_path).iterdir())]
    asleep()
    caplog.set_level(logging.INFO, "bat")
    for cache in ("disk", "auto"):
        second = get(cache)
        assert (second.cache, second.gb) == ("disk", first.gb)
        assert str(_folder(tmp_path)) in second.why
        assert torch.equal(second.source.patches, first.source.patches)
        assert second.source.keys == first.source.keys
    assert "features of 10 clips" in caplog.text
    assert "checksums of 10 right" in caplog.text
    assert before == [f.stat().st_mtime_ns for f in sorted(_folder(tmp_path).iterdir())]
    assert {f.name for f in _folder(tmp_path).iterdir()} == {
        "patches.bin", "cls.bin", "meta.json"
    }  # fmt: skip


OTHER = {
    "weights": {"digest": "another"},
    "clips": {"ids": np.array([0, 1, 2, 3, 4, 5, 6, 7, 9, 8])},
    "frames": {"frames": 48},
    "seconds": {"clip_seconds": 0.25},
    "shortest": {"min_seconds": 0.1},
    "longest": {"max_seconds": 9.0},
    "type": {"autocast": torch.bfloat16},
    "needs": {"needs": Needs("last")},
    "entry": {"needs": Needs("all", entry=True)},
    "front end": {"encoder": BAT(width=16, depth=3, heads=2, grid=Grid(2, 8),
                                 frontend={"pad": "waveform"}).eval()},
}  # fmt: skip


class Asked(Exception):  # noqa: N818
    """For which folder."""


def test_disk__every_dependency_has_its_own_cache(get, index, monkeypatch):
    def ask(folder):
        raise Asked(folder.name)

    monkeypatch.setattr(feature_disk, "read", ask)

    def name(**words) -> str:
        with pytest.raises(Asked) as caught:
            get("disk", **words)
        return str(caught.value)

    names = {what: name(**words) for what, words in OTHER.items()}
    names["nothing"] = name()
    with monkeypatch.context() as patch:
        patch.setitem(vars(index), "hash", "another")
        names["data"] = name()
        patch.setattr(feature_cache, "__version__", "another")
        names["version"] = name()
    assert len(set(names.values())) == len(names) == len(OTHER) + 3
    alike = {"batch": 2, "memory_gb": 1.0, "workers": 1, "bad_clips": BadClips(max_bad=0.3)}
    assert name(**alike) == names["nothing"]


def _flip(path: Path, at: int = 100) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def _meta(folder: Path, **changes) -> None:
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps(meta | changes))


DAMAGE = {
    "patches.bin has 5000 bytes": lambda f: os.truncate(f / "patches.bin", 5000),
    "cls.bin": lambda f: (f / "cls.bin").unlink(),
    "clip 0 has another checksum": lambda f: _flip(f / "cls.bin"),
    "Unterminated": lambda f: os.truncate(f / "meta.json", 5),
    "float99": lambda f: _meta(f, dtype="float99"),
}


@pytest.mark.parametrize("said", DAMAGE)
def test_disk__damaged_cache_is_named_and_made_anew(get, asleep, tmp_path, caplog, said):
    wanted = get("disk").source
    wanted = (wanted.patches.clone(), wanted.cls.clone())
    DAMAGE[said](_folder(tmp_path))
    caplog.clear()
    found = get("disk").source
    (warning,) = (r.getMessage() for r in caplog.records if r.levelno == logging.WARNING)
    assert str(_folder(tmp_path)) in warning
    assert re.search(said, warning), warning
    assert torch.equal(found.patches, wanted[0])
    assert torch.equal(found.cls, wanted[1])
    asleep()
    assert get("disk").why.startswith("found")


def test_disk__sample_of_a_large_cache_is_checked(get, tmp_path, caplog, monkeypatch):
    get("disk")
    caplog.set_level(logging.INFO, "bat")
    monkeypatch.setattr(feature_disk, "CHECK_BYTES", 1)
    assert get("disk").why.startswith("found")
    told = [r.getMessage() for r in caplog.records if "checksums" in r.getMessage()]
    numbers = [int(re.findall(r"checksums of (\d+)", line)[0]) for line in told]
    assert 2 <= numbers[-1] <= 3  # the first, the last, one drawn
    _flip(_folder(tmp_path) / "patches.bin", -1)
    assert not get("disk").why.startswith("found")


def test_disk__reports_the_same_unreadable_clips(get, index, monkeypatch):
    read = index.read

    def broken(i):
        clip = read(i)
        return clip if i not in (2, 5) else replace(clip, data=b"nonsense")

    monkeypatch.setattr(index, "read", broken)
    runs = []
    for cache in ("memory", "disk", "disk"):
        bad = BadClips(max_bad=0.5)
        opened = get(cache, bad_clips=bad)
        runs.append((bad.state_dict(), opened.source.ids.tolist(), opened.source.skipped))
        wanted = np.stack([index.targets(i) for i in (0, 1, 3, 4, 6, 7, 8, 9)])
        assert torch.equal(opened.source.targets, torch.from_numpy(wanted))
    assert runs[0] == runs[1] == runs[2]
    assert runs[0][0]["seen"] == 10
    assert list(runs[0][0]["keys"]) == [index.key(2), index.key(5)]
    with pytest.raises(UserError, match=r"2 of 10 clips unreadable.*max_bad=0\.1"):
        get("disk", bad_clips=BadClips(max_bad=0.1))
    bad.seen = 90  # of another encoder: added up
    get("disk", bad_clips=bad)
    assert (bad.seen, bad.bad) == (100, 4)


def test_disk__frame_labels_are_not_cached(get):
    def labels(value):
        def targets_of(batch, time):
            assert batch.targets.shape == (len(batch.keys), 5)
            inside = torch.arange(time)[None] * 2560 < batch.lengths[:, None]
            made = torch.full((len(batch.keys), time, 5), value) * batch.positions[:, None, None]
            return made.where(inside[..., None], torch.nan)

        return targets_of

    words = {"frames": 64, "clip_seconds": 0.6}
    memory = get("memory", targets_of=labels(1.0), **words).source
    first = get("disk", targets_of=labels(1.0), **words).source
    again = get("disk", targets_of=labels(2.0), **words)
    assert again.why.startswith("found")
    assert memory.targets.shape == (10, 4, 5)
    assert memory.targets.isnan().sum() == 10 * 2 * 5
    assert torch.equal(memory.targets.nan_to_num(-1), first.targets.nan_to_num(-1))
    assert torch.equal(again.source.targets.nan_to_num(0), 2 * first.targets.nan_to_num(0))
    long = {"clip_seconds": 0.2}  # counted from the start of a clip that is cut
    begins = get("memory", **long).source.cls
    assert torch.equal(get("memory", targets_of=labels(1.0), **long).source.cls, begins)
    with pytest.raises(UserError, match=r"data\.roll=true moves the clips"):
        get("auto", targets_of=labels(1.0), roll=True)


def test_disk__full_disk_is_an_error_and_leaves_nothing(get, tmp_path, monkeypatch):
    opens = Path.open

    def full(path, *how, **words):
        return opens(Path("/dev/full") if path.name == "cls.bin" else path, *how, **words)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", full)
        with pytest.raises(UserError, match=r"the disk is full .*features\.cache=off"):
            get("disk")
    assert not [p for p in (tmp_path / "features").iterdir() if p.is_dir()]
    assert get("disk").cache == "disk"


def test_disk__interruption_leaves_nothing(get, tmp_path, backbone, monkeypatch):
    features, calls = backbone.features, []

    def interrupted(spectrogram):
        calls.append(len(spectrogram))
        if len(calls) == 3:  # a clip to measure, a batch, a batch
            raise KeyboardInterrupt
        return features(spectrogram)

    monkeypatch.setattr(backbone, "features", interrupted)
    with pytest.raises(KeyboardInterrupt):
        get("disk")
    assert calls == [1, 4, 4]
    assert not [p for p in (tmp_path / "features").iterdir() if p.is_dir()]


def test_disk__unwritable_folder_is_an_error(get, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="nothing can be written there"):
        get("disk", folder=str(tmp_path / "file" / "features"))


def test_disk__leftovers_of_dead_processes_are_removed(get, tmp_path):
    root = tmp_path / "features"
    dead, living, other = root / "dead.part", root / "living.part", root / "mine"
    for folder in (dead, living, other):
        folder.mkdir(parents=True)
        (folder / "patches.bin").write_bytes(b"half made")
    with FileLock(root / "living.lock"):
        get("disk")
    assert not dead.exists()
    assert (living / "patches.bin").exists()
    assert (other / "patches.bin").exists()


def test_disk__waits_for_another_process(get, tmp_path, caplog):
    get("disk")
    folder = _folder(tmp_path)
    made = folder.rename(tmp_path / "made")
    held = threading.Event()

    def make() -> None:
        with FileLock(folder.with_suffix(".lock")):
            held.set()
            while "waiting" not in caplog.text:
                time.sleep(0.05)
            made.rename(folder)

    caplog.set_level(logging.INFO, "bat")
    caplog.clear()
    threading.Thread(target=make).start()
    held.wait()
    assert get("disk").cache == "disk"
    said = [r.getMessage() for r in caplog.records]
    assert sum("waiting" in line for line in said) == 1
    assert not any(line.startswith("all features in") for line in said)  # made by the other


def test_disk__readers_keep_their_mapping(get, tmp_path):
    reader = get("disk").source
    wanted = reader.patches.clone()
    file = _folder(tmp_path) / "patches.bin"
    mapped = file.stat().st_ino  # still in use: no new file can have it
    _flip(_folder(tmp_path) / "cls.bin", 3)
    get("disk")
    assert file.stat().st_ino != mapped  # never written over: a shortened mapping kills its reader
    assert torch.equal(reader.patches, wanted)


def _where(cache: str, gb: float, *, on_gpu=False, free=1000, moving="", **budgets):
    store = FeatureStore(cache=cache, **budgets)
    each = int(gb * GB / 100)
    return storage_for(store, clips=100, each=each, moving=moving, on_gpu=on_gpu, free=free * GB)


@pytest.mark.parametrize(
    ("cache", "gb", "words", "where", "why"),
    [
        ("auto", 4, {}, "memory", "4 GB fit features.memory_gb=4"),
        ("auto", 4, {"on_gpu": True}, "memory", "fit"),
        ("auto", 4.1, {}, "disk", "4.1 GB .*more than features.memory_gb=4"),
        ("auto", 4.1, {"on_gpu": True}, "off", "GPU makes them faster .*features.memory_gb"),
        ("auto", 50.1, {}, "off", "more than features.disk_gb=50"),
        ("auto", 20, {"free": 19}, "off", "only 19 GB are free"),
        ("auto", 1, {"moving": "data.roll=true"}, "off", "data.roll=true: the clips differ"),
        ("off", 1, {}, "off", "features.cache=off"),
        ("memory", 4, {}, "memory", "fit"),
        ("disk", 1, {"free": 1}, "disk", "features.cache=disk"),
        ("disk", 1, {"on_gpu": True}, "disk", "features.cache=disk"),
    ],
)
def test_storage_for__decides_by_size(cache, gb, words, where, why):
    found, said = _where(cache, gb, **words)
    assert found == where
    assert re.search(why, said), said


@pytest.mark.parametrize(
    ("cache", "gb", "words", "said"),
    [
        (
            "memory",
            9.4,
            {},
            r"100 clips need 9\.4 GB \(94 MB a clip\), more than .*memory_gb=4.*auto",
        ),
        ("disk", 60, {}, r"60 GB .*more than features\.disk_gb=50.*Raise features\.disk_gb"),
        ("disk", 20, {"free": 19}, r"only 19 GB are free in features\.folder=runs/features"),
        ("disk", 1, {"moving": "pad_offset=random"}, "features.cache=disk with pad_offset=random"),
        ("memory", 1, {"moving": "data.roll=true"}, "features.cache=memory with data.roll=true"),
    ],
)
def test_storage_for__impossible_cache_is_an_error(cache, gb, words, said):
    with pytest.raises(UserError, match=said):
        _where(cache, gb, **words)


def test_open_features__respects_budgets(get):
    assert get("auto").cache == "memory"
    assert get("auto", memory_gb=0.0, disk_gb=0.0).cache == "off"
    with pytest.raises(UserError, match="memory_gb=1e-06"):
        get("memory", memory_gb=1e-6)
    assert get("auto", memory_gb=1e-6).cache == "disk"
