"""NaN and infinity in a model stop all decoding with an error that names the layer, and nothing is saved."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch

from meteora_core import AdapterBank, attach
from meteora_core.errors import NonFiniteError
from meteora_core.evaluation.eval_plan import EvalOptions
from meteora_core.evaluation.routes import RouteCounts, count_routes
from meteora_core.evaluation.runner import evaluate_task
from meteora_core.generation.engine import Engine
from meteora_core.generation.nonfinite import not_finite
from meteora_core.generation.requests import Request
from meteora_core.generation.sampling import Sampling
from meteora_core.trace.record import trace_tokens
from support.chat_world import byte_llama, byte_tokenizer, without_ends
from support.evaluation_plans import plan_of, run
from support.evaluation_workspace import TASKS, Workspace, make_workspace
from support.generation import engine_of
from support.tiny_models import make_tiny_llama

LAYER = "model.layers.1.mlp.up_proj"
REQUESTS = [Request((5, 6), Sampling(12)), Request((9, 8, 7, 6), Sampling(12))]
# For each fault: the tensor, the value, and the part of the message about it.
FAULTS = {
    "gate": ("gate", float("nan"), "whose gate holds such values"),
    "adapter": ("lora_A", float("inf"), "whose lora_A holds such values"),
    "scaling": ("scaling", float("nan"), "whose scaling holds such values"),
    "base": ("base_layer.weight", float("-inf"), "whose weight holds such values"),
    "overflow": ("lora_B", 3e38, ""),
}


def break_it(model: torch.nn.Module, fault: str) -> str:
    """Put a value that is not finite, or too large, into a layer. Returns the expected message as a regular expression."""
    name, value, said = FAULTS[fault]
    with torch.no_grad():
        tensor = dict([*model.named_parameters(), *model.named_buffers()])[f"{LAYER}.{name}"]
        if fault == "overflow":
            tensor.fill_(value)
        else:
            tensor.view(-1)[0] = value
    return rf"the model's output is NaN or infinite; the first layer where that happens is {LAYER}(\.base_layer)?,? ?{said}"


@pytest.fixture
def model(make_adapter):
    bank = AdapterBank.from_peft({name: make_adapter(name, seed) for seed, name in enumerate(("one", "two"))})
    return attach(make_tiny_llama(initializer_range=0.3), bank)


def test_minus_infinity_only_rules_a_token_out() -> None:
    nan, inf = float("nan"), float("inf")
    rows = torch.tensor([[1.0, -inf], [nan, 0.0], [inf, 0.0], [-inf, -inf], [-3e38, 3e38]])
    assert not_finite(rows).tolist() == [False, True, True, True, False]


@pytest.mark.parametrize("fault", FAULTS)
def test_decoding_recording_and_pictures_stop(model, fault) -> None:
    message = break_it(model, fault)
    with pytest.raises(NonFiniteError, match=message) as stopped:
        engine_of(model).answer(REQUESTS)
    assert stopped.value.hint
    with pytest.raises(NonFiniteError, match=message):
        engine_of(model, "on", 4).answer(REQUESTS)
    with pytest.raises(NonFiniteError, match=message):
        trace_tokens(model, byte_tokenizer(), [5, 6, 7], ["prompt"] * 3)
    if fault != "overflow":  # after an overflow, the mixing weights up to this layer are finite, and only these are counted
        last = RouteCounts(model.meteora.names)
        with pytest.raises(NonFiniteError, match=message):
            count_routes(model, [((5, 6), (7,)), ((5,), (9, 9))], 2, last)
        assert not last.counts


@pytest.mark.parametrize("graphs", ["off", "on"])
@pytest.mark.parametrize("sampling", [Sampling(max_new_tokens=3), Sampling(max_new_tokens=3, temperature=1.0)])
def test_a_conversation_stops_before_anything_is_written(graphs, sampling) -> None:
    model = byte_llama()
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"the first layer where that happens is model\.layers\.2\.mlp\.up_proj, whose weight holds"):
        list(Engine(model, byte_tokenizer(), graphs).stream(Request([1, 5, 6], sampling)))


@pytest.mark.parametrize("step", [0, 3, 11])
def test_a_later_step_is_found_too(model, step) -> None:
    calls = [0]

    def spoil(module: torch.nn.Module, arguments: object, output: torch.Tensor) -> torch.Tensor | None:
        calls[0] += 1
        return torch.full_like(output, float("nan")) if calls[0] == step + 1 else None

    model.lm_head.register_forward_hook(spoil)
    without_ends(model)
    for graphs, no_repeat in (("off", 0), ("on", 4)):
        calls[0] = 0
        with pytest.raises(NonFiniteError, match=r"^the model's output is NaN or infinite$"):
            engine_of(model, graphs, no_repeat).answer(REQUESTS)


def test_a_row_that_is_done_does_not_stop_the_others(model) -> None:
    without_ends(model)
    requests = [Request((5, 6), Sampling(1)), REQUESTS[1]]
    wanted = engine_of(model).answer(requests)

    def spoil(module: torch.nn.Module, arguments: object, output: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        output = output.clone()
        if len(calls) > 1 and output.shape[0] == 2:
            output[0] = float("nan")
        return output

    calls: list[int] = []
    model.lm_head.register_forward_hook(spoil)
    assert engine_of(model, "on").answer(requests) == wanted


@pytest.fixture
def place(tmp_path, make_adapter) -> Workspace:
    return make_workspace(tmp_path, make_adapter, count=3)


def test_an_evaluation_saves_no_result(place) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(place.base / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][0] = 3e38  # finite, so it can be loaded, but its products overflow
    save_file(weights, place.base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NonFiniteError, match=r"happens is model\.layers\.1\.mlp\.(up|down)_proj"):
        run(plan_of(place, TASKS[:1], ("base",)))
    assert not list(place.folder.rglob("results_*")), "accuracy 0 is no result"


@pytest.mark.parametrize("routing", [False, True])
def test_one_task_stops(place, routing) -> None:
    from meteora_core import load_checkpoint
    from meteora_core.model.base import BaseReference, load_tokenizer

    model = load_checkpoint(place.checkpoint, device="cpu")
    message = break_it(model, "gate")
    with pytest.raises(NonFiniteError, match=message):
        evaluate_task(model, load_tokenizer(BaseReference(str(place.base))), TASKS[0], place.data, EvalOptions(max_new_tokens=3, routing=routing))


@pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm-eval is not installed")
def test_the_harness_stops_too(model) -> None:
    from meteora_core.integrations.lm_eval import model_class

    harness = object.__new__(model_class())
    harness._model, harness._device, harness.tokenizer = model, torch.device("cpu"), byte_tokenizer()
    harness.mixed_precision_dtype = None
    ids = torch.tensor([[2, 5, 6], [9, 8, 7]])
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    assert harness._model_call(ids).shape == (2, 3, 64)
    assert harness._model_generate(ids, 6, [], attention_mask=mask, do_sample=False).shape == (2, 6)
    message = break_it(model, "gate")
    with pytest.raises(NonFiniteError, match=message):
        harness._model_call(ids)
    with pytest.raises(NonFiniteError, match=message):
        harness._model_generate(ids, 6, [], attention_mask=mask, do_sample=False)
