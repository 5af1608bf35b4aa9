"""Custom data in a CSV, from its lines to what a probe is trained on."""

import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from bat.audio.decode import encode
from bat.config.compose import compose, to_yaml
from bat.config.probing import FeatureStore
from bat.config.schema import Finetune, Pretrain, Probe
from bat.data.bad_clips import BadClips
from bat.data.stream import eval_loader
from bat.data.tar import escape_key
from bat.data.toy import SAMPLE_RATE, toy_wave
from bat.encoders.bat import BAT
from bat.encoders.eat import EAT
from bat.errors import UserError
from bat.eval.evaluation import Evaluation
from bat.eval.feature_cache import open_features
from bat.eval.features import FeatureStream
from bat.eval.fit import predictions
from bat.eval.heads import load_head, save_head
from bat.eval.prepare import open_probing, prepare, with_encoder
from bat.eval.probe import probe
from bat.eval.run_folder import open_data
from bat.eval.targets import FrameTargets
from bat.probes.base import build_probe, expand
from bat.tasks.base import load_task
from bat.tasks.events import Event
from bat.train.finetune import finetune
from bat.types import Grid, Needs, WaveBatch

SECONDS = (0.5, 0.7, 1.0)


@pytest.fixture(scope="module")
def sounds(tmp_path_factory):
    """Nine clips, ``0.flac`` ... of 0.5, 0.7 and 1.0 s."""
    folder = tmp_path_factory.mktemp("sounds")
    for i in range(9):
        wave = toy_wave("tone", seed=0, number=i, seconds=SECONDS[i % 3])
        (folder / f"{i}.flac").write_bytes(encode(wave, sample_rate=SAMPLE_RATE, codec="flac"))
    return folder


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("shards")


@pytest.fixture
def own(sounds, encoder, cache, tmp_path):
    """``own(text, "key=value", ...)``: the configuration for a CSV of ``text``."""

    def build(text, *words, schema=Probe, command="probe"):
        csv = sounds / f"{tmp_path.name}.csv"
        csv.write_text(text)
        recipe = "own" if schema is Probe else "esc10"
        given = [f"recipe={recipe}", f"data.csv={csv}", f"checkpoint={encoder}",
                 f"data.cache={cache}", "hardware=cpu", "log.progress=false",
                 "data.workers=0"]  # fmt: skip
        merged = dict(word.split("=", 1) for word in [*given, *words])
        return compose(schema, command, [f"{k}={v}" for k, v in merged.items()])

    return build


PLAIN = "path,label\n" + "".join(f"{i}.flac,{'ab'[i % 2]}\n" for i in range(9))
EVENTS = """path,label,onset,offset,fold
0.flac,a,0.0,0.1,1
0.flac,b,0.2,0.4,1
1.flac,a,0.3,0.9,1
2.flac,,,,1
3.flac,b,0,0.5,2
4.flac,a,0.33,0.47,2
5.flac,b,0.5,1,2
"""


def test_prepare__csv_with_one_label_a_clip(own):
    ready = prepare(own(PLAIN, "task=esc10"))
    assert (ready.task.name, ready.config.task, ready.task.loss) == ("csv", "csv", "ce")
    assert ready.index.vocabulary == ["a", "b"]
    assert len(ready.splits) == 4  # the rarer class has four clips
    assert [len(r.test) for r in ready.splits] == [3, 2, 2, 2]
    assert all(r.drawn and r.valid_is == "fold" for r in ready.splits)
    assert "learning rate selected on the fold after the held-out one" in ready.how
    assert any(line.startswith("folds drawn: ") for line in ready.notices)
    assert ready.targets_of is None


