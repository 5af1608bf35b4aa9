"""Bytes through a server that misbehaves."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import fsspec
import numpy as np
import pytest

from bat.data import ending, index
from bat.data import remote as transport
from bat.data.index import open_index
from bat.data.remote import ChangedError, RedirectError, fetch, stat, stream
from bat.data.sources import Patience, identity, shown
from bat.errors import UserError
from tests.data.http_server import FaultyServer

QUICK = Patience(retries=3, timeout_seconds=0.5, backoff_seconds=0.01)
BIG, OTHER = (np.random.default_rng(seed).bytes(3_000_000) for seed in (0, 1))


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Short pauses, and no cache of this machine's user."""
    monkeypatch.setattr(index, "Patience", lambda *_, **__: QUICK)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FaultyServer]:
    (tmp_path / "www").mkdir()
    (tmp_path / "www/big.bin").write_bytes(BIG)
    with FaultyServer(tmp_path / "www") as running:
        yield running


def read(server: FaultyServer, **options: Any) -> bytes:
    options = {"size": len(BIG), "patience": QUICK} | options
    return b"".join(stream(f"{server.url}/big.bin", **options))


@pytest.mark.parametrize(
    ("faults", "requests"),
    [
        ([], 1),
        (["500", "503"], 3),
        (["drop:1000000"], 2),
        (["500", "500", *["drop:1200000", "500"] * 2], 7),  # the count begins anew after progress
        (["short:1200000"], 2),
        (["end:1200000"], 2),
        (["stall"], 2),
        (["crawl"], 2),
        (["drop:0", "429"], 3),
    ],
)
def test_a_stream_goes_on_where_it_stopped(
    server: FaultyServer, faults: list[str], requests: int
) -> None:
    server.faults["big.bin"] = list(faults)
    assert read(server) == BIG
    assert server.count("big.bin") == requests
    sent = sum(int(f.split(":")[1]) for f in faults if f[:4] in ("drop", "end:"))
    assert server.requests[-1][1] == (f"bytes={sent}-" if sent else "")


def test_a_server_that_refuses_ranges_is_read_from_the_front_again(tmp_path: Path) -> None:
    (tmp_path / "big.bin").write_bytes(BIG)
    with FaultyServer(tmp_path, ranges=False) as server:
        server.faults["big.bin"] = ["drop:1500000", "drop:2000000"]
        assert read(server) == BIG
        assert read(server, start=2_999_990) == BIG[-10:]
        assert stat(f"{server.url}/big.bin", QUICK).size == len(BIG)


@pytest.mark.parametrize(
    ("fault", "says", "requests"),
    [
        ("500*", r"big.bin cannot be reached: HTTP 500 \(3 tries\)", 3),
        ("stall*", r"no answer within 0.5 s \(3 tries\)", 3),
        ("drop:100*", r"the connection broke \(3 tries\)|cannot be reached", 3),
        ("404*", "big.bin does not exist", 1),
        ("403*", "big.bin is refused", 1),
    ],
)
def test_a_file_that_stays_unreachable(
    server: FaultyServer, fault: str, says: str, requests: int
) -> None:
    server.faults["big.bin"] = [fault]
    with pytest.raises(OSError, match=says) as error:
        read(server)
    assert server.count("big.bin") == requests
    assert error.value.strerror is not None


def test_a_server_that_trickles_has_stalled(
    server: FaultyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transport, "CRAWL_BYTES", 1)
    monkeypatch.setattr(transport, "SLOW_SECONDS", 0.3)
    monkeypatch.setattr(transport, "PROGRESS_BYTES", 5)  # not the progress that counts
    server.faults["big.bin"] = ["crawl*"]
    with pytest.raises(OSError, match=r"it sends 0.0\d+ kB/s only \(3 tries\)"):
        read(server)
    server.faults["big.bin"] = ["crawl"]
    assert read(server) == BIG
    assert server.requests[-1][1].startswith("bytes=")
    server.requests.clear()
    monkeypatch.setattr(transport, "PIECE_BYTES", 1_000_000)
    monkeypatch.setattr(transport, "SLOW_BYTES", 10_000_000)
    with contextlib.closing(stream(f"{server.url}/big.bin", patience=QUICK)) as pieces:
        taken = []
        for piece in pieces:  # it is the taker who is slow
            taken.append(piece)
            time.sleep(0.4)
    assert b"".join(taken) == BIG
    assert server.count("big.bin") == 1


