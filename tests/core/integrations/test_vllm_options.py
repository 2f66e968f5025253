"""The routing options of requests to vLLM, the versions of vLLM, and the reader of an exported checkpoint; none of them needs vLLM."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from meteora_core.integrations.vllm.checkpoint import Store
from meteora_core.integrations.vllm.options import Options, parse
from meteora_core.integrations.vllm.runtime import Runtime
from meteora_core.integrations.vllm.versions import why_not

NAMES = ["a", "b", "c"]
DEFAULT = Options(2, 1.0)


@pytest.mark.parametrize(
    ("extra", "wanted"),
    [
        (None, DEFAULT),
        ({"other": 1, "meteora_top_k": None}, DEFAULT),
        ({"meteora_top_k": 3, "meteora_temperature": 15}, Options(3, 15.0)),
        ({"meteora_top_k": "1"}, Options(1, 1.0)),
        ({"meteora_allowed": "c, a"}, Options(2, 1.0, (0, 2))),
        ({"meteora_allowed": ["a", "b", "c"]}, DEFAULT),
        ({"meteora_muted": ["a"], "meteora_allowed": ["a", "b"]}, Options(2, 1.0, (1,))),
        ({"meteora_force": "b", "meteora_top_k": 2}, Options(1, 1.0, (1,))),
        ({"meteora_off": 1, "meteora_allowed": ["a"]}, Options(0, 1.0)),
        ({"meteora_off": 0, "meteora_trace": 1}, Options(2, 1.0, None, True)),
    ],
)
def test_options(extra: dict[str, Any] | None, wanted: Options) -> None:
    assert parse(extra, NAMES, DEFAULT) == wanted


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        ({"meteora_topk": 1}, "unknown option 'meteora_topk': choose from meteora_top_k,"),
        ({"meteora_top_k": 4}, "meteora_top_k must be a whole number from 1 to 3, not 4"),
        ({"meteora_top_k": 1.5}, "meteora_top_k must be a whole number"),
        ({"meteora_top_k": [1]}, "meteora_top_k must be a whole number"),
        ({"meteora_temperature": 0}, "meteora_temperature must be a number from 1.18e-38 to 8.5e+37, not 0"),
        ({"meteora_temperature": float("nan")}, "meteora_temperature must be a number from"),
        ({"meteora_temperature": "1e-320"}, "meteora_temperature must be a number from"),
        ({"meteora_temperature": "warm"}, "meteora_temperature must be a number from 1.18e-38 to 8.5e+37, not 'warm'"),
        ({"meteora_allowed": ["d"]}, "meteora_allowed names 'd', which is no adapter of this model: choose from a, b, c"),
        ({"meteora_allowed": []}, "meteora_allowed must be a list of names of adapters"),
        ({"meteora_muted": [1]}, "meteora_muted must be a list of names of adapters"),
        ({"meteora_muted": NAMES}, "no adapter is left to choose: use meteora_off=1"),
        ({"meteora_force": ["a", "b"]}, "meteora_force takes one adapter"),
        ({"meteora_force": "a", "meteora_muted": ["b"]}, "meteora_force takes one adapter"),
    ],
)
def test_wrong_options_are_refused(extra: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError) as refused:
        parse(extra, NAMES, DEFAULT)
    assert str(refused.value).startswith(said)


@pytest.mark.parametrize(("version", "good"), [("0.26.0", True), ("0.33.0+cpu", True), ("0.25.9", False), ("0.34.0", False), ("1.0", False), ("main", False)])
def test_versions(version: str, good: bool) -> None:
    assert (why_not(version) is None) == good


def scheduled(new: dict[str, dict[str, Any] | None], cached: dict[str, int], counts: dict[str, int], finished: tuple[str, ...] = ()) -> Any:
    """What vLLM's scheduler says about a step."""
    requests = [SimpleNamespace(req_id=name, sampling_params=SimpleNamespace(extra_args=extra), num_computed_tokens=0) for name, extra in new.items()]
    done = SimpleNamespace(req_ids=list(cached), num_computed_tokens=list(cached.values()))
    return SimpleNamespace(finished_req_ids=finished, scheduled_new_reqs=requests, scheduled_cached_reqs=done, num_scheduled_tokens=counts)


def test_a_step_is_observed_only_while_a_request_in_it_has_options() -> None:
    runtime = Runtime()
    runtime.names = NAMES
    runtime.begin(scheduled({"x": None}, {}, {"x": 3}))
    assert not runtime.observed
    runtime.begin(scheduled({"y": {"meteora_force": "c"}}, {"x": 3}, {"x": 1, "y": 2}))
    assert runtime.observed
    runtime.arrange(["y", "x"], [2, 1])
    tokens = runtime.tokens(5, torch.device("cpu"))
    assert tokens.top_k.tolist() == [1, 1, 2, 2, 2]  # the last two tokens are padding
    assert tokens.allowed is not None
    assert tokens.allowed.tolist() == [[False, False, True]] * 2 + [[True, True, True]] * 3
    runtime.finish()
    runtime.begin(scheduled({}, {"x": 4}, {"x": 1}))
    assert not runtime.observed  # "y" is not in this step
    runtime.begin(scheduled({}, {"x": 5, "y": 2}, {"x": 1, "y": 1}))
    assert runtime.observed
    runtime.begin(scheduled({}, {"x": 5}, {"x": 1}, finished=("y",)))
    runtime.begin(scheduled({"y": None}, {}, {"y": 1}))
    assert not runtime.observed  # another request of the same name


