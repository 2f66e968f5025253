"""The folder of a newcomer: twelve adapters of many kinds, one command, one report, eleven adapters in the bank."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from meteora_core import load_checkpoint
from meteora_core.living.route import RouteOptions, route_adapters
from support.architectures import save_lora
from support.living_folder import NAMES, rows_of, write_jsonl_rows
from support.tiny_models import make_tiny_llama
from support.tiny_training import letters

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
ADAPTERS: dict[str, dict[str, Any]] = {
    "add": {"r": 2, "target_modules": ATTENTION},
    "bash": {"r": 8, "target_modules": "all-linear"},
    "emoji": {"r": 4, "target_modules": MLP},
    "opposite": {"r": 8, "target_modules": ATTENTION},  # in default/
    "pirate": {"r": 16, "target_modules": ["q_proj", "v_proj"], "use_rslora": True},
    "plural": {"r": 2, "target_modules": ["q_proj", "v_proj"]},
    "sentiment": {"r": 32, "target_modules": ATTENTION, "lora_alpha": 64},
    "sql": {"r": 8, "target_modules": ATTENTION + MLP, "use_dora": True},
    "title": {"r": 4, "target_modules": ATTENTION},  # of another base
    "tojson": {"r": 8, "target_modules": ATTENTION, "rank_pattern": {"o_proj": 4}, "alpha_pattern": {"q_proj": 32}},
    "translate": {"r": 4, "target_modules": [*ATTENTION, "lm_head"]},
    "upper": {"r": 8, "target_modules": ["down_proj"], "use_dora": True, "use_rslora": True},
}
IDS = torch.arange(3, 43).reshape(2, 20)


def base():
    return make_tiny_llama(vocab_size=98, initializer_range=0.2)


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=IDS).logits


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """``base/``, ``adapters/`` and ``rows/``; and what each adapter computes in PEFT."""
    place = tmp_path_factory.mktemp("newcomer")
    base().save_pretrained(place / "base")
    letters().save_pretrained(place / "base")
    theirs = {}
    for seed, (name, settings) in enumerate(ADAPTERS.items()):
        target = place / "adapters" / name / ("default" if name == "opposite" else "")
        theirs[name] = logits(save_lora(base(), target, seed, **{"lora_alpha": 16, **settings}))
        file = target / "adapter_config.json"
        origin = "meta-llama/Llama-3.2-1B" if name == "title" else str(place / "base")
        file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": origin}))
        rows = [{**row, "prompt": f"{name}: {row['prompt']}"} for row in rows_of(NAMES[seed % len(NAMES)], 12)]
        write_jsonl_rows(place / "rows" / f"{name}.jsonl", rows)
    return place, theirs


def test_one_command_makes_a_bank_of_eleven(folder, tmp_path: Path) -> None:
    place, theirs = folder
    done = route_adapters(place / "adapters", tmp_path / "routed", RouteOptions(data=place / "rows", device="cpu", tokens=300))
    assert done.set_aside == {"title": f"it names another base model: meta-llama/Llama-3.2-1B instead of {place / 'base'}"}
    eleven = [name for name in ADAPTERS if name != "title"]
    assert done.adapters == (*eleven, "no_adapter")
    assert all(done.rows[name] == str(place / "rows" / f"{name}.jsonl") for name in eleven)
    model = load_checkpoint(tmp_path / "routed", device="cpu")
    for name in eleven:
        with model.meteora.force(name):
            torch.testing.assert_close(logits(model), theirs[name], rtol=0, atol=1e-5)
    assert model.meteora.gates == "closed form"
    assert logits(model).isfinite().all()


def test_misfits_are_reported_together(folder, tmp_path: Path) -> None:
    """Also when the adapters that can be used are the fewer ones."""
    place, _ = folder
    for name in ("add", "bash"):
        (tmp_path / "adapters" / name).mkdir(parents=True)
        for file in (place / "adapters" / name).iterdir():
            (tmp_path / "adapters" / name / file.name).write_bytes(file.read_bytes())
    for name, changes in {"ia3": {"peft_type": "IA3"}, "pissa": {"init_lora_weights": "pissa"}, "torn": None}.items():
        (tmp_path / "adapters" / name).mkdir()
        text = (place / "adapters" / "add" / "adapter_config.json").read_text()
        (tmp_path / "adapters" / name / "adapter_config.json").write_text("{" if changes is None else json.dumps({**json.loads(text), **changes}))
        (tmp_path / "adapters" / name / "adapter_model.safetensors").write_bytes((place / "adapters" / "add" / "adapter_model.safetensors").read_bytes())
    for step in ("checkpoint-10", "checkpoint-20"):
        (tmp_path / "adapters" / "run" / step).mkdir(parents=True)
        (tmp_path / "adapters" / "run" / step / "adapter_config.json").write_text("{}")
    done = route_adapters(tmp_path / "adapters", tmp_path / "routed", RouteOptions(data=place / "rows", device="cpu", tokens=300))
    assert done.adapters == ("add", "bash", "no_adapter")
    assert set(done.set_aside) == {"ia3", "pissa", "torn", "run"}
    assert done.set_aside["run"] == "it holds several adapters: checkpoint-10, checkpoint-20"
