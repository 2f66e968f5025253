"""Every router as a model of an evaluation: which adapter answers, with and without the asked task's own, and from training rows alone."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from meteora_core.data.tasks import get_task
from meteora_core.errors import DataError, UsageError
from meteora_core.evaluation.eval_plan import EvalPlan
from meteora_core.evaluation.evaluate import evaluate
from meteora_core.evaluation.processes import ALONE
from meteora_core.evaluation.router_names import ROUTERS, RouterName
from meteora_core.generation.prompts import Prompt
from meteora_core.json_files import write_jsonl
from meteora_core.model.base import BaseReference, load_base, load_tokenizer
from meteora_core.progress import SILENT
from meteora_core.routers import make_router
from meteora_core.routers import phatgoose as phatgoose_module
from meteora_core.routers.centroid import mean_states
from meteora_core.routers.fixed import draw
from support.evaluation_plans import plan_of
from support.evaluation_workspace import TASKS, Workspace, make_workspace, rows

CPU = torch.device("cpu")


@pytest.fixture
def place(tmp_path: Path, make_adapter: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Workspace:
    """A tiny world with training rows, and a short training of PHATGOOSE's gates."""
    monkeypatch.setenv("METEORA_CACHE", str(tmp_path / "cache"))
    made = make_workspace(tmp_path, make_adapter, count=4)
    for task in TASKS:
        write_jsonl(made.data / task / "train.jsonl", rows(task, 12))
    monkeypatch.setattr(phatgoose_module.Phatgoose, "training", phatgoose_module.GateTraining(steps=2, batch_size=2, max_length=64))
    return made


def planned(place: Workspace, models: tuple[str, ...], tasks: tuple[str, ...] = (TASKS[0],), **changes: Any) -> EvalPlan:
    plan = plan_of(place, tasks, models, save=False, max_new_tokens=4)
    return dataclasses.replace(plan, make_router=make_router, **changes)


def outputs(plan: EvalPlan) -> dict[str, dict[str, list[str]]]:
    outcomes = evaluate(plan, device=CPU, dtype=torch.float32)
    return {outcome.model: {task: [sample.output for sample in result.samples] for task, result in outcome.results.items()} for outcome in outcomes}


def test_every_router_answers_and_leaves_the_base_as_it_was(place: Workspace) -> None:
    routers = [f"router:{name}" for name in ROUTERS]
    answers = outputs(planned(place, ("base", *routers, "own", "meteora")))
    assert answers["router:oracle"] == answers["own"]
    assert answers["router:meteora"] == answers["meteora"]
    assert all(len(answers[model][TASKS[0]]) == 4 for model in routers)
    assert outputs(planned(place, ("router:spectr", "base")))["base"] == answers["base"]
    assert answers["router:uniform"] != answers["base"] != answers["router:spectr"]


def test_the_asked_adapter_is_removed_for_its_task_alone(place: Workspace) -> None:
    models = tuple(f"router:{name}:without-asked" for name in ROUTERS if name != "oracle")
    answers = outputs(planned(place, models, TASKS[:2]))
    for name in ("closed-form", "arrow", "spectr", "phatgoose", "centroid", "uniform", "random"):  # the same as if it had never been there
        for task in TASKS[:2]:
            hidden = place.folder / "hidden"
            (place.adapters / task).rename(hidden)
            alone = outputs(planned(place, (f"router:{name}",), (task,)))[f"router:{name}"][task]
            hidden.rename(place.adapters / task)
            if name != "closed-form":  # its gates were computed with the removed adapter too
                assert answers[f"router:{name}:without-asked"][task] == alone, (name, task)
    assert answers["router:meteora:without-asked"] != outputs(planned(place, ("meteora",), TASKS[:2]))["meteora"]


def test_a_random_adapter_is_drawn_per_row_by_the_seed(place: Workspace) -> None:
    own = {name: outputs(planned(place, (name,)))[name][TASKS[0]] for name in TASKS}
    answers = outputs(planned(place, ("router:random@1", "router:random@2")))
    for seed in (1, 2):
        drawn = [TASKS[draw(seed, TASKS[0], row) % 3] for row in range(4)]
        assert answers[f"router:random@{seed}"][TASKS[0]] == [own[name][row] for row, name in enumerate(drawn)]
    assert answers["router:random@1"] != answers["router:random@2"]


