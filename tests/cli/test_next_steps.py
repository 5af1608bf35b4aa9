"""Every command that a finished command advises runs as it is printed."""

import re
import shlex
from pathlib import Path

import pytest
import torch

from bat.audio.encode import encode
from bat.cli import finetune, pretrain, probe, shard
from bat.config.compose import compose, to_yaml, words_of
from bat.config.schema import Finetune, Pretrain, Probe
from bat.data.toy import SAMPLE_RATE, toy_wave
from bat.encoders.bat import BAT
from bat.errors import UserError
from bat.eval.next_steps import after_pretraining
from bat.eval.run_folder import open_data
from bat.train.callbacks import Metrics
from bat.train.online import OnlineProbe
from bat.train.pretrain_data import open_stream
from bat.types import Grid
from bat.weights import export
from tests.toy import make_toy_shards

MAINS = {
    "bat-pretrain": pretrain.main,
    "bat-probe": probe.main,
    "bat-finetune": finetune.main,
}
QUICK = ["train.steps=2", "train.log_every=2", "log.progress=false"]


def advised(printed: str) -> list[list[str]]:
    """The commands below ``Next:``, as a shell takes them apart."""
    lines = printed.partition("Next:")[2].splitlines()
    found = [shlex.split(line, comments=True) for line in lines if line.strip()]
    return [words for words in found if words]


