"""Text of unknown origin."""

from __future__ import annotations

import sys
import unicodedata

import pytest

from meteora_core.text import one_line, printable

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


def test_one_line() -> None:
    assert one_line("first\n   second\r\n\n\u2028third\x1b[m") == r"first second third\x1b[m"
    assert one_line("\n") == ""
    assert len(one_line("x" * 10_000)) <= 4000
