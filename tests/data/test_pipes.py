"""``pipe:COMMAND``: refused, unless the user says so; then a stream like any other."""

from __future__ import annotations

import gzip
import itertools
import os
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from bat.data import pipes
from bat.data.index import open_index
from bat.data.pipes import allow_pipes, output_of
from bat.data.sequential import SequentialData, open_stream
from bat.data.sources import NotIndexable, RetryPolicy, Shard, find
from bat.errors import UserError
from tests.data.test_sequential import batches, keys
from tests.processes import alive, until
from tests.shard.files import WAV, write_tar


@pytest.fixture
def allowed() -> Iterator[None]:
    allow_pipes(True)
    yield
    allow_pipes(False)


def tar(path: Path, names: str) -> Path:
    return write_tar(path, {f"{name}.wav": WAV for name in names})


def test_find__command_is_not_run_unless_the_user_says_so(tmp_path: Path) -> None:
    command = f"pipe:touch {tmp_path}/owned"
    for source in (command, f"PIPE:{command[5:]}", f"{command}::http://h/a.tar"):
        for reading in (find, open_index):
            with pytest.raises(UserError, match=r"pipe: sources are refused.* say --allow-pipe"):
                reading(source)
    with pytest.raises(UserError, match=r"no protocol|unknown protocol|refused"):
        find("Pipe+x:true")
    assert not (tmp_path / "owned").exists()


def test_find__alone_makes_a_shard_a_command(tmp_path: Path, allowed: None) -> None:
    """A URL that says ``pipe:`` from elsewhere (a manifest) is no command."""
    assert find("pipe:cat x") == [Shard("pipe:cat x", command=True)]
    with (
        pytest.raises((OSError, ValueError)),
        open_stream(Shard(f"pipe:touch {tmp_path}/owned"), RetryPolicy(1, 1.0, 0.0)),
    ):
        pass
    assert not (tmp_path / "owned").exists()


def test_pipe__output_is_read_epoch_after_epoch(tmp_path: Path, allowed: None) -> None:
    path = tar(tmp_path / "a b.tar", "xyz")
    cat = f"pipe:cat {shlex.quote(str(path))}"
    assert keys(batches(cat, shuffle_clips=1), 6) == ["x", "y", "z"] * 2
    path.write_bytes(gzip.compress(path.read_bytes()))
    assert keys(batches(cat, shuffle_clips=1), 3) == ["x", "y", "z"]
    with pytest.raises(NotIndexable, match=r"^pipe-[0-9a-f]{8} is what a command writes"):
        open_index([cat])
    data = SequentialData([cat], batch=3, sample_rate=16_000, clip_seconds=0.1, workers=1)
    assert sorted(next(iter(data.train_dataloader())).keys) == ["x", "y", "z"]


@pytest.mark.parametrize(
    ("command", "why"),
    [
        ("echo no >&2; echo such file >&2; exit 3", "with exit code 3: such file"),
        ("kill -9 $$", "by signal 9: it said nothing"),
        ("cat TAR; echo lost >&2; exit 1", "with exit code 1: lost"),
        ("head -c 5000 TAR; exit 4", "with exit code 4: it said nothing"),
        ("echo https://u:pa55@h/ >&2; exit 1", r"with exit code 1: https://***@h/"),
    ],
)
def test_pipe__failure_is_an_error_with_the_last_words(
    tmp_path: Path, allowed: None, command: str, why: str
) -> None:
    path = tar(tmp_path / "a.tar", "xyz")
    source = f"pipe:{command.replace('TAR', str(path))}"
    if "TAR" not in command:
        with pytest.raises(UserError) as caught:
            next(iter(batches(source)))
        assert why in str(caught.value)
        return
    made = list(itertools.islice(batches(source, shuffle_clips=1), 4))
    ((kind, shard, said),) = {(s.kind, s.shard, s.why) for batch in made for s in batch.skipped}
    assert (kind, shard[:5]) == ("unreadable", "pipe-")
    assert why in said


def test_pipe__endless_output_is_left_at_the_end_of_the_tar(tmp_path: Path, allowed: None) -> None:
    path = tar(tmp_path / "a.tar", "xyz")
    endless = batches(f"pipe:cat {path} && yes", shuffle_clips=1)
    assert keys(endless, 4) == ["x", "y", "z", "x"]


def test_output_of__command_is_killed_with_its_children_when_nobody_reads(tmp_path: Path) -> None:
    command = f"sh -c 'echo $$ > {tmp_path}/child; sleep 100' & yes; wait"
    file = tmp_path / "child"
    with output_of(command) as output:
        assert output.read(2) == b"y\n"
        until(lambda: file.exists() and file.read_text())
        child = int(file.read_text())
        os.kill(child, 0)
    until(lambda: not alive(child))


def test_output_of__much_talk_about_errors_and_a_late_end(monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        pytest.raises(OSError, match=r"exit code 2: end$"),
        output_of("head -c 3000000 /dev/zero >&2; echo done; echo end >&2; exit 2") as output,
    ):
        assert output.read() == b"done\n"
    monkeypatch.setattr(pipes, "LEAVE_SECONDS", 0.2)
    with pytest.raises(OSError, match="does not end"), output_of("exec >&-; sleep 100") as output:
        output.read()


def test_allow_pipe__is_a_flag_of_the_command_line_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from bat.cli.pretrain import main
    from bat.train import run_pretrain

    found: list[str] = []
    monkeypatch.setattr(
        run_pretrain,
        "pretrain",
        lambda config, **_: found.extend(map(str, find(config.data.shards[0]))),
    )
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"data: {{shards: ['pipe:touch {tmp_path}/owned']}}\n")
    try:
        assert main([f"recipe={recipe}", "--allow-pipe"]) == 0
        assert len(found) == 1
        assert main([f"recipe={recipe}"]) == 2
        assert "say --allow-pipe" in capsys.readouterr().err
        recipe.write_text(recipe.read_text() + "allow_pipe: true\n")
        assert main([f"recipe={recipe}"]) == 2
        assert "unknown key 'allow_pipe'" in capsys.readouterr().err
    finally:
        allow_pipes(False)
    assert not (tmp_path / "owned").exists()


def test_pipe__command_with_a_colon_needs_quotes_of_its_own() -> None:
    from bat.config.compose import compose
    from bat.config.schema import Pretrain

    command = """pipe:curl -H "Accept: a/b" u"""

    def source(word: str) -> str:
        (said,) = compose(Pretrain, "pretrain", ["recipe=toy", word]).data.shards
        return said

    with pytest.raises(UserError, match=r"reads `: ` as a mapping, .* data.shards=\"'pipe:COMM"):
        find(source(f"data.shards={command}"))
    assert source(f"data.shards='{command}'") == command
