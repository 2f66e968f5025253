"""The engine vLLM without vLLM: the folder, the command, the translation of requests, and a vLLM that does not start."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from meteora_core.errors import CheckpointError, MeteoraError, UsageError
from meteora_core.routing import RoutingOptions, meteora_of
from meteora_core.serving import vllm_launch
from meteora_core.serving.jobs import Job
from meteora_core.serving.options import SamplingOptions
from meteora_core.serving.vllm_engine import VllmEngine, VllmFacts, token_routes
from meteora_core.serving.vllm_launch import described_model, overrides, pick_engine
from meteora_core.serving.vllm_process import VllmOptions, VllmProcess, cause_in, command_of, environment_of, is_exported, served_folder
from meteora_core.settings import Settings
from support.chat_world import NAMES, World, byte_tokenizer, open_chat_model


@pytest.fixture(scope="module")
def folder(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return served_folder(world.checkpoint, cache=tmp_path_factory.mktemp("cache"))


def test_the_export_is_made_once_and_again_after_a_change(world: World, folder: Path) -> None:
    assert is_exported(folder)
    before = (folder / "config.json").stat().st_mtime_ns
    assert served_folder(world.checkpoint, cache=folder.parent) == folder
    assert (folder / "config.json").stat().st_mtime_ns == before
    folder.with_suffix(".json").write_text('{"source": "that of another checkpoint"}')
    assert served_folder(world.checkpoint, cache=folder.parent) == folder
    assert (folder / "config.json").stat().st_mtime_ns != before
    assert served_folder(folder) == folder
    assert served_folder(None, str(world.base)) == world.base
    with pytest.raises(UsageError, match="nothing to serve"):
        served_folder(None)
    with pytest.raises(CheckpointError, match="no checkpoint"):
        served_folder(folder / "nowhere", cache=folder.parent)


def test_the_description_has_the_frames_of_the_checkpoint(world: World, folder: Path) -> None:
    ours, loaded = described_model(folder), open_chat_model(world)
    assert meteora_of(ours.model).names == NAMES
    for adapter in (None, "alpha"):
        assert ours.frame(adapter) == loaded.frame(adapter)
    assert ours.frame(base=True) == loaded.frame(base=True)
    assert ours.base.name == loaded.base.name
    assert described_model(world.base).kind == "base"


def test_the_command_and_its_environment(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = VllmOptions(Path("/opt/python"), "--tensor-parallel-size 2 --max-num-batched-tokens=99", 8, 4096, "float32")
    command = command_of(folder, Path("/run/socket"), options, "m")
    assert command[:3] == ["/opt/python", "-m", "vllm.entrypoints.openai.api_server"]
    assert command[-3:] == ["--tensor-parallel-size", "2", "--max-num-batched-tokens=99"]
    for flag, value in (("--model", str(folder)), ("--uds", "/run/socket"), ("--max-num-seqs", "8"), ("--max-model-len", "4096"), ("--dtype", "float32")):
        assert command[command.index(flag) + 1] == value
    for arguments in ("--port 1", "--host=0.0.0.0", "--api-key x"):
        with pytest.raises(UsageError, match="sets itself"):
            VllmOptions(arguments=arguments).extra()
    with pytest.raises(UsageError, match="cannot be read"):
        VllmOptions(arguments="'open").extra()
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    monkeypatch.setenv("PYTHONPATH", "/here")
    assert environment_of(VllmOptions())["VLLM_PLUGINS"] == "other,meteora"
    assert environment_of(VllmOptions())["PYTHONPATH"] == "/here"
    assert "PYTHONPATH" not in environment_of(options)
    assert overrides(folder, None, None) == []
    flag, value = overrides(folder, 1, 4.0)
    assert (flag, json.loads(value)["quantization_config"]) == (
        "--hf-overrides",
        {"quant_method": "meteora", "checkpoint": "meteora", "top_k": 1, "temperature": 4.0},
    )


def test_a_vllm_that_does_not_start_says_why(folder: Path) -> None:
    with pytest.raises(UsageError, match="cannot run /nowhere/python"):
        VllmProcess.start(folder, VllmOptions(Path("/nowhere/python")), "m")
    with pytest.raises(MeteoraError, match=r"vLLM does not start: .*No module named 'vllm'"):
        VllmProcess.start(folder, VllmOptions(Path(sys.executable)), "m")


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (
            "(VllmWorker-0 pid=9) ERROR 12-01 09:29:05 [multiproc_executor.py:953] ValueError: Available memory on node 0 is less than desired.\n"
            "(EngineCore pid=5) ERROR 12-01 09:29:10 [core.py:1510] EngineCore failed to start.\n"
            "RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {'EngineCore': 1}\n",
            "ValueError: Available memory on node 0 is less than desired.",
        ),
        (
            "(APIServer pid=1) WARNING 12-01 09:09:07 [system_utils.py:255] errors like `OSError: [Errno 24] Too many open files`.\n"
            "pydantic_core._pydantic_core.ValidationError: 1 validation error for VllmConfig\n"
            "  Value error, a/meteora.safetensors is not the file that was written: its SHA-256 differs [type=value_error, input_value=X]\n"
            "    For further information visit https://errors.pydantic.dev\n",
            "a/meteora.safetensors is not the file that was written: its SHA-256 differs",
        ),
        ("RuntimeError: Engine core initialization failed. See root cause above.\n", "RuntimeError: Engine core initialization failed. See root cause above."),
        ("api_server.py: error: unrecognized arguments: --nothing\n", "api_server.py: error: unrecognized arguments: --nothing"),
        ("INFO all is well\n", None),
    ],
)
def test_the_cause_in_what_vllm_wrote(lines: str, said: str | None) -> None:
    assert cause_in(lines) == said


def test_auto_is_vllm_on_a_gpu_with_vllm_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings()
    found = {"vllm": True, "device": "cuda"}
    monkeypatch.setattr(vllm_launch, "has_vllm", lambda python: found["vllm"])
    monkeypatch.setattr(vllm_launch, "refusal", lambda: None)
    monkeypatch.setattr(vllm_launch, "pick_device", lambda wish: torch.device(str(found["device"])))
    assert pick_engine(settings) == "vllm"
    assert pick_engine(settings, embedded=True) == "transformers"
    found["device"] = "cpu"
    assert pick_engine(settings) == "transformers"
    found |= {"device": "cuda", "vllm": False}
    assert pick_engine(settings) == "transformers"
    settings.serve.engine = "vllm"
    assert pick_engine(settings, embedded=True) == "vllm"


class _Nothing:
    """A vLLM that is never asked."""

    running, log = True, Path("log")


def job(routing: RoutingOptions, routes: Any = "none", **sampling: Any) -> Job:
    return Job([5, 6, 7], SamplingOptions(**{"max_new_tokens": 900, **sampling}), routing, lambda event: None, routes)


def test_requests_for_vllm() -> None:
    engine = VllmEngine(_Nothing(), VllmFacts(byte_tokenizer(), 259, frozenset({2}), NAMES, 2, 1.0), 100, 4)  # type: ignore[arg-type]
    body = engine.body(job(RoutingOptions(2, 1.0), temperature=0.5, seed=3))
    assert "vllm_xargs" not in body
    assert (body["max_tokens"], body["temperature"], body["seed"], body["stop_token_ids"]) == (97, 0.5, 3, [2])
    asked = [
        (RoutingOptions(1, 4.0, muted=frozenset({"beta", "alpha"})), {"meteora_top_k": 1, "meteora_temperature": 4.0, "meteora_muted": ["alpha", "beta"]}),
        (RoutingOptions(2, 1.0, forced="beta"), {"meteora_force": ["beta"]}),
        (RoutingOptions(enabled=False), {"meteora_off": 1}),
    ]
    for routing, expected in asked:
        assert engine.body(job(routing))["vllm_xargs"] == expected
        assert engine.body(job(routing, "layers"))["vllm_xargs"] == {**expected, "meteora_trace": 1}
    with pytest.raises(UsageError, match="fixed weights"):
        engine.body(job(RoutingOptions(weights={"beta": 1.0})))
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}}
    grammar = engine.grammars.of_schema(schema)
    full = engine.body(job(RoutingOptions(2, 1.0), grammar=grammar, logprobs=2, logit_bias={7: -1.0}, ignore_end=True))
    assert full["structured_outputs"]["json"] == schema
    assert (full["logprobs"], full["logit_bias"], full["ignore_eos"]) == (2, {"7": -1.0}, True)
    assert "stop_token_ids" not in full
    for ids, message in (([], "empty"), ([5] * 100, "maximum context length"), ([500], "outside")):
        with pytest.raises(UsageError, match=message):
            engine.submit(Job(ids, SamplingOptions(), RoutingOptions(2, 1.0), lambda event: None))


def test_routes_of_positions() -> None:
    layers = {
        "q": {"indices": [[1, 0], [2, 1]], "weights": [[0.75, 0.25], [1.0, 0.0]]},
        "v": {"indices": [[1, 2], [0, 1]], "weights": [[0.5, 0.5], [0.5, 0.5]]},
    }
    first, missing, second = token_routes({"positions": [4, 6], "layers": layers}, [4, 5, 6], 3, layers=True)
    assert missing is None
    assert first is not None
    assert second is not None
    assert first.mean.tolist() == [0.125, 0.625, 0.25]
    assert second.mean.tolist() == [0.25, 0.25, 0.5]
    assert first.paths == ("q", "v")
    assert second.indices is not None
    assert second.indices.tolist() == [[2, 1], [0, 1]]
