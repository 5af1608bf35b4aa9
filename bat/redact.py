"""Credentials out of what is written or shown: logs, ``config.yaml``, exports, lists, messages.

Told by their form: user and password in a URL, the query of a signed one, ``Authorization`` headers
and the tokens of well-known services, values whose name says what they are (``password=``).
A secret of another form is not recognised: give it by the environment or a credentials file, which
bat never writes down.
"""

from __future__ import annotations

import dataclasses
import logging
import re
from typing import Any, TypeVar

T = TypeVar("T")
HIDDEN = "***"
SECRET_NAME = (
    r"(?:pass(?:word|wd|phrase)|secret|credentials?|api[_-]?key|access[_-]?key(?:[_-]?id)?"
)
SECRET_NAME += r"|(?:access|auth|session|refresh|id|bearer|security|private)[_-]?(?:token|key))"
_SIGNED = re.compile(
    rf"[?&#;](?:x-(?:amz|goog|oss|ms)-[\w-]+|sig|signature|token|key-pair-id|policy|key|auth|pwd"
    rf"|awsaccesskeyid|googleaccessid|[\w-]{{0,60}}{SECRET_NAME})=",
    re.IGNORECASE,
)
_URL = re.compile(r"\b([A-Za-z][A-Za-z0-9+.-]{0,20}://)([^\s'\"<>]*)")
_TOKENS = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{16,}|(?:AKIA|ASIA)[A-Z0-9]{16}|gh[pousr]_[A-Za-z0-9]{20,}"
    r"|github_pat_\w{20,}|glpat-[\w-]{16,}|sk-[\w-]{20,}|xox[a-z]-[\w-]{10,}|AIza[\w-]{30,}"
    r"|ya29\.[\w-]{10,}|eyJ[\w-]{8,2000}\.[\w-]{4,4000}\.[\w-]*)"
)
_HEADER = re.compile(
    r"((?:authorization|x-api-key|x-auth-token|(?:set-)?cookie)['\"]?\s*[:=]\s*['\"]?)"
    r"((?:bearer|basic|token|digest)\s+)?[^\s'\",}]+",
    re.IGNORECASE,
)
_BEARER = re.compile(r"\b(bearer|basic)\s+(?=[^\s]*[\d=])[\w.~+/=-]{8,}", re.IGNORECASE)
_NAMED = re.compile(
    rf"(\b[\w.-]{{0,60}}{SECRET_NAME}['\"]?\s*(?:=|:(?!//)|\s(?=\S*\d))\s*)"
    r"(?:'[^']*'|\"[^\"]*\"|[^\s'\",;&}\]]+)",
    re.IGNORECASE,
)
_USER = re.compile(r"((?:^|\s)(?:-u|--user|--proxy-user)[\s=]+['\"]?)[^\s:'\"]+:[^\s'\"]+")
_KEY = re.compile(
    r"-----BEGIN [A-Z ]{0,40}PRIVATE KEY-----.*?(?:-----END [A-Z ]*-----|\Z)", re.DOTALL
)
_SECRET = re.compile(rf"(?:.*[._-])?(?:{SECRET_NAME}|token)", re.IGNORECASE)


def redact(text: str) -> str:
    """``text`` with ``***`` for what looks like a credential; the same again for the result."""
    text = _KEY.sub(HIDDEN, text)
    text = _URL.sub(_without_secrets, text)
    text = _HEADER.sub(rf"\1\2{HIDDEN}", text)
    text = _BEARER.sub(rf"\1 {HIDDEN}", text)
    text = _USER.sub(rf"\1{HIDDEN}", text)
    text = _NAMED.sub(rf"\1{HIDDEN}", text)
    return _TOKENS.sub(HIDDEN, text)


def _without_secrets(found: re.Match[str]) -> str:
    scheme, rest = found.groups()
    host, slash, path = rest.partition("/")
    if "@" in host:
        host = f"{HIDDEN}@{host.rpartition('@')[2]}"
    rest = host + slash + path
    signed = _SIGNED.search(rest)
    if signed:
        begin = min(at for at in (rest.find("?"), rest.find("#"), signed.start()) if at >= 0)
        rest = f"{rest[: begin + 1]}{HIDDEN}"
    return scheme + rest


def redact_tree(tree: T) -> T:
    """A copy of mappings, lists, tuples and dataclasses with ``redact`` on every string in them.

    A string whose key is the name of a secret (``password``, ``token``, ``api_key``) is hidden
    whole. Other values are those of ``tree``.
    """
    made: Any = tree
    if isinstance(tree, str):
        made = redact(tree)
    elif isinstance(tree, dict):
        made = {key: _under(key, value) for key, value in tree.items()}
    elif isinstance(tree, tuple) and hasattr(tree, "_fields"):
        made = type(tree)(*(redact_tree(value) for value in tree))
    elif isinstance(tree, (list, tuple)):
        made = type(tree)(redact_tree(value) for value in tree)
    elif dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        values = {f.name: getattr(tree, f.name) for f in dataclasses.fields(tree) if f.init}
        made = dataclasses.replace(tree, **{k: _under(k, v) for k, v in values.items()})
    return made


def _under(key: Any, value: Any) -> Any:
    if isinstance(key, str) and isinstance(value, str) and value and _SECRET.fullmatch(key):
        return HIDDEN
    return redact_tree(value)


class Redacting(logging.Filter):
    """For a log's handlers: lines and tracebacks go through ``redact``."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = redact(record.getMessage()), ()
        if record.exc_info and record.exc_info[0] is not None:
            record.exc_text = redact(logging.Formatter().formatException(record.exc_info))
        elif record.exc_text:
            record.exc_text = redact(record.exc_text)
        if record.stack_info:
            record.stack_info = redact(record.stack_info)
        return True
