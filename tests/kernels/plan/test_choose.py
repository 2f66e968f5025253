"""The shipped tables, the table that a GPU gets, and the choices at Llama-3-8B's sizes and others."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from meteora_kernels import plan
from meteora_kernels.group import CAN_RUN, PATHS
from meteora_kernels.layer import CAN_RUN as LAYER_CAN_RUN
from meteora_kernels.plan import Case, Facts, Row, Span, choose
from meteora_kernels.plan.choose import shipped_for, user_file, user_table
from meteora_kernels.plan.table import shipped, shipped_tables
from meteora_kernels.tile import Tile

H100 = shipped("h100")
CPU, GPU = torch.device("cpu"), torch.device("cuda:0")
HALVES = (torch.bfloat16, torch.float16)
LLAMA = {"qkv": ((4096, 1024, 1024), 4096), "o": ((4096,), 4096), "gate-up": ((14336, 14336), 4096), "down": ((4096,), 14336)}
TOKENS = (17, 64, 65, 256, 257, 512, 1024, 1025, 4096, 1 << 20)


def facts(widths: tuple[int, ...], hidden: int, dtype: torch.dtype = torch.bfloat16, *, adapters: int = 28, rank: int = 8, wide: bool = False) -> Facts:
    return Facts(hidden, widths, adapters, adapters * rank, rank, dtype, CPU, wide)


def group_row(case: Case) -> Row:
    return choose(H100.group, case, CAN_RUN)


def layer_row(tokens: int, adapters: int, rank: int, top_k: int = 2, *, plain: bool = True) -> Row:
    return choose(H100.layer, Case(facts((4096,), 4096, adapters=adapters, rank=rank), tokens, top_k, plain=plain), LAYER_CAN_RUN)


def test_paths_of_layers() -> None:
    assert layer_row(1, 28, 8).path == layer_row(16, 28, 8).path == "few_tokens"
    assert layer_row(1, 28, 8).way == "all_rows"
    assert layer_row(1, 256, 16).way == layer_row(16, 256, 16).way == "chosen_rows"
    assert layer_row(4096, 28, 8).path == "many_tokens"
    assert [layer_row(tokens, 28, 8, plain=False).inline for tokens in (1, 64, 65)] == [True, True, False]
    assert (layer_row(4096, 256, 16).path, layer_row(4096, 256, 16).way) == ("many_adapters", "sorted")
    assert layer_row(4096, 8, 512, 8).path == "many_tokens"
    assert (layer_row(128, 256, 8).way, layer_row(129, 256, 8).path, layer_row(4096, 256, 8).way) == ("few", "many_tokens", "sorted")
    assert layer_row(64, 256, 8, plain=False).path == "many_tokens"


def test_fused_groups_sort_many_adapters_on_the_h200() -> None:
    """The path is used from 512 tokens on, for a total rank of 2,048 and more; only for A where B fits into the cache or tokens are few."""

    def path(tokens: int, adapters: int, width: int = 4096) -> tuple[str, str]:
        row = choose(shipped("h200").group, Case(facts((width,), 4096, adapters=adapters, rank=8), tokens, 2), CAN_RUN)
        return row.path, row.way

    assert path(512, 256) == path(4096, 256) == path(512, 256, 28672) == ("many_adapters", "sorted_down")
    assert path(4096, 1024) == path(4096, 256, 28672) == ("many_adapters", "sorted")
    assert path(256, 256) == ("many_adapters", "few")
    assert "many_adapters" not in {path(511, 256)[0], path(4096, 255)[0], path(4096, 64)[0]}


def test_paths_of_an_8b_model_on_the_h200(monkeypatch: pytest.MonkeyPatch) -> None:
    """28 adapters of rank 8: one launch from 8 tokens on, and prefill of many tokens without copies of x; with 64 adapters, only chosen rows are read."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # the sizes are those of tensors on a CPU, also on a machine with a GPU

    def paths(tokens: int, *, wide: bool = False, in_place: bool = False, adapters: int = 28) -> list[str]:
        cases = [Case(facts(widths, hidden, adapters=adapters, wide=wide), tokens, 2, in_place, aligned=True) for widths, hidden in LLAMA.values()]
        return [choose(shipped("h200").group, case, CAN_RUN).path for case in cases]

    assert paths(8) == paths(16) == paths(17) == ["one_launch"] * 4
    assert paths(7) == paths(8, adapters=64) == ["decode_chosen_rows"] * 4
    assert paths(256) == ["packed", "packed", "split", "packed"]
    assert paths(256, wide=True) == ["packed", "packed", "wide", "packed"]
    assert paths(16384) == ["split", "split", "split", "packed"]
    assert paths(16384, wide=True) == ["split", "split", "wide", "packed"]
    assert paths(16384, wide=True, in_place=True) == ["wide"] * 4
    assert paths(16384, adapters=64)[3] == paths(8192)[3] == "split"


