"""Text of unknown origin."""

from __future__ import annotations

import json
import sys
import unicodedata

import pytest

from meteora_core.text import json_printable, one_line, printable, redact

_VISIBLE = {0x600, 0x601, 0x602, 0x603, 0x604, 0x605, 0x6DD, 0x70F, 0x890, 0x891, 0x8E2, 0x110BD, 0x110CD}
"""Signs that Unicode counts as format characters though they are seen."""


def test_every_control_and_format_character_is_escaped() -> None:
    for code in range(sys.maxunicode + 1):
        category = unicodedata.category(chr(code))
        steers = category in ("Cc", "Cf", "Cs", "Zl", "Zp") and code not in _VISIBLE
        if category != "Cn" and steers != (printable(chr(code)) != chr(code)):
            pytest.fail(f"U+{code:04X} {unicodedata.name(chr(code), '')}")


@pytest.mark.parametrize(
    ("text", "line", "running"),
    [
        ("plain", "plain", "plain"),
        ("Größe 数 é", "Größe 数 é", "Größe 数 é"),
        ("a\x1b[2Jb", r"a\x1b[2Jb", r"a\x1b[2Jb"),
        ("\x1b]52;c;eA==\x07", r"\x1b]52;c;eA==\x07", r"\x1b]52;c;eA==\x07"),
        ("\x9b31m\x85", r"\x9b31m\x85", r"\x9b31m\x85"),
        ("a\r\nb\tc", r"a\r\nb\tc", "a\nb\tc"),
        ("old\rnew", r"old\rnew", r"old\rnew"),
        ("\u202eexe.\u2066x\u200b\ufeff", r"\u202eexe.\u2066x\u200b\ufeff", r"\u202eexe.\u2066x\u200b\ufeff"),
        ("\ud83d", r"\ud83d", r"\ud83d"),
        ("👩\u200d👧 می\u200cخواهم", r"👩\u200d👧 می\u200cخواهم", "👩\u200d👧 می\u200cخواهم"),
        ("ad\u200dmin é\u200d\u200dx", r"ad\u200dmin é\u200d\u200dx", r"ad\u200dmin é\u200d\u200dx"),
        ("\U000e0041", r"\U000e0041", r"\U000e0041"),
    ],
)
def test_names_and_running_text(text: str, line: str, running: str) -> None:
    assert printable(text) == line
    assert printable(text, multiline=True) == running
    assert printable(printable(text)) == line


def test_json_is_exact_and_printable() -> None:
    value = {"a\x7f": ["\x9b\u202e\U000e0041\u200d", "Größe 数\n\t", "\x1b"]}
    document = json_printable(json.dumps(value, ensure_ascii=False, indent=2))
    assert json.loads(document) == value
    assert printable(document, multiline=True) == document
    assert "Größe 数" in document


def test_one_line() -> None:
    assert one_line("first\n   second\r\n\n\u2028third\x1b[m") == r"first second third\x1b[m"
    assert one_line("\n") == ""
    assert len(one_line("x" * 10_000)) <= 4000


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("see https://user:p4ss@host/x?y=1", "see https://***@host/x?y=1"),
        ("https://tok3n@host/simple", "https://***@host/simple"),
        ("socks5://u:p@[::1]:8080", "socks5://***@[::1]:8080"),
        ("proxy user:p%40ss@host:3128 is down", "proxy ***@host:3128 is down"),
        ("GET https://h/a?X-Amz-Signature=abc&n=3&token=t", "GET https://h/a?X-Amz-Signature=***&n=3&token=***"),
        ("{'authorization': 'Bearer hf_abcdefghijkl'}", "{'authorization': '***'}"),
        ("Illegal header value b'Bearer hf_abcdefghijklmno defghij'", "Illegal header value b'Bearer *** defghij'"),
        ("Illegal header value b'Bearer abcdefghijklmnopqrstuvw'", "Illegal header value b'***'"),
        ("Basic operations of bearer adapters", "Basic operations of bearer adapters"),
        ("hf_abcdefghijkl", "***"),
        ("someone@example.org wrote at 12:30 to a:b", "someone@example.org wrote at 12:30 to a:b"),
        ("https://host/path and key=value", "https://host/path and key=value"),
    ],
)
def test_redact(text: str, shown: str) -> None:
    assert redact(text, {}) == shown


def test_secrets_of_the_environment_are_found_anywhere() -> None:
    environment = {
        "HF_TOKEN": "abcdefgh",
        "PIP_PROXY": "user:sw0rd%21fish@proxy:3128",
        "PIP_EXTRA_INDEX_URL": "https://a.example/simple https://tok3n-value@b.example/simple",
        "HTTPS_PROXY": "http://u:short@p",
        "SHELL": "/bin/sh",
        "MY_TOKENIZER": "fast-one",
    }
    text = "abcdefgh; sw0rd%21fish, sw0rd!fish; tok3n-value; u:short; /bin/sh fast-one"
    shown = redact(text, environment)
    assert shown == "***; ***, ***; ***; ***; /bin/sh fast-one"
    assert redact(text, {}) != shown
