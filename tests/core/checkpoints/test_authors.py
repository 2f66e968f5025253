"""Checkpoints in the authors' layout against a per-token float64 loop, and everything that can be wrong with them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from meteora_core import load_authors_checkpoint, load_checkpoint, save_checkpoint
from meteora_core.checkpoints.authors_layout import AuthorsAdapters
from meteora_core.errors import AdapterError, CheckpointError, UsageError

PREFIX = "base_model.model."
Make = Callable[..., Any]


class PerToken(nn.Module):
    """One adapted linear, one token at a time, one chosen adapter at a time, in float64."""

    def __init__(self, weight: Tensor, gate: Tensor, A: Tensor, B: Tensor, scaling: list[float], top_k: int, temperature: float) -> None:
        super().__init__()
        self.numbers = [tensor.double() for tensor in (weight, gate, A, B)]
        self.scaling, self.top_k, self.temperature = scaling, top_k, temperature

    def forward(self, x: Tensor) -> Tensor:
        weight, gate, A, B = self.numbers
        rank = A.shape[0] // len(self.scaling)
        rows = []
        for token in x.reshape(-1, x.shape[-1]):
            logits = (gate @ token).tolist()
            chosen = sorted(range(len(logits)), key=lambda i: (-logits[i], i))[: self.top_k]
            exponentials = [torch.tensor((logits[i] - logits[chosen[0]]) / self.temperature, dtype=torch.float64).exp() for i in chosen]
            y = weight @ token
            for i, exponential in zip(chosen, exponentials, strict=True):
                own = slice(rank * i, rank * (i + 1))
                y = y + exponential / sum(exponentials) * self.scaling[i] * (B[:, own] @ (A[own] @ token))
            rows.append(y)
        return torch.stack(rows).reshape(*x.shape[:-1], -1)


def per_token_model(made: Any, top_k: int, temperature: float) -> LlamaForCausalLM:
    """The base model in float64 with the checkpoint's tensors in place, computed token by token."""
    model = LlamaForCausalLM.from_pretrained(made.base).double().eval()
    stored = {}
    for shard in sorted(made.checkpoint.glob("*.safetensors")):
        stored |= load_file(shard)
    for key, tensor in stored.items():
        name = key.removeprefix(PREFIX)
        if name.endswith(".base_layer.weight"):
            path = name.removesuffix(".base_layer.weight")
            parts = [stored[f"{PREFIX}{path}.{part}.weight"] for part in ("moe_gate", "lora_A", "lora_B")]
            scaling = [alpha / made.rank for alpha in made.alphas]
            parent, _, leaf = path.rpartition(".")
            setattr(model.get_submodule(parent), leaf, PerToken(tensor, *parts, scaling, top_k, temperature))
        elif not name.endswith((".moe_gate.weight", ".lora_A.weight", ".lora_B.weight")):
            model.get_parameter(name).data = tensor.double()
    return model


def left_padded() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(3, 96, (3, 11), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    mask[2, :7] = 0
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}


@pytest.mark.parametrize(("top_k", "temperature"), [(1, 1.0), (2, 1.0), (2, 15.0), (2, 30.0)])
def test_logits_and_greedy_continuations_are_those_of_the_formula(make_authors: Make, top_k: int, temperature: float) -> None:
    made = make_authors(same_alpha=False, change=("model.norm.weight", "model.layers.0.self_attn.k_proj.weight", "lm_head.weight"))
    model = load_authors_checkpoint(str(made.base), made.adapters, made.checkpoint, top_k, temperature, device="cpu")
    reference = per_token_model(made, top_k, temperature)
    batch = left_padded()
    with torch.no_grad():
        ours, theirs = model(**batch).logits, reference(**batch).logits
    real = batch["attention_mask"].bool()
    assert theirs[real].abs().max() > 1
    torch.testing.assert_close(ours[real].double(), theirs[real], atol=2e-4, rtol=0)
    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(model.generate(**batch, **settings), reference.generate(**batch, **settings))


def test_every_form_of_base_and_checkpoint_gives_the_same_model(make_authors: Make) -> None:
    made = make_authors(count=5, rank=3)
    batch = left_padded()
    forms: list[tuple[Any, Any]] = [
        (made.base, made.checkpoint),
        (str(made.base), str(made.file)),
        (LlamaForCausalLM.from_pretrained(made.base), made.file),
    ]
    with torch.no_grad():
        outputs = [load_authors_checkpoint(base, made.adapters, checkpoint, device="cpu")(**batch).logits for base, checkpoint in forms]
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])