def test_protocol_unmute__one_search_and_the_task_s_prototypes(own, tmp_path):
    out = tmp_path / "run"
    probe(own(PLAIN, "protocol=unmute", "protocol.sobol=2", "train.epochs=1", "seeds=2",
              "folds=[1]", "methods=[protobin,linear]", "diagnostics.encoder=false",
              "diagnostics.maps=0", "bootstrap=0", f"out={out}"))  # fmt: skip
    summary = json.loads((out / "summary.json").read_text())
    assert summary["head"]["per_class"] == 20
    said = (
        "learning rate and weight decay selected by the first seed on the fold after the held-out"
    )
    assert summary["how"].startswith(said)
    (encoder,) = summary["encoders"].values()
    for entry in encoder["results"].values():
        first, second = entry["selected"]["1-0"], entry["selected"]["1-1"]
        assert (first["candidates"], second["candidates"]) == (2, 1)
        same = ("lr", "weight_decay", "step")
        assert [first[k] for k in same] == [second[k] for k in same]
    head, _ = load_head(*out.glob("heads/*/protobin-1-0"))
    assert head.prototypes.shape == (20 * 2, 16)
    assert head.dropout.p == 0
    linear, _ = load_head(*out.glob("heads/*/linear-1-0"))
    assert isinstance(linear.norm, torch.nn.Identity)
    assert [load_task(name).per_class for name in ("audioset", "esc50", "csv")] == [10, 20, 20]


def test_window__is_the_longest_clip(own):
    ready = prepare(own(PLAIN))
    assert ready.config.data.clip_seconds == 1.0
    assert ready.frames is None
    assert ready.notices[0] == "window 1 s, the longest clip (data.clip_seconds=10)"
    assert "\n  window 1 s, the longest clip" in ready.headline("first")
    ready = prepare(own(PLAIN, "data.clip_seconds=0.6", "data.windows=false"))
    assert (ready.config.data.clip_seconds, ready.frames) == (0.6, None)
    assert "6 of 9 clips are longer than the window of 0.6 s: only their start" in ready.notices[0]
    assert prepare(own(PLAIN, "frames=208")).frames == 208
    with pytest.raises(UserError, match="makes 101 frames, more than frames=64"):
        prepare(own(PLAIN, "frames=64"))
    padded = prepare(own(PLAIN, "pad=clip")).backbone.frontend
    assert (padded.pad, padded.clip_samples) == ("clip", 16000)  # the window's


class NoClassToken(BAT):
    has_cls = False


@pytest.mark.parametrize(
    ("words", "cls"),
    [(["protocol=bat"], "mean"), ([], "patches"), (["protocol=bat", "head.cls=patches"], "patches"),
     (["head.cls=mean"], "mean")],
)  # fmt: skip
def test_evaluation__substitute_of_the_class_token(own, tmp_path, words, cls):
    ready = prepare(own(PLAIN, "head.prototypes=4", *words))
    backbone = NoClassToken(width=16, depth=2, heads=2, grid=Grid(8, 8))
    lab = Evaluation(
        dataclasses.replace(ready, backbone=backbone), tmp_path, name="x", methods=["cgp"]
    )
    probe = lab.build("cgp")
    assert probe.cls == cls
    save_head(tmp_path / "head", probe, name="cgp", head=lab.head, meta={})
    assert load_head(tmp_path / "head")[0].cls == cls
    if any(word.startswith("head.cls=") for word in words):
        with pytest.raises(UserError, match=f"head.cls={cls} .* this encoder has one"):
            Evaluation(ready, tmp_path, name="x", methods=["cgp"])
    else:
        assert Evaluation(ready, tmp_path, name="x", methods=["cgp"]).head["cls"] is None


