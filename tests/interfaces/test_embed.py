"""Embeddings of files and arrays: values, order, windows, formats, resuming, bad input."""

import csv
import json

import numpy as np
import pytest
import soundfile
import torch

import bat
from bat.cli import embed as cli
from bat.data.parts import Part
from bat.encoders.bat import BAT
from bat.encoders.eat import EAT
from bat.errors import UserError
from bat.eval.heads import save_head
from bat.eval.loading import weights_digest
from bat.interfaces import parts
from bat.interfaces.embed import embed_files
from bat.probes.base import build_probe
from bat.shard.write import write_shards
from bat.tasks.base import Row
from bat.types import Grid
from bat.weights import export

RATE, D, L = 16_000, 16, 2
SECONDS = {"b/long": 5.0, "b/short": 0.3, "a": 1.0, "c": 1.9}
"""Recordings by name, in no order of length; the encoder takes 2.08 s at once."""
SORTED = ["a", "b/long", "b/short", "c"]


def _wave(seconds, seed=0, rate=RATE):
    noise = np.random.default_rng(seed).standard_normal(round(seconds * rate))
    return (0.1 * noise).astype(np.float32)


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    return BAT(width=D, depth=L, heads=2, grid=Grid(13, 8)).eval()


@pytest.fixture(scope="module")
def checkpoint(encoder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    weights = {"student": encoder.state_dict()}
    export(folder / "export", backbone="bat", encoder=encoder.config(), weights=weights, meta={})
    return folder


@pytest.fixture(scope="module")
def audio(tmp_path_factory):
    root = tmp_path_factory.mktemp("audio")
    for seed, (name, seconds) in enumerate(SECONDS.items()):
        file = root / f"{name}.wav"
        file.parent.mkdir(exist_ok=True)
        soundfile.write(file, _wave(seconds, seed), RATE, subtype="FLOAT")
    return root


@pytest.fixture
def run(checkpoint, audio):
    """``run(out, **settings)`` embeds the four recordings."""

    def call(out, paths=None, **settings):
        settings = {"checkpoint": checkpoint, "window": "whole", "batch": 2, **settings}
        embed_files([audio] if paths is None else paths, out, **settings)
        return np.load(out) if out.suffix == ".npz" and out.is_file() else None

    return call


def _names(held):
    names = [path.rpartition("audio0/")[2].removesuffix(".wav") for path in held["path"]]
    return [names[i] for i in held["recording"]]


def _reference(encoder, name, pool="cls"):
    """The embedding of one recording, by the encoder itself."""
    wave = torch.from_numpy(_wave(SECONDS[name], list(SECONDS).index(name)))
    with torch.no_grad():
        features = encoder(wave[None])
    return features.cls[:, 0] if pool == "cls" else features.patches[:, 0].mean((1, 2))  # (L, D)


@pytest.mark.parametrize(("pool", "layer"), [("cls", "last"), ("mean", "all"), ("cls", 1)])
def test_embed__equals_the_encoder_in_order(run, encoder, tmp_path, pool, layer):
    held = run(tmp_path / "e.npz", pool=pool, layer=layer, batch=4)
    assert _names(held) == SORTED
    assert held["start"].tolist() == [0] * 4
    assert held["end"].tolist() == [SECONDS[name] for name in SORTED]
    index = {"last": -1, "all": slice(None), 1: 0}[layer]
    for row, name in zip(held["embedding"], SORTED, strict=True):
        np.testing.assert_allclose(row, _reference(encoder, name, pool)[index], atol=1e-5)


def test_embed__frames_have_times_and_no_padding(run, encoder, audio, tmp_path):
    held = run(tmp_path / "f.npz", level="frame", batch=4)
    for i, name in enumerate(SORTED):
        mine = held["recording"] == i
        with torch.no_grad():
            wave = torch.from_numpy(soundfile.read(audio / f"{name}.wav", dtype="float32")[0])
            want = encoder(wave[None]).patches[-1, 0].mean(1)  # (T, D)
        np.testing.assert_allclose(held["embedding"][mine], want, atol=1e-5)
        start, end = held["start"][mine], held["end"][mine]
        np.testing.assert_allclose(start, np.arange(len(want)) * encoder.hop_seconds)
        np.testing.assert_allclose(end[:-1], start[1:])
        assert end[-1] <= SECONDS[name]


def test_embed__windows_cover_a_recording(run, encoder, audio, tmp_path):
    held = run(tmp_path / "w.npz", [audio / "b/long.wav", audio / "a.wav"], window=2.0, hop=1.5)
    assert held["recording"].tolist() == [0, 0, 0, 1]
    assert held["start"].tolist() == [0, 1.5, 3.0, 0]
    assert held["end"].tolist() == [2, 3.5, 5.0, 1]
    wave = torch.from_numpy(soundfile.read(audio / "b/long.wav", dtype="float32")[0])
    with torch.no_grad():
        want = encoder(wave[None, 24_000:56_000]).cls[-1, 0]
    np.testing.assert_allclose(held["embedding"][1], want, atol=1e-5)
    for window, ends in ((4.9, [4.9]), (4.8, [4.8, 5.0])):  # a rest shorter than a patch, 160 ms
        held = run(tmp_path / f"{window}.npz", [audio / "b/long.wav"], window=window)
        assert held["end"].tolist() == ends
    held = run(tmp_path / "d.npz", window=None)  # what the encoder takes at once, not more
    assert held["start"].tolist() == [0, 0, 2.079, 4.158, 0, 0]
    with torch.no_grad():
        want = encoder(wave[None, : int(2.079 * RATE)]).cls[-1, 0]
    np.testing.assert_allclose(held["embedding"][1], want, atol=1e-5)


@pytest.mark.parametrize("level", ["clip", "frame"])
@pytest.mark.parametrize("layer", ["last", "all"])
def test_embed__formats_hold_the_same(run, tmp_path, level, layer):
    pq = pytest.importorskip("pyarrow.parquet")
    how = {"level": level, "layer": layer, "window": 2.0}
    held = run(tmp_path / "e.npz", **how)
    want = held["embedding"]
    for name in ("e.parquet", "e.csv", "folder"):
        run(tmp_path / name, **how)
    table = pq.read_table(tmp_path / "e.parquet").to_pydict()
    names = ["embedding"] if layer == "last" else ["layer_1", "layer_2"]
    found = np.stack([np.array(table[name], np.float32) for name in names], 1)
    np.testing.assert_array_equal(found.reshape(want.shape), want)
    assert table["path"] == held["path"][held["recording"]].tolist()
    assert table["start"] == held["start"].tolist()
    lines = list(csv.reader((tmp_path / "e.csv").open()))
    numbers = np.array([line[3:] for line in lines[1:]], np.float32)
    np.testing.assert_array_equal(numbers.reshape(want.shape), want)
    assert [line[0] for line in lines[1:]] == table["path"]
    np.testing.assert_allclose([float(line[2]) for line in lines[1:]], held["end"], rtol=1e-8)
    index = list(csv.DictReader((tmp_path / "folder/index.csv").open()))
    arrays = {line["file"]: np.load(tmp_path / "folder" / line["file"]) for line in index}
    assert sorted(arrays) == ["a.npy", "b__long.npy", "b__short.npy", "c.npy"]
    np.testing.assert_array_equal(np.concatenate(list(arrays.values())), want)
    assert [float(line["start"]) for line in index] == [0, 0, 2, 4, 0, 0]


def test_embed__is_independent_of_the_batch(run, tmp_path):
    for level in ("clip", "frame"):
        one = run(tmp_path / f"one-{level}.npz", level=level, batch=1)
        many = run(tmp_path / f"many-{level}.npz", level=level, batch=8, workers=1)
        np.testing.assert_allclose(one["embedding"], many["embedding"], atol=1e-5)


@pytest.mark.parametrize("name", ["e.npz", "e.parquet", "folder"])
def test_embed__resumes_to_the_same_bytes(run, tmp_path, name, monkeypatch, audio):
    monkeypatch.setattr(parts, "MOST_BLOCKS", 3)
    (audio / "b/broken.wav").write_bytes(b"RIFF0000WAVEfmt ")
    how = {"batch": 1, "window": 1.0}
    for folder in ("whole", "killed"):
        (tmp_path / folder).mkdir()
    run(tmp_path / "whole" / name, **how)
    for k in (1, 2):
        run(tmp_path / "killed" / name, part=Part(k, 3), **how)
    left = tmp_path / "killed" / f"{name}.parts"
    assert sorted(file.name for file in left.glob("block-*")) == [
        "block-00000.npz",
        "block-00001.npz",
    ]
    assert not (tmp_path / "killed" / name).exists()
    stamp = (left / "block-00000.npz").stat().st_mtime_ns
    run(tmp_path / "killed" / name, part=Part(1, 3), **how)
    assert (left / "block-00000.npz").stat().st_mtime_ns == stamp
    run(tmp_path / "killed" / name, **how)
    (audio / "b/broken.wav").unlink()
    found = [
        {str(f.relative_to(tmp_path / folder)): f.read_bytes()
         for f in sorted((tmp_path / folder).rglob("*")) if f.is_file()}
        for folder in ("whole", "killed")
    ]  # fmt: skip
    assert found[0] == found[1]
    assert not any(".parts" in name for name in found[0])


def test_embed__two_processes_make_the_same_file(run, tmp_path, monkeypatch):
    run(tmp_path / "one.npz", batch=1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    run(tmp_path / "two.npz", batch=1)
    made = sorted(file.name for file in (tmp_path / "two.npz.parts").glob("block-*"))
    assert made == ["block-00002.npz", "block-00003.npz"]
    assert not (tmp_path / "two.npz").exists()
    monkeypatch.setenv("RANK", "0")
    run(tmp_path / "two.npz", batch=1)
    assert (tmp_path / "two.npz").read_bytes() == (tmp_path / "one.npz").read_bytes()


def test_embed__bad_files_are_listed_and_nothing_else_is_lost(run, audio, tmp_path, capsys):
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "text.wav").write_text("no audio")
    (bad / "film.mp4").write_text("")
    nan = _wave(1.0)
    nan[100] = np.nan
    soundfile.write(bad / "nan.wav", nan, RATE, subtype="FLOAT")
    good = (audio / "a.wav").read_bytes()
    soundfile.write(bad / "cut.flac", _wave(3.0), RATE)
    (bad / "cut.flac").write_bytes((bad / "cut.flac").read_bytes()[:20_000])
    (bad / "z.wav").write_bytes(good)
    held = run(tmp_path / "e.npz", [bad, audio / "a.wav"])
    assert [name.rpartition("/")[2] for name in held["path"][held["recording"]]] == [
        "z.wav",
        "a.wav",
    ]
    np.testing.assert_allclose(held["embedding"][0], held["embedding"][1], atol=1e-6)
    with (tmp_path / "e.npz.skipped.csv").open() as file:
        reasons = {line["path"].rpartition("/")[2]: line["reason"] for line in csv.DictReader(file)}
    assert {k: v.partition(":")[0] for k, v in reasons.items()} == {
        "film.mp4": "empty", "text.wav": "corrupt", "cut.flac": "corrupt", "nan.wav": "nan"
    }  # fmt: skip
    manifest = json.loads((tmp_path / "e.npz.json").read_text())
    assert (manifest["results"], manifest["left_out"]) == (2, 4)
    for name in ("z.wav", "cut.flac"):
        (bad / name).unlink()
    with pytest.raises(UserError, match=r"film\.mp4.* all 3 are listed in .*none\.npz\.skipped"):
        run(tmp_path / "none.npz", [bad])
    assert sorted(file.name for file in tmp_path.glob("none*")) == ["none.npz.skipped.csv"]
    (bad / "nan.wav").unlink()
    with pytest.raises(UserError, match=r"none of the 2 files can be read.*film\.mp4"):
        run(tmp_path / "none2.npz", [bad])
    assert not list(tmp_path.glob("none2*"))


def test_embed__reads_a_csv_shards_and_several_paths_once(run, audio, tmp_path):
    (audio.parent / "list.csv").write_text(
        "Filename,speaker\nc.wav,x\nb/short.wav,y\ngone.wav,y\nc.wav,z\n"
    )
    table = audio / "list.csv"
    (audio.parent / "list.csv").rename(table)
    rows = [Row(audio / "a.wav", "one", ()), Row(audio / "c.wav", "two", ())]
    write_shards(rows, tmp_path / "shards")
    paths = [table, tmp_path / "shards", audio / "a.wav", audio / "c.wav"]
    held = run(tmp_path / "e.npz", paths)
    table.unlink()
    assert "gone.wav,0,unreadable: No such file" in (tmp_path / "e.npz.skipped.csv").read_text()
    assert [name.rpartition("/")[2] for name in held["path"]] == [
        "c.wav", "short.wav", "one", "two", "a.wav"]  # fmt: skip
    np.testing.assert_allclose(held["embedding"][[2, 3]], held["embedding"][[4, 0]], atol=1e-5)


def _head(folder, encoder, name="cgp", level="clip"):
    torch.manual_seed(1)
    probe = build_probe(name, classes=3, width=D, depth=L, has_cls=True, level=level, prototypes=4)
    if name == "cgp":
        probe.layer_logits.data = torch.tensor([0.3, 1.2])
    meta = {
        "task": "toy", "target": "class", "labels": ["x", "y", "z"], "frames": None,
        "encoder": {"digest": weights_digest(encoder), "weights": "student"}}  # fmt: skip
    return save_head(folder, probe, name=name, head={"prototypes": 4}, meta=meta), probe.eval()


def test_embed__gate_and_cgp_are_what_the_head_reads(encoder, checkpoint, tmp_path):
    folder, probe = _head(tmp_path / "run/heads/tiny/cgp-1-0", encoder)
    waves = [_wave(1.0), _wave(0.3, 1)]
    with torch.no_grad():
        features = encoder(torch.from_numpy(waves[0])[None])
        alpha = probe.layer_gate()
        cls = torch.nn.functional.normalize(features.cls, dim=-1)  # (L, 1, D)
        want = (alpha[:, None, None] * cls).sum(0)[0]
        scores = probe(features)
    gated = bat.embed(waves, checkpoint, layer="gate", head=folder, sample_rate=RATE)
    np.testing.assert_allclose(gated[0], want, atol=1e-6)
    read = bat.embed(waves, checkpoint, pool="cgp", head=folder, sample_rate=RATE)
    assert read.shape == (2, 12)
    with torch.no_grad():
        np.testing.assert_allclose(probe.fc(torch.from_numpy(read[:1])), scores, atol=1e-5)
    with pytest.raises(UserError, match="weights=teacher"):
        bat.embed(waves, checkpoint, layer="gate", head=folder, weights="teacher", sample_rate=RATE)
    frame, probe = _head(tmp_path / "other/heads/tiny/cgp-1-0", encoder, level="frame")
    (long, short) = bat.embed(
        waves, checkpoint, pool="cgp", head=frame, level="frame", sample_rate=RATE
    )
    with torch.no_grad():
        np.testing.assert_allclose(probe.fc(torch.from_numpy(long)), probe(features)[0], atol=1e-5)
    assert len(short) == encoder.time_patches(4800)


def test_embed_python__arrays_rates_windows_and_paths(encoder, checkpoint, audio):
    waves = [_wave(seconds, seed) for seed, seconds in enumerate(SECONDS.values())]
    found = bat.embed(waves, encoder, sample_rate=RATE)
    for row, name in zip(found, SECONDS, strict=True):
        np.testing.assert_allclose(row, _reference(encoder, name)[-1], atol=1e-5)
    paths = [str(audio / f"{name}.wav") for name in (*SECONDS, "a")]
    np.testing.assert_allclose(bat.embed(paths, checkpoint)[:4], found, atol=1e-5)
    assert len(bat.embed(paths, checkpoint)) == 5  # the last is named twice
    (frames,) = bat.embed(waves[0], encoder, level="frame", layer="all", sample_rate=RATE)
    assert frames.shape == (encoder.time_patches(80_000), L, D)
    (windows, _) = bat.embed(waves[:2], encoder, window=2.0, sample_rate=RATE)
    np.testing.assert_allclose(
        windows[1], bat.embed(waves[0][32_000:64_000], encoder, sample_rate=RATE)[0], atol=1e-5
    )
    tone = np.sin(2 * np.pi * 440 * np.arange(44_100) / 44_100).astype(np.float32)
    same = np.sin(2 * np.pi * 440 * np.arange(RATE) / RATE).astype(np.float32)
    one = bat.embed(tone, encoder, sample_rate=44_100)
    two = bat.embed(same, encoder, sample_rate=RATE)
    taken_for_16 = bat.embed(tone, encoder, sample_rate=RATE)
    assert np.abs(one - two).max() < 0.1 < np.abs(one - taken_for_16).max()


BAD_CLIPS = {
    "stereo": ([np.zeros((2, 100), np.float32)], r"\(2, 100\)"),
    "nan": ([np.array([0.0, np.nan], np.float32)], "NaN"),
    "empty": ([np.zeros(0, np.float32)], "no samples"),
    "integers": ([np.zeros(100, np.int16)], "int16"),
    "none": ([], "no clips"),
    "missing": (["no-such.wav"], r"no-such\.wav"),
}


@pytest.mark.parametrize("case", BAD_CLIPS)
def test_embed_python__bad_clips_are_named(encoder, case):
    clips, match = BAD_CLIPS[case]
    with pytest.raises(UserError, match=match):
        bat.embed(clips, encoder, sample_rate=RATE)


BAD_SETTINGS = {
    "layer": ({"layer": "3"}, "layer=3.*1 to 2"),
    "word": ({"layer": "first"}, "layer=first"),
    "gate": ({"layer": "gate"}, "layer=gate"),
    "cgp": ({"pool": "cgp"}, "pool=cgp"),
    "frame": ({"pool": "cls", "level": "frame"}, "pool=cls"),
    "window": ({"window": "-1"}, "window=-1"),
    "hop": ({"window": "1", "hop": 2.0}, "hop=2"),
    "seconds": ({"window": "ten"}, "window=ten"),
    "device": ({"device": "tpu"}, "device=tpu"),
    "checkpoint": ({"checkpoint": "no-such-run"}, "no-such-run"),
    "batch": ({"batch": 0}, "batch=0"),
}


@pytest.mark.parametrize("case", BAD_SETTINGS)
def test_embed__bad_settings_are_named_and_leave_nothing(run, tmp_path, case):
    settings, match = BAD_SETTINGS[case]
    with pytest.raises(UserError, match=match):
        run(tmp_path / "e.npz", **settings)
    assert not list(tmp_path.iterdir())


def test_embed__cls_needs_a_class_token(encoder, audio, tmp_path):
    class Bare(BAT):
        has_cls = False

    bare = Bare(width=D, depth=L, heads=2, grid=Grid(13, 8))
    with pytest.raises(UserError, match="pool=cls"):
        bat.embed(_wave(1.0), bare, pool="cls", sample_rate=RATE)


def test_embed__bad_paths_and_outputs_are_named(run, audio, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.csv").write_text("path,label\n")
    (tmp_path / "other.csv").write_text("speaker\nx\n")
    paths = ["gone.wav", tmp_path / "empty", tmp_path / "empty.csv", tmp_path / "other.csv"]
    with pytest.raises(UserError) as error:
        run(tmp_path / "e.npz", paths)
    for part in (
        "gone.wav",
        "/empty holds no audio",
        "empty.csv lists no clips",
        "other.csv line 1",
    ):
        assert part in str(error.value)
    for out in ("e.h5", "gone/e.npz"):
        with pytest.raises(UserError, match=out):
            run(tmp_path / out)
    (tmp_path / "mine.npz").write_text("")
    with pytest.raises(UserError, match=r"mine\.npz exists"):
        run(tmp_path / "mine.npz")
    run(tmp_path / "e.npz")
    before = (tmp_path / "e.npz").stat().st_mtime_ns
    run(tmp_path / "e.npz")
    assert (tmp_path / "e.npz").stat().st_mtime_ns == before
    with pytest.raises(UserError, match="layer is 1, there last"):
        run(tmp_path / "e.npz", layer=1)
    assert not (tmp_path / "e.npz.parts").exists()
    run(tmp_path / "p.npz", batch=1, part=Part(1, 2))
    with pytest.raises(UserError, match="windows is 6, there 4"):
        run(tmp_path / "p.npz", batch=1, window=2.0)


def test_embed_command__says_speed_and_what_is_left_out(checkpoint, audio, tmp_path, capsys):
    (tmp_path / "broken.wav").write_text("no audio")
    words = [str(audio), str(tmp_path / "broken.wav"), "--checkpoint", str(checkpoint)]
    out = tmp_path / "e.csv"
    assert cli.main([*words, "--out", str(out), "--workers", "0", "--layer", "2"]) == 0
    said = capsys.readouterr().err
    assert "clips/s" in said
    assert "1 left out" in said
    assert len(out.read_text().splitlines()) == 7
    assert cli.main([*words, "--out", str(out), "--layer", "9"]) == 2


def test_embed__eat_and_short_clips(tmp_path):
    torch.manual_seed(0)
    eat = EAT(width=D, depth=L, heads=2, grid=Grid(13, 8)).eval()
    waves = [_wave(seconds, 3) for seconds in (0.3, 1.0, 5.0, 0.01)]
    together = bat.embed(waves, eat, sample_rate=RATE)
    for wave, row in zip(waves, together, strict=True):
        np.testing.assert_allclose(bat.embed(wave, eat, sample_rate=RATE)[0], row, atol=1e-5)
