"""PEFT's Arrow routing as a model of ``meteora eval``."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from meteora_core.errors import AdapterError, UsageError
from meteora_core.evaluation.adapters import with_adapter
from meteora_core.evaluation.arrow import arrow_top_k, with_arrow
from meteora_core.evaluation.eval_plan import EvalOptions, EvalPlan
from meteora_core.evaluation.evaluate import evaluate
from meteora_core.model.base import BaseReference
from support.evaluation_workspace import SIZES, TASKS, Workspace, make_workspace
from support.tiny_models import make_tiny_llama

IDS = torch.arange(3, 23).reshape(2, 10)


@pytest.fixture
def folders(make_adapter):
    return {name: make_adapter(name, seed) for seed, name in enumerate(("a", "b", "c"))}


def test_the_base_is_left_as_it_was_and_the_choice_is_reproducible(folders) -> None:
    model = make_tiny_llama()
    with torch.inference_mode():
        before = model(IDS).logits
        seen = []
        for _ in range(2):
            with with_arrow(model, folders) as routed:
                seen.append(routed(IDS).logits)
        with with_arrow(model, folders, top_k=1) as routed:
            one = routed(IDS).logits
        after = model(IDS).logits
    assert torch.equal(before, after)
    assert torch.equal(seen[0], seen[1])
    assert not torch.allclose(seen[0], before)
    assert not torch.allclose(seen[0], one)
    assert not any("lora" in name for name, _ in model.named_parameters())


def test_a_single_adapter_is_that_adapter(folders) -> None:
    model = make_tiny_llama()
    with torch.inference_mode():
        with with_arrow(model, {"b": folders["b"]}) as routed:
            mixed = routed(IDS).logits
        with with_adapter(model, folders["b"]) as alone:
            torch.testing.assert_close(mixed, alone(IDS).logits, rtol=1e-4, atol=1e-5)


def test_adapters_of_unequal_ranks_are_routed_as_if_padded(folders, make_adapter, tmp_path) -> None:
    """A copy with zeros up to the common rank and the same scaling is the reference; PEFT itself refuses unequal ranks."""
    small, copy = make_adapter("d", 7, r=2), tmp_path / "copy"
    shutil.copytree(small, copy)
    tensors = load_file(copy / "adapter_model.safetensors")
    rows = {name: (0, 0, 0, 2) if ".lora_A." in name else (0, 2) for name in tensors}
    save_file({name: torch.nn.functional.pad(tensor, rows[name]) for name, tensor in tensors.items()}, copy / "adapter_model.safetensors")
    config = json.loads((copy / "adapter_config.json").read_text())
    (copy / "adapter_config.json").write_text(json.dumps(config | {"r": 4, "lora_alpha": 16}))
    model, seen = make_tiny_llama(), []
    with torch.inference_mode():
        for folder in (small, copy):
            with with_arrow(model, {**folders, "d": folder}, top_k=2) as routed:
                seen.append(routed(IDS).logits)
        with with_arrow(model, folders, top_k=2) as routed:
            without = routed(IDS).logits
    torch.testing.assert_close(seen[0], seen[1])
    assert not torch.allclose(seen[0], without, atol=1e-3)


def test_layers_of_unequal_ranks_are_routed(make_adapter) -> None:
    folder, model = make_adapter("d", 8, r=2, rank_pattern={"down_proj": 5, "q_proj": 1}, use_rslora=True), make_tiny_llama()
    with torch.inference_mode():
        with with_arrow(model, {"d": folder}) as routed:
            mixed = routed(IDS).logits
        with with_adapter(model, folder) as alone:
            torch.testing.assert_close(mixed, alone(IDS).logits, rtol=1e-4, atol=1e-5)


def test_adapters_of_other_layers_are_refused_and_the_base_stays(folders, make_adapter) -> None:
    model = make_tiny_llama()
    names = {name for name, _ in model.named_parameters()}
    with (
        pytest.raises(AdapterError, match="mismatch") as caught,
        with_arrow(model, {**folders, "d": make_adapter("d", target_modules=["q_proj"])}),
    ):
        pass
    assert caught.value.hint == "Arrow needs adapters with the same base model and target modules"
    assert {name for name, _ in model.named_parameters()} == names


def test_top_k_is_peft_s_default_or_what_is_there() -> None:
    assert [arrow_top_k(None, 8), arrow_top_k(None, 2), arrow_top_k(2, 8)] == [3, 2, 2]
    with pytest.raises(UsageError, match="top_k is 9, but there are 8 adapters"):
        arrow_top_k(9, 8)


@pytest.fixture
def place(tmp_path, make_adapter) -> Workspace:
    return make_workspace(tmp_path, make_adapter, count=3)


def test_it_is_a_model_of_an_evaluation(place, make_adapter) -> None:
    options = EvalOptions(max_new_tokens=4, no_repeat_ngram_size=4)
    plan = EvalPlan(
        tasks=(TASKS[0], "composite_3"),
        models=("base", "peft-arrow"),
        data_dir=place.data,
        adapters_dir=place.adapters,
        checkpoint=place.checkpoint,
        base=BaseReference(str(place.base)),
        options=options,
        out_dir=place.folder / "out",
    )
    base, arrow = evaluate(plan, device=torch.device("cpu"), dtype=torch.float32)
    assert set(arrow.results) == {TASKS[0], "composite_3"}
    written = json.loads((place.folder / "out" / "peft-arrow").glob("results_*.json").__next__().read_text())
    assert set(written["config"]["model_args"]["weights_sha256"]) == set(TASKS)
    assert [sample.output for sample in base.results[TASKS[0]].samples] != [sample.output for sample in arrow.results[TASKS[0]].samples]
    make_adapter("balanced", 9, llama=SIZES)
    (place.adapters / "balanced" / "meteora_training.json").write_text('{"tasks": ["x", "y"]}')
    (again,) = evaluate(EvalPlan(**{**plan.__dict__, "models": ("peft-arrow",), "tasks": (TASKS[0],)}), device=torch.device("cpu"), dtype=torch.float32)
    assert again.document["config"]["model_args"] == arrow.document["config"]["model_args"]


def test_other_models_of_the_same_run_see_the_bare_base(place) -> None:
    options = EvalOptions(max_new_tokens=4, no_repeat_ngram_size=4)

    def run(*models: str):
        plan = EvalPlan(
            tasks=TASKS[:2],
            models=models,
            data_dir=place.data,
            adapters_dir=place.adapters,
            checkpoint=place.checkpoint,
            base=BaseReference(str(place.base)),
            options=options,
        )
        return [
            {task: [sample.output for sample in result.samples] for task, result in outcome.results.items()}
            for outcome in evaluate(plan, device=torch.device("cpu"), dtype=torch.float32)
        ]

    together = run("peft-arrow", "base", "meteora", "peft-arrow", "own")
    assert together == [run(model)[0] for model in ("peft-arrow", "base", "meteora", "peft-arrow", "own")]
