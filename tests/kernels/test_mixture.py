"""The entry point: what it refuses, what auto picks, what it does when the GPU kernels fail."""

from __future__ import annotations

import logging

import pytest
import torch

from meteora_kernels import lora_mixture, mixture, pick_backend, plan
from support.mixture_cases import make


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"top_k": 0}, "top_k is 0"),
        ({"top_k": 7}, "only|but there are 6 adapters"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"backend": "fast"}, "unknown backend 'fast'"),
    ],
)
def test_refuses_options_out_of_range(change: dict[str, object], message: str) -> None:
    case = make([4] * 6, 16, 9, (3,), torch.float32)
    with pytest.raises(ValueError, match=message):
        lora_mixture(*case.arguments, **change)  # type: ignore[arg-type]


def test_refuses_unknown_options() -> None:
    case = make([4] * 6, 16, 9, (3,), torch.float32)
    with pytest.raises(TypeError, match="unexpected keyword argument 'topk'"):
        lora_mixture(*case.arguments, topk=2)  # type: ignore[call-arg]


@pytest.mark.parametrize("name", ["x", "base", "gate", "lora_A", "lora_B", "scaling", "offsets"])
def test_refuses_shapes_that_do_not_fit(name: str) -> None:
    case = make([4] * 6, 16, 9, (3,), torch.float32)
    tensor = getattr(case, name)
    setattr(case, name, torch.cat([tensor, tensor], dim=-1))
    with pytest.raises(ValueError, match=r"expected|width|fit"):
        lora_mixture(*case.arguments)


def test_refuses_mixed_dtypes_and_devices() -> None:
    case = make([4] * 6, 16, 9, (3,), torch.float32)
    case.gate = case.gate.half()
    with pytest.raises(ValueError, match="they must be one"):
        lora_mixture(*case.arguments)
    case = make([4] * 6, 16, 9, (3,), torch.float32)
    case.gate = case.gate.to("meta")
    with pytest.raises(ValueError, match="several devices: cpu, meta"):
        lora_mixture(*case.arguments)


def test_refuses_logits_of_forced_routes() -> None:
    case = make([4] * 6, 16, 9, (3,), torch.float32)
    with pytest.raises(ValueError, match="gate is not evaluated"):
        lora_mixture(*case.arguments, routes=(torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, 1)), return_logits=True)


def test_the_first_rule_that_fits_wins() -> None:
    def case(**changes: object) -> plan.Case:
        facts = {"tokens": 1, "adapters": 28, "total_rank": 224, "top_k": 2, "dtype": torch.bfloat16, "device": "cuda", "capability": 90}
        return plan.Case(**{**facts, **changes})  # type: ignore[arg-type]

    assert plan.choose(case(dtype=torch.float64))[0] == "reference"
    assert plan.choose(case(device="cpu"))[0] == "dense"
    assert plan.choose(case(capability=70))[0] == "dense"
    assert plan.choose(case(top_k=17))[0] == "dense"
    assert plan.choose(case())[0] == ("triton" if plan.triton_installed() else "dense")
    assert all(rule.reason for rule in plan.PLAN)
    backend, reason = pick_backend(torch.zeros(3, 5), 28, 224, 2, training=False)
    assert backend == "dense"
    assert "no GPU" in reason


def test_paths() -> None:
    assert plan.path(1, 224, 2, 8) == "few"
    assert plan.path(4096, 224, 2, 8) == "many"
    assert plan.path(4096, 4096, 2, 16) == "chosen"
    assert plan.path(4096, 4096, 8, 512) == "many"
    assert plan.many_adapters_way(64, 2048, 2, 8) == "few"
    assert plan.many_adapters_way(4096, 2048, 2, 8) is None
    assert plan.many_adapters_way(4096, 2048, 2, 8, fused=False) == "sorted"
    assert plan.many_adapters_way(64, 224, 2, 8) is None
    assert plan.chosen_rows_only(4096, 2, 16)
    assert not plan.chosen_rows_only(224, 2, 8)


def test_fused_groups_read_chosen_rows_unless_tokens_choose_more_than_there_are() -> None:
    assert plan.group_takes_chosen_rows(16, 224, 2, 8)
    assert plan.group_takes_chosen_rows(1, 24, 2, 8)
    assert plan.group_takes_chosen_rows(16, 8192, 2, 16)
    assert not plan.group_takes_chosen_rows(16, 448, 2, 16)
    assert not plan.group_takes_chosen_rows(16, 128, 8, 8)


