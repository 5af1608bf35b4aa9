"""The commands as a user types them: results, files, and errors without a traceback."""

import json

import pytest
import torch

from bat.cli import finetune, probe
from bat.config.compose import compose
from bat.config.schema import Finetune, Probe
from bat.encoders.bat import BAT
from bat.eval.heads import load_head
from bat.types import Grid
from bat.weights import export

QUICK = ["train.steps=3", "train.log_every=2", "log.progress=false"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    torch.manual_seed(0)
    model = BAT(width=16, depth=2, heads=2, grid=Grid(13, 8))
    folder = tmp_path_factory.mktemp("runs") / "pretrain-toy"
    export(
        folder / "export",
        backbone="bat",
        encoder=model.config(),
        weights={"student": model.state_dict()},
        meta={},
    )
    return folder


@pytest.fixture
def words(run, tmp_path, tmp_path_factory, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cache = tmp_path_factory.getbasetemp() / "shards"
    return ["recipe=toy", f"checkpoint={run}", f"data.cache={cache}", *QUICK]


def test_probe__prints_a_table_and_leaves_these_files(words, tmp_path, capsys):
    assert probe.main([*words, "--method", "cgp,linear"]) == 0
    printed = capsys.readouterr().out
    for part in ("cgp ", "linear ", "fold 2", "mean ± std", "block  2", "after the last step",
                 "pretrain-toy,random", "bat-finetune recipe=toy"):  # fmt: skip
        assert part in printed, part
    out = tmp_path / "runs/probe-toy-pretrain-toy-cgp+linear"
    found = {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()}
    name = "pretrain-toy"
    heads = {f"heads/{name}/{m}-{k}-0/{f}" for m in ("cgp", "linear") for k in (1, 2)
             for f in ("config.json", "model.safetensors")}  # fmt: skip
    plots = {f"plots/{p}.png" for p in ("comparison", "gates", "attention-sinks", "norms-ranks")}
    own = {f"plots/{name}/{p}.png" for p in ("layer-gates", "folds", "prototype-maps-cgp")}
    assert found == heads | plots | own | {
        "config.yaml", "metrics.jsonl", "results.jsonl", "summary.json", "train.log",
        f"diagnostics/{name}.json", f"diagnostics/{name}-features.json"}  # fmt: skip
    summary = json.loads((out / "summary.json").read_text())
    results = summary["encoders"][name]["results"]
    assert set(results) == {"cgp", "linear"}
    assert {"accuracy", "map"} <= set(results["cgp"]["mean"])
    assert sum(results["cgp"]["gate"]["1-0"]) == pytest.approx(1)
    low, high = results["cgp"]["interval"]
    assert low <= results["cgp"]["mean"]["accuracy"] <= high
    assert len(summary["encoders"][name]["diagnostics"]["rank"]["patches"]) == 2
    head, config = load_head(out / f"heads/{name}/cgp-2-0")
    assert head.prototypes.shape == (64, 16)
    assert len(config["labels"]) == 5
    rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert [(r["method"], r["fold"]) for r in rows] == [
        ("cgp", "1"), ("linear", "1"), ("cgp", "2"), ("linear", "2")]  # fmt: skip
    assert "loss" in json.loads((out / "metrics.jsonl").read_text().splitlines()[0])


def test_probe__cached_features_equal_streamed_ones(words, tmp_path):
    results = []
    for name in ("disk", "off"):
        own = [*words, "methods=[cgp]", f"out={tmp_path / name}", f"features.cache={name}",
               f"features.folder={tmp_path}/features", "folds=[1]"]  # fmt: skip
        assert probe.main(own) == 0
        summary = json.loads((tmp_path / name / "summary.json").read_text())
        (entry,) = summary["encoders"].values()
        assert entry["features"]["cache"] == name
        results.append(entry["results"]["cgp"])
    for other in results[1:]:
        gate = other["gate"]["1-0"]
        assert results[0]["gate"]["1-0"] == pytest.approx(gate, abs=1e-5)
        assert results[0]["mean"] == pytest.approx(other["mean"])


def test_probe__clips_at_random_offsets_are_streamed(words, tmp_path):
    own = ["pad=waveform", "pad_offset=random", "data.clip_seconds=2.05", "methods=[linear]"]
    words = [w for w in words if not w.startswith("data.clip_seconds")]
    assert probe.main([*words, *own, f"out={tmp_path}/run", "folds=[1]"]) == 0
    (entry,) = json.loads((tmp_path / "run/summary.json").read_text())["encoders"].values()
    assert entry["features"]["cache"] == "off"
    assert "pad_offset=random" in entry["features"]["why"]


def test_probe__frame_level_of_the_random_baseline(words, run, capsys):
    own = [w for w in words if not w.startswith("checkpoint=")]
    control = f"checkpoint=random:{run}"
    assert probe.main([*own, control, "level=frame", "folds=[1]", "--method=lcgp,protobin"]) == 0
    captured = capsys.readouterr()
    assert "averaged over time" in captured.err
    assert "checkpoint=random:random" not in captured.out


@pytest.mark.parametrize("command", [probe, finetune])
def test_dry_run__writes_nothing(words, tmp_path, capsys, command):
    assert command.main([*words, "--dry-run"]) == 0
    assert "dry run: nothing was trained" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_finetune__prints_a_table_and_leaves_these_files(words, tmp_path, capsys):
    assert finetune.main([*words, "train.save_every=2", "folds=[2]"]) == 0
    printed = capsys.readouterr().out
    for part in ("linear ", "fold 2", "after the last step", "fold-2/export", "bat-probe recipe"):
        assert part in printed, part
    out = tmp_path / "runs/finetune-toy-pretrain-toy"
    found = {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()}
    assert found == {
        "config.yaml", "summary.json", "train.log", "plots/folds.png",
        "fold-2/checkpoints/last.ckpt", "fold-2/checkpoints/step-00000003.ckpt",
        "fold-2/export/config.json", "fold-2/export/model.safetensors",
        "fold-2/head/config.json", "fold-2/head/model.safetensors",
        "fold-2/metrics.jsonl", "fold-2/plots/curves.png", "fold-2/result.json",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("command", "own", "said"),
    [
        (probe, ["checkpoint=null"], "no checkpoint given"),
        (probe, ["methods=[]"], "methods is empty"),
        (probe, ["methods=[mhca]", "level=frame"], "probe mhca is not defined at frame level"),
        (probe, ["methods=[cgp,cgp]"], "names a probe twice"),
        (probe, ["task=esc10", "data.shards=SHARDS"], "'esc10' has 10 classes, the data has 5"),
        (probe, ["hardware.devices=2"], "runs on one device"),
        (probe, ["log.wandb=offline"], "log.wandb is for"),
        (probe, ["data.clip_seconds=3"], "makes 301 frames, more than frames=208"),
        (probe, ["pad_offset=random"], "say pad=clip or pad=waveform"),
        (finetune, ["statistics=esc50"], "(LogMel) uses none"),
        (probe, ["heads=3"], "heads=3"),
        (probe, ["task=esc50", "data.clip_seconds=5"], "no data given for task 'esc50'"),
        (finetune, ["loss=mse"], "'loss=mse'"),
        (finetune, ["checkpoint=random:Q"], "neither a run, a model fragment"),
        (finetune, ["drop_path=2"], "drop_path=2.0 must lie in [0, 1)"),
        (finetune, ["augment.roll=true"], "unknown key 'augment.roll'"),
    ],
)
def test_mistakes__are_named_without_a_traceback(words, capsys, command, own, said):
    merged = dict(w.split("=", 1) for w in [*words, *own])
    merged = {k: _shards(words) if v == "SHARDS" else v for k, v in merged.items()}
    assert command.main([f"{k}={v}" for k, v in merged.items()]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert "Traceback" not in error


def _shards(words) -> str:
    from tests.toy import make_toy_shards

    cache = next(w.removeprefix("data.cache=") for w in words if w.startswith("data.cache="))
    return str(make_toy_shards(f"{cache}/toy"))


def test_recipes__hold_the_papers_constants():
    as20k = compose(Probe, "probe", ["recipe=as20k"])
    optim = as20k.optim
    assert (as20k.train.steps, as20k.data.batch, optim.lr, optim.warmup_steps) == (
        20_000, 48, 1e-3, 500)  # fmt: skip
    assert (optim.weight_decay, optim.betas, as20k.head.dropout) == (0.05, [0.9, 0.999], 0.2)
    assert round(as20k.data.clip_seconds * 16000) == 163_680
    assert (as20k.pad, as20k.pad_offset, as20k.data.roll) == ("waveform", "random", True)
    esc50 = compose(Probe, "probe", ["recipe=esc50"])
    assert (esc50.train.steps, esc50.optim.warmup_steps, esc50.optim.weight_decay) == (
        4_000, 400, 0.2)  # fmt: skip
    assert esc50.head.prototypes == 10_000
    tuned = compose(Finetune, "finetune", ["recipe=as20k"])
    assert (tuned.pad, tuned.pad_offset, tuned.data.roll) == ("waveform", "random", True)
    assert (tuned.train.steps, tuned.data.batch, tuned.optim.lr, tuned.optim.warmup_steps) == (
        40_000, 48, 5e-5, 4_000)  # fmt: skip
    assert (tuned.optim.layer_decay, tuned.drop_path, tuned.optim.betas) == (
        0.75, 0.1, [0.9, 0.95])  # fmt: skip
    augment = tuned.augment
    assert (augment.mixup_p, augment.mixup_alpha) == (0.9, 0.8)
    assert (augment.spec_freq, augment.spec_time, augment.spec_repeats) == (16, 64, 2)
    esc = compose(Finetune, "finetune", ["recipe=esc50"])
    assert (esc.augment.noise_p, esc.augment.mixup_p) == (0.3, 0)
    assert (esc.augment.time_roll, esc.data.roll) == (True, False)
    assert (esc.augment.spec_freq, esc.augment.spec_time, esc.augment.spec_repeats) == (16, 32, 1)
    assert (esc.train.steps, esc.optim.lr, esc.optim.warmup_steps) == (4_000, 5e-5, 400)


def test_probe__more_methods_seeds_and_encoders_are_added(words, tmp_path, monkeypatch):
    from bat.eval import search as selection

    trained = []
    fit = selection.fit

    def spy(trainings, *args, **words):
        trained.append(sorted({(t.method, t.seed) for t in trainings}))
        return fit(trainings, *args, **words)

    monkeypatch.setattr(selection, "fit", spy)
    words = [*words, f"out={tmp_path}/run", "folds=[1]"]
    assert probe.main([*words, "--method", "linear"]) == 0
    first = json.loads((tmp_path / "run/summary.json").read_text())
    assert probe.main([*words, "--method", "linear,mlp", "--seeds", "2"]) == 0
    own = [w + ",random" if w.startswith("checkpoint=") else w for w in words]
    assert probe.main([*own, "--method", "linear,mlp", "--seeds", "2"]) == 0
    everything = [("linear", 0), ("linear", 1), ("mlp", 0), ("mlp", 1)]
    assert trained == [[("linear", 0)], everything[1:], everything]
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert list(summary["encoders"]) == ["pretrain-toy", "random-pretrain-toy"]
    old, new = (s["encoders"]["pretrain-toy"]["results"]["linear"] for s in (first, summary))
    assert new["folds"]["1"]["0"] == old["folds"]["1"]["0"]
    assert new["std_over"] == "seeds"
    assert summary["seconds"] >= first["seconds"]
    assert summary["precision"] == "32-true"
    assert summary["unfinished"] == []
    for entry in summary["encoders"].values():  # also of the one that had nothing left to do
        assert entry["features"]["cache"] == "memory"
        assert entry["bad_clips"]["seen"] > 0
    assert len(summary["ranking"]) == 4
    assert len(summary["differences"]) == 5  # 3 to the best, 1 within random, 1 gain more
    assert probe.main([*words, "--method", "linear,mlp"]) == 0  # what is asked for now, no more
    less = json.loads((tmp_path / "run/summary.json").read_text())
    means = {m: e["mean"]["accuracy"] for m, e in
             less["encoders"]["pretrain-toy"]["results"].items()}  # fmt: skip
    (apart,) = less["differences"]
    assert apart["difference"] == pytest.approx(max(means.values()) - min(means.values()))
    assert probe.main([*own, "--method", "linear,mlp", "--seeds", "2", "optim.lr=0.5"]) == 2
    assert probe.main([*own, "--method", "linear,mlp", "--seeds", "2", "data.batch=2"]) == 2


def test_probe__without_saved_heads_cgp_is_still_the_one_drawn(words, tmp_path):
    own = [*words, f"out={tmp_path}/run", "folds=[1]", "heads_of=none"]
    own += ["--method", "protobin,cgp"]
    assert probe.main(own) == 0
    drawn = [p.name for p in (tmp_path / "run/plots/pretrain-toy").glob("prototype-maps-*")]
    assert drawn == ["prototype-maps-cgp.png"]
    assert not (tmp_path / "run/heads").exists()


def listed(folder, labels):
    """A CSV of four toy clips with these labels."""
    from bat.data.toy import make_toy

    make_toy(folder / "toy")
    clips = sorted((folder / "toy" / "audio").iterdir())[:4]
    lines = [f"{f},{x},{i // 2 + 1}\n" for i, (f, x) in enumerate(zip(clips, labels, strict=True))]
    csv = folder / f"{labels}.csv"
    csv.write_text("path,label,fold\n" + "".join(lines))
    return f"data.csv={csv}"


@pytest.mark.parametrize("command", [probe, finetune])
def test_other_data__are_refused_and_the_first_run_stays(words, tmp_path, capsys, command):
    own = [*words, f"out={tmp_path}/run", "folds=[1]"]
    assert command.main([*own, listed(tmp_path, "abab")]) == 0
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    assert command.main([*own, listed(tmp_path, "abba")]) == 2
    assert "other data" in capsys.readouterr().err
    found = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    assert found == before
    assert command.main([*own, listed(tmp_path, "abab")]) == 0
    assert capsys.readouterr().err.startswith("nothing to do")


def test_mistakes__leave_no_folder_behind(words, tmp_path, run):
    bad = ["--method=mhca", "head.attention_heads=5", f"out={tmp_path}/runs/new"]
    assert probe.main([*words, *bad]) == 2
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / "config.yaml").write_text("")
    own = [w for w in words if not w.startswith(("checkpoint=", "data.cache="))]
    own += [f"checkpoint={tmp_path}/unfinished", f"data.cache={tmp_path}/cache"]
    for command in (probe, finetune):
        assert command.main([*own, listed(tmp_path, "abab")]) == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["abab.csv", "toy", "unfinished"]


def test_probe__lines_of_a_run_that_was_cut_off_are_not_repeated(words, tmp_path):
    out = tmp_path / "out"
    call = [*words, f"out={out}", "methods=[linear,cgp]"]
    assert probe.main(call) == 0
    metrics, results = out / "metrics.jsonl", out / "results.jsonl"
    whole = metrics.read_text().splitlines()
    kept = [line for line in results.read_text().splitlines() if json.loads(line)["fold"] == "1"]
    results.write_text("\n".join(kept) + "\n")  # as after a kill in the second fold
    (out / "summary.json").unlink()
    assert probe.main(call) == 0
    assert sorted(metrics.read_text().splitlines()) == sorted(whole)