@pytest.mark.parametrize("level", ["clip", "frame"])
@pytest.mark.parametrize("kind", [BAT, EAT])
def test_probes__do_not_depend_on_the_batch_or_the_cache(own, tmp_path, level, kind):
    """Whatever the batch, wherever features are kept, for every probe."""
    ready = prepare(own(EVENTS if level == "frame" else PLAIN, f"level={level}"))
    torch.manual_seed(0)
    encoder = kind(width=16, depth=2, heads=2, grid=Grid(4, 8)).eval()  # of 1 s: two chunks
    ids, methods = np.arange(len(ready.index)), expand(["all"], level=level)
    shape = {"classes": 2, "width": 16, "depth": 2, "has_cls": True, "level": level}
    probes = {
        m: build_probe(m, **shape, encoder=encoder, prototypes=5, pool_queries=2) for m in methods
    }
    found = {}
    for cache, batch in [("off", 1), ("off", 7), ("memory", 48), ("disk", 7)]:
        stream = FeatureStream(
            encoder, ready.index, frames=ready.frames, needs=Needs("all", entry=True),
            clip_seconds=ready.config.data.clip_seconds, targets_of=ready.targets_of,
            bad_clips=BadClips(max_bad=0.0),
        )  # fmt: skip
        store = FeatureStore(cache=cache, folder=str(tmp_path / "features"))
        source = open_features(
            stream, ids, batch=batch, store=store, digest="", progress=False
        ).source
        found[cache, batch] = predictions(probes, source.once(ids, batch=batch))
    first = found["off", 1]
    if level == "frame":  # complete windows of 25 ms alone: two clips lose a patch of 20 ms
        assert len(first.targets) == (32 if kind is BAT else 30)
    for other in found.values():
        assert torch.equal(other.targets, first.targets)
        for name, logits in first.logits.items():
            torch.testing.assert_close(other.logits[name], logits, atol=1e-5, rtol=1e-5)
    loader = eval_loader(ready.index, ids, batch=1, sample_rate=SAMPLE_RATE, clip_seconds=1.0)
    for row, batch in enumerate(loader if level == "clip" else ()):
        with torch.no_grad():
            alone = encoder(batch.waves[0, : batch.lengths[0]])
            logits = probes["cgp"].eval()(alone)[0]
        torch.testing.assert_close(first.logits["cgp", ""][row], logits, atol=1e-5, rtol=1e-5)


def test_with_encoder__data_are_opened_once(own, encoder):
    config = own(PLAIN)
    data = open_probing(dataclasses.replace(config, checkpoint=f"{encoder},random"))
    a, b = (with_encoder(data, config, name) for name in (str(encoder), "random:tiny"))
    assert a.index is b.index is data.index
    assert a.splits is b.splits
    assert (a.config.checkpoint, b.config.checkpoint) == (str(encoder), "random:tiny")
    assert a.config.data == b.config.data == data.config.data
    assert (a.backbone.width, b.backbone.width) == (16, 192)


def test_open_probing__data_of_the_first_checkpoint_that_has_some(own, encoder, sounds):
    run = encoder.parent
    words = ["recipe=toy", "task=folder", f"data.root={sounds}", "online.every=0"]
    (run / "config.yaml").write_text(to_yaml(compose(Pretrain, "pretrain", words)))
    config = own(PLAIN)
    config = dataclasses.replace(
        config, task="folder", data=dataclasses.replace(config.data, csv=None),
        checkpoint=f"random,{encoder}",
    )  # fmt: skip
    try:
        with pytest.raises(UserError, match=r"the data has 0 class\(es\)"):  # found, unlabelled
            open_probing(config)
    finally:
        (run / "config.yaml").unlink()


def test_open_probing__edited_csv_is_other_data(own, tmp_path):
    where = f"data.cache={tmp_path}/cache"
    first = open_probing(own(PLAIN, where)).index.hash
    [kept] = (tmp_path / "cache").iterdir()
    stamp = os.stat(kept).st_mtime_ns
    assert open_probing(own(PLAIN, where)).index.hash == first
    edited = open_probing(own(PLAIN.replace("3.flac,b", "3.flac,a"), where)).index
    assert edited.hash != first
    assert edited.labels_per_clip.sum() == 9
    assert list((tmp_path / "cache").iterdir()) == [kept]
    assert os.stat(kept).st_mtime_ns == stamp


