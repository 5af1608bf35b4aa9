"""Files through a server that misbehaves."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import fsspec
import numpy as np
import pytest

from bat.data.index import open_index
from bat.data.remote import RefusedError, download, listing, opened, read, stat, why
from bat.data.sources import RetryPolicy, identity, shown
from bat.errors import UserError
from tests.data.http_server import FaultyServer

QUICK = RetryPolicy(retries=3, timeout_seconds=0.3, backoff_seconds=0.01)
BIG, OTHER = (np.random.default_rng(seed).bytes(3_000_000) for seed in (0, 1))


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FaultyServer]:
    (tmp_path / "www").mkdir()
    (tmp_path / "www/big.bin").write_bytes(BIG)
    with FaultyServer(tmp_path / "www") as running:
        yield running


def fetched(server: FaultyServer, *, size: int = len(BIG), tag: str = "") -> bytes:
    path = server.folder / "copy.bin"
    download(f"{server.url}/big.bin", path, size=size, tag=tag, policy=QUICK)
    return path.read_bytes()


@pytest.mark.parametrize(
    ("faults", "requests"),
    [
        ([], 1),
        (["500", "503"], 3),
        (["drop:1000000"], 2),
        (["short:1200000"], 2),
        (["end:1200000"], 2),
        (["stall"], 2),
        (["drop:0", "429"], 3),
    ],
)
def test_download__failure_is_tried_again_from_the_start(
    server: FaultyServer, faults: list[str], requests: int
) -> None:
    server.faults["big.bin"] = list(faults)
    assert fetched(server) == BIG
    assert server.count("big.bin") == requests
    assert {asked for _, asked in server.requests} == {""}  # no part is gone on with


@pytest.mark.parametrize(
    ("fault", "says", "requests"),
    [
        ("500*", r"big.bin cannot be reached: HTTP 500 \(3 tries\)", 3),
        ("stall*", r"no answer within 0.3 s \(3 tries\)", 3),
        ("drop:100*", r"the connection broke \(3 tries\)", 3),
        ("404*", "big.bin does not exist", 1),
        ("403*", "big.bin is refused", 1),
    ],
)
def test_download__unreachable_is_one_error(
    server: FaultyServer, fault: str, says: str, requests: int
) -> None:
    server.faults["big.bin"] = [fault]
    with pytest.raises(OSError, match=says) as error:
        fetched(server)
    assert server.count("big.bin") == requests
    assert error.value.strerror is not None


def test_download__other_length_or_version_is_an_error(server: FaultyServer) -> None:
    with pytest.raises(OSError, match="sent 3000000 bytes, 3000001 were expected"):
        fetched(server, size=len(BIG) + 1)
    tag = stat(f"{server.url}/big.bin", QUICK).tag
    assert fetched(server, tag=tag) == BIG
    (server.folder / "big.bin").write_bytes(OTHER)
    with pytest.raises(RefusedError, match=r"big\.bin was changed on the server"):
        fetched(server, tag=tag)


def test_read__is_bounded(server: FaultyServer) -> None:
    with pytest.raises(OSError, match="larger than 1000 bytes"):
        read(f"{server.url}/big.bin", limit=1000, policy=QUICK)
    assert read(f"{server.url}/big.bin", limit=len(BIG), policy=QUICK) == BIG


def test_opened__breaks_off_where_the_server_does(server: FaultyServer) -> None:
    url = f"{server.url}/big.bin"
    server.faults["big.bin"] = ["500"]
    with opened(url, QUICK) as file:
        assert file.read() == BIG
    for fault in ("drop:1000000", "stall"):
        server.faults["big.bin"] = [fault]
        with pytest.raises(OSError, match=r"big\.bin broke off"), opened(url, QUICK) as file:
            file.read(len(BIG))


def test_nobody_there(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"127.0.0.1:9/x.tar cannot be reached: .*efused \(3 tries\)"):
        read("http://127.0.0.1:9/x.tar", limit=9, policy=QUICK)
    with pytest.raises(UserError, match="cannot be reached"):
        open_index("http://127.0.0.1:9/set", cache=tmp_path, retries=1)


def test_messages_and_file_names_show_no_secrets(server: FaultyServer, tmp_path: Path) -> None:
    (server.folder / "a.tar").write_bytes(b"x" * 1024)
    server.faults["a.tar"] = ["500*"]
    url = server.url.replace("//", "//me:hunter2@") + "/a.tar?X-Amz-Signature=hunter3&id=4"
    with pytest.raises(UserError, match="HTTP 500") as error:
        open_index(url, cache=tmp_path / "cache", retries=1)
    assert "hunter" not in str(error.value)
    assert shown("s3://k:v@b/a.tar?x#y") == "s3://b/a.tar"
    same = f"{server.url}/a.tar?id=4"
    assert identity(url) == identity(same)
    assert identity(same) != identity(same + "5")
    bearer = "at https://u:pa55@h/ with Authorization: Bearer abc.def and hf_" + "a1" * 12
    text = why(RuntimeError(bearer), "https://h/a.tar", RetryPolicy())
    assert not [secret for secret in ("pa55", "abc.def", "a1a1") if secret in text]


def test_other_stores(tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe("/bucket/big.bin", BIG)
    url = "memory://bucket/big.bin"
    with opened(url, QUICK) as file:
        assert (file.peek(2)[:2], file.read()) == (BIG[:2], BIG)
    download(url, tmp_path / "copy", size=len(BIG), policy=QUICK)
    assert (tmp_path / "copy").read_bytes() == BIG
    assert stat(url, QUICK).size == len(BIG)
    assert listing("memory://bucket", QUICK) == ["big.bin"]
    with pytest.raises(FileNotFoundError, match="memory://bucket/none does not exist"):
        read("memory://bucket/none", limit=9, policy=QUICK)


def test_redirects__to_another_host_or_port_are_not_followed_unless_allowed(
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
        assert read(f"{server.url}/here.bin", limit=1 << 22, policy=QUICK) == BIG
        for name, says in {
            "there.bin": rf"there\.bin leads to .*http://{place}/big\.bin: .*data\.redirects=\[127",
            "file.bin": r"leads to another place, file:///etc/passwd",
            "round.bin": "leads on and on",
        }.items():
            with pytest.raises(RefusedError, match=says) as caught:
                read(f"{server.url}/{name}", limit=1 << 22, policy=QUICK)
            assert "secret" not in str(caught.value)
            with pytest.raises(RefusedError):
                stat(f"{server.url}/{name}", QUICK)
            with pytest.raises(RefusedError):
                download(f"{server.url}/{name}", tmp_path / "x", size=9, policy=QUICK)
        with pytest.raises(UserError, match=r"manifest\.json leads to another place"):
            open_index(server.url, cache=tmp_path)
        assert second.requests == []
        for allowed in ("127.0.0.1", place, "127.*", "*"):
            policy = QUICK._replace(redirects=("elsewhere", allowed))
            assert read(f"{server.url}/there.bin", limit=1 << 22, policy=policy) == BIG
        with pytest.raises(RefusedError):
            read(f"{server.url}/file.bin", limit=9, policy=QUICK._replace(redirects=("*",)))


def test_listing__names_files_of_the_folder_alone(server: FaultyServer) -> None:
    links = ["../up.tar", "http://elsewhere/c.tar", "/s/d.tar", "e/f.tar", "file:///h", "g.tar"]
    page = "".join(f"<a class='x' href='{link}'>{link}</a>\n" for link in links)
    (server.folder / "s").write_text(page)  # asked for as s/
    assert listing(f"{server.url}/s", QUICK) == ["d.tar", "g.tar"]
