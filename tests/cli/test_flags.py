"""Flags without effect are refused by every command before anything is read (`meteora train` has a test of its own)."""

from __future__ import annotations

import pytest


@pytest.mark.parametrize(
    ("arguments", "flag"),
    [
        ("eval --task strategyqa --model base --T 3", "--T"),
        ("eval --task strategyqa --model own --top-k 3", "--top-k"),
        ("eval --task strategyqa --model own,base --checkpoint x", "--checkpoint"),
        ("eval --task strategyqa --model base --adapters x", "--adapters"),
        ("eval --task strategyqa --model base --backend dense", "--backend"),
        ("eval --task strategyqa --out x --no-save", "--out"),
        ("eval --task strategyqa --processes 2", "--processes"),
        ("eval --T 2 report x", "--T"),
        ("eval report x --kind radar", "--kind"),
        ("trace --prompt x --row 2", "--row"),
        ("trace --prompt x --json --out y.html", "--out"),
        ("trace --prompt x --adapter y --T 2", "--T"),
        ("trace --prompt x --adapter y --top-k 2", "--top-k"),
        ("trace --prompt x --base y --adapters z", "--adapters"),
        ("trace --prompt x --base y --backend dense", "--backend"),
        ("data build --task strategyqa --source pypi --raw-dir x", "--raw-dir"),
        ("bench-kernels --layers 2", "--layers"),
        ("bench-kernels --end-to-end --no-graph --compile", "--compile"),
        ("bench-kernels --tune --plot x.png", "--plot"),
        ("config show --defaults --json", "--json"),
    ],
)
def test_a_flag_without_effect_is_refused(meteora, tmp_path, arguments, flag) -> None:
    ran = meteora(*arguments.split())
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.startswith(f"error: {flag} "), ran.err
    assert "hint: " in ran.err
    assert list(tmp_path.iterdir()) == []
