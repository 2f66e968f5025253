"""Whole models on a CUDA GPU: fused layers, transformers' static cache, and captured steps in whole evaluations and conversations."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from meteora_core import fuse, record_routes, unfuse
from meteora_core.chat.chat_model import load_chat_model
from meteora_core.chat.session import ChatSession
from meteora_core.errors import UsageError
from meteora_core.evaluation.eval_plan import EvalOptions, EvalPlan
from meteora_core.evaluation.evaluate import evaluate
from meteora_core.fused.fuse import fuse_for_inference, is_fused
from meteora_core.generation.sampling import Sampling
from meteora_core.model.base import BaseReference
from meteora_core.routing import meteora_of
from meteora_core.settings import load_settings
from support.chat_world import NAMES, build_world
from support.evaluation_workspace import TASKS, make_workspace

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    pytest.mark.filterwarnings("ignore::UserWarning"),  # compilers' advice, and what PyTorch says of a capture that was broken off
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),  # PyTorch 2.11's compiler, of itself, when it is first imported
]

DEVICE = "cuda"


def ids_of(rows: int, width: int, seed: int = 5) -> torch.Tensor:
    return torch.randint(3, 64, (rows, width), generator=torch.Generator().manual_seed(seed)).to(DEVICE)


SIZES = {
    "decode": [(1, 1)] * 24 + [(2, 8)] * 12,
    "packed": [(2, 9)] * 12 + [(4, 16)] * 4 + [(1, 100)] * 3,
    "split": [(11, 128)],
}
"""Texts and their lengths, per path of a fused group."""


def error(got: list[torch.Tensor], wide: list[torch.Tensor]) -> float:
    """Of logits, relative, median over all tokens: a near tie that falls to another adapter changes a token, not the median."""
    rows = [((one.float() - other).norm(dim=-1) / other.norm(dim=-1)).flatten() for one, other in zip(got, wide, strict=True)]
    return float(torch.cat(rows).median())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@torch.no_grad()
def test_fused_logits(gpu_model, dtype: torch.dtype) -> None:
    """Fused layers are as near to float32 on the same weights as the layers apart; in float32 they give the same logits."""
    state = meteora_of(gpu_model)
    texts = {path: [ids_of(*size, seed=seed) for seed, size in enumerate(sizes)] for path, sizes in SIZES.items()}
    cases = [(path, muted) for path in texts for muted in ((), ("one",))]

    def logits(path: str, muted: tuple[str, ...]) -> list[torch.Tensor]:
        state.mute(list(muted))
        return [gpu_model(ids).logits for ids in texts[path]]

    gpu_model.to(dtype).float()
    wide = [logits(*case) for case in cases]
    gpu_model.to(dtype)
    apart = [logits(*case) for case in cases]
    assert fuse_for_inference(gpu_model) == 8
    assert is_fused(gpu_model)
    for case, one, exact in zip(cases, apart, wide, strict=True):
        together = logits(*case)
        assert all(torch.equal(*pair) for pair in zip(logits(*case), together, strict=True)), case
        if dtype == torch.float32:
            torch.testing.assert_close(together, one, rtol=1e-3, atol=1e-3)
        else:
            assert error(together, exact) <= 1.25 * error(one, exact) + 0.002, case
    assert not torch.equal(apart[0][0], apart[1][0])
    assert unfuse(gpu_model) == 14
    for case, one in zip(cases, apart, strict=True):
        assert all(torch.equal(*pair) for pair in zip(logits(*case), one, strict=True)), case


def test_recording_while_a_graph_is_captured_is_refused(gpu_model) -> None:
    ids = ids_of(1, 4)
    with torch.no_grad(), record_routes(gpu_model):
        gpu_model(ids)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with pytest.raises(UsageError, match="routes cannot be recorded while a CUDA graph is captured"), torch.cuda.graph(graph):
            gpu_model(ids)
    torch.cuda.synchronize()
    with torch.no_grad():
        assert gpu_model(ids).logits.isfinite().all()


@pytest.mark.parametrize("fused", [False, True])
def test_generate_with_a_static_cache(gpu_model, fused: bool, caplog) -> None:
    """transformers compiles the decoding step for a static cache on a GPU; routes are recorded by eager code beside it."""
    if fused:
        fuse(gpu_model)
    ids = ids_of(2, 9)
    gpu_model.generation_config.eos_token_id = None
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 2, "attention_mask": torch.ones_like(ids)}
    wanted = gpu_model.generate(ids, **options)
    assert torch.equal(gpu_model.generate(ids, cache_implementation="static", **options), wanted)
    gpu_model.generation_config.cache_implementation = "static"
    with caplog.at_level(logging.WARNING), record_routes(gpu_model) as routes:
        assert torch.equal(gpu_model.generate(ids, **options), wanted)
    assert "routes are recorded by eager code" in caplog.text
    assert routes.layer(routes.paths[0]).indices.shape[:2] == (2, 9 + 11)
    assert torch.equal(gpu_model.generate(ids, **options), wanted)


def test_evaluation_with_graphs_equals_eager(tmp_path: Path, make_adapter) -> None:
    place = make_workspace(tmp_path, make_adapter, count=9)

    def tokens(fuse: Any, graphs: Any, batch_size: Any = "auto") -> dict[str, list[tuple[int, ...]]]:
        plan = EvalPlan(
            tasks=(TASKS[0], "composite_3"),
            models=("meteora", "base", TASKS[1]),
            data_dir=place.data,
            adapters_dir=place.adapters,
            checkpoint=place.checkpoint,
            base=BaseReference(str(place.base)),
            options=EvalOptions(fuse=fuse, max_new_tokens=12, no_repeat_ngram_size=4, cuda_graphs=graphs, batch_size=batch_size),
        )
        outcomes = evaluate(plan, device=torch.device(DEVICE), dtype=torch.float32)
        assert all(outcome.document["meteora"]["speed"]["rows"] == 18 for outcome in outcomes)
        return {f"{outcome.model} {task}": [sample.ids for sample in result.samples] for outcome in outcomes for task, result in outcome.results.items()}

    wanted = tokens("off", "off")
    assert tokens("auto", "auto") == wanted
    assert tokens("on", "off", 1) == wanted
    assert tokens("off", "on", 4) == wanted


def test_chat_by_graphs_says_the_same(tmp_path: Path, caplog) -> None:
    world = build_world(tmp_path)

    def session(fuse: str, graphs: Any) -> ChatSession:
        settings = load_settings(None, {"model": {"device": DEVICE, "dtype": "float32"}, "chat": {"fuse": fuse}})
        return ChatSession(load_chat_model(settings, checkpoint=world.checkpoint), Sampling(max_new_tokens=12), cuda_graphs=graphs)

    def talk(chat: ChatSession) -> list[Any]:
        said: list[Any] = []

        def ask(message: str, **options: bool) -> None:
            said.append(list(chat.ask(message, **options))[-1].ids)

        ask("One?")
        ask("Two?")
        chat.mute(NAMES[0])
        ask("Three?")
        ask("Four?", record=True)
        ask("Five?")
        chat.use(NAMES[1])
        ask("Six?")
        chat.use(None)
        said.extend(compared.event.ids for compared in chat.compare(adapter=NAMES[2]) if hasattr(compared.event, "reason"))
        chat.set("top-k", "3")
        ask("Seven?")
        chat.new()
        ask("x" * 300)
        ask("One?")
        return said

    wanted = talk(session("off", "off"))
    graphs = session("auto", "auto")
    assert is_fused(graphs.chat_model.model)
    assert talk(graphs) == wanted
    assert graphs.engine.stream_cache is not None
    assert graphs.engine.stream_cache.captured
    assert "cannot be captured" not in caplog.text
