"""``pipe:COMMAND``: refused, unless the user says so; then a stream like any other."""

from __future__ import annotations

import io
import os
import shlex
import signal
import tarfile
import time
from collections.abc import Iterator
from multiprocessing import active_children
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bat.audio.decode import encode
from bat.data import pipes
from bat.data.index import open_index
from bat.data.loader import OUTLIVED
from bat.data.pipes import allow_pipes, output_of
from bat.data.sequential import SequentialClips
from bat.data.sequential_data import SequentialData
from bat.data.sources import NotIndexable, RetryPolicy, Shard, find
from bat.data.splits import choose_split
from bat.data.tar_stream import open_stream, stream_members
from bat.errors import UserError
from tests.data.test_heartbeat import until
from tests.data.test_loader import alive, kill_all

WAV = encode(np.ones(1_600, np.float32) * 0.1, sample_rate=16_000, codec="wav")


@pytest.fixture
def allowed() -> Iterator[None]:
    allow_pipes(True)
    yield
    allow_pipes(False)


def tar(path: Path, keys: str) -> Path:
    with tarfile.open(path, "w") as file:
        for key in keys:
            info = tarfile.TarInfo(f"{key}.wav")
            info.size = len(WAV)
            file.addfile(info, io.BytesIO(WAV))
    return path


def taken(source: str, count: int) -> list[str]:
    clips = iter(SequentialClips([source], shuffle_clips=1))
    return [next(clips).key for _ in range(count)]


def test_a_command_is_not_run_unless_the_user_says_so(tmp_path: Path) -> None:
    command = f"pipe:touch {tmp_path}/owned"
    for source in (command, f"PIPE:{command[5:]}", f"{command}::http://h/a.tar"):
        for reading in (find, open_index, SequentialClips):
            with pytest.raises(UserError, match=r"pipe: sources are refused .*--allow-pipe|chain"):
                reading(source)
    with pytest.raises(UserError, match=r"no protocol|unknown protocol|refused"):
        find("Pipe+x:true")
    assert not (tmp_path / "owned").exists()


def test_only_find_makes_a_shard_a_command(tmp_path: Path, allowed: None) -> None:
    """A URL that says ``pipe:`` from elsewhere (a manifest) is no command."""
    assert find("pipe:cat x") == [Shard("pipe:cat x", command=True)]
    assert not Shard(f"pipe:touch {tmp_path}/owned").command
    with (
        pytest.raises((OSError, ValueError)),
        open_stream(Shard(f"pipe:touch {tmp_path}/owned"), RetryPolicy(1, 1.0, 0.0)),
    ):
        pass
    assert not (tmp_path / "owned").exists()


def test_what_a_command_writes_is_read_epoch_after_epoch(tmp_path: Path, allowed: None) -> None:
    path = tar(tmp_path / "a b.tar", "xyz")
    cat = f"pipe:cat {shlex.quote(str(path))}"
    assert taken(cat, 6) == ["x", "y", "z"] * 2
    path.with_suffix(".gz").write_bytes(__import__("gzip").compress(path.read_bytes()))
    assert taken(f"{cat} | gzip -c", 3) == ["x", "y", "z"]
    with pytest.raises(NotIndexable, match=r"^pipe-[0-9a-f]{8} is what a command writes"):
        open_index([cat])
    shards = choose_split(find(cat), "auto", RetryPolicy()).shards
    assert [s.command for s in shards] == [True]


def test_loader_workers_run_the_command(tmp_path: Path, allowed: None) -> None:
    path = tar(tmp_path / "a.tar", "xyz")
    data = SequentialData(
        [f"pipe:cat {path}"],
        batch=3,
        sample_rate=16_000,
        clip_seconds=0.1,
        workers=1,
    )
    batches = iter(data.train_dataloader())
    assert sorted(next(batches).keys) == ["x", "y", "z"]


@pytest.mark.parametrize(
    ("command", "why"),
    [
        ("echo no >&2; echo such file >&2; exit 3", "with exit code 3: such file"),
        ("kill -9 $$", "by signal 9: it said nothing"),
        ("cat TAR; echo lost >&2; exit 1", "with exit code 1: lost"),
        ("head -c 5000 TAR; exit 4", "with exit code 4: it said nothing"),
        ("echo https://u:pa55@h/ >&2; exit 1", r"with exit code 1: https://\*\*\*@h/"),
    ],
)
def test_a_command_that_fails_is_an_error_with_its_last_words(
    tmp_path: Path, allowed: None, command: str, why: str
) -> None:
    path = tar(tmp_path / "a.tar", "xyz")
    clips = SequentialClips([f"pipe:{command.replace('TAR', str(path))}"], shuffle_clips=1)
    if "TAR" not in command:
        with pytest.raises(UserError, match=why):
            next(iter(clips))
        return
    found = iter(clips)
    for _ in range(4):  # beyond the first reading, if there is one
        next(found)
    skipped = clips.take_skipped()
    assert {skip.kind for skip in skipped} == {"unreadable"}
    assert why in skipped[0].why
    assert skipped[0].shard.startswith("pipe-")


