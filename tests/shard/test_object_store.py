"""Shards on a real S3 server: written in parts, verified, read; nothing half there, no secrets."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import boto3
import pytest

from bat.cli import shard as cli
from bat.data.index import open_index
from bat.data.manifest import Manifest
from bat.data.store import Store
from bat.errors import UserError
from bat.shard.verify import verify
from bat.tasks.base import Row
from tests.shard.files import noise, recording
from tests.stores import BUCKET, KEYS


@pytest.fixture
def rows(tmp_path: Path) -> list[Row]:
    made = [recording(tmp_path / f"in/{i:02d}.wav", noise(i, 0.05)) for i in range(8)]
    made[4].path.write_bytes(b"no audio")
    return made


def objects(prefix: str) -> dict[str, bytes]:
    client = boto3.client("s3")
    found = client.list_objects_v2(Bucket="clips", Prefix=prefix).get("Contents", [])
    return {
        entry["Key"].removeprefix(prefix): client.get_object(Bucket="clips", Key=entry["Key"])[
            "Body"
        ].read()
        for entry in found
    }


def test_bat_shard__parts_write_to_a_bucket_what_one_process_writes_here(
    s3: str, rows: list[Row], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    here, there = tmp_path / "here", f"{BUCKET}/set"
    flags = ["--shard-mb", "0.011", "--jobs", "1"]
    assert cli.main([str(tmp_path / "in"), str(here), *flags]) == 0
    call = [str(tmp_path / "in"), there, *flags]
    assert cli.main([*call, "--part", "2/2"]) == 0
    with pytest.raises(UserError, match="unfinished"):
        open_index(there, cache=tmp_path / "cache")
    assert cli.main([*call, "--part", "1/2"]) == 0
    assert "clips     7 " in capsys.readouterr().out
    found = objects("set/")
    assert {name for name in found if not name.endswith(".npz")} == {
        "manifest.json",
        *(f"shard-0000{i}.tar" for i in range(3)),
    }
    for name in found:
        if name.endswith(".tar"):
            assert found[name] == (here / name).read_bytes()
    local, remote = Manifest.load(here), Manifest.load(there)
    assert local is not None
    assert remote is not None
    assert local.shards == remote.shards
    assert local.left_out == remote.left_out
    one, other = open_index(here), open_index(there, cache=tmp_path / "cache")
    assert one.hash == other.hash
    assert all(one.read(i).data == other.read(i).data for i in range(7))
    assert cli.main(["verify", there, "--jobs", "1"]) == 0
    spoilt = bytearray(found["shard-00001.tar"])
    spoilt[2000] ^= 1
    boto3.client("s3").put_object(Bucket="clips", Key="set/shard-00001.tar", Body=bytes(spoilt))
    report = verify(there)
    assert report is not None
    assert {p.shard for p in report.problems if p.kind == "shard"} == {"shard-00001.tar"}


def test_upload__that_fails_leaves_nothing(
    s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bat.data import remote

    large, store = os.urandom(12 << 20), Store(f"{BUCKET}/up")
    store.policy = store.policy._replace(retries=1)
    system, _ = remote._system_of(f"{BUCKET}/up", store.policy)
    real, calls = system._call_s3, []

    async def breaks(method: str, *args: Any, **named: Any) -> Any:
        calls.append(method)
        if method == "upload_part" and calls.count("upload_part") == 2:
            raise OSError(5, "the connection broke")
        return await real(method, *args, **named)

    put = system.put_file
    monkeypatch.setattr(system, "put_file", lambda a, b: put(a, b, chunksize=5 << 20))
    monkeypatch.setattr(system, "_call_s3", breaks)
    with pytest.raises(UserError, match="the connection broke"):
        store.write("large.tar", large)
    assert "abort_multipart_upload" in calls
    monkeypatch.setattr(system, "_call_s3", real)
    client = boto3.client("s3")
    assert not client.list_multipart_uploads(Bucket="clips").get("Uploads")
    assert store.sizes() == {}
    store.write("large.tar", large)
    assert store.sizes() == {"large.tar": 12 << 20}
    assert store.read("large.tar") == large


def test_store__missing_bucket_and_credentials_are_one_line(
    s3: str, rows: list[Row], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    import requests

    from bat.data import remote

    call = [str(tmp_path / "in"), "--jobs", "1"]
    assert cli.main([*call, "s3://no-such-bucket/set"]) == 2
    said = capsys.readouterr().err
    assert "s3://no-such-bucket/set" in said
    assert "AWS_ENDPOINT_URL" in said
    requests.post(f"{s3}/moto-api/reset-auth", data=b"0", timeout=10)  # keys count from here on
    try:
        remote._systems.clear()
        for word in (f"{BUCKET}/set", "verify"):
            command = ["verify", f"{BUCKET}/set"] if word == "verify" else [*call, word]
            assert cli.main(command) == 2
            said = capsys.readouterr().err
            lines = [line for line in said.splitlines() if "error" in line]
            assert len(lines) == 1
            assert "AWS_ACCESS_KEY_ID" in lines[0]
            assert not any(value in said for value in KEYS.values())
        secret = f"s3://{':'.join(KEYS.values())}@clips/set"
        for command in ([*call, secret], ["verify", secret], ["info", secret, "--plot", "x.png"]):
            assert cli.main(command) == 2
            said = "".join(capsys.readouterr())
            assert "s3://***@clips/set: a URL must not hold credentials" in said
            assert not any(value in said for value in KEYS.values())
    finally:
        requests.post(f"{s3}/moto-api/reset-auth", data=b"1000000000", timeout=10)


def test_store__refuses_urls_that_run_code(tmp_path: Path) -> None:
    for url in ("pipe:cat > /tmp/x", "simplecache::s3://a/b", "reference://x"):
        with pytest.raises(UserError, match="refused"):
            Store(url)
    Store(f"file://{tmp_path}/a").write("b", b"c")
    assert (tmp_path / "a/b").read_bytes() == b"c"
