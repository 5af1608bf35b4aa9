"""BirdSet from its published layout: what is read, one clip by hand, the sampling, the errors."""

from __future__ import annotations

import gzip
import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from bat.audio.decode import decode
from bat.config.compose import compose
from bat.config.schema import Finetune, Probe
from bat.data.draws import OFFSET, below, philox
from bat.data.files import read_row
from bat.data.plan import make_plan
from bat.errors import UserError
from bat.eval.evaluation import Evaluation
from bat.eval.features import FeatureBank
from bat.eval.loading import load_for
from bat.eval.prepare import open_probing, prepare
from bat.shard.rows import detect, open_rows
from bat.tasks.base import LeftOut, load_task
from bat.train.pretrain_data import audio_stream
from bat.weights import export
from tests.encoders.tiny import tiny
from tests.golden_files import Golden
from tests.tasks.birds import CLIPS, RATE, write_set

WORDS = ("recipe=hsn", "hardware=cpu", "data.workers=0", "log.progress=false")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_set(tmp_path / "sets/HSN", CLIPS)
    save(tmp_path / "encoder", "bat")
    return tmp_path / "sets"


def save(folder: Path, name: str) -> None:
    model = tiny(name)
    state = {"student": model.state_dict()}
    export(folder, backbone=name, encoder=model.config(), weights=state, meta={})


def words(root: Path, *more: str) -> list[str]:
    own = [f"data.root={root}", f"data.cache={root.parent / 'cache'}"]
    return [*WORDS, *own, f"checkpoint={root.parent / 'encoder'}", *more]


def test_hsn__reads_its_published_layout_with_its_classes_in_their_order(root: Path) -> None:
    found = load_task("hsn").open(root)
    assert [(r.key, r.labels, r.split) for r in found.rows] == [
        *((f[:-4], tuple(x or ()), "train") for f, (x, _) in CLIPS["train"].items()),
        *((f[:-4], tuple(x or ()), "test") for f, (x, _) in CLIPS["test_5s"].items()),
    ]
    assert (len(found.vocabulary), found.vocabulary[0]) == (21, "gcrfin")
    assert [found.vocabulary.index(n) for n in ("yerwar", "norfli")] == [14, 20]
    assert found.notes[0] == "HSN_metadata_train.parquet lists 6 clips, 5460 were published"
    assert not found.left_out
    for row in found.rows:  # members of an uncompressed tar, read in place
        assert (row.suffix, row.path.suffix, read_row(row)[:4]) == ("ogg", ".tar", b"OggS")
    assert detect(root / "HSN") == "hsn"


def test_hsn__shards_are_unpacked_once_and_a_tar_is_used_as_it_is(root: Path) -> None:
    folder = root / "HSN"
    load_task("hsn").open(folder)
    before = {p.name: p.stat().st_mtime_ns for p in folder.iterdir()}
    for archive in folder.glob("*.tar.gz"):
        archive.unlink()
    load_task("hsn").open(folder)
    tars = {n: t for n, t in before.items() if not n.endswith(".gz")}
    assert {p.name: p.stat().st_mtime_ns for p in folder.iterdir()} == tars


HUB = "datasets--DBD-research-group--BirdSet"


@pytest.mark.parametrize("place", [".", "HSN", "snapshots/12ab/HSN", f"{HUB}/snapshots/12ab/HSN"])
def test_hsn__is_found_as_the_hub_keeps_it(tmp_path: Path, place: str) -> None:
    write_set(tmp_path / place, CLIPS)
    assert len(load_task("hsn").open(tmp_path).rows) == 10


def test_hsn__loose_files_stand_in_for_shards(root: Path) -> None:
    rows = load_task("hsn").open(root).rows
    for row in rows:
        path = root / "HSN/audio" / row.split / f"{row.key}.ogg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(read_row(row))
    for path in root.glob("HSN/*.tar*"):
        path.unlink()
    again = load_task("hsn").open(root).rows
    assert [(r.key, r.labels, r.span) for r in again] == [(r.key, r.labels, None) for r in rows]


