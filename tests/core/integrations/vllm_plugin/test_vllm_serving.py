"""The plugin in vLLM itself, on a CPU, in an environment of its own: greedy answers are those of ``load_checkpoint``. ``make test-vllm`` runs this."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import load_file, save_file

from meteora_core import AdapterBank, attach, load_checkpoint, save_checkpoint
from meteora_core.exports.common import ExportOptions
from meteora_core.exports.vllm_model import export_vllm
from meteora_core.model.base import BaseReference, load_base
from meteora_core.routing import meteora_of, record_routes
from support.quantised_bases import FORMATS, quantised
from support.tiny_models import make_tiny_llama
from support.vllm_environment import PYTHON, environment, needs_vllm

pytestmark = [pytest.mark.slow, needs_vllm]

ROOT = Path(__file__).parents[4]
SIZES = {"vocab_size": 200, "hidden_size": 128, "intermediate_size": 160, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
NAMES = ("all", "attention", "few", "mlp")
TARGETS: dict[str, list[str] | str] = {"all": "all-linear", "attention": ["q_proj", "v_proj", "o_proj"], "few": ["v_proj"], "mlp": ["up_proj", "down_proj"]}
"""k_proj and gate_proj get adapters from "all" alone, so members of one of vLLM's layers have different ranks."""
RANKS = {"all": 4, "attention": 8, "few": 3, "mlp": 6}
OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "top 1": {"meteora_top_k": 1},
    "top 3, T": {"meteora_top_k": 3, "meteora_temperature": 4.0},
    "forced": {"meteora_force": "attention"},
    "muted": {"meteora_muted": ["all", "mlp"]},
    "allowed": {"meteora_allowed": "few,mlp"},
    "off": {"meteora_off": 1},
}
NEW = 10


def make_phi3() -> Any:
    """A random model whose q, k, v and gate, up are one linear layer each."""
    from transformers import Phi3Config, Phi3ForCausalLM

    torch.manual_seed(0)
    return Phi3ForCausalLM(Phi3Config(**SIZES, max_position_embeddings=128, original_max_position_embeddings=128, pad_token_id=2)).eval()


def make_moe() -> Any:
    """A random mixture of experts; adapters can be on its attention."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    experts = {"moe_intermediate_size": 64, "num_experts": 4, "num_experts_per_tok": 2, "decoder_sparse_step": 1}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, **experts, head_dim=32, max_position_embeddings=128)).eval()


def make_qwen2() -> Any:
    """A random model whose q, k and v have biases."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(**SIZES, max_position_embeddings=128)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                parameter.normal_(0, 0.3)
    return model


def make_llama() -> Any:
    return make_tiny_llama(**SIZES)


def make_world(folder: Path, make: Any, targets: dict[str, list[str] | str]) -> Path:
    """A folder with a model, a checkpoint of four adapters with different targets and ranks, and its export."""
    from peft import LoraConfig, get_peft_model

    make().save_pretrained(folder / "base")
    for seed, name in enumerate(NAMES):
        torch.manual_seed(seed)
        config = LoraConfig(r=RANKS[name], lora_alpha=2 * RANKS[name], target_modules=targets[name], task_type="CAUSAL_LM", init_lora_weights=False)
        get_peft_model(make(), config).save_pretrained(folder / "adapters" / name)
    bank = AdapterBank.from_peft({name: folder / "adapters" / name for name in NAMES})
    model = attach(load_base(BaseReference(str(folder / "base")), dtype=torch.float32), bank, init="normal")
    model.meteora.gates = "trained"
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".gate"):
                parameter.mul_(30)
    save_checkpoint(model, folder / "checkpoint")
    export_vllm(folder / "checkpoint", folder / "served")
    return folder


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("llama"), make_llama, TARGETS)


@pytest.fixture(scope="module")
def phi3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    targets: dict[str, list[str] | str] = {"all": "all-linear", "attention": ["qkv_proj", "o_proj"], "few": ["qkv_proj"], "mlp": ["gate_up_proj", "down_proj"]}
    return make_world(tmp_path_factory.mktemp("phi3"), make_phi3, targets)


def answers(model: Any, prompts: list[list[int]], kind: str) -> list[list[int]]:
    """Greedy answers of the library to every prompt, with the options of a kind."""
    state = meteora_of(model)
    before = state.top_k, state.temperature
    options = OPTIONS[kind]
    state.top_k, state.temperature = options.get("meteora_top_k", before[0]), options.get("meteora_temperature", before[1])
    muted = options.get("meteora_muted", []) or ([name for name in NAMES if name not in options["meteora_allowed"].split(",")] if kind == "allowed" else [])
    state.mute(muted)

    def run() -> list[list[int]]:
        found = []
        for prompt in prompts:
            ids = torch.tensor([prompt])
            out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW, min_new_tokens=NEW, pad_token_id=0)
            found.append(out[0, len(prompt) :].tolist())
        return found

    try:
        with torch.inference_mode():
            if kind == "forced":
                with state.force("attention"):
                    return run()
            if kind == "off":
                with state.disabled():
                    return run()
            return run()
    finally:
        state.mute([])
        state.top_k, state.temperature = before