def test_the_h200_multiplies_chosen_adapters_once_where_that_was_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """With 256 adapters of rank 8: down, from 17 to 32 tokens."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")

    def paths(tokens: int, *, adapters: int = 256, aligned: bool = True) -> list[str]:
        cases = [Case(facts(widths, hidden, adapters=adapters), tokens, 2, aligned=aligned) for widths, hidden in LLAMA.values()]
        return [choose(shipped("h200").group, case, CAN_RUN).path for case in cases]

    many, chosen = "many_adapters", "chosen_adapters"
    assert paths(17) == paths(32) == [many, many, many, chosen]
    assert paths(33) == paths(32, adapters=1024) == paths(32, aligned=False) == [many] * 4


def test_programs_of_the_rows_for_chosen_adapters_fit_into_shared_memory() -> None:
    """All stages of a tile of the input and of the weights, in the 227 KiB that a program of compute capability 9.0 can have."""
    tiles = [row.tile for row in shipped("h200").group if row.path == "chosen_adapters"]
    assert tiles
    for tile in tiles:
        assert tile is not None
        assert 2 * tile.step * (tile.tokens + tile.outputs) * tile.stages <= 227 << 10


def test_the_h200_reads_many_gates_in_larger_programs() -> None:
    """With 1,024 adapters and more than one token, every group of Llama-3-8B has a row of its own for decoding."""

    def rows_of_gates(tokens: int, adapters: int) -> list[int]:
        found = []
        for widths, hidden in (((4096, 1024, 1024), 4096), ((4096,), 4096), ((14336, 14336), 4096), ((4096,), 14336)):
            row = choose(shipped("h200").group, Case(facts(widths, hidden, adapters=adapters), tokens, 2), CAN_RUN)
            assert row.path == "decode_chosen_rows"
            assert row.tile is not None
            found.append(row.tile.gate_rows)
        return found

    assert rows_of_gates(8, 1024) == [32, 64, 64, 64]
    assert rows_of_gates(8, 1023) == rows_of_gates(1, 1024) == [16] * 4


@pytest.mark.parametrize(
    ("tokens", "adapters", "rank", "top_k", "layer", "group"),
    [
        (89, 348, 20, 4, "library", "split"),
        (20, 170, 4, 3, "many_adapters", ""),
        (20, 64, 8, 8, "many_tokens", ""),
        (128, 256, 8, 2, "many_adapters", "many_adapters"),
    ],
)
def test_tokens_that_choose_too_many_rows_are_not_multiplied_one_by_one(tokens: int, adapters: int, rank: int, top_k: int, layer: str, group: str) -> None:
    case = Case(facts((1024,), 4096, adapters=adapters, rank=rank), tokens, top_k)
    assert choose(shipped("h200").layer, case, LAYER_CAN_RUN).path == layer
    assert choose(shipped("h200").group, case, CAN_RUN).path == group or not group


@pytest.mark.parametrize(("tokens", "over", "path"), [(64, True, "library"), (65, True, "many_tokens"), (64, False, "many_tokens"), (16, True, "few_tokens")])
def test_the_h200_overlaps_layers_of_64_tokens_with_the_base_product(tokens: int, over: bool, path: str) -> None:
    case = Case(facts((4096,), 4096, adapters=28, rank=8), tokens, 2, over=over)
    assert choose(shipped("h200").layer, case, LAYER_CAN_RUN).path == path


def test_one_token_keeps_the_form_of_the_published_figures() -> None:
    flat = {(adapters, rank, top_k): layer_row(1, adapters, rank, top_k).flat for adapters in (16, 17, 32, 33) for rank in (4, 5, 8, 9) for top_k in (1, 2, 3)}
    assert {sizes for sizes, is_flat in flat.items() if not is_flat} == {(adapters, rank, 2) for adapters in (17, 32) for rank in (5, 8)}
    assert layer_row(2, 28, 8).flat


@pytest.mark.parametrize(
    ("tokens", "adapters", "rank", "top_k", "path"),
    [
        (16, 28, 8, 2, "decode_chosen_rows"),
        (1, 3, 8, 2, "decode_chosen_rows"),
        (16, 512, 16, 2, "decode_chosen_rows"),
        (16, 28, 16, 2, "decode_all_rows"),
        (16, 16, 8, 8, "decode_all_rows"),
        (64, 256, 8, 2, "many_adapters"),
        (4096, 256, 8, 2, "split"),
    ],
)
def test_groups_decode_chosen_rows_unless_tokens_choose_more_than_there_are(tokens: int, adapters: int, rank: int, top_k: int, path: str) -> None:
    assert group_row(Case(facts((4096,), 4096, adapters=adapters, rank=rank), tokens, top_k)).path == path


def test_decoding_with_mixed_ranks_expects_the_mean_rank() -> None:
    """Ranks up to 64 whose mean is 22: 14 tokens choose as many rows as there are."""
    mixed = facts((4096,), 4096)._replace(total_rank=28 * 22, max_rank=64)
    assert [group_row(Case(mixed, tokens, 2)).path for tokens in (8, 14, 15)] == ["decode_chosen_rows", "decode_chosen_rows", "decode_all_rows"]


ROUNDED, LATE, ONCE, TWICE = ("packed", 0, None), ("split", 0, None), ("packed", 1, None), ("packed", 2, None)
KERNEL, BROAD = ("packed", 1, Tile(64, 64, 128, 4, 3)), ("split", 2, None)
COPYING = [("wide", pieces, Tile(64, 128, 64, 4, 3)) for pieces in (8, 8, 4)] + [("wide", pieces, Tile(128, 128, 64, 8, 3)) for pieces in (4, 2, 2)]


@pytest.mark.parametrize(
    ("widths", "hidden", "plain", "wide", "in_place"),
    [
        pytest.param(
            (4096, 1024, 1024),
            4096,
            [ONCE] * 4 + [ROUNDED] * 3 + [LATE] * 3,
            [ONCE] * 4 + COPYING,
            [ONCE] * 4 + [("wide", 2, None)] * 3 + [("wide", 0, None)] * 3,
            id="qkv-and-o",
        ),
        pytest.param(
            (14336, 14336),
            4096,
            [KERNEL] * 2 + [ONCE] * 2 + [BROAD] * 3 + [LATE] * 3,
            [KERNEL] * 2 + [ONCE] * 2 + [BROAD] * 3 + [("wide", 0, None)] * 3,
            [KERNEL] * 2 + [("wide", 4, None)] * 2 + [("wide", 2, None)] * 4 + [("wide", 0, None)] * 2,
            id="gate-up",
        ),
        pytest.param(
            (4096,),
            14336,
            [TWICE] * 4 + [ROUNDED] * 3 + [LATE] * 3,
            [TWICE] * 4 + [ROUNDED] * 3 + [LATE] * 3,
            [TWICE] * 2 + [("wide", pieces, None) for pieces in (4, 8, 4, 4, 4, 4, 2, 2)],
            id="down",
        ),
        pytest.param(
            (16383,),
            8191,
            [ONCE] * 4 + [ROUNDED] * 3 + [LATE] * 3,
            [ONCE] * 4 + COPYING,
            [ONCE] * 4 + [("wide", 2, None)] * 3 + [("wide", 0, None)] * 3,
            id="below-the-limits",
        ),
    ],
)
def test_groups_that_the_copy_engine_cannot_read(widths: tuple[int, ...], hidden: int, plain: list[object], wide: list[object], in_place: list[object]) -> None:
    """The choices for Llama-3-8B's groups on both sides of every limit; float32 needs no partial sums."""

    def found(dtype: torch.dtype, *, has_up: bool = False, window: bool = False) -> list[object]:
        rows = [group_row(Case(facts(widths, hidden, dtype, wide=has_up), count, 2, in_place=window)) for count in TOKENS]
        assert all(row.inline == (count <= 64) for row, count in zip(rows, TOKENS, strict=True) if row.path == "packed")
        return [(row.path, row.pieces, row.tile) for row in rows]

    for dtype in HALVES:
        assert found(dtype) == plain
        assert found(dtype, has_up=True) == wide
        assert found(dtype, has_up=True, window=True) == in_place
    assert found(torch.float32) == [ROUNDED] * 7 + [LATE] * 3