def test_shards_give_what_the_single_file_gives(make_authors: Make, tmp_path: Path) -> None:
    made = make_authors(count=4, shards=3)
    batch = left_padded()
    with torch.no_grad():
        sharded = load_authors_checkpoint(made.base, made.adapters, made.checkpoint, device="cpu")(**batch).logits
        single = tmp_path / "one.safetensors"
        save_file(made.tensors, single)
        assert torch.equal(load_authors_checkpoint(made.base, made.adapters, single, device="cpu")(**batch).logits, sharded)
    next(made.checkpoint.glob("model-00002*")).unlink()
    with pytest.raises(CheckpointError, match="lacks shards that its index names: model-00002"):
        load_authors_checkpoint(made.base, made.adapters, made.checkpoint)


def test_bfloat16_and_tied_embeddings(make_authors: Make) -> None:
    made = make_authors(tied=True, dtype=torch.bfloat16)
    assert f"{PREFIX}lm_head.weight" not in made.tensors
    model = load_authors_checkpoint(made.base, made.adapters, made.checkpoint, dtype="float32", device="cpu")
    batch = left_padded()
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits[real].double(), per_token_model(made, 2, 1.0)(**batch).logits[real], atol=2e-4, rtol=0)
    assert load_authors_checkpoint(made.base, made.adapters, made.checkpoint, dtype="bfloat16", device="cpu").lm_head.weight.dtype == torch.bfloat16
    made.rewrite({**made.tensors, f"{PREFIX}lm_head.weight": made.tensors[f"{PREFIX}model.embed_tokens.weight"] + 1})
    with pytest.raises(CheckpointError, match="which the base model ties together"):
        load_authors_checkpoint(made.base, made.adapters, made.checkpoint, device="cpu")


def test_without_adapter_folders_alpha_gives_the_scaling(make_authors: Make) -> None:
    made = make_authors()
    batch = left_padded()
    with torch.no_grad():
        with_folders = load_authors_checkpoint(made.base, made.adapters, made.checkpoint, device="cpu")
        without = load_authors_checkpoint(made.base, None, made.checkpoint, device="cpu")
        halved = load_authors_checkpoint(made.base, AuthorsAdapters(alpha=8), made.checkpoint, device="cpu")
        assert with_folders.meteora.names == without.meteora.names == made.names
        assert torch.equal(with_folders(**batch).logits, without(**batch).logits)
        assert not torch.allclose(halved(**batch).logits, without(**batch).logits, atol=1e-2)
    with pytest.raises(UsageError, match="which states alpha"):
        AuthorsAdapters(made.adapters, alpha=8)


def test_rslora_scaling(make_authors: Make) -> None:
    made = make_authors(count=3, rank=4)
    for folder in made.adapters.iterdir():
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps({**config, "use_rslora": True}))
    made.alphas = (32.0,) * 3
    model = load_authors_checkpoint(made.base, made.adapters, made.checkpoint, device="cpu")
    with torch.no_grad():
        torch.testing.assert_close(model(**left_padded()).logits[0].double(), per_token_model(made, 2, 1.0)(**left_padded()).logits[0], atol=2e-4, rtol=0)


def test_a_checkpoint_without_base_tensors_takes_the_base_models(make_authors: Make) -> None:
    made = make_authors(count=4, with_base=False)
    model = load_authors_checkpoint(made.base, made.adapters, made.checkpoint, device="cpu")
    base = LlamaForCausalLM.from_pretrained(made.base)
    assert torch.equal(model.model.layers[0].self_attn.q_proj.base_layer.weight, base.model.layers[0].self_attn.q_proj.weight)