def test_a_command_is_killed_with_its_children_when_nobody_reads(tmp_path: Path) -> None:
    command = f"(echo $BASHPID > {tmp_path}/pid; sh -c 'echo $$ > {tmp_path}/child; sleep 100') "
    pieces = output_of(f"{command} & yes; wait")
    assert next(pieces).startswith(b"y\n")
    for _ in range(100):
        if (tmp_path / "child").exists() and (tmp_path / "child").read_text():
            break
        time.sleep(0.05)
    child = int((tmp_path / "child").read_text())
    os.kill(child, 0)
    pieces.close()
    for _ in range(100):
        try:
            state = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            break
        if state == "Z":
            break
        time.sleep(0.05)
    else:
        pytest.fail("the child of the command lives on")


def test_a_command_that_writes_without_end_is_left_at_the_end_of_the_tar(
    tmp_path: Path, allowed: None
) -> None:
    path = tar(tmp_path / "a.tar", "xyz")
    assert taken(f"pipe:cat {path} && yes", 4) == ["x", "y", "z", "x"]


def test_a_command_that_talks_much_about_errors_does_not_stop(allowed: None) -> None:
    pieces = output_of("head -c 3000000 /dev/zero >&2; echo done; echo end >&2; exit 2")
    assert next(pieces) == b"done\n"
    with pytest.raises(OSError, match=r"exit code 2: end$"):
        next(pieces)


def test_a_command_that_stays_after_its_output_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pipes, "LEAVE_SECONDS", 0.2)
    with pytest.raises(OSError, match="does not end"):
        list(output_of("exec >&-; sleep 100"))


def test_a_tar_from_a_command_ends_as_any_other(tmp_path: Path, allowed: None) -> None:
    with open_stream(find(f"pipe:cat {tar(tmp_path / 'a.tar', 'xy')}")[0], RetryPolicy()) as file:
        assert [member.name for member, _ in stream_members(file)] == ["x.wav", "y.wav"]


def test_the_flag_of_the_command_line_is_what_allows_it(
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


def test_a_command_with_a_colon_needs_quotes_of_its_own() -> None:
    from bat.config.compose import compose
    from bat.config.schema import Pretrain

    command = """pipe:curl -H "Accept: a/b" u"""

    def source(word: str) -> str:
        (said,) = compose(Pretrain, "pretrain", ["recipe=toy", word]).data.shards
        return said

    with pytest.raises(
        UserError, match=r"reads `: ` as a mapping, .* data.shards=\"'pipe:COMMAND'"
    ):
        find(source(f"data.shards={command}"))
    assert source(f"data.shards='{command}'") == command


# ---- a command ends with whoever reads it


def stuck(folder: Path) -> SequentialData:
    """A stream whose one worker waits for a command that sleeps, as does a child of it."""
    command = f"echo $$ > {folder}/shell; (sleep 300 & echo $! > {folder}/child; wait); true"
    return SequentialData(
        [f"pipe:{command}"], batch=1, sample_rate=16_000, clip_seconds=0.1, workers=1, split="all"
    )


def gone(pids: list[int], seconds: float) -> bool:
    """Whether processes that are not our children end in time."""
    end = time.monotonic() + seconds
    while any(alive(pid) for pid in pids):
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


def pids_of(folder: Path) -> list[int]:
    def read() -> list[int]:
        files = [folder / "shell", folder / "child"]
        return [int(f.read_text()) for f in files if f.exists() and f.read_text().strip()]

    return until(lambda: len(read()) == 2 and read())


def test_a_command_ends_with_a_killed_worker(tmp_path: Path, allowed: None) -> None:
    before = set(active_children())
    batches: Any = iter(stuck(tmp_path).train_dataloader())
    pids = pids_of(tmp_path)
    kill_all(before)
    assert gone(pids, 5)
    del batches


def test_a_command_ends_with_a_killed_run(tmp_path: Path, allowed: None) -> None:
    run = os.fork()
    if run == 0:
        batches: Any = iter(stuck(tmp_path).train_dataloader())
        time.sleep(60)
        del batches
        os._exit(0)
    pids = pids_of(tmp_path)
    os.kill(run, signal.SIGKILL)
    os.waitpid(run, 0)
    assert gone(pids, 10)


def test_a_command_has_its_signals_as_a_shell_finds_them(tmp_path: Path) -> None:
    """A loader worker ignores those of the run; its command must not."""
    handlers = {number: signal.signal(number, signal.SIG_IGN) for number in OUTLIVED}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2])
    try:
        said = b"".join(output_of("grep -E '^Sig(Blk|Ign)' /proc/self/status"))
        with pytest.raises(OSError, match="by signal 15"):
            list(output_of("kill -TERM $$"))
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert said.split() == [b"SigBlk:", b"0" * 16, b"SigIgn:", b"0" * 16]
