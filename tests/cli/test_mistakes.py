"""Mistakes of the first hour: each ends in code 2, without a traceback, and says what to type next.

A case is the command as typed, and what its message must name: the value, the key, the remedy.
"""

import errno
import importlib
import shlex
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import bat
from bat.encoders.bat import BAT
from bat.errors import UserError
from bat.eval import run_folder
from bat.tasks.synthetic import write_wav
from bat.train import run_pretrain
from bat.types import Grid
from bat.weights import export

CLIPS = [f"recordings/{('dog', 'cat')[i % 2]}/{i}.wav" for i in range(8)]


def table(path: str, header: str, row: Callable[[int, str], str], clips: list[str] = CLIPS) -> None:
    lines = [header, *(row(i, clip) for i, clip in enumerate(clips))]
    Path(path).write_text("\n".join(lines) + "\n")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Recordings, tables with and without faults, encoders, things that are none of these."""
    here = tmp_path_factory.mktemp("first-hour")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here)
        for i, clip in enumerate(CLIPS):
            write_wav(Path(clip), 0.1 * np.sin(np.arange(8000) * (i + 1) / 50))
        table("labels.csv", "path,label", lambda i, c: f"{c},{'ab'[i % 2]}")
        table("klass.csv", "path,klass", lambda i, c: f"{c},{'ab'[i % 2]}")
        table("names.csv", "name,label", lambda i, c: f"{c},{'ab'[i % 2]}")
        table("paths.csv", "path", lambda i, c: c)
        table("one.csv", "path,label", lambda i, c: f"{c},dog")
        table("gone.csv", "path,label", lambda i, c: f"gone/{i}.wav,{'ab'[i % 2]}")
        table("blank.csv", "path,label", lambda i, c: "", [])
        table("hole.csv", "path,label", lambda i, c: f"{c},{'' if i == 3 else 'ab'[i % 2]}")
        table("semicolon.csv", "path;label", lambda i, c: f"{c};{'ab'[i % 2]}")
        table("fold.csv", "path,label,fold", lambda i, c: f"{c},{'ab'[i % 2]},1")
        table("single.csv", "path,label", lambda i, c: f"{c},{'abbbbbbb'[i]}")
        for name in ("empty", "text", "broken", "full", "unfinished"):
            Path(name).mkdir()
        Path("text/notes.txt").write_text("no audio")
        Path("broken/a.wav").write_bytes(b"nothing" * 9)
        Path("full/thesis.tex").write_text("not a run")
        Path("unfinished/config.yaml").write_text("recipe: toy\n")
        Path("junk.pt").write_bytes(b"nothing" * 99)
        Path("model.onnx").write_bytes(b"nothing" * 99)
        Path("mine.yaml").write_text("use: [model/XXL]\n")
        torch.manual_seed(0)
        model = BAT(width=48, depth=2, heads=2, grid=Grid(13, 8))
        state = {"student": model.state_dict()}
        export(Path("run/export"), backbone="bat", encoder=model.config(), weights=state, meta={})
    return here


@pytest.fixture
def say(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[[str], str]:
    """``say(line)`` runs a command that must fail and returns its message on one line."""
    monkeypatch.chdir(folder)

    def run(line: str) -> str:
        name, *words = shlex.split(line)
        main = importlib.import_module(f"bat.cli.{name.removeprefix('bat-')}").main
        try:
            code = main(words)
        except SystemExit as end:  # argparse
            code = end.code
        said = capsys.readouterr()
        assert code == 2, said
        assert "Traceback" not in said.out + said.err
        assert "error: " in said.err
        return " ".join(said.err.split())

    return run


CASES = {
    # no recipe, no data, no checkpoint
    "bat-pretrain": ["recipe=toy", "data.root=FOLDER"],
    "bat-probe": ["recipe=toy", "data.csv=labels.csv"],
    "bat-probe data.root=recordings": ["recipe=own task=folder"],
    "bat-pretrain recipe=esc10": ["esc10", "data.root=DIR"],
    "bat-probe data.csv=labels.csv": ["checkpoint=RUN", "checkpoint=random"],
    "bat-finetune recipe=toy": ["checkpoint=RUN"],
    "bat-embed recordings --checkpoint run": ["--out FILE|DIR"],
    "bat-embed recordings --out e.npz": ["--checkpoint"],
    # a folder or file that is not there, or not that kind
    "bat-pretrain data.root=recording": ["data.root=recording ", "did you mean recordings?"],
    "bat-pretrain recordings/": ["data.root=recordings/"],
    "bat-pretrain data.root=empty": ["empty has no audio", ".flac", "another folder"],
    "bat-pretrain data.root=text": ["text has no audio", "another folder"],
    "bat-pretrain data.root=broken": ["a.wav", "convert them to WAV or FLAC"],
    f"bat-pretrain data.root={CLIPS[0]}": [CLIPS[0], "name the folder, recordings/dog"],
    "bat-pretrain recipe=esc10 data.root=recordings": ["meta.csv", "give the folder"],
    "bat-pretrain recipe=toy data.shards=recordings": ["bat-shard recordings OUT"],
    "bat-pretrain recipe=toy init=runn": ["init=runn", "did you mean run?"],
    "bat-pretrain recipe=toy checkpoint=run": ["init=CHECKPOINT"],
    "bat-probe recipe=toy checkpoint=runn": ["checkpoint runn", "did you mean run?", "bat runs"],
    "bat-probe recipe=toy checkpoint=empty": ["empty holds no model.safetensors", "bat runs"],
    "bat-probe recipe=toy checkpoint=unfinished": ["unfinished", "same command continues"],
    "bat-probe recipe=toy checkpoint=junk.pt": ["junk.pt", "torch.save its weights alone"],
    "bat-probe recipe=toy checkpoint=model.onnx": ["model.onnx", ".safetensors"],
    "bat-probe recipe=toy checkpoint=random:XL": ["random:XL", "tiny"],
    "bat-probe recipe=toy checkpoint=run weights=teacher": ["teacher", "weights=student"],
    "bat-embed nowhere --checkpoint run --out e.npz": ["nowhere", "name audio files"],
    "bat-embed text --checkpoint run --out e.npz": ["text holds no audio", "another folder"],
    "bat-embed broken --checkpoint run --out e.npz": ["a.wav", "convert them to WAV or FLAC"],
    "bat-embed recordings --checkpoint runn --out e.npz": ["runn", "did you mean run?"],
    "bat-embed recordings --checkpoint run --out no/e.npz": ["no folder no", "make it"],
    "bat-predict recordings --checkpoint run --out p.csv": ["run holds no head", "bat-finetune"],
    "bat-predict recordings --checkpoint runn --out p.csv": ["runn", "did you mean run?"],
    "bat-export onnx runn out": ["runn", "did you mean run?"],
    "bat-export hear unfinished out": ["unfinished", "same command continues"],
    "bat-shard nowhere out": ["nowhere", "give a folder"],
    "bat-shard recordings": ["give OUT", "recordings"],
    "bat-shard verify recordings": ["bat-shard recordings OUT"],
    "bat-runs nowhere": ["nowhere", "bat runs FOLDER"],
    "bat-runs compare run empty": ["run holds no run", "out="],
    "bat-runs report empty": ["empty", "out="],
    "bat-debug empty": ["empty", "nan/STEP", "bat runs"],
    "bat-probe report empty": ["empty has no summary.json", "bat-probe"],
    # labels
    "bat-probe data.csv=label.csv checkpoint=run": ["label.csv", "did you mean labels.csv?"],
    "bat-probe data.csv=klass.csv checkpoint=run": ["klass.csv line 1", "'klass'", "Rename"],
    "bat-probe data.csv=names.csv checkpoint=run": ["names.csv line 1", "'name'", "path, label"],
    "bat-probe data.csv=paths.csv checkpoint=run": ["no column 'label'", "add one"],
    "bat-probe data.csv=one.csv checkpoint=run": ["one class, 'dog'", "add clips of another"],
    "bat-probe data.csv=gone.csv checkpoint=run": ["line 2: 'gone/0.wav'", "Mend the paths"],
    "bat-probe data.csv=blank.csv checkpoint=run": ["blank.csv lists no clips", "give a line"],
    "bat-probe data.csv=hole.csv checkpoint=run": ["hole.csv line 5", "give it one"],
    "bat-probe data.csv=semicolon.csv checkpoint=run": ["semicolons", "save the file with commas"],
    "bat-probe data.csv=fold.csv checkpoint=run": ["fold 1", "another fold", "remove the column"],
    "bat-probe data.csv=single.csv checkpoint=run": ["class 'a'", "add clips"],
    "bat-probe data.csv=recordings checkpoint=run": ["task=folder data.root=recordings"],
    "bat-finetune data.csv=labels.csv checkpoint=run folds=[7]": ["fold 7", "[1, 2, 3, 4]"],
    "bat-shard gone.csv out": ["line 2: 'gone/0.wav'", "Mend the paths"],
    # names and values
    "bat-pretrain recipe=tyo": ["'tyo'", "Did you mean 'toy'?"],
    "bat-pretrain --recipe toy": ["recipe=VALUE"],
    "bat-pretrain recipe=mine.yaml": ["model/XXL", "model/tiny"],
    "bat-pretrain recipe=toy train.step=3": ["'train.step'", "'train.steps'"],
    "bat-pretrain recipe=toy train.steps 3": ["train.steps=VALUE"],
    "bat-pretrain recipe=toy train.steps=many": ["train.steps=many", "Integer"],
    "bat-pretrain recipe=toy train.steps=-3": ["train.steps=-3", "at least 1"],
    "bat-pretrain recipe=toy lr=3": ["'lr'", "'optim.lr'"],
    "bat-pretrain recipe=toy model=XL": ["model/XL", "model/tiny"],
    "bat-pretrain recipe=toy hardware=gpus": ["hardware/gpus", "hardware/gpu"],
    "bat-pretrain recipe=toy objective=mea": ["objective/mea", "objective/mae"],
    "bat-pretrain recipe=toy model.width=50": ["model.width=50", "model.heads=1"],
    "bat-pretrain recipe=toy out=full": ["out=full", "choose another folder"],
    "bat-pretrain recipe=toy out=labels.csv": ["out=labels.csv is a file", "name a folder"],
    "bat-pretrain recipe=toy out=/proc/x": ["out=/proc/x", "choose another"],
    "bat-probe recipe=toy checkpoint=run --method cpg": ["cpg", "did you mean 'cgp'?"],
    "bat-probe recipe=toy checkpoint=run --methods cgp": ["--methods", "Did you mean --method?"],
    "bat-probe recipe=toy checkpoint=run --method cgp mlp": ["--method cgp,mlp"],
    "bat-probe recipe=toy checkpoint=run level=fram": ["level=fram", "frame"],
    "bat-probe recipe=toy checkpoint=run protocol=bta": ["protocol/bta", "protocol/bat"],
    "bat-finetune recipe=toy checkpoint=run method=cpg": ["cpg", "did you mean 'cgp'?"],
    "bat-embed recordings --checkpoint run --out e.h5": ["--out e.h5", ".npz"],
    "bat-embed recordings --checkpoint run --out e.npz --layer 9": ["layer=9", "blocks 1 to 2"],
    "bat-embed recordings --checkpoint run --out e.npz --pool cgp": ["pool=cgp", "head=RUN"],
    "bat-export onx run out": ["onx", "did you mean 'onnx'?"],
    "bat-export hf run full": ["full", "give a new one"],
    "bat-shard recordings out --splits train=0.9,test=0.3": ["1.2", "not to 1"],
    "bat-shard labels.csv out --task esc5": ["esc5", "did you mean 'esc50'?"],
    "bat-bat prob": ["'prob'", "did you mean 'probe'?"],
}


@pytest.mark.parametrize("line", CASES)
def test_mistake__message_names_value_key_and_remedy(say: Callable[[str], str], line: str) -> None:
    said = say(line)
    assert [word for word in CASES[line] if word not in said] == [], said


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a GPU where there is none")
@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("bat-pretrain recipe=toy hardware=gpu", "hardware=cpu"),
        ("bat-finetune recipe=toy checkpoint=run hardware=gpu", "hardware=cpu"),
        ("bat-embed recordings --checkpoint run --out e.npz --device cuda", "say cpu"),
    ],
)
def test_no_gpu__cpu_is_offered(say: Callable[[str], str], line: str, expected: str) -> None:
    assert expected in say(line)


def test_too_little_memory__smaller_settings_are_named(
    say: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(config: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB")

    monkeypatch.setattr(run_pretrain, "Pretraining", full)
    said = say("bat-pretrain recipe=toy")
    assert "9.00 GiB" in said
    assert "too little memory" in said
    assert "data.batch" in said
    assert "model=S" in said


def test_full_disk__is_said(say: Callable[[str], str], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, data: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(run_folder, "write_atomic", full)
    said = say("bat-pretrain recipe=toy out=new")
    assert "out=new" in said
    assert "free some space" in said


def test_run_in_use__names_the_process(say: Callable[[str], str], folder: Path) -> None:
    code = "import sys, pathlib; from bat.lock import hold\n"
    code += "with hold(pathlib.Path('busy')): print(1, flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        other.stdout.readline()
        said = say("bat-pretrain recipe=toy out=busy")
        other.kill()
    assert f"process {other.pid}" in said
    assert "another out=" in said


def test_port_in_use__another_is_named(
    say: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
            monkeypatch.setenv(name, value)
        for name in ("RANK", "LOCAL_RANK", "GROUP_RANK"):
            monkeypatch.setenv(name, "0")
        for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
            monkeypatch.setenv(name, "2")
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "test")
        said = say("bat-pretrain recipe=toy out=ranks hardware=ddp hardware.accelerator=cpu")
    assert f"port {port}" in said
    assert "MASTER_PORT=" in said


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda: bat.load_encoder("runn"), ["runn", "did you mean run?"]),
        (lambda: bat.load_encoder("junk.pt"), ["junk.pt", "torch.save"]),
        (lambda: bat.embed("nowhere.wav", "run"), ["nowhere.wav"]),
        (lambda: bat.embed(np.full((1, 8000), np.nan, np.float32), "run"), ["clip 0", "NaN"]),
        (lambda: bat.embed(["recordings"], "run", level="fram"), ["fram", "frame"]),
        (lambda: bat.predict(["recordings"], "run"), ["run holds no head", "bat-finetune"]),
    ],
    ids=range(6),
)
def test_python__mistake_is_a_user_error(
    folder: Path, monkeypatch: pytest.MonkeyPatch, call: Callable[[], object], expected: list[str]
) -> None:
    monkeypatch.chdir(folder)
    with pytest.raises(UserError) as error:
        call()
    assert [word for word in expected if word not in str(error.value)] == [], error.value