def test_old_rotary_buffers_are_passed_over(make_authors: Make) -> None:
    made = make_authors(count=2)
    made.rewrite({**made.tensors, f"{PREFIX}model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)})
    assert load_authors_checkpoint(made.base, made.adapters, made.checkpoint, device="cpu").meteora.names == made.names


def test_what_is_saved_again_is_the_loaded_model(make_authors: Make, tmp_path: Path) -> None:
    made = make_authors(count=4, change=("model.norm.weight", "model.layers.1.mlp.up_proj.weight"))
    model = load_authors_checkpoint(made.base, made.adapters, made.checkpoint, device="cpu")
    save_checkpoint(model, tmp_path / "native")
    again = load_checkpoint(tmp_path / "native", device="cpu")
    save_checkpoint(again, tmp_path / "twice")
    thrice = load_checkpoint(tmp_path / "twice", str(made.base), device="cpu")
    with torch.no_grad():
        expected = model(**left_padded()).logits
        assert torch.equal(again(**left_padded()).logits, expected)
        assert torch.equal(thrice(**left_padded()).logits, expected)
    stored = load_file(tmp_path / "native" / "meteora.safetensors")
    assert {key for key in stored if key.startswith("base.")} == {"base.model.norm.weight", "base.model.layers.1.mlp.up_proj.weight"}


def without(key: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if name != PREFIX + key}


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (without("model.layers.0.self_attn.q_proj.moe_gate.weight"), r"lacks tensors: base_model.model.model.layers.0.self_attn.q_proj.moe_gate.weight$"),
        (without("model.layers.1.mlp.up_proj.lora_B.weight"), r"lacks tensors: \S*up_proj.lora_B.weight$"),
        (without("model.layers.1.mlp.up_proj.base_layer.weight"), r"lacks tensors: \S*up_proj.base_layer.weight$"),
        (without("model.norm.weight"), r"lacks tensors of .*: base_model.model.model.norm.weight$"),
        (without("lm_head.weight"), r"lacks tensors of .*: base_model.model.lm_head.weight$"),
        (lambda t: {k: v for k, v in t.items() if "layers.1.self_attn" not in k}, r"lacks tensors: (\S+, ){4}\S+ and 11 more"),
        (lambda t: {**t, "stray": torch.ones(1)}, "has unknown tensors: stray"),
        (lambda t: {**t, f"{PREFIX}model.layers.0.extra.weight": torch.ones(1)}, r"has tensors that .* lacks: \S+layers.0.extra.weight"),
        (lambda t: {**t, **{f"x{i}": torch.ones(1) for i in range(7)}}, "x0, x1, x2, x3, x4 and 2 more"),
        (
            lambda t: {**t, f"{PREFIX}model.layers.0.mlp.up_proj.lora_A.weight": torch.ones(32, 31)},
            r"up_proj.lora_A.weight has shape \[32, 31\], expected \[32, 32\]",
        ),
        (lambda t: {**t, f"{PREFIX}model.layers.1.mlp.up_proj.moe_gate.weight": torch.ones(5, 32)}, r"moe_gate.weight has shape \[5, 32\], expected \[4, 32\]"),
        (lambda t: {k.removeprefix(PREFIX): v for k, v in t.items()}, "is not a checkpoint in the authors' layout"),
        (lambda t: {k: v for k, v in t.items() if "moe_gate" not in k}, "is not a checkpoint in the authors' layout"),
    ],
)
def test_missing_and_unknown_tensors_are_named(make_authors: Make, spoil: Any, message: str) -> None:
    made = make_authors(count=4)
    made.rewrite(spoil(made.tensors))
    with pytest.raises(CheckpointError, match=message):
        load_authors_checkpoint(made.base, made.adapters, made.checkpoint, device="cpu")


def test_broken_files(make_authors: Make, tmp_path: Path) -> None:
    made = make_authors(count=2)
    whole = made.file.read_bytes()
    for length, message in ((len(whole) - 100, "was cut short"), (600, "cut short"), (5, "cut short"), (0, "cut short")):
        made.file.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=message):
            load_authors_checkpoint(made.base, made.adapters, made.checkpoint)
    made.file.write_bytes(whole + b"more")
    with pytest.raises(CheckpointError, match="not the file that was saved"):
        load_authors_checkpoint(made.base, made.adapters, made.checkpoint)
    made.file.write_bytes(b"\x20\0\0\0\0\0\0\0" + b"no header at all, but long enough" * 4)
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        load_authors_checkpoint(made.base, made.adapters, made.checkpoint)
    made.file.unlink()
    with pytest.raises(CheckpointError, match="holds no safetensors file"):
        load_authors_checkpoint(made.base, made.adapters, made.checkpoint)
    with pytest.raises(CheckpointError, match="holds no safetensors file") as caught:
        load_authors_checkpoint(made.base, made.adapters, tmp_path)
    assert "base/model.safetensors" in str(caught.value.hint)
    with pytest.raises(CheckpointError, match="no such file"):
        load_authors_checkpoint(made.base, made.adapters, tmp_path / "nowhere")


def test_pickles_are_refused_unread(make_authors: Make) -> None:
    made = make_authors(count=2)
    pickle = made.checkpoint / "pytorch_model.bin"
    made.file.rename(pickle)
    for path in (pickle, made.checkpoint):
        with pytest.raises(CheckpointError, match="never read") as caught:
            load_authors_checkpoint(made.base, made.adapters, path)
        assert "pytorch_model.bin" in caught.value.message