ROUNDED, LATE, ONCE, TWICE = ("packed", 0, None), ("split", 0, None), ("packed", 1, None), ("packed", 2, None)
KERNEL, BROAD = ("packed", 1, (64, 64, 128, 4, 3)), ("split", 2, None)
COPYING = [("wide", pieces, (64, 128, 64, 4, 3)) for pieces in (8, 8, 4)] + [("wide", pieces, (128, 128, 64, 8, 3)) for pieces in (4, 2, 2)]
TOKENS = (17, 64, 65, 256, 257, 512, 1024, 1025, 4096, 1 << 20)


@pytest.mark.parametrize(
    ("outputs", "hidden", "apart", "beside", "in_place"),
    [
        pytest.param(
            6144,
            4096,
            [ONCE] * 4 + [ROUNDED] * 3 + [LATE] * 3,
            [ONCE] * 4 + COPYING,
            [ONCE] * 4 + [("wide", 2, None)] * 3 + [("wide", 0, None)] * 3,
            id="qkv-and-o",
        ),
        pytest.param(
            28672,
            4096,
            [KERNEL] * 2 + [ONCE] * 2 + [BROAD] * 3 + [LATE] * 3,
            [KERNEL] * 2 + [ONCE] * 2 + [BROAD] * 3 + [("wide", 0, None)] * 3,
            [KERNEL] * 2 + [("wide", 4, None)] * 2 + [("wide", 2, None)] * 4 + [("wide", 0, None)] * 2,
            id="gate-up",
        ),
        pytest.param(
            4096,
            14336,
            [TWICE] * 4 + [ROUNDED] * 3 + [LATE] * 3,
            [TWICE] * 4 + [ROUNDED] * 3 + [LATE] * 3,
            [TWICE] * 2 + [("wide", pieces, None) for pieces in (4, 8, 4, 4, 4, 4, 2, 2)],
            id="down",
        ),
        pytest.param(
            16383,
            8191,
            [ONCE] * 4 + [ROUNDED] * 3 + [LATE] * 3,
            [ONCE] * 4 + COPYING,
            [ONCE] * 4 + [("wide", 2, None)] * 3 + [("wide", 0, None)] * 3,
            id="below-the-limits",
        ),
    ],
)
def test_plan_of_groups(outputs: int, hidden: int, apart: list[object], beside: list[object], in_place: list[object]) -> None:
    """Llama-3-8B's groups, and both sides of every limit; float32 has no use for float32 sums."""

    def found(dtype: torch.dtype, **state: bool) -> list[object]:
        rules = [plan.group_rule(count, outputs, hidden, dtype, **state) for count in TOKENS]
        return [(rule.order, rule.pieces, rule.tile) for rule in rules]

    for dtype in (torch.bfloat16, torch.float16):
        assert found(dtype) == apart
        assert found(dtype, beside=True) == beside
        assert found(dtype, beside=True, in_place=True) == in_place
    assert found(torch.float32) == [ROUNDED] * 7 + [LATE] * 3
    with pytest.raises(AssertionError):
        plan.group_rule(16, outputs, hidden, torch.bfloat16)


def test_plan_of_groups_streams_where_it_can() -> None:
    """Up to 128 tokens and in 16 bits, after asking whether that very line can run."""
    asked = []

    def can(rule: plan.GroupRule) -> bool:
        asked.append(rule)
        return rule.least_hidden > 0

    for outputs, hidden in ((28672, 4096), (6144, 4096), (4096, 4096), (4096, 14336)):
        for dtype in (torch.bfloat16, torch.float16):
            assert plan.group_rule(129, outputs, hidden, dtype, can_run=can).order == "packed"
        assert plan.group_rule(64, outputs, hidden, torch.float32, can_run=can).order == "packed"
        assert asked == []
        for count in (17, 32, 33, 64, 65, 128):
            assert plan.group_rule(count, outputs, hidden, torch.bfloat16, can_run=can).order == ("stream" if hidden > 8192 else "packed")
            most = max(32, 1 << (count - 1).bit_length())
            assert {(rule.order, rule.most_tokens) for rule in asked} == {("stream", most)}
            asked.clear()


