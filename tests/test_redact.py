"""``redact`` hides credentials and leaves all other text readable."""

from __future__ import annotations

import io
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import pytest

from bat.redact import RedactingFormatter, one_line, printable, redact, redact_tree, shown
from bat.report.tables import plain

SIGNATURE = "X-Amz-Credential=AKIAIOSFODNN7EXAMPLE%2F2026&X-Amz-Signature=0badc0ffee"
TOKEN = "hf_" + "aB3" * 11


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("https://me:pa55@host.org/a.tar", "https://***@host.org/a.tar"),
        ("https://me:p@ss@host/a and s3://b/c", "https://***@host/a and s3://b/c"),
        (f"https://h/a.tar?{TOKEN}@", "https://h/a.tar?***@"),
        (f"https://b.s3.org/a.tar?{SIGNATURE}", "https://b.s3.org/a.tar?***"),
        ("https://h/a.tar?sv=2020&sig=abc%3D", "https://h/a.tar?***"),
        ("https://h/a.tar?part=1&token=abc.", "https://h/a.tar?***"),
        ("https://h/a#access_token=abc", "https://h/a#***"),
        ("('https://h/a?Signature=abc')", "('https://h/a?***')"),
        ("Authorization: Bearer abc.def", "Authorization: Bearer ***"),
        ("{'Authorization': 'Basic dTpw'}", "{'Authorization': 'Basic ***'}"),
        ("curl -H 'Authorization: token abc'", "curl -H 'Authorization: token ***'"),
        ("sent bearer abcdef0123456789", "sent bearer ***"),
        (f"login with {TOKEN}", "login with ***"),
        ("key AKIAIOSFODNN7EXAMPLE here", "key *** here"),
        ("pipe:curl -u me:pa55 ftp://h/a", "pipe:curl -u *** ftp://h/a"),
        ("WANDB_API_KEY=0123456789abcdef x", "WANDB_API_KEY=*** x"),
        ("password: hunter2, lr 0.1", "password: ***, lr 0.1"),
        ("aws_secret_access_key = 'a b'", "aws_secret_access_key = ***"),
        ("pipe:HF_TOKEN=abc123 python a.py", "pipe:HF_TOKEN=*** python a.py"),
        ("GITHUB_TOKEN=abc make", "GITHUB_TOKEN=*** make"),
        ("token: x", "token: ***"),
        ("get --token abc123 -v", "get --token *** -v"),
        ("get --token=x -v", "get --token=*** -v"),
        ("get --password hunter --verbose", "get --password *** --verbose"),
        ("curl --oauth2-bearer x h", "curl --oauth2-bearer *** h"),
        ("curl -uuser:hunter2 h", "curl -u*** h"),
        ("curl -u 'user:pass word' h", "curl -u *** h"),
        ("AccountName=a;AccountKey=abc==", "AccountName=a;AccountKey=***"),
        ("https://h/a?jwt=abc", "https://h/a?***"),
        ("https://h/a?api-token=abc", "https://h/a?***"),
        ("https://h/a?x=1&pass=abc", "https://h/a?***"),
        ("https://h/a?%73ig=abc", "https://h/a?***"),
        ("https://h/a%3Fsig%3Dabc", "https://h/a%***"),
        ("https://h/a b.tar?sig=abc", "https://h/a b.tar?sig=***"),
        ("https://h/a?key=0123456789abcdef", "https://h/a?***"),
        ("https://user:pa/ss@h/a@b", "https://***@h/a@b"),
        ("curl -H 'Authorization: ApiKey deadbeef' h", "curl -H 'Authorization: ApiKey ***' h"),
        (
            "-H 'Authorization: AWS4-HMAC-SHA256 Credential=AKIA/2, Signature=deadbeef' h",
            "-H 'Authorization: AWS4-HMAC-SHA256 ***' h",
        ),
        ('-H "Cookie: a=b; session=SECRET" h', '-H "Cookie: ***" h'),
        ("sk-proj-abcdefghijkl-mnopqrstuvwx", "***"),
        ("sk-abcdefghijkl0123456789AB", "***"),
        ("-----BEGIN RSA PRIVATE KEY-----\nMII\n-----END RSA PRIVATE KEY-----", "***"),
    ],
)
def test_redact__credential_is_hidden_and_the_rest_stays(text: str, expected: str) -> None:
    assert redact(text) == expected
    assert redact(expected) == expected