def runs(words: list[str]) -> None:
    """``words`` as a command; with ``--dry-run``, which opens and builds all but trains nothing."""
    assert "RECIPE" not in " ".join(words)
    dry = [] if words[1] == "report" else ["--dry-run"]
    assert MAINS[words[0]]([*words[1:], *dry]) == 0, words


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def encoder_in(folder: Path, *, frames: int = 208) -> Path:
    torch.manual_seed(0)
    model = BAT(width=16, depth=2, heads=2, grid=Grid(frames // 16, 8))
    export(
        folder / "export",
        backbone="bat",
        encoder=model.config(),
        weights={"student": model.state_dict()},
        meta={},
    )
    return folder


def sounds(folder: Path, *, count: int = 10, below: str = "{kind}") -> Path:
    """Clips of half a second in a sub-folder a kind."""
    for i in range(count):
        kind = ("tone", "noise")[i % 2]
        file = folder / below.format(kind=kind, split=("train", "test")[i // 2 % 2]) / f"{i}.flac"
        file.parent.mkdir(parents=True, exist_ok=True)
        wave = toy_wave(kind, seed=0, number=i, seconds=0.5)
        file.write_bytes(encode(wave, sample_rate=SAMPLE_RATE, codec="flac"))
    return folder


def test_after_pretraining__probe_and_finetune_run(here, capsys):
    small = ["model.width=48", "model.depth=1", "model.heads=2", "objective.decoder_depth=1"]
    words = ["recipe=toy", *small, "objective.mask.views=1", "online.every=0", "out=a run", *QUICK]
    assert pretrain.main([*words, "data.cache=my shards"]) == 0
    found = advised(capsys.readouterr().out)
    assert [words[0] for words in found] == ["bat-probe", "bat-finetune"]
    for words in found:
        assert "data.cache=my shards" in words
        runs(words)


@pytest.mark.parametrize(
    ("below", "labelled"), [("{kind}", True), ("{split}/{kind}", True), ("", False)]
)
def test_after_pretraining__on_a_folder_nothing_that_fails_is_advised(here, below, labelled):
    words = ["recipe=esc10", "task=folder", f"data.root={sounds(here / 'own', below=below)}"]
    config = compose(Pretrain, "pretrain", words)
    run = encoder_in(here / "run", frames=512)
    (run / "config.yaml").write_text(to_yaml(config))
    task, index = open_data("folder", config.data, progress=False)
    lines = after_pretraining(config, run, task, index)
    found = advised("\n".join(["Next:", *lines]))
    assert len(found) == (2 if labelled else 0)
    for command in found:
        assert "task=folder" in command
        runs(command)
    assert labelled or "data.csv" in lines[0]


def test_after_probing__the_baseline_is_of_the_same_level(here, capsys):
    clips = [f.as_posix() for f in sorted(sounds(here / "in").rglob("*.flac"))]
    lines = [f"{f},{'ab'[i % 2]},0.1,0.3,{i // 2 % 2 + 1}\n" for i, f in enumerate(clips)]
    (here / "my events.csv").write_text("path,label,onset,offset,fold\n" + "".join(lines))
    run = encoder_in(here / "runs" / "pretrain-a")
    words = ["recipe=toy", "data.csv=my events.csv", f"checkpoint={run}", *QUICK]
    assert probe.main([*words, "level=frame", "--method", "lcgp"]) == 0
    control, report, tuned = advised(capsys.readouterr().out)
    assert report[:2] == ["bat-probe", "report"]
    assert {"level=frame", "data.csv=my events.csv", "--method=lcgp"} <= set(control)
    assert "level=frame" in tuned
    for command in (control, report, tuned):
        runs(command)
    capsys.readouterr()
    assert finetune.main([*words, "--dry-run"]) == 0
    assert finetune.main([*words, "folds=[1]"]) == 0
    captured = capsys.readouterr()
    assert "onsets and offsets of 10 event(s) are not used" in captured.err
    (compared,) = advised(captured.out)
    assert {"data.csv=my events.csv", "folds=[1]"} <= set(compared)
    runs(compared)
    (out,) = here.glob("runs/finetune-*")
    places = re.findall(re.escape(str(out.relative_to(here))) + r"[\w/.-]*", captured.out)
    assert len(places) > 6
    assert all(Path(place).exists() for place in places), places


def test_after_probing__fine_tuning_is_told_the_same_data(here, capsys):
    run = encoder_in(here / "run")
    shards = make_toy_shards(here / "toy")
    words = ["recipe=toy", f"data.shards={shards}", "data.cache=elsewhere", *QUICK]
    assert probe.main([*words, f"checkpoint={run},random:{run}", "--method=linear"]) == 0
    found = advised(capsys.readouterr().out)
    assert [words[:2] for words in found] == [
        ["bat-probe", "report"],
        ["bat-finetune", "recipe=toy"],
    ]
    assert {f"data.shards=[{shards}]", "data.cache=elsewhere"} <= set(found[1])
    for command in found:
        runs(command)


@pytest.mark.parametrize(
    ("below", "flags"),
    [("{kind}", ["--folds=2"]), ("", []), ("{split}/{kind}", []), (None, [])],
)
def test_after_sharding__a_small_set_gets_a_small_pretraining(here, capsys, below, flags):
    source = sounds(here / "in", below="{kind}" if below is None else below)
    assert shard.main([str(source), "my shards", "--jobs=1", *flags]) == 0
    if below is None:
        assert shard.main(["my shards", "--index-dir=tables"]) == 0
    line = next(x for x in reversed(capsys.readouterr().out.splitlines()) if x[:5] == "next ")
    command, *words = shlex.split(line[10:])
    assert command == "bat-pretrain"
    config = compose(Pretrain, "pretrain", words)
    assert config.model.width == 192
    stream = open_stream(config)
    metrics = Metrics(every=1, progress=False)
    if config.online.every:
        probes = OnlineProbe(
            config, task=stream.task, index=stream.index, out=here, metrics=metrics
        )
        assert probes.splits
    assert bool(config.online.every) == (below != "")


def test_after_sharding__a_large_set_gets_the_papers_pretraining():
    from collections import Counter

    import numpy as np

    from bat.shard.info import Summary

    large = Summary(9, 9, 227_000, [], np.zeros(0, np.int64), Counter({0: 227_000}), np.ones(1))
    said = shard.next_command(large, Path("out"), "audioset")
    assert said == "bat-pretrain recipe=as2m data.shards=out"
    assert compose(Pretrain, "pretrain", shlex.split(said)[1:]).model.width == 768


@pytest.mark.parametrize(
    ("schema", "command", "words"),
    [
        (Probe, "probe", ["recipe=esc50", "protocol=unmute", "protocol.sobol=8", "level=frame"]),
        (Probe, "probe", ["recipe=own", "data.csv='its, a: b.csv'", "methods=[cgp,linear]"]),
        (Probe, "probe", ["recipe=esc10", "hardware=cpu", "data.root='007'", "checkpoint=A,B"]),
        (Pretrain, "pretrain", ["recipe=as2m", "model=S", "hardware=ddp", "data.shards=[a,x y]"]),
        (Finetune, "finetune", ["recipe=own", "optim.lr=1e-6", "head.per_class=3"]),
        (Finetune, "finetune", ["recipe=toy"]),
    ],
)
def test_words_of__make_the_configuration_again(schema, command, words):
    config = compose(schema, command, words)
    again = words_of(config, command)
    assert again is not None
    assert len(again) <= len(words)
    assert compose(schema, command, again) == config
    config.recipe = "given-by-a-path"
    assert words_of(config, command) is None


def test_flags__a_misspelt_one_is_named(capsys):
    with pytest.raises(SystemExit, match="2"):
        probe.main(["recipe=toy", "--metod", "cgp"])
    assert "Did you mean --method?" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        shard.main(["a", "b", "--clip-second=3", "--sample-rat=8", "--shard_mb=3"])
    assert "Did you mean --shard-mb?" in capsys.readouterr().err


def test_checkpoint__a_finished_fine_tuning_is_one(here):
    import bat

    (here / "tuned").mkdir()
    (here / "tuned" / "config.yaml").write_text("")
    with pytest.raises(UserError, match="has not finished"):
        bat.load_encoder("tuned")
    encoder_in(here / "tuned" / "fold-2")
    assert bat.load_encoder("tuned").width == 16
    encoder_in(here / "tuned" / "fold-1")
    with pytest.raises(UserError, match=r"tuned/fold-1/export, tuned/fold-2/export"):
        bat.load_encoder("tuned")