def test_open_probing__unreadable_files_are_noted(own, sounds):
    text = PLAIN
    for i in range(6):
        (sounds / f"bad{i}.flac").write_bytes(b"fLaC, but not really")
        text += f"bad{i}.flac,a\n"
    data = open_probing(own(text, "data.max_bad=0.5"))
    [said] = [line for line in data.notices if "cannot be read" in line]
    assert said.startswith("6 of the 15 files of ")
    for i in range(5):
        assert f"line {11 + i}: bad{i}.flac, corrupt" in said
    assert "bad5" not in said
    listed = json.loads(Path(said[said.index("all: ") + 5 : said.index("): left out")]).read_text())
    assert [entry["file"] for entry in listed["left_out"]] == [f"bad{i}.flac" for i in range(6)]
    assert f"\n  {said}" in prepare(own(text, "data.max_bad=0.5")).headline("first")
    assert not any("cannot be read" in line for line in open_probing(own(PLAIN)).notices)


def test_open_probing__mistakes_name_the_remedy(own, sounds):
    with pytest.raises(UserError, match=r"does not exist: name a CSV"):
        open_data("csv", dataclasses.replace(own(PLAIN).data, csv=f"{sounds}/none.csv"))
    with pytest.raises(UserError, match=r"with task=csv: name its CSV, data\.csv=FILE"):
        open_data("csv", dataclasses.replace(own(PLAIN).data, csv=None, root=str(sounds)))
    with pytest.raises(UserError, match="class 'c' has a single clip, so no folds can be drawn"):
        open_probing(own(PLAIN.replace("8.flac,a", "8.flac,c")))
    folds = "".join(f"{i}.flac,{'ab'[i > 4]},{1 + (i > 4)}\n" for i in range(9))
    with pytest.raises(UserError, match="has training clips of 1 class"):
        open_probing(own(f"path,label,fold\n{folds}"))


def test_open_probing__several_labels_a_clip_or_none(own):
    text = PLAIN.replace("label", "labels").replace("4.flac,a", "4.flac,a;c")
    data = open_probing(own(text))
    assert (data.task.multi_label, data.task.metric, data.task.loss) == (True, "map", "bce")
    said = [line for line in data.notices if line.startswith("no training clip where")]
    assert said == [
        "no training clip where they are held out, so chance at best: 'c' (fold "
        f"{next(r.name for r in data.splits if 4 in r.test)})"
    ]
    data = open_probing(own(text.replace("a;c", "").replace("8.flac,a", "8.flac,nan")))
    assert (data.task.multi_label, data.task.loss) == (True, "bce")
    assert "2 of 9 clips have no label: negatives of every class" in data.notices
    assert data.index.targets(4).tolist() == [0, 0]


def test_open_probing__events_at_clip_level(own):
    data = open_probing(own(EVENTS))
    targets = np.stack([data.index.targets(i) for i in range(6)])
    assert targets.tolist() == [[1, 1], [1, 0], [0, 0], [0, 1], [1, 0], [0, 1]]
    assert data.task.multi_label
    assert data.events is None
    assert [r.name for r in data.splits] == ["1", "2"]
    one = "path,label,onset,offset\n" + "".join(f"{i}.flac,{'ab'[i % 2]},0,0.4\n" for i in range(6))
    alone = open_probing(own(one))
    assert (alone.task.multi_label, alone.task.loss) == (False, "ce")
    quiet = open_probing(own(one + "8.flac,,,\n"))  # one label at most, but none of one
    assert (quiet.task.multi_label, quiet.task.loss, quiet.task.metric) == (True, "bce", "map")


