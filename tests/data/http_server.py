"""A small HTTP server that misbehaves on request, on 127.0.0.1 and a free port."""

from __future__ import annotations

import http.server
import socket
import threading
import time
from collections import defaultdict
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import numpy as np

from bat.audio.decode import encode


class FaultyServer:
    """Serves ``folder`` while in a ``with`` block.

    ``faults[name]``: what to do with the next requests of a file, one each: ``"500"`` or another
    status; ``"stall"``: send 10 bytes, then nothing; ``"drop:N"``: promise all, send N and close;
    ``"short:N"``: pretend the rest has N bytes; ``"end:N"``: as drop, without having promised a
    length; ``""``: behave. The last one stays where it ends in ``*``, e.g. ``"500*"``.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.faults: defaultdict[str, list[str]] = defaultdict(list)
        self.requests: list[tuple[str, str]] = []
        """(name, range) of each request."""
        self.redirects: dict[str, str] = {}
        """``{name: Location}``"""
        self.sends_parts = False
        """Sends the range that is asked for, not the whole file."""
        self.done = threading.Event()

    def __enter__(self) -> FaultyServer:
        outer = self

        class Handler(_Handler):
            server_of = outer

        class Quiet(http.server.ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *args: Any) -> None:
                pass  # a client that hung up

        self._server = Quiet(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.done.set()
        self._server.shutdown()
        self._server.server_close()

    def fault(self, name: str) -> str:
        """The next fault of ``name``."""
        queue = self.faults[name]
        if not queue:
            return ""
        return queue[0][:-1] if queue[0].endswith("*") else queue.pop(0)

    def count(self, name: str) -> int:
        return sum(asked == name for asked, _ in self.requests)


class _Handler(http.server.BaseHTTPRequestHandler):
    server_of: FaultyServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        """Not counted, and without faults."""
        server = self.server_of
        name = unquote(urlsplit(self.path).path).lstrip("/")
        path = server.folder / name
        self.send_response(302 if name in server.redirects else 200 if path.is_file() else 404)
        if name in server.redirects:
            self.send_header("Location", server.redirects[name])
        if path.is_file():
            self.send_header("ETag", f'"{path.stat().st_mtime_ns}"')
        self.send_header("Content-Length", str(path.stat().st_size if path.is_file() else 0))
        self.end_headers()

    def do_GET(self) -> None:
        server = self.server_of
        name = unquote(urlsplit(self.path).path).lstrip("/")
        asked = self.headers.get("Range", "")
        server.requests.append((name, asked))
        if name in server.redirects:
            self.send_response(302)
            self.send_header("Location", server.redirects[name])
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        kind, _, number = server.fault(name).partition(":")
        path = server.folder / name
        if kind.isdigit() or not path.exists():
            self.send_response(int(kind or 404))
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if path.is_dir():
            links = [p.name + "/" * p.is_dir() for p in sorted(path.iterdir())]
            data = "".join(f'<a href="{link}">{link}</a>\n' for link in links).encode()
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)
            return
        data = path.read_bytes()
        part = asked if server.sends_parts else ""
        self.send_response(206 if part else 200)
        if part:
            first, _, last = part.removeprefix("bytes=").partition("-")
            data = data[int(first) : int(last) + 1]
        self.send_header("ETag", f'"{path.stat().st_mtime_ns}"')
        if kind == "short":
            data = data[: int(number)]
        if kind == "end":
            self.send_header("Connection", "close")
        else:
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if kind in ("drop", "end"):
            self.wfile.write(data[: int(number)])
            self.wfile.flush()
            time.sleep(0.05)  # else the client's buffer is lost with the connection
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
        elif kind == "stall":
            self.wfile.write(data[:10])
            server.done.wait(20)
            self.close_connection = True
        else:
            self.wfile.write(data)


def wave(i: int) -> bytes:
    """A clip of 0.1 s; another one for each ``i``."""
    tone = np.sin(np.arange(1600) * (0.05 + 0.01 * i))
    return encode(tone, sample_rate=16_000, codec="wav")