@pytest.mark.parametrize(
    "text",
    [
        "https://host.org/set/shard-{00000..00041}.tar",
        "https://host.org/a.tar?download=true&part=2",
        "s3://bucket/a@b/shard.tar",
        "hf://datasets/confit/audioset-16khz-wds",
        "512 tokens: 64 x 8, keep_ratio=0.2",
        "mask.keep_ratio=0.2, key dog-17 of shard-000003.tar",
        "basic probes on 400 clips",
        "loss 0.123456789012345 at step 400000",
        "sha256 9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
        "runs/2026-11-22/checkpoints/last.ckpt",
        "task=esc50: one label a clip",
        "/…/My Secret 2/audio",
        "/data/secret=1/x",
        "s3://bucket/secret=1/shard-{000..010}.tar",
        "C:\\api_key: 3\\x",
        "/data/password 1/x and the session key 3",
        "runs/basic ablation-2024",
        "runs/bearer run-2024-10-12-long",
        "runs/sk-esc10-base-seed0-lr3e-4-2024",
        "task-sk-abcdefghijklmnopqrstuvwxyz",
        "/data/xoxo-collection-1/",
        "https://h/x?version=2&key=3",
        "https://h/data;policy=open/shard-0.tar",
        "https://h:8080/a@b/c",
        "pipe:docker run -u 1000:1000 image cat x.tar",
        "missing: cls_token (1, 1, 768); mask_token: (768,)",
        "label 'Secret, whisper: quiet' is not in the vocabulary",
    ],
)
def test_redact__other_text_stays(text: str) -> None:
    assert redact(text) == text


@pytest.mark.parametrize(
    "part",
    [
        *("a.", "a-", "eyJ-", "?a", "bearer ", "basic A", "api-", "://", "a://b:", "-----BEGIN "),
        *(" --a-", " -u", " -ua", "?%", "cookie ", "A_", "'"),
    ],
)
def test_redact__time_is_linear_in_the_length(part: str) -> None:
    """A pattern that takes squared time would not end here."""
    text = part * (100_000 // len(part))
    assert "***" not in redact(text)


class Pair(NamedTuple):
    url: str
    size: int


@dataclass
class Section:
    shards: list[str] = field(default_factory=lambda: ["https://u:p@h/a.tar"])
    steps: int = 3
    api_key: str = "abc"


def test_redact_tree__copies_with_its_strings_redacted() -> None:
    section = Section()
    tree = {
        "data": section,
        "pair": Pair("https://h/a?sig=x", 5),
        "token": "abc",
        "hub_token": "",
        "tokens": 512,
        "deep": [{"why": ("https://u:p@h/", None)}],
    }
    assert redact_tree(tree) == {
        "data": Section(["https://***@h/a.tar"], 3, "***"),
        "pair": Pair("https://h/a?***", 5),
        "token": "***",
        "hub_token": "",
        "tokens": 512,
        "deep": [{"why": ("https://***@h/", None)}],
    }
    assert section == Section()


def test_redact_tree__existing_path_stays(tmp_path: Path) -> None:
    """A run whose ``data.root`` was altered in its ``config.yaml`` could not be evaluated."""
    there = tmp_path / "set token=abc" / "audio"
    there.mkdir(parents=True)
    absent = there.parent / "video"
    assert redact(str(there)) != str(there)
    assert redact_tree({"root": str(there)}) == {"root": str(there)}
    assert redact_tree({"root": str(absent)}) == {"root": redact(str(absent))}
    assert redact_tree({"password": str(there)}) == {"password": "***"}


def test_redacting_formatter__lines_and_tracebacks_show_no_credential() -> None:
    out = io.StringIO()
    handler = logging.StreamHandler(out)
    handler.setFormatter(RedactingFormatter("%(message)s"))
    log = logging.getLogger("test_redact")
    log.propagate = False
    log.addHandler(handler)
    try:
        log.warning("reading %s, %d left", "https://u:pa55@h/a", 3)
        try:
            raise OSError("no answer from https://h/a?sig=5ecret")
        except OSError:
            log.exception("failed")
    finally:
        log.removeHandler(handler)
    text = out.getvalue()
    assert text.startswith("reading https://***@h/a, 3 left\nfailed\nTraceback")
    assert "OSError: no answer from https://h/a?***" in text
    assert "pa55" not in text
    assert text.count("Traceback") == 1


def test_printable__control_characters_are_spelled_out() -> None:
    text = "a\x1b[2Jb\x9bc\u202ed\ud800\r\té\n"
    assert printable(text) == "a\\x1b[2Jb\\x9bc\\u202ed\\ud800\\r\té\n"
    assert one_line("a\n\tb") == "a\\n\\tb"
    assert shown("token=\x1b[1mabc") == "token=***"
    assert printable("plain, ünïcode, 日本") == "plain, ünïcode, 日本"
    assert "\x1b" not in plain("\x1b[31mrun")
