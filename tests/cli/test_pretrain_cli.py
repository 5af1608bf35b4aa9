"""bat-pretrain at the command line: mistakes end in one clear line, exit code 2, no traceback."""

import re
from pathlib import Path

import pytest

from bat.cli.pretrain import main
from bat.errors import UserError
from tests.toy import make_toy_shards

TINY = ["model.width=48", "model.depth=1", "model.heads=2", "objective.decoder_depth=1"]
TINY += ["objective.mask.views=1", "online.every=0", "log.progress=false"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["recipe=as2m"], "no data given for task 'audioset'"),
        (["recipe=esc10", "data.root=nowhere"], "nowhere does not exist"),
        (["recipe=as2m", "data.shards=nowhere.tar"], "nowhere.tar"),
        (["recipe=as2m", "data.shards=[]"], "data.shards"),
        (["recipe=as2m", "data.shards=empty"], "empty"),
        (["recipe=toy", "task=chess"], "chess"),
        (
            ["recipe=toy", "model.width=100", "model.heads=4"],
            "model.width=100 is not a multiple of 12",
        ),
        (["recipe=toy", "frontend.frames=100"], "frontend.frames=100 is not a multiple"),
        (["recipe=toy", "objective.decoder=cnn", "model.width=100"], "is not a multiple of 16"),
        (["recipe=toy", "objective.decoder_width=30"], "objective.decoder_width=30"),
        (["recipe=toy", "frontend.kind=eat", "frontend.hop_length=320"], "hop_length=320"),
        (["recipe=toy", "frontend.statistics=esc50"], "is for the legacy front ends"),
        (["recipe=toy", "online.task=esc50"], "online.task is the task of"),
        (["recipe=toy", "data.root=${nowhere}"], "nowhere"),
        (["recipe=toy", "objective.mask.ratio=0.999"], "keeps 0 of 104 patches"),
        (["recipe=toy", "frontend.kind=eat", "frontend.statistics=mars"], "mars"),
        (["recipe=toy", "out=file"], "file"),
        (["recipe=toy", "data.cache=/dev/null"], "set data.cache to another folder"),
        (["recipe=toy", "data.cache=file/x"], "set data.cache to another folder"),
        (["recipe=toy", "data.cache=/proc/x"], "set data.cache to another folder"),
        (["recipe=esc10", f"data.root={'x' * 300}"], "File name too long: give another file"),
        (["recipe=as2m", f"data.shards={'x' * 300}"], "File name too long: give another file"),
        (["recipe=as2m", "data.shards=shard-00000.tar"], "shard-00000.tar"),
        (["recipe=latin.yaml"], "latin.yaml is not readable YAML in UTF-8"),
    ],
)
def test_mistakes__end_in_one_line_and_code_2(
    folder: Path, capsys: pytest.CaptureFixture[str], words: list[str], expected: str
) -> None:
    (folder / "empty").mkdir()
    (folder / "file").write_text("")
    (folder / "shard-00000.tar").write_bytes(b"this is no archive" * 100)
    (folder / "latin.yaml").write_bytes(b"out: caf\xe9\n")
    assert main(words) == 2
    shown = capsys.readouterr().err
    assert "bat-pretrain: error: " in shown
    assert expected in shown
    assert "Traceback" not in shown
    assert not (folder / "runs" / "pretrain-toy" / "checkpoints").exists()


def test_debug__shows_the_traceback(folder: Path) -> None:
    with pytest.raises(UserError):
        main(["recipe=nope", "--debug"])


def test_print_config__shows_the_resolved_values(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["recipe=toy", "train.steps=7", "--print-config"]) == 0
    shown = capsys.readouterr().out
    assert "steps: 7" in shown
    assert "hop_length: 160" in shown  # a default, written out
    assert not list(folder.iterdir())


def test_bad_clips__are_counted_and_printed(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tars = sorted(make_toy_shards(folder / "toy").glob("*.tar"))
    data = bytearray(tars[0].read_bytes())
    at = data.index(b"fLaC")  # the first clip's audio: its frames become noise
    data[at + 200 : at + 4000] = bytes(range(256)) * 14 + bytes(216)
    tars[0].write_bytes(bytes(data))
    words = ["recipe=toy", f"data.shards={tars[0].parent}", *TINY, "train.steps=4"]
    assert main([*words, "data.max_bad=0.5", "out=run"]) == 0
    log = (folder / "run" / "train.log").read_text()
    counted = re.search(r"(\d+) of (\d+) clips unreadable \((\d+) corrupt\)", log)
    assert counted, log
    bad, seen, corrupt = (int(n) for n in counted.groups())
    assert bad == corrupt == 2  # 20 positions are two epochs of ten clips, one of them bad
    assert seen == 20 + bad
    assert main([*words, "data.max_bad=0.0", "out=strict"]) == 2
    assert "more than max_bad=0" in capsys.readouterr().err
