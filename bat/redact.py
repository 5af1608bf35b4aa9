"""Removes credentials from logs, ``config.yaml``, exports, lists and messages, and control
characters from terminal output (``printable``).

Credentials are recognised by their form: user and password in a URL, the query of a signed URL,
``Authorization`` headers, tokens of well-known services, and values with a telling name
(``password=``, ``--password x``). A name within a path (``/data/secret=1``) does not count.
Secrets of another form are not recognised: pass them by the environment or a credentials file,
which bat never writes to disk.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import re
from typing import Any, TypeVar
from urllib.parse import unquote

T = TypeVar("T")
HIDDEN = "***"
SECRET_NAME = (
    r"(?:pass(?:word|wd|phrase)|secret|credentials?|api[_-]?key|access[_-]?key(?:[_-]?id)?"
    r"|shared[_-]?access[_-]?signature|(?:access|account|api|auth|bearer|git(?:hub|lab)|hf|hub|id"
    r"|oauth2?|private|refresh|security|session|wandb)[_-]?(?:token|key))"
)
_VALUE = r"(?:'[^']*'|\"[^\"]*\"|[^\s'\",;&}\]]+)"
_PARAMETER = (
    r"[?&#;](?:x-(?:amz|goog|oss|ms)-[\w-]+|sig|signature|sas|hmac|hdne[as]|hdnts|jwt|auth|pass|pwd?"
    r"|key-pair-id|awsaccesskeyid|googleaccessid|key(?==[^&#\s]{16})"
    rf"|[\w-]{{0,60}}(?:{SECRET_NAME}|token))="
)
_SIGNED = re.compile(_PARAMETER, re.IGNORECASE)
_LOOSE = re.compile(rf"({_PARAMETER})[^\s&'\"<>]+", re.IGNORECASE)
_URL = re.compile(r"\b([A-Za-z][A-Za-z0-9+.-]{0,20}://)([^\s'\"<>]*)")
_TOKENS = re.compile(
    r"(?<![\w-])(?:hf_[A-Za-z0-9]{30,}|(?:AKIA|ASIA)[A-Z0-9]{16}|gh[pousr]_[A-Za-z0-9]{20,}"
    r"|github_pat_\w{20,}|glpat-[\w-]{16,}|sk-(?:(?:proj|ant|svcacct)-[\w-]{20,}|\w{20,})"
    r"|xox[abeprs]-\d[\w-]{9,}|AIza[\w-]{30,}|ya29\.[\w-]{10,}"
    r"|eyJ[\w-]{8,2000}\.[\w-]{4,4000}\.[\w-]*)"
)
_HEADER = re.compile(
    r"((?<![/\\])(?:authorization|x-api-key|x-auth-token|(?:set-)?cookie)['\"]?\s*[:=]\s*['\"]?)"
    r"((?:bearer|basic|token|digest|apikey|aws4-hmac-sha256)\s+)?[^'\"}\n]+",
    re.IGNORECASE,
)
_BEARER = re.compile(
    r"(?<![\w/\\-])(bearer\s+(?=\S*\d)(?=\S{16})|basic\s+(?=[A-Za-z0-9+/]{6,2000}=))[\w.~+/=-]+",
    re.IGNORECASE,
)
_NAMED = re.compile(
    rf"((?<![\w./\\-])(?:[\w.-]{{0,60}}{SECRET_NAME}|token|(?-i:[A-Z][A-Z0-9_]{{0,60}}_TOKEN))"
    rf"['\"]?\s*(?:=|:(?!//))\s*){_VALUE}",
    re.IGNORECASE,
)
_FLAG = re.compile(
    rf"((?:^|\s)--?(?:[\w-]{{0,60}}(?:{SECRET_NAME}|token|oauth2-bearer)|pass)[\s=]+)(?!-){_VALUE}",
    re.IGNORECASE,
)
_USER = re.compile(
    r"((?:^|\s)(?:-u[\s=]*|--(?:proxy-)?user[\s=]+))(?!\d+:\d+(?:\s|$))"
    r"(?:'[^':]+:[^']*'|\"[^\":]+:[^\"]*\"|[^\s:'\"]+:[^\s'\"]+)"
)
_KEY = re.compile(
    r"-----BEGIN [A-Z ]{0,40}PRIVATE KEY-----.*?(?:-----END [A-Z ]*-----|\Z)", re.DOTALL
)
_SECRET = re.compile(rf"(?:.*[._-])?(?:{SECRET_NAME}|token)", re.IGNORECASE)
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters (C0, C1), line and direction marks, and surrogates."""


def printable(text: str) -> str:
    """Escapes control characters in ``text`` (as ``\\x1b``), except line breaks and tabs."""
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def one_line(text: str) -> str:
    """As ``printable``, also escaping line breaks and tabs; for names of classes, splits, files."""
    return printable(text).replace("\n", "\\n").replace("\t", "\\t")


def redact(text: str) -> str:
    """Replaces what looks like a credential in ``text`` by ``***``; idempotent."""
    text = _KEY.sub(HIDDEN, text)
    text = _URL.sub(_without_secrets, text)
    text = _HEADER.sub(rf"\1\2{HIDDEN}", text)
    text = _BEARER.sub(rf"\1{HIDDEN}", text)
    for pattern in (_USER, _NAMED, _FLAG, _LOOSE):
        text = pattern.sub(rf"\1{HIDDEN}", text)
    return _TOKENS.sub(HIDDEN, text)


def shown(text: str) -> str:
    """Applies ``printable`` and ``redact``, for logs and error messages."""
    return redact(printable(text))


def _without_secrets(found: re.Match[str]) -> str:
    scheme, rest = found.groups()
    host, slash, path = rest.partition("/")
    if "@" in host:
        rest = f"{HIDDEN}@{host.rpartition('@')[2]}{slash}{path}"
    elif re.match(r"[^/@:?\[]*:(?!\d*(?:/|$))[^@]*@", rest):  # a password with a slash, no port
        rest = f"{HIDDEN}@{rest.partition('@')[2]}"
    if _SIGNED.search(unquote(rest)):
        ends = [at.start() for at in (re.search("[?#]", rest), _SIGNED.search(rest)) if at]
        rest = f"{rest[: min(ends, default=rest.find('%')) + 1]}{HIDDEN}"
    return scheme + rest


def redact_tree(tree: T) -> T:
    """Returns a copy of mappings, lists, tuples and dataclasses with every string redacted.

    A string whose key names a secret (``password``, ``token``, ``api_key``) is replaced whole; one
    that is an existing path on this disk is kept. Other values are those of ``tree``.
    """
    copy: Any = tree
    if isinstance(tree, str):
        copy = tree if os.path.exists(os.path.expanduser(tree)) else redact(tree)
    elif isinstance(tree, dict):
        copy = {key: _under(key, value) for key, value in tree.items()}
    elif isinstance(tree, (list, tuple)):
        values = [redact_tree(value) for value in tree]
        copy = type(tree)(*values) if hasattr(tree, "_fields") else type(tree)(values)
    elif dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        fields = {f.name: getattr(tree, f.name) for f in dataclasses.fields(tree) if f.init}
        copy = dataclasses.replace(tree, **{k: _under(k, v) for k, v in fields.items()})
    return copy


def _under(key: Any, value: Any) -> Any:
    if isinstance(key, str) and isinstance(value, str) and value and _SECRET.fullmatch(key):
        return HIDDEN
    return redact_tree(value)


class RedactingFormatter(logging.Formatter):
    """Log formatter that applies ``redact`` and ``printable`` to lines and tracebacks."""

    def format(self, record: logging.LogRecord) -> str:
        return shown(super().format(record))