@pytest.mark.parametrize("name", LLAMA)
def test_one_launch_where_it_can_run(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The path is used up to 128 tokens in 16 bits, with fewer waiting programs than an H100 has multiprocessors."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    widths, hidden = LLAMA[name]
    for tokens in (17, 32, 33, 64, 65, 128):
        for dtype in HALVES:
            row = group_row(Case(facts(widths, hidden, dtype), tokens, 2, aligned=True))
            assert row.path == "one_launch"
            assert row.tile is not None
            assert row.tile.tokens == max(32, 1 << (tokens - 1).bit_length())
            assert len(widths) * -(-256 // row.tile.outputs) * row.gate_pieces <= 64
        assert group_row(Case(facts(widths, hidden, torch.float32), tokens, 2)).path == "packed"
    assert group_row(Case(facts(widths, hidden), 129, 2, aligned=True)).path == "packed"


def test_one_launch_before_a_wide_product_where_it_can_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """The launch is used above 256 tokens, for x that is not in place."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for tokens, pieces in ((257, 8), (1024, 4), (2048, 4), (2049, 2)):
        sizes = facts((4096,), 4096, wide=True)
        row = group_row(Case(sizes, tokens, 2, aligned=True))
        assert (row.path, row.gate_pieces, row.tile) == ("wide", pieces, Tile(64, 128, 64, 4, 4))
        assert group_row(Case(sizes, tokens, 2)).gate_pieces == 0
        assert group_row(Case(sizes, tokens, 2, in_place=True, aligned=True)).in_place
        assert group_row(Case(facts((4096,), 4096), tokens, 2, aligned=True)).path != "wide"


@pytest.mark.parametrize(
    ("name", "capability", "table", "by"),
    [
        ("NVIDIA H100 80GB HBM3", 90, "NVIDIA H100", "name"),
        ("NVIDIA H200", 90, "NVIDIA H200", "name"),
        ("NVIDIA GH200 480GB", 90, "NVIDIA H200", "name"),
        ("NVIDIA H800", 90, "NVIDIA H100", "compute capability"),
        ("NVIDIA A100-SXM4-80GB", 80, "default", "default"),
        ("NVIDIA B200", 100, "default", "default"),
    ],
)
def test_tables_are_found_by_name_then_by_compute_capability(name: str, capability: int, table: str, by: str) -> None:
    found, how = shipped_for(name, capability)
    assert (found.name, how) == (table, by)


def test_shipped_tables_are_whole() -> None:
    """Every table has a row for every size and says what was measured on another GPU, and the default has the rows of the H100."""
    tables = shipped_tables()
    assert [table.name for table in tables] == ["NVIDIA H100", "NVIDIA H200"]
    assert shipped("default").group == H100.group
    for table in tables:
        assert all(row.measured for row in table.group + table.layer)
        for tokens in (1, 16, 17, 100, 1000, 1 << 20):
            for rank, dtype in ((1, torch.float32), (300, torch.float16)):
                sizes = facts((100,), 100, dtype, adapters=5, rank=rank)
                assert choose(table.group, Case(sizes, tokens, 2), CAN_RUN).path in PATHS
                assert choose(table.layer, Case(sizes, tokens, 2, plain=False), LAYER_CAN_RUN).path == "many_tokens"
    assert all("not measured here" in row.measured for row in tables[1].group if "H100" in row.measured)
    with pytest.raises(LookupError, match="no path fits"):
        choose((), Case(facts((100,), 100), 1, 2), CAN_RUN)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the properties of the GPU that the choice of a table reads by those of an unknown GPU."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-80GB")
    monkeypatch.setattr(plan.machine, "capability", lambda device: 80)


@pytest.mark.usefixtures("gpu")
def test_an_unknown_gpu_says_which_table_it_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("METEORA_CACHE", str(tmp_path))
    with caplog.at_level(logging.INFO):
        before = plan.use(GPU, None)
        try:
            assert plan.table_of(GPU) is plan.table_of(GPU)
        finally:
            plan.use(GPU, before)
    assert len(caplog.records) == 1
    assert "no kernel table for NVIDIA A100-SXM4-80GB: taking that of default" in caplog.text


@pytest.mark.usefixtures("gpu")
def test_the_user_s_own_rows_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METEORA_CACHE", str(tmp_path))
    file = user_file("NVIDIA A100-SXM4-80GB")
    assert file == tmp_path / "kernels" / "nvidia-a100-sxm4-80gb.toml"
    file.parent.mkdir()
    file.write_text('[[group]]\npath = "split"\ntokens = [1, 9]\noutputs = [100, 100]\nmeasured = "here"\n', encoding="utf-8")
    before = plan.use(GPU, None)
    try:
        rows = plan.table_of(GPU).group
    finally:
        plan.use(GPU, before)
    assert rows[0] == Row("split", Span(1, 9), outputs=Span(100, 100), measured="here")
    assert rows[1:] == H100.group
    assert choose(rows, Case(facts((100,), 100), 9, 2), CAN_RUN) is rows[0]
    assert choose(rows, Case(facts((101,), 100), 9, 2), CAN_RUN) is not rows[0]


def test_where_the_user_s_table_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("METEORA_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert user_file("GPU") == tmp_path / "meteora" / "kernels" / "gpu.toml"
    monkeypatch.setenv("METEORA_KERNEL_TABLE", str(tmp_path / "mine.toml"))
    assert user_file("GPU") == tmp_path / "mine.toml"
    monkeypatch.setenv("METEORA_KERNEL_TABLE", "")
    assert user_file("GPU") is None


@pytest.mark.parametrize("text", ["no toml", '[[group]]\npath = "warp"\n', "[[group]]\npath = 3\n"])
def test_a_broken_table_is_reported_and_left_out(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "mine.toml"
    monkeypatch.setenv("METEORA_KERNEL_TABLE", str(file))
    assert user_table("GPU") is None
    file.write_text(text, encoding="utf-8")
    with caplog.at_level(logging.WARNING):
        assert user_table("GPU") is None
    assert f"the kernel table {file} cannot be used" in caplog.text
