"""Starts vLLM for a checkpoint and makes the server in front of it, from the settings."""

from __future__ import annotations

import atexit
import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from meteora_core.adapters.peft_folder import AdapterInfo
from meteora_core.chat.chat_model import ChatModel
from meteora_core.checkpoints.native_config import read_config
from meteora_core.data.frames import read_frame
from meteora_core.errors import UsageError
from meteora_core.exports.vllm_model import INSIDE, quantization
from meteora_core.generation.limits import end_tokens
from meteora_core.integrations.vllm.versions import refusal
from meteora_core.json_files import read_object
from meteora_core.model.base import BaseReference, load_tokenizer, pick_device
from meteora_core.progress import SILENT, Progress
from meteora_core.routing import Meteora, find_meteora
from meteora_core.serving.app import AppOptions, create_app
from meteora_core.serving.guard import LOOPBACK, Access
from meteora_core.serving.launch import ServerPlan, check_name
from meteora_core.serving.metrics import Metrics
from meteora_core.serving.service import Service, ServiceOptions
from meteora_core.serving.vllm_engine import MODEL, VllmEngine, VllmFacts
from meteora_core.serving.vllm_process import VllmOptions, VllmProcess, has_vllm, is_exported, served_folder
from meteora_core.starter import usual_checkpoint

if TYPE_CHECKING:
    from starlette.types import ASGIApp

    from meteora_core.settings import Settings


def pick_engine(settings: Settings, *, embedded: bool = False) -> Literal["transformers", "vllm"]:
    """The engine of the settings; "auto" is vLLM on a GPU on which a tested version of it is installed, and transformers otherwise.

    Args:
        settings: All settings.
        embedded: Whether an option requires the embedded engine, so that "auto" is transformers.
    """
    chosen = settings.serve.engine
    if chosen != "auto":
        return chosen
    if embedded or settings.model.quantization != "none" or not has_vllm(settings.serve.vllm_python):
        return "transformers"
    if settings.serve.vllm_python is None and refusal() is not None:
        return "transformers"
    return "vllm" if pick_device(settings.model.device).type == "cuda" else "transformers"


def make_vllm_server(plan: ServerPlan, progress: Progress = SILENT, *, verbose: bool = False) -> ASGIApp:
    """Export the checkpoint if needed, start vLLM, wait until it is ready, and make the application.

    Args:
        plan: What to serve.
        progress: Receiver of progress reports.
        verbose: Whether vLLM's messages are shown.

    Raises:
        UsageError: An option contradicts another, or cannot be used.
        CheckpointError: vLLM cannot serve the checkpoint.
        MeteoraError: vLLM does not start.
    """
    settings, chosen = plan.settings, plan.settings.serve
    if not has_vllm(chosen.vllm_python):
        raise UsageError("vLLM is not installed", hint="pip install 'meteora-lora[vllm]', or name the Python of another environment: --vllm-python")
    VllmOptions(arguments=chosen.vllm_args).extra()  # checked before anything is exported
    bare = plan.base is not None and plan.checkpoint is None
    checkpoint = None if bare else plan.checkpoint or usual_checkpoint(settings.paths.runs)
    folder = served_folder(checkpoint, plan.base, plan.adapters_dir, progress=progress)
    chat_model = described_model(folder)
    words = overrides(folder, plan.top_k, plan.routing_temperature)
    if settings.model.trust_remote_code:
        words.append("--trust-remote-code")
    arguments = " ".join([chosen.vllm_args, *map(shlex.quote, words)]).strip()
    options = VllmOptions(chosen.vllm_python, arguments, chosen.max_batch, chosen.max_model_len, settings.model.dtype, verbose)
    state = find_meteora(chat_model.model)
    check_name(chosen.name, () if state is None else state.names)
    process = VllmProcess.start(folder, options, MODEL, progress)
    atexit.register(process.stop)
    metrics = Metrics()
    top_k, temperature = (1, 1.0) if state is None else (plan.top_k or state.top_k, plan.routing_temperature or state.temperature)
    described = read_object(folder / "config.json")
    vocabulary = int(described.get("vocab_size") or described.get("text_config", {}).get("vocab_size") or len(chat_model.tokenizer))
    names = () if state is None else state.names
    facts = VllmFacts(chat_model.tokenizer, vocabulary, end_tokens(chat_model.model, chat_model.tokenizer), names, top_k, temperature)
    engine = VllmEngine(process, facts, process.longest(), chosen.max_queue + (chosen.max_batch or 256), metrics.report)
    service = Service(chat_model, engine, ServiceOptions(chosen.name, chosen.template, chosen.max_new_tokens, plan.top_k, plan.routing_temperature))
    service.defaults.check(service.adapters)
    access = Access((plan.key,) if plan.key else (), LOOPBACK if plan.local else (), chosen.max_body_mb * 1_000_000)
    return create_app(service, metrics, AppOptions(access, tuple(chosen.cors), extra_metrics=engine.metrics))


def described_model(folder: Path) -> ChatModel:
    """The description of an exported folder or a base model: its tokenizer, its adapters and their prompt frames, without weights."""
    shell: Any = torch.nn.Module()
    tokenizer = load_tokenizer(BaseReference(str(folder)))
    generation = folder / "generation_config.json"
    if generation.is_file():
        from transformers import GenerationConfig

        shell.generation_config = GenerationConfig.from_pretrained(folder)
    if not is_exported(folder):
        return ChatModel("base", f"{folder.name} (base model, no adapters)", shell, tokenizer, BaseReference(folder.name))
    config = read_config(folder / INSIDE)
    shell.meteora = Meteora(tuple(AdapterInfo.from_entry(entry) for entry in config["adapters"]), config["top_k"], config["temperature"], "reference")
    shell.meteora.provenance.frame = read_frame(config.get("frame"))
    base = BaseReference(str(config["base"]["name"]), config["base"].get("revision"))
    return ChatModel("meteora", f"{folder.name}: {len(config['adapters'])} adapters on {base.name}", shell, tokenizer, base)


def overrides(folder: Path, top_k: int | None, temperature: float | None) -> list[str]:
    """The options of vLLM that replace the default top-k and routing temperature of an exported folder, so that requests need not send them."""
    changed = {name: value for name, value in (("top_k", top_k), ("temperature", temperature)) if value is not None}
    if not changed or not is_exported(folder):
        return []
    found = read_object(folder / "config.json").get("quantization_config") or quantization({})
    return ["--hf-overrides", json.dumps({"quantization_config": {**found, **changed}})]
