"""A run over shards on a server is the run over the same shards here, windows for windows."""

from __future__ import annotations

import functools
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bat.train.run_pretrain import pretrain
from tests.toy import make_toy_shards


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    return make_toy_shards(tmp_path / "toy")


@pytest.fixture
def url(shards: Path):
    """The toy shards on a plain server (which knows no ranges)."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(shards)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}/"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_remote_run_is_the_local_one(
    small, tmp_path: Path, shards: Path, url: str, workers: int
) -> None:
    order = ("data.shuffle=window", "data.window=4", "train.steps=4")
    there, here = tmp_path / "there", tmp_path / "here"
    words = (f"data.shards={url}", f"data.workers={workers}", f"data.cache={tmp_path / 'cache'}")
    pretrain(small(*order, *words, out=there))
    pretrain(small(*order, f"data.shards={shards}", out=here))
    a, b = (load_file(out / "export" / "model.safetensors") for out in (there, here))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert list((tmp_path / "cache").rglob("*.tar"))