def test_per__classes_are_those_of_its_json_of_the_classlabel_or_sorted(tmp_path: Path) -> None:
    names = ("yerwar", "norfli", "gcrfin", "never")
    write_set(tmp_path / "PER", CLIPS, name="PER")
    plain = load_task("per").open(tmp_path)
    assert plain.vocabulary == ["gcrfin", "norfli", "yerwar"]
    assert "PER_ebird_codes.json" in plain.notes[-1]
    write_set(tmp_path / "PER", CLIPS, name="PER", numbers=names)
    numbered = load_task("per").open(tmp_path)
    assert numbered.vocabulary == list(names)
    assert [r.labels for r in numbered.rows] == [r.labels for r in plain.rows]
    codes = {"id2label": {str(i): n for i, n in enumerate((*names, "more"))}, "label2id": {}}
    (tmp_path / "PER_ebird_codes.json").write_text(json.dumps(codes))
    assert load_task("per").open(tmp_path).vocabulary == [*names, "more"]


def test_clip__training_is_at_a_random_place_with_noise_and_a_test_clip_is_plain(
    root: Path,
) -> None:
    config = compose(Finetune, "finetune", words(root, "data.batch=6", "data.balance=none"))
    ready = prepare(config)
    config, index, encoder = ready.config, ready.index, ready.backbone
    (held,) = ready.splits
    how = {"sample_rate": encoder.sample_rate, "seed": 3, "out": None, "random_offset": True}
    batch = audio_stream(config, index, held.train, **how).first_batch()
    assert batch.waves.shape == (6, 160_000)
    assert batch.lengths.tolist() == [160_000] * 6
    row = batch.keys.index("XC2")  # 3 s of yerwar and gcrfin
    position = int(batch.positions[row])
    offset = below(160_000 - 96_000 + 1, philox(3, position, OFFSET))
    wanted = np.zeros(160_000, np.float32)
    clip = next(i for i in range(len(index)) if index.key(i) == "XC2")
    wanted[offset : offset + 96_000] = decode(index.read(clip).data, sample_rate=RATE)
    noise = batch.waves[row].numpy() - wanted
    assert noise.std() == pytest.approx(0.02, rel=0.02)
    assert abs(noise.mean()) < 3e-4
    assert (noise**4).mean() / noise.var() ** 2 == pytest.approx(3, abs=0.1)  # normal
    assert abs(np.corrcoef(noise[1:], noise[:-1])[0, 1]) < 0.01
    assert batch.targets[row].nonzero().flatten().tolist() == [0, 14]  # gcrfin, yerwar

    alone = np.zeros(160_000, np.float32)  # a test clip of 4 s: zeros on the right, no noise
    (short,) = (i for i in held.test if index.key(i) == "HSN_15_20")
    data = decode(index.read(int(short)).data, sample_rate=RATE)
    alone[: len(data)] = data
    waves = torch.from_numpy(data[None])
    spectrogram = encoder.inputs(waves, torch.tensor([len(data)]), frames=ready.frames)
    assert spectrogram.shape == (1, 1, 512, 128)
    whole = encoder.inputs(torch.from_numpy(alone[None]), frames=512)
    torch.testing.assert_close(spectrogram, whole)
    assert not spectrogram[0, 0, 501:].any()
    assert not spectrogram[0, 0, 410:501].any()  # padding: 80 dB below the clip's maximum


def test_front_end__32_khz_hears_a_tone_above_8_khz_where_the_mel_scale_says(root: Path) -> None:
    encoder = prepare(compose(Probe, "probe", words(root))).backbone
    assert (encoder.sample_rate, encoder.hop_seconds) == (32_000, 0.16)
    t = torch.arange(160_000) / 32_000
    mels = encoder.inputs((0.5 * torch.sin(2 * math.pi * 13_000 * t))[None], frames=512)
    mel = [2595 * math.log10(1 + hz / 700) for hz in (13_000, 16_000)]
    assert int(mels[0, 0, 250].argmax()) == round(129 * mel[0] / mel[1]) - 1