def test_prepare__events_at_frame_level(own):
    """Patches of 160 ms; clip 1 of 0.7 s has five, the last from 0.64 s on; clip 0 has four."""
    ready = prepare(own(EVENTS, "level=frame"))
    assert ready.task.multi_label
    assert ready.task.loss == "bce"
    assert ready.targets_of is not None
    loader = eval_loader(ready.index, np.arange(6), batch=6, sample_rate=SAMPLE_RATE,
                         clip_seconds=ready.config.data.clip_seconds)  # fmt: skip
    (batch,) = loader
    targets = ready.targets_of(batch, 7)
    assert targets.shape == (6, 7, 2)
    x = float("nan")
    torch.testing.assert_close(
        targets,
        torch.tensor(
            [
                [[1, 0], [0, 0], [0, 1], [0, 0], [x, x], [x, x], [x, x]],
                [[0, 0], [0, 0], [1, 0], [1, 0], [1, 0], [x, x], [x, x]],
                [[0, 0]] * 7,
                [[0, 1], [0, 1], [0, 1], [0, 1], [x, x], [x, x], [x, x]],
                [[0, 0]] * 5 + [[x, x]] * 2,
                [[0, 0]] * 4 + [[0, 1]] * 3,
            ]
        ),
        equal_nan=True,
    )
    assert ready.notices[-1].startswith("1 event(s) begin and end between the starts of two")


def test_frame_targets__digest_follows_an_edited_onset(own):
    before = prepare(own(EVENTS, "level=frame"))
    after = prepare(own(EVENTS.replace("0.3,0.9", "0.2,0.9"), "level=frame"))
    assert before.index.hash == after.index.hash
    assert before.targets_of.digest != after.targets_of.digest
    assert before.targets_of.digest == prepare(own(EVENTS, "level=frame")).targets_of.digest


@pytest.mark.parametrize("word", ["data.roll=true", "pad_offset=random"])
def test_open_probing__what_moves_events_is_refused(own, word):
    with pytest.raises(UserError, match=f"{word} moves clips .* say"):
        open_probing(own(EVENTS, "level=frame", word))
    open_probing(own(EVENTS, word))


def test_window__longer_clips_are_noted(own):
    data = open_probing(own(EVENTS, "level=frame", "data.clip_seconds=0.5", "data.windows=false"))
    said = next(line for line in data.notices if "the window of 0.5 s" in line)
    assert said.startswith("4 of 6 clips are longer")
    assert "only their start is evaluated (the longest: 1 s;" in said
    assert said.endswith("; 1 event(s) begin after it")


def test_check_events__after_the_end_is_an_error(own):
    with pytest.raises(UserError, match=r"1 event.s. begin after .* line 6: onset 300, 3 has 0.5"):
        open_probing(own(EVENTS.replace("b,0,0.5", "b,300,500")))


def test_frame_targets__bounds_belong_to_the_event():
    """As docs/method.md 5: index x 160 ms inside [start, end]; 3 x 160 ms is 0.48 s exactly."""
    events = {"x.y": (Event(0.16, 0.48, ("b",), 2), Event(0.481, 0.639, ("a",), 3))}
    made = FrameTargets(events, labels=["a", "b"], patch_hop_ms=160.0, sample_rate=1000)
    batch = WaveBatch(
        waves=torch.zeros(1, 960), lengths=torch.tensor([800]), targets=torch.zeros(1, 2),
        keys=[escape_key("x.y")], positions=torch.zeros(1), skipped=[],
    )  # fmt: skip
    (targets,) = made(batch, 6)
    assert targets[:5, 1].tolist() == [0, 1, 1, 1, 0]
    assert targets[:5, 0].tolist() == [0] * 5
    assert made.missed == 1
    assert targets[5].isnan().all()  # 0.8 s is the clip's end
    batch.lengths = torch.tensor([801])
    assert made(batch, 6)[0, 5].tolist() == [0, 0]


def test_finetune__fsdp_needs_frames(own, tmp_path):
    words = ["hardware.strategy=fsdp", f"out={tmp_path}/run"]
    with pytest.raises(UserError, match=r"strategy=fsdp .* say frames=NUMBER"):
        finetune(own(PLAIN, *words, schema=Finetune, command="finetune"))
    assert not (tmp_path / "run").exists()


def test_prepare__csv_for_finetuning(own):
    ready = prepare(own(PLAIN, schema=Finetune, command="finetune"))
    assert (ready.task.name, ready.frames) == ("csv", None)
    assert [len(r.train) for r in ready.splits] == [6, 7, 7, 7]
    assert all(r.valid is None for r in ready.splits)
    assert "nothing was selected" in ready.how
