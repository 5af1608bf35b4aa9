"""The run folder: whose it is, other settings, leftovers."""

import json
import logging
from pathlib import Path

import pytest

from bat.config.compose import compose
from bat.config.schema import Finetune, Probe
from bat.data.bad_clips import BadClips, merged_states
from bat.shapes import Skipped, UserError, WaveBatch
from bat.train.lock import LOCK, hold
from bat.train.run_folder import run_folder


def test_other_settings_are_refused_unless_forced_and_safe_ones_are_told(
    small, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "run"
    with run_folder(small(out=out), out) as begin:
        assert (out / LOCK).exists()
        begin()
    logging.getLogger("bat").propagate = True
    with (
        pytest.raises(UserError, match=r"(?s)- optim.lr: 0.001.*\+ optim.lr: 0.5.*--force"),
        run_folder(small("optim.lr=0.5", out=out), out),
    ):
        pass
    words = ["optim.lr=0.5", "health.stall_seconds=60", "train.save_minutes=5"]
    with run_folder(small(*words, out=out), out, force=True) as begin:
        begin()
        assert "lr: 0.5" in (out / "config.yaml").read_text()
    assert "by --force" in caplog.text
    with run_folder(small("optim.lr=0.5", out=out), out):  # health and save_minutes are safe
        pass
    assert not (out / LOCK).exists()


def test_a_folder_in_use_is_refused(small, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with hold(out), pytest.raises(UserError, match="in use"), run_folder(small(out=out), out):
        pass
    assert not (out / "config.yaml").exists()


def test_leftovers_of_a_first_start_that_was_cut_off_do_not_bar_the_folder(
    small, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    out.mkdir()
    for name in (".config.yaml.host-1-ab.tmp", LOCK, "train.log"):
        (out / name).write_text("")
    with run_folder(small(out=out), out) as begin:
        begin()
    assert (out / "config.yaml").is_file()


def test_credentials_are_not_written_down_and_a_renewed_signature_is_no_difference(
    small, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    for signature in ("aaaa1111", "bbbb2222"):
        url = f"https://me:pw123@host/a.tar?X-Amz-Signature={signature}"
        with run_folder(small(f"data.shards='{url}'", out=out), out) as begin:
            begin()
            text = (out / "config.yaml").read_text()
        assert signature not in text
        assert "pw123" not in text
        assert "host/a.tar" in text


def test_counts_of_several_processes_add_up() -> None:
    states = []
    for rank in range(2):
        clips = BadClips()
        skipped = [Skipped(f"k{rank}", "s.tar", "corrupt", "why", 0)]
        clips.add(WaveBatch(None, None, None, ["a", "b"], None, skipped))
        states.append(clips.state_dict())
    merged = json.loads(json.dumps(merged_states(states)))
    assert merged["seen"] == 6
    assert merged["kinds"] == {"corrupt": 2}
    assert merged["shards"] == {"s.tar": 2}
    assert set(merged["keys"]) == {"k0", "k1"}
    assert merged_states(states[:1]) == states[0]


def test_settings_that_would_be_ignored_are_refused() -> None:
    with pytest.raises(UserError, match=r"data\.global_batch is for bat-pretrain"):
        compose(Probe, "probe", ["recipe=toy", "data.global_batch=8"])
    with pytest.raises(UserError, match=r"health\.collapse is for bat-pretrain"):
        compose(Finetune, "finetune", ["recipe=toy", "health.collapse=stop"])