def test_front_end__rate_of_legacy_encoders_and_of_those_that_cannot_change(
    tmp_path: Path,
) -> None:
    def front(name: str, *more: str):
        folder = tmp_path / f"{name}{len(more)}"
        save(folder, name)
        config = compose(Probe, "probe", [*WORDS, f"checkpoint={folder}", *more])
        return load_for(config, load_task("hsn"))[0].frontend

    eat = front("eat", "statistics=hsn")
    shape = (eat.sample_rate, eat.window_length, eat.hop_length, eat.n_fft)
    assert shape == (32_000, 800, 320, 1024)
    assert (eat.mean, eat.std, eat.clip_samples) == (-8.55048120, 4.04533479, 160_000)
    assert eat(torch.rand(1, 160_000), 512)[0, 0, 498:].any().item() is False
    with pytest.raises(UserError, match=r"hop_length=160: .*320 samples at 32000"):
        front("beats", "hop_length=160")
    with pytest.raises(UserError, match=r"sample_rate=32000 .*M2D.*16000 Hz; say sample_rate=null"):
        front("m2d")
    nulls = ("sample_rate=null", "n_fft=null", "hop_length=null", "frames=512")
    assert front("m2d", *nulls).sample_rate == 16_000


def test_sampling__is_with_replacement_by_the_first_label(root: Path) -> None:
    data = open_probing(compose(Probe, "probe", words(root)))
    (held,) = data.splits
    plan = make_plan(data.index, held.train, seed=1, balance="first_label")
    assert len(plan) == 6
    keys = [data.index.key(int(i)) for i in plan.clips(np.arange(6_000))]
    count = Counter(keys)
    for key, share in {"XC1": 9, "XC4": 9, "XC6": 9, "XC2": 6, "XC5": 6, "XC3": 3}.items():
        assert count[key] / 6_000 == pytest.approx(1 / share, abs=0.02)
    assert any(len(set(keys[i : i + 6])) < 6 for i in range(0, 6_000, 6))
    assert "with replacement" in plan.identity()
    index = data.index
    bank = FeatureBank(  # probes on stored features
        patches=torch.zeros(6, 1, 1, 1, 1),
        cls=None,
        targets=torch.from_numpy(np.stack([index.targets(int(i)) for i in held.train])),
        ids=held.train,
        keys=[index.key(int(i)) for i in held.train],
        skipped={},
        index=index,
        order={"balance": "first_label"},
    )
    drawn = torch.cat([y for _, y in bank.training(held.train, batch=60, steps=50, seed=1)])
    assert drawn[:, 20].mean() == pytest.approx(1 / 3, abs=0.03)  # norfli, one of six clips


def test_probing__its_stream_has_noise_places_and_sampling_of_the_recipe(
    root: Path, tmp_path: Path
) -> None:
    ready = prepare(compose(Probe, "probe", words(root)))
    stream = Evaluation(ready, tmp_path, name="narrow", methods=["linear"]).stream()
    assert (stream.noise, stream.random_offset, stream.frames) == (0.02, True, 512)
    assert stream.order == {"balance": "first_label", "epoch_clips": None}
    (held,) = ready.splits
    batches = stream.training(held.train, batch=30, steps=2, seed=0)
    drawn = torch.cat([y for _, y in batches])
    assert drawn[:, 20].mean() == pytest.approx(1 / 3, abs=0.15)


def test_front_end__equals_the_reference_at_32_khz(golden: Path, root: Path) -> None:
    file = Golden(golden / "frontend.npz")
    encoder = prepare(compose(Probe, "probe", words(root))).backbone
    found = encoder.inputs(file["wave_32k_5s"][None], frames=512)[0, 0]
    torch.testing.assert_close(found, file["out_sup_32k_5s_T512"], atol=1e-4, rtol=0)


