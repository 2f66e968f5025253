"""The benchmark's arithmetic and shape of results; small sizes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from meteora_core.bench import ModelShape, ModelSizes, bench_end_to_end, bench_layers, plot_layers
from meteora_core.bench.contenders import POOL, RUN, Setting, lay_input, local_input, make_layer, run_group
from meteora_core.bench.end_to_end import BASES, _decoder, random_model
from meteora_core.bench.shapes import SHAPES, shape_named
from meteora_core.bench.timing import Timing, medians
from meteora_core.errors import UsageError
from meteora_kernels import wide as wide_layout
from meteora_kernels.plan import Row, Span
from meteora_kernels.plan.table import shipped
from support.kernel_rows import taking

TINY = ModelShape("tiny", 32, 16, 48, 4, 2, 2, 64)
CPU = torch.device("cpu")
QUICK = Timing(torch.float32, CPU, seconds=0.01)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ceilings are not measured and weights not spread past the cache."""
    monkeypatch.setattr("meteora_core.bench.layers.ceilings", lambda device, dtype: (10.0, 0.1))
    monkeypatch.setattr("meteora_core.bench.layers._CACHE_BYTES", {"cpu": 1})


def test_all_contenders_compute_the_same() -> None:
    setting = Setting(5, 4, 2)
    for group in make_layer(TINY, setting, torch.float64, CPU, fused=False):
        x = torch.randn(7, group.hidden, dtype=torch.float64)
        expected = run_group("reference", group, x, setting)
        for name in ("loop", "gather", "dense"):
            for one, other in zip(expected, run_group(name, group, x, setting), strict=True):
                torch.testing.assert_close(other, one)
        base = run_group("base", group, x, setting)
        assert all(not torch.allclose(one, other) for one, other in zip(expected, base, strict=True))
        assert all(not torch.allclose(one, other) for one, other in zip(run_group("peft", group, x, setting), base, strict=True))


def test_fused_gets_its_input_as_a_fused_model_gives_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """For q, k, v, for gate, up and for down in the columns of a wider buffer, for o as it is; all four are right."""
    monkeypatch.setattr(wide_layout, "SHARE", 0)
    device, setting, wide = torch.device("cuda" if torch.cuda.is_available() else "cpu"), Setting(3, 4, 2), []
    with taking(Row("wide", Span(17), pieces=1), *shipped("default").group):
        for group in make_layer(TINY, setting, torch.float16, device, fused=True):
            tensors = [tensor for linear in group.linears for tensor in (linear.weight, linear.gate, linear.lora_A)]
            assert all(tensor.is_contiguous() for tensor in tensors), "the other contenders' rows have no gaps"
            assert lay_input(group, few := torch.randn(3, group.hidden).to(device, torch.float16), 2) is few
            x = torch.randn(18, group.hidden).to(device, torch.float16)
            given = lay_input(group, x, 2)
            assert torch.equal(given, x)
            wide.append(not given.is_contiguous())
            for one, other in zip(run_group("reference", group, x, setting), run_group("fused", group, given, setting), strict=True):
                assert float(((one - other).norm(dim=1) / one.norm(dim=1)).median()) < 2e-3
    assert wide == [True, False, True, True]


def test_rows_cover_every_contender_and_size() -> None:
    bench = bench_layers(TINY, (1, 9), Setting(5, 4), QUICK)
    assert {(row.tokens, row.name) for row in bench.rows} == {
        (count, name) for count in (1, 9) for name in ("base", "peft", "loop", "gather", "reference", "dense")
    }
    for row in bench.rows:
        assert row.milliseconds > 0
        assert row.error is not None
        assert row.error < 1e-5
        assert row.mode == "eager"
        assert row.peak_mib is None
        assert (row.ratio == 1.0) == (row.name == "base")
    assert bench.chosen[9].startswith("dense: ")
    assert bench.to_json()["rows"][0]["name"] == "base"


