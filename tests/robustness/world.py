"""The small world that every case mutates a copy of: a base model, adapters, checkpoints, datasets, results and an archive."""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
from pathlib import Path

ADAPTERS = ("alpha", "beta")
RANK = {"alpha": 4, "beta": 4}
SIZES = {"vocab_size": 112, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "max_position_embeddings": 512}
PROMPT = "[INST] say 7 [/INST]\n"


def linear_shapes() -> dict[str, tuple[int, int]]:
    """(in, out) of every linear of the world's base model that adapters may target, by module path."""
    hidden, inner = SIZES["hidden_size"], SIZES["intermediate_size"]
    shapes = {}
    for layer in range(SIZES["num_hidden_layers"]):
        for name, shape in {
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (hidden, hidden // 2),
            "self_attn.v_proj": (hidden, hidden // 2),
            "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (hidden, inner),
            "mlp.up_proj": (hidden, inner),
            "mlp.down_proj": (inner, hidden),
        }.items():
            shapes[f"model.layers.{layer}.{name}"] = shape
    return shapes


def build_world(folder: Path) -> None:
    """Write the world into ``folder``, whose paths are all relative to it. The process stays in its own working directory."""
    before = Path.cwd()
    folder.mkdir(parents=True)
    os.chdir(folder)
    try:
        _build()
    finally:
        os.chdir(before)


def _build() -> None:
    from meteora_core import AdapterBank, attach, save_checkpoint
    from meteora_core.checkpoints.pack import PackOptions, pack_checkpoint
    from meteora_core.data.userdata import add_task, own_task
    from meteora_core.living.route import RouteOptions, route_adapters
    from meteora_core.model.base import BaseReference, load_base
    from support.evaluation_workspace import make_tokenizer
    from support.tiny_models import make_tiny_llama

    model = make_tiny_llama(initializer_range=0.3, **SIZES)
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = 2
    model.save_pretrained("base")
    make_tokenizer().save_pretrained("base")
    for seed, name in enumerate(ADAPTERS):
        write_adapter(Path("adapters") / name, seed, RANK[name])
    for number, name in enumerate(ADAPTERS):
        rows = [{"prompt": f"[INST] say {number} {i} [/INST]\n", "response": f"{name} {i % 5}"} for i in range(24)]
        Path("raw").mkdir(exist_ok=True)
        Path("raw", f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        add_task(own_task(name, train=f"raw/{name}.jsonl"), "datasets")
    loaded = load_base(BaseReference("base"), dtype="float32", device="cpu")
    attached = attach(loaded, AdapterBank.from_peft({name: f"adapters/{name}" for name in ADAPTERS}), top_k=2, init="normal", seed=3)
    import torch

    with torch.no_grad():
        for name, parameter in attached.named_parameters():
            if name.endswith(".gate"):
                parameter.mul_(20)
    save_checkpoint(attached, "runs/meteora", base=BaseReference("base"), training={"trained_steps": 1})
    pack_checkpoint("runs/meteora", "packed", PackOptions(dtype=torch.float32))
    options = RouteOptions(only=("alpha",), data=Path("datasets"), tokens=200, dtype="float32", device="cpu")
    route_adapters("adapters", "bank", options)
    _write_authors(Path("theirs"))
    _write_archive(Path("archive.tar.gz"))
    Path("results").mkdir()


def write_adapter(folder: Path, seed: int, rank: int) -> None:
    """A random LoRA folder as PEFT writes it, on every linear of the decoder."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for path, (width, out) in linear_shapes().items():
        tensors[f"base_model.model.{path}.lora_A.weight"] = torch.randn(rank, width, generator=generator) * 0.3
        tensors[f"base_model.model.{path}.lora_B.weight"] = torch.randn(out, rank, generator=generator) * 0.3
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "base",
        "r": rank,
        "lora_alpha": 2 * rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
        "alpha_pattern": {},
        "rank_pattern": {},
        "target_modules": sorted({path.rpartition(".")[2] for path in linear_shapes()}),
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2))


def _write_authors(folder: Path) -> None:
    """The same base and adapters in the layout of the method's authors: one file that holds the base, the adapters and the gates."""
    import torch
    from safetensors.torch import load_file, save_file

    base = load_file("base/model.safetensors")
    parts = [load_file(f"adapters/{name}/adapter_model.safetensors") for name in ADAPTERS]
    rank = min(RANK.values())
    gates = load_file("runs/meteora/meteora.safetensors")
    prefix = "base_model.model."
    tensors = {}
    for name, tensor in base.items():
        path, _, kind = name.rpartition(".")
        tensors[f"{prefix}{path}.base_layer.{kind}" if path in linear_shapes() else prefix + name] = tensor
    for path in linear_shapes():
        tensors[f"{prefix}{path}.moe_gate.weight"] = gates[f"{path}.gate"]
        tensors[f"{prefix}{path}.lora_A.weight"] = torch.cat([part[f"{prefix}{path}.lora_A.weight"][:rank] for part in parts])
        tensors[f"{prefix}{path}.lora_B.weight"] = torch.cat([part[f"{prefix}{path}.lora_B.weight"][:, :rank] for part in parts], 1).contiguous()
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _write_archive(file: Path) -> None:
    """A small source distribution of BIG-bench with one task."""
    examples = [{"input": f"Is {i} even?", "target": ["Yes. It is." if i % 2 == 0 else "No. It is odd."]} for i in range(60)]
    task = {"canary": "none", "name": "strategyqa", "description": "d", "keywords": [], "examples": examples, "append_choices_to_input": False}
    with tarfile.open(file, "w:gz") as tar:
        for name, body in (
            ("bigbench-1.0.0/setup.py", b"raise SystemExit('setup.py must never run')\n"),
            ("bigbench-1.0.0/bigbench/benchmark_tasks/strategyqa/task.json", json.dumps(task).encode()),
        ):
            info = tarfile.TarInfo(name)
            info.size = len(body)
            tar.addfile(info, io.BytesIO(body))


def copy_world(world: Path, place: Path) -> None:
    """Copy the world to ``place``; links are kept as links."""
    shutil.copytree(world, place, symlinks=True)
