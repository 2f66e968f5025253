"""Evaluations with fused layers and fixed caches, which give the same tokens, and with checkpoints in the authors' layout."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from meteora_core import load_authors_checkpoint, load_checkpoint
from meteora_core.checkpoints.native import write_checkpoint
from meteora_core.errors import CheckpointError, UsageError
from meteora_core.evaluation.eval_plan import EvalOptions, EvalPlan
from meteora_core.evaluation.evaluate import ModelResults, evaluate
from meteora_core.model.base import BaseReference
from support.authors_files import Authors, write_authors
from support.evaluation_workspace import SIZES, TASKS, Workspace, make_tokenizer, make_workspace
from support.plain_groups import use_plain_groups

TASK = TASKS[0]


def plan_of(place: Workspace, models: tuple[str, ...], *, fuse: Any = "off", **options: Any) -> EvalPlan:
    return EvalPlan(
        tasks=(TASK,),
        models=models,
        data_dir=place.data,
        adapters_dir=place.adapters,
        checkpoint=place.checkpoint,
        base=BaseReference(str(place.base)),
        options=EvalOptions(**{"max_new_tokens": 6, "no_repeat_ngram_size": 4, "limit": 4, "fuse": fuse, **options}),
    )


def tokens(plan: EvalPlan) -> dict[str, list[tuple[int, ...]]]:
    outcomes: list[ModelResults] = evaluate(plan, device=torch.device("cpu"), dtype=torch.float32)
    return {outcome.model: [sample.ids for sample in outcome.results[TASK].samples] for outcome in outcomes}


@pytest.fixture
def place(tmp_path: Path, make_adapter) -> Workspace:
    return make_workspace(tmp_path, make_adapter)


def test_fused_and_captured_evaluations_give_the_same_tokens(place, monkeypatch) -> None:
    models = ("meteora", "base", "own")
    wanted = tokens(plan_of(place, ("base", "own", "meteora")))
    assert len({str(rows) for rows in wanted.values()}) == 3
    groups = use_plain_groups(monkeypatch)
    for options in ({}, {"cuda_graphs": "on"}, {"routing": True}):
        groups.clear()
        assert tokens(plan_of(place, models, fuse="on", **options)) == wanted
        assert set(groups) == {1, 2, 3}
    assert tokens(plan_of(place, models, cuda_graphs="on")) == wanted
    groups.clear()
    assert tokens(plan_of(place, models, fuse="auto")) == wanted
    assert not groups


@pytest.fixture
def authors(tmp_path: Path, place) -> tuple[Workspace, Authors]:
    """A workspace with a checkpoint in the authors' layout, whose base tensors differ from those of its base model's folder."""
    (tmp_path / "theirs").mkdir()
    made = write_authors(tmp_path / "theirs", count=3, vocabulary=SIZES["vocab_size"], change=("model.norm.weight", "lm_head.weight"))
    make_tokenizer().save_pretrained(made.base)
    return replace(place, base=made.base, checkpoint=made.checkpoint), made


def test_the_authors_layout_and_a_base_that_it_changes(authors, monkeypatch) -> None:
    place, made = authors
    outcome = evaluate(replace(plan_of(place, ("meteora",)), checkpoint_adapters=made.adapters), device=torch.device("cpu"), dtype=torch.float32)[0]
    model = load_authors_checkpoint(str(made.base), made.adapters, made.checkpoint, device="cpu")
    tokenizer = make_tokenizer()
    for sample in outcome.results[TASK].samples:
        prompt = tokenizer(sample.row.prompt, return_tensors="pt").input_ids
        answer = model.generate(prompt, max_new_tokens=6, do_sample=False, no_repeat_ngram_size=4, eos_token_id=2, pad_token_id=2)[
            0, prompt.shape[1] :
        ].tolist()
        assert list(sample.ids) == (answer[: answer.index(2)] if 2 in answer else answer)
    config = outcome.document["config"]
    assert (config["checkpoint"], len(config["model_args"]["weights_sha256"])) == (str(made.checkpoint), 64)
    # The model "base" is that of the folder, whichever of the two models is evaluated first.
    base = tokens(plan_of(place, ("base",)))["base"]
    assert tokens(plan_of(place, ("meteora", "base")))["base"] == base
    assert tokens(plan_of(place, ("base", "meteora")))["base"] == base
    use_plain_groups(monkeypatch)
    assert tokens(plan_of(place, ("meteora", "base"), fuse="on"))["base"] == base


def test_what_the_authors_layout_needs_is_said_before_a_model_is_loaded(authors, monkeypatch) -> None:
    place, made = authors
    monkeypatch.setattr("meteora_core.model.base.load_base", lambda *_, **__: pytest.fail("loaded"))
    plan = plan_of(place, ("meteora",))
    with pytest.raises(UsageError, match="does not name its base model"):
        tokens(replace(plan, base_given=False))
    with pytest.raises(CheckpointError, match="has 3 adapters, and there are 4 names"):
        (made.adapters / "more").mkdir()
        (made.adapters / "more" / "adapter_config.json").write_text("{}")
        tokens(replace(plan, checkpoint_adapters=made.adapters))
    with pytest.raises(UsageError, match="has 3 adapters"):
        tokens(plan_of(place, ("meteora",), top_k=4))
    (made.checkpoint / "model.safetensors").rename(made.checkpoint / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="only pickle files"):
        tokens(plan)
    (made.checkpoint / "pytorch_model.bin").unlink()
    with pytest.raises(CheckpointError, match=r"holds no meteora_config\.json"):
        tokens(plan)


def test_a_quantised_base_is_refused_before_anything_is_loaded(place, monkeypatch) -> None:
    monkeypatch.setattr("meteora_core.model.base.load_base", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(UsageError, match="a 4bit base model needs a CUDA GPU, and the device is cpu"):
        tokens(replace(plan_of(place, ("meteora", "base")), quantization="4bit"))


def test_a_native_checkpoint_may_change_the_base_too(place, tmp_path) -> None:
    """A native checkpoint may contain base tensors, as conversion creates them. The model "base" is evaluated without them."""
    file = place.checkpoint / "meteora.safetensors"
    config = json.loads((place.checkpoint / "meteora_config.json").read_text())
    model = load_checkpoint(place.checkpoint, device="cpu")
    config |= {"base_tensors": ["model.norm.weight"], "contains": [*config["contains"], "base"]}
    write_checkpoint(place.checkpoint, config, {**load_file(file), "base.model.norm.weight": -model.model.norm.weight.detach()})
    base = tokens(plan_of(place, ("base",)))["base"]
    both = tokens(plan_of(place, ("meteora", "base")))
    assert both["base"] == base != both["meteora"]