def test_an_ending_run_stops_a_fetch_at_once(
    server: FaultyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.faults["big.bin"] = ["stall*"]
    start = time.monotonic()
    threading.Timer(0.3, monkeypatch.setattr, (ending, "ending", lambda: True)).start()
    with pytest.raises(OSError, match="the run is ending"):
        read(server, patience=Patience(5, 60.0, 0.01))
    assert time.monotonic() - start < 5


def test_another_length_than_expected_is_an_error(server: FaultyServer) -> None:
    with pytest.raises(OSError, match="it has 3000000 bytes on the server, 3000001 were expected"):
        read(server, size=len(BIG) + 1)
    with pytest.raises(OSError, match="larger than 1000 bytes"):
        fetch(f"{server.url}/big.bin", limit=1000, patience=QUICK)
    assert fetch(f"{server.url}/big.bin", limit=len(BIG), patience=QUICK) == BIG


def test_nobody_there() -> None:
    with pytest.raises(OSError, match=r"127.0.0.1:9/x.tar cannot be reached: .*efused \(3 tries\)"):
        fetch("http://127.0.0.1:9/x.tar", limit=9, patience=QUICK)
    with pytest.raises(UserError, match="cannot be reached"):
        open_index("http://127.0.0.1:9/set")


def test_messages_and_file_names_show_no_secrets(server: FaultyServer, tmp_path: Path) -> None:
    server.faults["a.tar"] = ["500*"]
    url = server.url.replace("//", "//me:hunter2@") + "/a.tar?X-Amz-Signature=hunter3&id=4"
    with pytest.raises(UserError) as error:
        open_index(url, cache=tmp_path / "cache")
    assert "hunter" not in str(error.value)
    assert f"{server.url}/a.tar cannot be reached" in str(error.value)
    assert shown("s3://k:v@b/a.tar?x#y") == "s3://b/a.tar"
    same = f"{server.url}/a.tar?id=4"
    assert identity(url) == identity(same)
    assert identity(same) != identity(same + "5")


def test_other_stores_are_read_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "STORE_PIECE_BYTES", 1_000_000)
    memory = fsspec.filesystem("memory")
    memory.pipe("/bucket/big.bin", BIG)
    url = "memory://bucket/big.bin"
    sizes = [len(piece) for piece in stream(url, start=500_000, patience=QUICK)]
    assert sizes == [1_000_000, 1_000_000, 500_000]
    assert stat(url, QUICK).size == len(BIG)
    with pytest.raises(FileNotFoundError, match="memory://bucket/none does not exist"):
        fetch("memory://bucket/none", limit=9, patience=QUICK)


@pytest.mark.parametrize("conditions", [True, False])
def test_two_versions_of_a_file_are_not_spliced(server: FaultyServer, conditions: bool) -> None:
    server.conditions = conditions
    server.faults["big.bin"] = ["drop:1000000"]
    server.before[2] = lambda: (server.folder / "big.bin").write_bytes(OTHER)
    with pytest.raises(ChangedError, match=r"big\.bin was changed on the server"):
        read(server)
    assert server.count("big.bin") == 2
    server.faults["big.bin"] = ["drop:1000000"]
    assert read(server) == OTHER
    with pytest.raises(ChangedError):
        read(server, tag='"an older one"')


def test_a_small_file_that_changes_is_read_again(server: FaultyServer) -> None:
    server.faults["big.bin"] = ["drop:1000000"]
    server.before[2] = lambda: (server.folder / "big.bin").write_bytes(OTHER)
    assert fetch(f"{server.url}/big.bin", limit=1 << 22, patience=QUICK) == OTHER


def test_a_store_whose_file_changes_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    store = fsspec.filesystem("memory")
    store.pipe("/bat-changed/x.bin", BIG)
    tags = iter(("1", "1", "1", "2"))
    real = type(store).info
    monkeypatch.setattr(type(store), "info", lambda *a, **k: real(*a, **k) | {"ETag": next(tags)})
    how: Any = {"size": len(BIG), "patience": QUICK}
    assert b"".join(stream("memory://bat-changed/x.bin", **how)) == BIG
    with pytest.raises(ChangedError):
        b"".join(stream("memory://bat-changed/x.bin", **how))


def test_redirects_to_another_host_or_port_are_not_followed_unless_allowed(
    server: FaultyServer, tmp_path: Path
) -> None:
    with FaultyServer(tmp_path / "www") as second:
        place = urlsplit(second.url).netloc
        server.redirects |= {
            "here.bin": "/big.bin",
            "there.bin": f"{second.url}/big.bin?X-Amz-Signature=secret",
            "file.bin": "file:///etc/passwd",
            "round.bin": "round.bin",
            "manifest.json": f"{second.url}/manifest.json",
        }
        assert fetch(f"{server.url}/here.bin", limit=1 << 22, patience=QUICK) == BIG
        for name, says in {
            "there.bin": rf"there\.bin leads to .*http://{place}/big\.bin: .*data\.redirects=\[127",
            "file.bin": r"leads to another place, file:///etc/passwd",
            "round.bin": "leads on and on",
        }.items():
            with pytest.raises(RedirectError, match=says) as caught:
                fetch(f"{server.url}/{name}", limit=1 << 22, patience=QUICK)
            assert "secret" not in str(caught.value)
            assert server.count(name) == (1 if name != "round.bin" else 11)
        with pytest.raises(UserError, match=r"manifest\.json leads to another place"):
            open_index(server.url)
        assert second.requests == []
        for allowed in ("127.0.0.1", place, "127.*", "*"):
            patience = QUICK._replace(redirects=("elsewhere", allowed))
            assert fetch(f"{server.url}/there.bin", limit=1 << 22, patience=patience) == BIG
        with pytest.raises(RedirectError):
            fetch(f"{server.url}/file.bin", limit=9, patience=QUICK._replace(redirects=("*",)))