def test_local_routes_are_shared_by_neighbours() -> None:
    setting, tokens = Setting(40, 2, 2), 5 * RUN - 3
    shape = ModelShape("shallow", 512, 8, 600, 4, 2, 2, 64)  # gates of 512 columns are nearly orthogonal
    for group in make_layer(shape, setting, torch.float32, CPU, fused=False):
        x = local_input(group, torch.randn(tokens, group.hidden), setting)
        for linear in group.linears:
            chosen = (x @ linear.gate.t()).topk(2, dim=1).indices.sort(dim=1).values.tolist()
            assert all(chosen[token] == chosen[token // RUN * RUN] for token in range(tokens))
            assert 2 < len({adapter for pair in chosen for adapter in pair}) <= POOL


def test_both_kinds_of_routes_are_timed() -> None:
    bench = bench_layers(TINY, (6,), Setting(5, 4), QUICK, contenders=["dense"], routes=("uniform", "local"))
    assert [(row.name, row.routes) for row in bench.rows] == [(name, routes) for routes in ("uniform", "local") for name in ("base", "dense")]
    assert all(row.error is not None and row.error < 1e-5 for row in bench.rows)
    assert bench.base == "F.linear for each linear, as transformers' eager code calls it, launched one by one"
    with pytest.raises(UsageError, match="unknown routes: near"):
        bench_layers(TINY, (6,), timing=QUICK, routes=("near",))


def test_backward_and_a_choice_of_contenders() -> None:
    bench = bench_layers(TINY, (6,), Setting(5, 4), QUICK, backward=True, contenders=["dense"])
    assert [row.name for row in bench.rows] == ["base", "dense"]
    assert all(row.error is None for row in bench.rows)


def test_end_to_end_on_a_tiny_model() -> None:
    whole = bench_end_to_end(TINY, Setting(3, 2), QUICK, sizes=ModelSizes((1, 2), 5, 6, 7))
    works = {"decode, batch 1", "decode, batch 2", "prefill of 6", "training step of 7"}
    assert {(row.work, row.name) for row in whole.rows} == {(work, name) for work in works for name in ("base", "peft", "meteora")}
    assert whole.skipped == []
    assert whole.bases == {"eager": BASES["eager"]}
    for row in whole.rows:
        assert row.tokens_per_second == pytest.approx(int(row.work.split()[-1]) / row.milliseconds * 1e3)


def test_compiled_decoding_is_one_graph_of_the_thorough_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same step, with the whole model passed to the compiler once."""
    model = random_model(TINY, 1, torch.float32, torch.device("cpu"))
    asked = []
    monkeypatch.setattr(torch, "compile", lambda given, **options: asked.append((given, options)) or given)
    ids = torch.arange(10).view(2, 5)
    one, other = (_decoder(model, ids, compiled=compiled)() for compiled in (False, True))
    assert asked == [(model, {"mode": "max-autotune-no-cudagraphs", "fullgraph": True, "dynamic": False})]
    assert torch.equal(one.logits, other.logits)


def test_large_gathers_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("meteora_core.bench.layers._GATHER_LIMIT", 1)
    bench = bench_layers(TINY, (3,), Setting(3, 2), QUICK, contenders=["gather"])
    assert [row.name for row in bench.rows] == ["base"]
    assert bench.skipped[0].startswith("gather at 3 tokens")


@pytest.mark.parametrize(("setting", "contenders"), [(Setting(5, 4, 9), None), (Setting(0, 4), None), (Setting(5, 0), None), (Setting(5, 4), ["warp"])])
def test_refuses_what_makes_no_sense(setting: Setting, contenders: list[str] | None) -> None:
    with pytest.raises(UsageError):
        bench_layers(TINY, (1,), setting, QUICK, contenders=contenders)
    with pytest.raises(UsageError):
        bench_layers(TINY, (0,), timing=QUICK)


def test_shapes() -> None:
    assert shape_named("llama3-8b").weights == 2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336
    with pytest.raises(UsageError, match="unknown model shape"):
        shape_named("llama3")
    assert set(SHAPES) == {"llama3-8b", "llama2-13b", "smollm2-135m"}


def test_medians_run_in_turn_and_nobody_always_behind_the_same() -> None:
    def run() -> list[str]:
        order: list[str] = []
        found = medians({name: lambda name=name: order.append(name) for name in "abc"}, CPU, repeats=20, seconds=60.0)  # type: ignore[misc]
        assert set(found) == set("abc")
        return order

    order = run()
    rounds = [tuple(order[start : start + 3]) for start in range(0, 63, 3)]
    assert rounds[0] == ("a", "b", "c")  # the warm-up
    assert all(sorted(one) == ["a", "b", "c"] for one in rounds)
    assert len({one[0] for one in rounds}) == 3
    assert run() == order
    few: list[int] = []
    medians({"a": lambda: few.append(1)}, CPU, repeats=20, seconds=0.0)
    assert len(few) == 6


def test_plot_is_an_image(tmp_path: Path) -> None:
    bench = bench_layers(TINY, (1, 4), Setting(3, 2), QUICK, contenders=["dense"])
    plot_layers(bench, tmp_path / "ratios.png")
    assert (tmp_path / "ratios.png").read_bytes().startswith(b"\x89PNG")