def test_another_base_model_is_named_and_left_alone(make_authors: Make) -> None:
    made = make_authors(count=2)
    config = LlamaConfig.from_pretrained(made.base)

    def other(**changes: int) -> LlamaForCausalLM:
        return LlamaForCausalLM(LlamaConfig(**{**config.to_dict(), **changes}))

    for base, message in (
        (other(vocab_size=100), "has a vocabulary of 100 tokens, the checkpoint .* one of 96"),
        (other(intermediate_size=64), r"mlp.down_proj.weight of shape \[32, 64\], the checkpoint .* of shape \[32, 48\]"),
        (other(hidden_size=64), r"(embed_tokens|lm_head).weight of shape \[96, 64\], the checkpoint .* of shape \[96, 32\]"),
        (other(num_hidden_layers=1), "has tensors that .* lacks: .*layers.1"),
        (other(num_hidden_layers=3), "lacks tensors of .*layers.2"),
    ):
        before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
        with pytest.raises(CheckpointError, match=message) as caught:
            load_authors_checkpoint(base, made.adapters, made.checkpoint)
        assert "another base model" in str(caught.value.hint)
        assert getattr(base, "meteora", None) is None
        assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())


def test_adapters_that_do_not_fit_the_checkpoint(make_authors: Make) -> None:
    made = make_authors()

    def load(names: Sequence[str] | None = None) -> Any:
        return load_authors_checkpoint(made.base, AuthorsAdapters(made.adapters, names), made.checkpoint, device="cpu")

    swapped = list(made.names)
    swapped[3], swapped[7] = swapped[7], swapped[3]
    with pytest.raises(CheckpointError, match=r"not that of the checkpoint: adapter 3 of .* is 'contextual_parametric_.*', not 'epistemic_reasoning'"):
        load(swapped)
    with pytest.raises(CheckpointError, match="has 28 adapters, and there are 27 names"):
        load(made.names[:27])
    with pytest.raises(CheckpointError, match="names given twice: alpaca"):
        load([*made.names[:27], "alpaca"])
    shutil.copytree(made.adapters / "alpaca", made.adapters / "zeta")
    with pytest.raises(CheckpointError, match="has 29: it has also zeta"):
        load()
    assert load(made.names).meteora.names == made.names
    (made.adapters / "alpaca").rename(made.adapters.parent / "elsewhere")
    with pytest.raises(CheckpointError, match="has 28: it lacks alpaca and has also zeta"):
        load()
    shutil.rmtree(made.adapters / "zeta")
    with pytest.raises(CheckpointError, match="has 27: it lacks alpaca"):
        load()
    with pytest.raises(CheckpointError, match="no such folder of adapters"):
        load_authors_checkpoint(made.base, made.adapters / "nowhere", made.checkpoint)


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"r": 4}, CheckpointError, "'task_01' has rank 4, and the adapters in .* have rank 8"),
        ({"peft_type": "IA3"}, AdapterError, "'task_01' is a 'IA3' adapter"),
        ({"use_dora": True}, AdapterError, r"'task_01' uses DoRA \(use_dora\)"),
        ({"alpha_pattern": {"q_proj": 1}}, AdapterError, "'task_01' uses alpha_pattern"),
    ],
)
def test_adapter_configurations_that_do_not_fit(make_authors: Make, change: dict[str, Any], kind: type[Exception], message: str) -> None:
    made = make_authors(count=3)
    file = made.adapters / "task_01" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(kind, match=message):
        load_authors_checkpoint(made.base, made.adapters, made.checkpoint)


def test_adapters_trained_on_with_the_gates_are_the_checkpoints(make_authors: Make) -> None:
    made = make_authors(count=3)
    key = f"{PREFIX}model.layers.0.mlp.down_proj.lora_A.weight"
    changed = {name: tensor + 0.01 if ".lora_" in name else tensor for name, tensor in made.tensors.items()}
    made.rewrite(changed)
    model = load_authors_checkpoint(made.base, made.adapters, made.checkpoint, device="cpu")
    assert torch.equal(model.model.layers[0].mlp.down_proj.lora_A, changed[key])


def test_routing_arguments_out_of_range(make_authors: Make) -> None:
    made = make_authors(count=2)
    base = LlamaForCausalLM.from_pretrained(made.base)
    with pytest.raises(UsageError, match="top_k is 3"):
        load_authors_checkpoint(base, made.adapters, made.checkpoint, top_k=3)
    with pytest.raises(UsageError, match="temperature T is 0"):
        load_authors_checkpoint(base, made.adapters, made.checkpoint, temperature=0.0)
    load_authors_checkpoint(base, made.adapters, made.checkpoint)
    with pytest.raises(UsageError, match="attached already"):
        load_authors_checkpoint(base, made.adapters, made.checkpoint)