def test_gpu_kernels_read_the_options_of_every_token_from_a_table() -> None:
    runtime = Runtime()
    runtime.names = NAMES
    table, default, forced = runtime.make_table(6, torch.device("cpu")), [1.0, 1.0, 1.0, 2.0, 1.0], [0.0, 0.0, 1.0, 1.0, 1.0]
    assert table.tolist() == [default] * 6
    extra: dict[str, dict[str, Any] | None] = {"y": {"meteora_force": "c"}, "z": {"meteora_off": 1, "meteora_temperature": 3}}
    runtime.begin(scheduled({"x": None, **extra}, {}, {"x": 1, "y": 2, "z": 1}))
    assert not runtime.observed
    runtime.arrange(["y", "x", "z"], [2, 1, 1])
    assert table.tolist() == [forced, forced, default, [1.0, 1.0, 1.0, 0.0, 3.0], default, default]
    runtime.begin(scheduled({}, {"x": 1, "y": 2}, {"x": 1, "y": 1}))
    runtime.arrange(["x", "y"], [1, 1])
    assert table.tolist() == [default, forced, *[default] * 4]
    table[1] = 7.0  # not written again: nothing changed
    runtime.begin(scheduled({}, {"x": 2, "y": 3}, {"x": 1, "y": 1}))
    runtime.arrange(["x", "y"], [1, 1])
    assert table[1].tolist() == [7.0] * 5
    runtime.begin(scheduled({}, {"x": 3}, {"x": 1}, finished=("y",)))
    assert runtime.ordered
    runtime.arrange(["x"], [1])
    assert table.tolist() == [default] * 6
    assert not runtime.ordered
    runtime.begin(scheduled({"t": {"meteora_top_k": 3}}, {}, {"t": 1}))
    assert runtime.observed  # the kernels choose two adapters
    with pytest.raises(RuntimeError, match="a step has 9 tokens, more than the 6 of max_num_batched_tokens"):
        runtime.begin(scheduled({"w": {"meteora_off": 1}}, {}, {"w": 9}))
        runtime.arrange(["w"], [9])


def test_routes_and_counts_of_the_requests_in_a_step() -> None:
    runtime = Runtime()
    runtime.names, runtime.count_every = NAMES, 2
    for step in range(2):
        runtime.begin(scheduled({"x-1": {"meteora_trace": 1}} if not step else {}, {} if not step else {"x-1": 2}, {"x-1": 2, "y": 1}))
        assert runtime.observed
        runtime.arrange(["y", "x-1"], [1, 2])
        runtime.record("layer", torch.tensor([[0, 1], [1, 2], [2, 0], [0, 0]]), torch.tensor([[1.0, 0.0], [0.5, 0.5], [0.25, 0.75], [0.0, 0.0]]))
        runtime.finish()
    found = runtime.routes("x")
    assert found == {"positions": [0, 1, 2, 3], "layers": {"layer": {"indices": [[1, 2], [2, 0]] * 2, "weights": [[0.5, 0.5], [0.25, 0.75]] * 2}}}
    assert runtime.routes("y") is None
    assert runtime.counts() == {"adapters": {"a": 2, "b": 1, "c": 2}, "tokens": 3, "layers": 0, "every": 2}


@pytest.fixture
def checkpoint(documented_folder: Path, tmp_path: Path) -> Path:
    from meteora_core.checkpoints.pack import pack_checkpoint

    shutil.copytree(documented_folder, tmp_path / "world")
    config = tmp_path / "world" / "runs" / "mine" / "meteora_config.json"
    assert config.is_file()
    pack_checkpoint(config.parent, tmp_path / "packed", adapters_dir=tmp_path / "world" / "adapters")
    return tmp_path / "packed"


def test_the_reader_of_a_checkpoint(checkpoint: Path) -> None:
    store = Store(checkpoint)
    store.check()
    assert (store.names, store.top_k, store.temperature) == (["gsm8k", "strategyqa"], 2, 1.0)
    path = next(iter(store.modules))
    assert store.tensor(f"{path}.gate").shape[0] == 2
    sent = pickle.loads(pickle.dumps(store))  # vLLM sends it to the processes of the engine
    assert torch.equal(sent.tensor(f"{path}.lora_A"), store.tensor(f"{path}.lora_A"))
    with pytest.raises(ValueError, match="has no tensor nothing; write the folder again"):
        store.tensor("nothing")


def test_broken_checkpoints_are_refused(checkpoint: Path) -> None:
    file = checkpoint / "meteora_config.json"
    good = json.loads(file.read_text())
    path = next(iter(good["modules"]))
    for bad, said in (
        ({**good, "contains": ["gates"]}, "does not contain its adapters"),
        ({**good, "modules": {path: {**good["modules"][path], "ranks": [1]}}}, "does not list 2 ranks and scalings"),
        ({**good, "top_k": None}, "is not the configuration of a meteora checkpoint"),
        ([], "is not the configuration of a meteora checkpoint"),
    ):
        file.write_text(json.dumps(bad))
        with pytest.raises(ValueError, match=said):
            Store(checkpoint)
    file.write_text(json.dumps({**good, "weights_sha256": ""}))
    weights = load_file(checkpoint / "meteora.safetensors")
    save_file({**weights, f"{path}.scale": torch.ones(2)}, checkpoint / "meteora.safetensors")
    with pytest.raises(ValueError, match=r"\.scale: the plugin reads gates, A and B only"):
        Store(checkpoint).check()
    file.unlink()
    with pytest.raises(ValueError, match="cannot be read: No such file or directory; write the folder again with `meteora ckpt export"):
        Store(checkpoint)