def test_plan_of_groups_routes_in_one_launch_where_it_can() -> None:
    """For x that nobody wrote in place, above 256 tokens; who asks without saying so gets the lines that run everywhere."""
    for tokens, tile, pieces in ((257, (64, 128, 64, 4, 4), 8), (1024, (64, 128, 64, 4, 4), 4), (2048, (64, 128, 64, 4, 4), 4), (2049, (64, 128, 64, 4, 4), 2)):
        for can in (lambda rule: True, lambda rule: False, None):
            rule = plan.group_rule(tokens, 4096, 4096, torch.bfloat16, beside=True, can_run=can)
            assert rule.order == "wide"
            assert (rule.routes, rule.tile == tile, rule.gate_pieces) == ((True, True, pieces) if can is not None and can(rule) else (False, False, 0))
        in_place = plan.group_rule(tokens, 4096, 4096, torch.bfloat16, beside=True, in_place=True, can_run=lambda rule: True)
        assert (in_place.order, in_place.routes, in_place.in_place) == ("wide", False, True)
        assert plan.group_rule(tokens, 4096, 4096, torch.bfloat16, can_run=lambda rule: True).order != "wide"


def test_plan_of_groups_lets_gates_run_at_once() -> None:
    """28 adapters of rank 8 in Llama-3-8B's groups: the programs that wait for each other are fewer than an H100's multiprocessors."""
    for outputs, hidden, members in ((28672, 4096, 2), (6144, 4096, 3), (4096, 4096, 1), (4096, 14336, 1)):
        for count in (17, 33, 65):
            rule = plan.group_rule(count, outputs, hidden, torch.bfloat16, can_run=lambda rule: True)
            assert rule.order == "stream"
            assert rule.tile is not None
            assert members * -(-256 // rule.tile[1]) * rule.gate_pieces <= 64


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("wide", 17, 64, 0, None, 2), "needs a tile"),
        (("wide", 17, 64, 2, (64, 64, 128, 4, 3), 2), "those of gates and A"),
        (("apart", 17, 64), "no such order"),
        (("packed", 16, 64), "above 16"),
        (("packed", 65, 64), "must be a range"),
        (("packed", 17, 64, -1), "0 or more"),
        (("packed", 17, 64, 0, (64, 64, 128, 4, 3)), "with a tile"),
        (("packed", 17, 64, 1, (64, 64, 8, 4, 3)), "from 16 on"),
        (("packed", 17, 64, 1, (64, 96, 128, 4, 3)), "powers of two"),
        (("packed", 17, 64, 1, (64, 64, 128, 4, 0)), "stages"),
        (("packed", 17, 64, 1, (64, 64, 128, 4, 3), 2), "the other orders have none"),
        (("stream", 17, 64, 1, (64, 64, 128, 4, 3)), "1 or more"),
        (("stream", 17, 64, 1, None, 2), "holds all tokens"),
        (("stream", 17, 65, 1, (64, 64, 128, 4, 3), 2), "holds all tokens"),
        (("stream", 17, 64, 5, (64, 64, 128, 4, 3), 2), "16 outputs for every piece"),
        (("packed", 17, 64, 0, None, 0, 0, 0, True), "only 'wide'"),
    ],
)
def test_plan_of_groups_refuses_lines_without_sense(arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan.GroupRule(*arguments)  # type: ignore[arg-type]


def test_auto_falls_back_and_says_so_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    case = make([4] * 6, 16, 9, (3,), torch.float32)
    expected = lora_mixture(*case.arguments, backend="dense")
    calls = []

    class Broken:
        @staticmethod
        def mix(*arguments: object, **options: object) -> None:
            calls.append(arguments)
            raise RuntimeError("out of resource: shared memory")

    monkeypatch.setattr(mixture, "_triton", Broken)
    monkeypatch.setattr(mixture, "_broken", {})
    monkeypatch.setattr(plan, "choose", lambda case: ("triton", "test"))
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert torch.equal(lora_mixture(*case.arguments), expected)  # type: ignore[arg-type]
    assert len(calls) == 1
    assert [record.message for record in caplog.records] == ["GPU kernels cannot run on cpu (out of resource: shared memory); the dense backend runs instead"]