def test_shots__at_most_so_many_of_a_class_and_short_recordings_first(root: Path) -> None:
    data = open_probing(compose(Probe, "probe", words(root, "shots=2")))
    (held,) = data.splits
    keys = {data.index.key(int(i)) for i in held.train}
    assert keys == {"XC4", "XC6", "XC2", "XC5", "XC3"}  # XC1 has 7 s
    assert any(n.startswith("shots=2: 5 training clip(s) in the split") for n in data.notices)
    searched = open_probing(compose(Probe, "probe", words(root, "shots=2", "protocol=unmute")))
    (held,) = searched.splits  # the validation clips are of these five, too
    assert {data.index.key(int(i)) for i in (*held.train, *held.valid)} == keys
    assert (len(held.train), len(held.valid)) == (4, 1)


def test_hsn__absent_audio_is_left_out_and_said(root: Path) -> None:
    (root / "HSN/HSN_train_shard_0002.tar.gz").unlink()
    found = load_task("hsn").open(root)
    assert found.left_out[0] == LeftOut("XC2", "XC2.ogg", "no file", "train")
    assert "3 of the 6 clips" in found.notes[0]
    assert "HSN_train_shard_*.tar.gz" in found.notes[0]


@pytest.mark.parametrize(
    ("break_it", "says"),
    [
        (lambda f: (f / "HSN_metadata_test_5s.parquet").unlink(),
         r"lacks HSN_metadata_test_5s\.parquet: .*BirdSet"),
        (lambda f: [p.unlink() for p in f.glob("*test5s*")],
         r"none of the 4 clips .*HSN_test5s_shard_\*\.tar\.gz there, from .*BirdSet"),
        (lambda f: (f / "HSN_train_shard_0001.tar.gz").write_bytes(b"\x1f\x8b damaged"),
         r"HSN_train_shard_0001\.tar\.gz is damaged"),
        (lambda f: (f / "HSN_train_shard_0001.tar.gz").write_bytes(
            (f / "HSN_train_shard_0001.tar.gz").read_bytes()[:5_000]),
         r"HSN_train_shard_0001\.tar\.gz is damaged"),
        (lambda f: (f / "HSN_train_shard_0001.tar.gz").write_bytes(gzip.compress(b"no tar" * 999)),
         r"HSN_train_shard_0001\.tar is not a readable tar"),
        (lambda f: (f / "HSN_metadata_train.parquet").write_bytes(b"PAR1"),
         r"HSN_metadata_train\.parquet is not a readable parquet"),
        (lambda f: write_set(f, {"train": {"XC9.ogg": (("yerwar",), 1.0)}, "test_5s": {}},
                             name="HSN", numbers=("yerwar",)), "none of the 0 clips"),
    ],
)  # fmt: skip
def test_hsn__mistakes_name_the_file_and_the_remedy(root: Path, break_it, says: str) -> None:
    break_it(root / "HSN")
    with pytest.raises(UserError, match=says):
        load_task("hsn").open(root)
    assert not list(root.glob("HSN/.*.tmp"))


def test_hsn__unknown_labels_are_named(tmp_path: Path) -> None:
    clips = {"train": {"XC1.ogg": (("gcrfin",), 1.0)}, "test_5s": {"a.ogg": (("gcrfin",), 1.0)}}
    write_set(tmp_path, clips, numbers=("gcrfin",))
    write_set(tmp_path / "UHH", clips, name="UHH")
    codes = json.dumps({"id2label": {"0": "apapan"}})
    (tmp_path / "UHH/UHH_ebird_codes.json").write_text(codes)
    with pytest.raises(UserError, match=r"XC1\.ogg has the label 'gcrfin', not among 1 classes"):
        load_task("uhh").open(tmp_path)
    (tmp_path / "UHH/UHH_ebird_codes.json").write_text('{"id2label": {"1": "apapan"}}')
    with pytest.raises(UserError, match=r"UHH_ebird_codes\.json is not"):
        load_task("uhh").open(tmp_path)


def test_hsn__packs_from_the_folder_alone(root: Path) -> None:
    found = open_rows(root / "HSN")
    assert (found.kind, len(found.vocabulary), len(found.rows)) == ("hsn", 21, 10)