@pytest.fixture(scope="module")
def expected(world: Path) -> dict[str, Any]:
    return expected_of(world)


def expected_of(world: Path) -> dict[str, Any]:
    """The library's answers and routes."""
    model = load_checkpoint(world / "checkpoint", dtype=torch.float32, device="cpu")
    model.generation_config.eos_token_id = None
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(3, SIZES["vocab_size"], (length,), generator=generator).tolist() for length in (5, 17, 40, 70)]
    jobs = []
    for kind, options in OPTIONS.items():
        for prompt, answer in zip(prompts, answers(model, prompts, kind), strict=True):
            jobs.append({"kind": kind, "prompt": prompt, "options": options or None, "answer": answer})
    with torch.inference_mode(), record_routes(model) as routes:
        model(torch.tensor([prompts[0]]))
    return {"jobs": jobs, "routes": {path: routes.layer(path).indices[0].tolist() for path in routes.paths}}


def in_vllm(folder: Path, jobs: dict[str, Any], parallel: int) -> dict[str, Any]:
    """The answers of vLLM."""
    (folder / "jobs.json").write_text(json.dumps(jobs))
    program = [PYTHON, str(ROOT / "tests" / "support" / "vllm_program.py"), str(folder / "jobs.json"), str(folder / "out.json"), str(parallel)]
    done = subprocess.run(program, env=environment(), cwd=folder, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads((folder / "out.json").read_text())
    return found


def check_equal(found: dict[str, Any], expected: dict[str, Any]) -> None:
    for answered in found["rounds"]:  # the second time, prefixes are in the cache
        wrong = [job["kind"] for job, answer in zip(expected["jobs"], answered, strict=True) if answer != job["answer"]]
        assert wrong == []
    by_kind: dict[str, list[list[int]]] = {}
    for job in expected["jobs"]:
        by_kind.setdefault(job["kind"], []).append(job["answer"])
    assert len({json.dumps(each) for each in by_kind.values()}) == len(OPTIONS)  # the options make a difference
    assert "nobody" in found["refused"]
    for process in found["routes"]:
        assert {path: layer["indices"] for path, layer in process["layers"].items()} == expected["routes"]


@pytest.mark.parametrize("parallel", [1, 2])
def test_greedy_answers_are_those_of_the_library(world: Path, expected: dict[str, Any], tmp_path: Path, parallel: int) -> None:
    check_equal(in_vllm(tmp_path, {"folder": str(world / "served"), "new": NEW, "jobs": expected["jobs"]}, parallel), expected)


def test_a_model_that_merges_its_layers_itself(phi3: Path, tmp_path: Path) -> None:
    expected = expected_of(phi3)
    check_equal(in_vllm(tmp_path, {"folder": str(phi3 / "served"), "new": NEW, "jobs": expected["jobs"]}, 1), expected)


def test_a_model_whose_layers_have_biases(tmp_path: Path) -> None:
    expected = expected_of(make_world(tmp_path, make_qwen2, TARGETS))
    check_equal(in_vllm(tmp_path, {"folder": str(tmp_path / "served"), "new": NEW, "jobs": expected["jobs"]}, 1), expected)


def test_an_ordinary_lora_on_top(world: Path, expected: dict[str, Any], tmp_path: Path) -> None:
    """Answers are those of the library with the LoRA added to the base weights, with and without the checkpoint's adapters."""
    folder = world / "adapters" / "attention"
    tensors, scaling = load_file(folder / "adapter_model.safetensors"), 2.0
    model = load_checkpoint(world / "checkpoint", dtype=torch.float32, device="cpu")
    model.generation_config.eos_token_id = None
    for name in [name for name in tensors if name.endswith(".lora_A.weight")]:
        layer: Any = model.get_submodule(name.removeprefix("base_model.model.").removesuffix(".lora_A.weight"))
        layer.base_layer.weight.data += scaling * tensors[name.replace("lora_A", "lora_B")] @ tensors[name]
    jobs = [job for job in expected["jobs"] if job["kind"] in ("default", "off")]
    prompts = [job["prompt"] for job in jobs[: len(jobs) // 2]]
    wanted = [*answers(model, prompts, "default"), *answers(model, prompts, "off")]
    more = {"enable_lora": True, "max_lora_rank": 8, "max_loras": 1}
    found = in_vllm(tmp_path, {"folder": str(world / "served"), "new": NEW, "jobs": jobs, "more": more, "lora": str(folder), "plain": True}, 1)
    assert found["rounds"] == [wanted] * 2
    assert wanted != [job["answer"] for job in jobs]


def test_the_functions_of_vllm_that_the_plugin_wraps(tmp_path: Path) -> None:
    """Both model runners have them, with the arguments that the plugin reads or sets."""
    program = """
from inspect import signature
from vllm.v1.core import block_pool, kv_cache_utils
from vllm.v1.engine.input_processor import InputProcessor
from vllm.v1.worker import gpu_model_runner, gpu_worker
from vllm.v1.worker.gpu import model_runner
from meteora_core.integrations.vllm import hooks, register
plain = kv_cache_utils.generate_block_hash_extra_keys
assert block_pool.generate_block_hash_extra_keys is plain
register()
hooks.install_in_worker()
hooks.install_in_worker()
first, second = gpu_model_runner.GPUModelRunner, model_runner.GPUModelRunner
wanted = {
    kv_cache_utils.generate_block_hash_extra_keys: ["request"],
    block_pool.generate_block_hash_extra_keys: ["request"],
    InputProcessor._validate_params: ["self", "params"],
    first.execute_model: ["self", "scheduler_output"],
    first._prepare_inputs: ["self", "scheduler_output", "num_scheduled_tokens"],
    first._determine_batch_execution_and_padding: ["self", "force_eager"],
    second.execute_model: ["self", "scheduler_output", "intermediate_tensors", "dummy_run"],
    second.prepare_inputs: ["self", "scheduler_output"],
    model_runner.dispatch_cg_and_sync_dp: ["need_eager"],
    gpu_worker.kernel_warmup: ["worker"],
}
assert block_pool.generate_block_hash_extra_keys.__wrapped__ is plain
for function, names in wanted.items():
    assert not hasattr(function.__wrapped__, hooks._MARK), function  # once
    assert set(names) <= set(signature(function).parameters), function
assert list(signature(second.execute_model).parameters).index("dummy_run") == 3
print("all", len(wanted))
"""
    done = subprocess.run([PYTHON, "-c", program], env=environment(), cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == "all 10"


def test_the_dense_layers_of_a_mixture_of_experts(tmp_path: Path) -> None:
    attention = ["q_proj", "k_proj", "v_proj", "o_proj"]
    targets: dict[str, list[str] | str] = {"all": attention, "attention": ["q_proj", "v_proj", "o_proj"], "few": ["v_proj"], "mlp": ["k_proj"]}
    expected = expected_of(make_world(tmp_path, make_moe, targets))
    check_equal(in_vllm(tmp_path, {"folder": str(tmp_path / "served"), "new": NEW, "jobs": expected["jobs"]}, 1), expected)


def test_speculative_decoding_and_weights_that_are_loaded_again(world: Path, expected: dict[str, Any], tmp_path: Path) -> None:
    """Tokens that vLLM guesses from the prompt do not change the answers, and neither do weights that are loaded a second time."""
    guess = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2, "prompt_lookup_min": 1}
    jobs = {"folder": str(world / "served"), "new": NEW, "jobs": expected["jobs"], "more": {"speculative_config": guess}, "reload": True, "plain": True}
    found = in_vllm(tmp_path, jobs, 1)
    assert found["rounds"] == [[job["answer"] for job in expected["jobs"]]] * 2


@pytest.mark.parametrize("kind", FORMATS)
def test_a_quantised_base(world: Path, expected: dict[str, Any], tmp_path: Path, kind: str) -> None:
    """Without adapters, answers are those of the quantised base in vLLM itself; with adapters, they differ from these."""
    shutil.copytree(world / "base", tmp_path / "base")
    save_file(quantised(load_file(world / "base" / "model.safetensors"), kind), tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    described = json.loads((world / "base" / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(json.dumps(described | {"quantization_config": FORMATS[kind][1]}))
    export_vllm(world / "checkpoint", tmp_path / "served", ExportOptions(base=str(tmp_path / "base")))
    jobs = {"new": NEW, "dtype": "bfloat16", "plain": True}
    prompts = [job["prompt"] for job in expected["jobs"][:4]]
    plain = in_vllm(tmp_path, {**jobs, "folder": str(tmp_path / "base"), "jobs": [{"prompt": prompt, "options": None} for prompt in prompts]}, 1)
    off = in_vllm(tmp_path, {**jobs, "folder": str(tmp_path / "served"), "jobs": [{"prompt": prompt, "options": {"meteora_off": 1}} for prompt in prompts]}, 1)
    assert off["rounds"] == plain["rounds"]
    if kind == "int8":
        on = in_vllm(tmp_path, {**jobs, "folder": str(tmp_path / "served"), "jobs": [{"prompt": prompt, "options": None} for prompt in prompts]}, 1)
        assert on["rounds"] != plain["rounds"]


def test_a_server_answers_and_tells_its_routes(world: Path, expected: dict[str, Any], tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path / "server.log"
    program = [PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", str(world / "served"), "--served-model-name", "m", "--host", "127.0.0.1"]
    program += ["--port", str(port), "--api-key", "secret", "--dtype", "float32", "--max-model-len", "128", "--max-num-seqs", "8", "--enforce-eager"]
    program += ["--max-num-batched-tokens", "128", "--skip-tokenizer-init"]
    with log.open("w") as out:
        server = subprocess.Popen(program, env=environment(), cwd=tmp_path, stdout=out, stderr=out, start_new_session=True)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", headers={"Authorization": "Bearer secret"}, timeout=120) as client:
            wait_for(client, server, log)
            assert client.get("/v1/meteora/adapters").json() == {"adapters": list(NAMES), "top_k": 2, "temperature": 1.0}
            assert httpx.get(f"http://127.0.0.1:{port}/v1/meteora/adapters").status_code == 401
            for job in (job for job in expected["jobs"] if job["kind"] in ("default", "muted")):
                body = {"model": "m", "prompt": job["prompt"], "max_tokens": NEW, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
                reply = client.post("/v1/completions", json=body | {"vllm_xargs": {**(job["options"] or {}), "meteora_trace": 1}})
                assert reply.status_code == 200, reply.text
                assert reply.json()["choices"][0]["token_ids"] == job["answer"]
            routes = client.get(f"/v1/meteora/routes/{reply.json()['id']}").json()
            assert set(routes["layers"]) == set(expected["routes"])
            assert {NAMES[index] for layer in routes["layers"].values() for row in layer["indices"] for index in row} == {"attention", "few"}
            refused = client.post("/v1/completions", json={"model": "m", "prompt": [5], "vllm_xargs": {"meteora_top_k": 9}})
            assert (refused.status_code, "from 1 to 4" in refused.text) == (400, True)
            assert client.get("/v1/meteora/routes/nothing").status_code == 404
            counts = client.get("/v1/meteora/counts").json()
            assert counts["tokens"] > 0
            assert counts["adapters"]["attention"] > 0
            metrics = client.get("/metrics").text
            assert f'meteora:adapter_choices{{adapter="attention"}} {float(counts["adapters"]["attention"])}' in metrics
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait(30)


def wait_for(client: httpx.Client, server: subprocess.Popen[bytes], log: Path) -> None:
    """Wait until the server answers."""
    for _ in range(240):
        assert server.poll() is None, log.read_text()[-3000:]
        try:
            if client.get("/health").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(1)
    raise AssertionError(log.read_text()[-3000:])


def test_another_weight_file_is_refused(world: Path, tmp_path: Path) -> None:
    copy = tmp_path / "served"
    shutil.copytree(world / "served", copy)
    file = copy / "meteora" / "meteora.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    program = "from meteora_core.integrations.vllm.checkpoint import Store; import sys; Store(sys.argv[1]).check()"
    done = subprocess.run([PYTHON, "-c", program, str(copy / "meteora")], env=environment(), cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert "its SHA-256 differs; write the folder again" in done.stderr


def test_layers_that_have_other_names_in_vllm(world: Path, tmp_path: Path) -> None:
    """Vision-language models of vLLM rename the layers of their language model."""
    program = """
import sys
from vllm.model_executor.models.utils import WeightsMapper
from meteora_core.integrations.vllm.config import MeteoraConfig
config = MeteoraConfig({"checkpoint": sys.argv[1]})
config.packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
config.apply_vllm_mapper(WeightsMapper(orig_to_new_prefix={"model.": "language_model.model."}))
print(config.members("language_model.model.layers.1.self_attn.qkv_proj"), config.members("visual.blocks.1.attn.qkv_proj"))
"""
    command = [PYTHON, "-c", program, str(world / "served" / "meteora")]
    done = subprocess.run(command, env=environment(), cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    parts = [f"model.layers.1.self_attn.{name}_proj" for name in "qkv"]
    assert done.stdout.splitlines()[-1] == f"{parts} {[None] * 3}"


def test_an_untested_version_of_vllm_refuses_models_with_adapters_alone(tmp_path: Path) -> None:
    program = """
from meteora_core.integrations.vllm import register, versions
versions.BELOW = "0.27"
register()
from vllm.model_executor.layers.quantization import get_quantization_config
get_quantization_config("compressed-tensors")
get_quantization_config("meteora").from_config({})
"""
    done = subprocess.run([PYTHON, "-c", program], env=environment(), cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert "ImportError: Meteora was tested with vLLM 0.26.0 up to, not including, 0.27, and 0.32.0" in done.stderr
    assert "METEORA_VLLM_ANY_VERSION=1 to try" in done.stderr