def test_the_nearest_centroid_is_that_of_the_prompts(place: Workspace) -> None:
    plan = planned(place, ("router:centroid",))
    base = BaseReference(str(place.base))
    model, tokenizer = load_base(base, dtype=torch.float32, device=CPU), load_tokenizer(base)
    router = make_router(RouterName("centroid"), plan)
    router.prepare([get_task(TASKS[0])])
    centroids = []
    for task in TASKS:
        states = []
        for row in rows(task, 12):
            ids = torch.tensor([tokenizer(row["prompt"])["input_ids"]])
            with torch.inference_mode():
                states.append(model(ids, output_hidden_states=True).hidden_states[-1][0].double().mean(0))
        centroids.append(torch.stack(states).mean(0))
    router.enter(model, tokenizer, SILENT, ALONE)
    prompts = [
        Prompt(index, tuple(tokenizer(text)["input_ids"])) for index, text in enumerate(("[INST] logical 3", "[INST] question_select 7 [/INST]\n", "strateg"))
    ]
    with router.ready(get_task(TASKS[0])) as routed:
        chosen = {
            prompt.index: int(routed.model.model.layers[0].self_attn.q_proj.choice.fixed.argmax()) for group in routed.groups(prompts) for prompt in group
        }
        assert list(routed.groups([])) == []
    router.leave()
    for prompt in prompts:
        with torch.inference_mode():
            state = model(torch.tensor([prompt.tokens]), output_hidden_states=True).hidden_states[-1][0].double().mean(0)
        assert chosen[prompt.index] == min(range(3), key=lambda index: float((state - centroids[index]).norm()))
    assert type(model.model.layers[0].self_attn.q_proj) is torch.nn.Linear
    texts = [[5, 6, 7], [8]]
    torch.testing.assert_close(mean_states(model, texts, 2)[1], mean_states(model, texts[1:], 2)[0])


def test_trained_gates_are_stored_once(place: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = dataclasses.replace(planned(place, ("router:phatgoose@1",)), out_dir=place.folder / "out")
    first = outputs(plan)
    files = sorted(path.name.rpartition("-")[0] for path in (place.folder / "out" / "phatgoose").glob("*.safetensors"))
    assert files == sorted(TASKS)
    document = json.loads(next((place.folder / "out" / "router_phatgoose_1").glob("results_*.json")).read_text())
    facts = document["config"]["model_args"]["router"]
    assert (facts["method"], facts["seed"], facts["top_k"], facts["training"]["steps"]) == ("phatgoose", 1, 2, 2)
    assert set(facts["adapters"]) == set(facts["rows"]) == set(TASKS)
    monkeypatch.setattr(phatgoose_module, "train_alone", None)
    assert outputs(plan) == first
    with pytest.raises(TypeError):
        outputs(dataclasses.replace(plan, models=("router:phatgoose@2",)))  # another seed needs other gates


def test_composites_have_no_oracle_and_lose_all_members(place: Workspace) -> None:
    models = ("router:oracle", "router:uniform")
    outcomes = evaluate(planned(place, models, (TASKS[0], "composite_3")), device=CPU, dtype=torch.float32)
    assert [list(outcome.results) for outcome in outcomes] == [[TASKS[0]], [TASKS[0], "composite_3"]]
    with pytest.raises(UsageError, match="router:oracle is not defined for"):
        outputs(planned(place, ("router:oracle",), ("composite_3",)))
    for name in ("uniform", "meteora", "arrow"):
        with pytest.raises(UsageError, match="no adapter is left for composite_3"):
            outputs(planned(place, (f"router:{name}:without-asked",), ("composite_3",)))


def test_what_is_missing_is_said_before_a_model_is_loaded(place: Workspace) -> None:
    (place.data / TASKS[1] / "train.jsonl").unlink()
    for name in ("centroid", "phatgoose", "closed-form"):
        with pytest.raises(DataError, match=f"router:{name} needs training rows of every adapter's task, and .* has none of {TASKS[1]}") as caught:
            outputs(planned(place, (f"router:{name}",)))
        assert f"meteora data build --task {TASKS[1]}" in str(caught.value.hint)
    with pytest.raises(UsageError, match="nothing makes the router router:uniform"):
        outputs(dataclasses.replace(planned(place, ("router:uniform",)), make_router=None))
    with pytest.raises(UsageError, match="top_k is 3, but there are 2 adapters"):
        outputs(planned(place, ("router:spectr:without-asked",), options=plan_of(place, (), (), top_k=3).options))
