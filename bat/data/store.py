"""Reads and writes the files of a folder, here or in an object store, each whole or not at all.

A local file is written under another name and renamed. A remote one is written here (in ``TMPDIR``)
and uploaded by fsspec: object stores show a file when its upload is complete, and a multi-part
upload that fails is aborted; other servers get it under another name first.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import unquote, urlsplit

from bat.data import remote
from bat.data.sources import RetryPolicy, checked_url, is_url, shown
from bat.errors import UserError
from bat.io import replace_durably, replacing
from bat.redact import redact

LARGEST = 1 << 32
"""Bytes of a file that ``read`` takes into memory at most."""


class Store:
    """The files of one folder; ``place`` is its ``Path``, or its URL without a slash at the end.

    Raises:
        UserError: by all methods: a protocol that is refused or not installed, a bucket that does
            not exist, credentials that are refused, a server that cannot be reached.
    """

    def __init__(self, place: str | Path) -> None:
        self.place: str | Path = Path(place)
        if isinstance(place, str) and is_url(place):
            url = checked_url(place)
            is_file = url.startswith("file:")
            self.place = Path(unquote(urlsplit(url).path)) if is_file else url.rstrip("/")
        self.policy = RetryPolicy()

    def __str__(self) -> str:
        return str(self.place) if isinstance(self.place, Path) else redact(shown(self.place))

    @property
    def local(self) -> Path | None:
        return self.place if isinstance(self.place, Path) else None

    def below(self, name: str) -> Store:
        """Returns the folder ``name`` in this one."""
        return Store(self.place_of(name))

    def place_of(self, name: str) -> str | Path:
        """Returns the path or URL of file ``name``."""
        is_here = isinstance(self.place, Path)
        return self.place / name if is_here else remote.join(self.place, name)  # type: ignore[operator, arg-type]

    def sizes(self) -> dict[str, int]:
        """Returns ``{name: bytes}`` of the files, sorted; empty if there is no such folder."""
        if isinstance(self.place, Path):
            if not self.place.is_dir():
                return {}
            return {p.name: p.stat().st_size for p in sorted(self.place.iterdir()) if p.is_file()}
        with self._saying():
            return remote.sizes(self.place, self.policy)

    def read(self, name: str) -> bytes:
        """Returns the content of a file; raises ``FileNotFoundError``."""
        place = self.place_of(name)
        if isinstance(place, Path):
            return place.read_bytes()
        with self._saying():
            return remote.read(place, limit=LARGEST, policy=self.policy)

    def write(self, name: str, data: bytes) -> None:
        with self.put(name) as path:
            path.write_bytes(data)

    @contextmanager
    def put(self, name: str) -> Iterator[Path]:
        """Gives a path for the content of file ``name``, which appears if the body succeeds."""
        place = self.place_of(name)
        if isinstance(place, Path):
            place.parent.mkdir(parents=True, exist_ok=True)
            with replacing(place) as path:
                yield path
            return
        with tempfile.TemporaryDirectory(prefix="bat-") as folder:
            path = Path(folder) / name
            yield path
            self.adopt(path, name)

    def adopt(self, path: Path, name: str) -> None:
        """Makes the file ``path`` the file ``name``; it must lie on the same disk."""
        place = self.place_of(name)
        if isinstance(place, Path):
            place.parent.mkdir(parents=True, exist_ok=True)
            replace_durably(path, place)
            return
        with self._saying():
            remote.upload(path, place, self.policy)

    def remove(self, names: Iterable[str]) -> None:
        """Removes files, those that exist."""
        for name in names:
            place = self.place_of(name)
            if isinstance(place, Path):
                place.unlink(missing_ok=True)
                continue
            with self._saying():
                remote.remove(place, self.policy)

    def sweep(self, *patterns: str) -> None:
        """Removes what killed processes left of files whose names match ``patterns``."""
        if isinstance(self.place, Path):
            for pattern in patterns:
                for path in self.place.glob(f".{pattern}.*.tmp"):
                    path.unlink(missing_ok=True)

    def clear(self) -> None:
        """Removes all files, and the folder."""
        if isinstance(self.place, Path):
            shutil.rmtree(self.place, ignore_errors=True)
        else:
            self.remove(self.sizes())

    @contextmanager
    def _saying(self) -> Iterator[None]:
        """Turns errors of the server into ``UserError``."""
        try:
            yield
        except FileNotFoundError:
            raise
        except PermissionError as error:
            raise UserError(f"{error.strerror}: {remote.remedy(str(self.place))}") from None
        except OSError as error:
            raise UserError(error.strerror or str(error)) from None
