"""Losses: the language-model loss in chunks, which never holds all logits at once, and the gate loss beside it."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from meteora_core.model.sharded import is_sharded
from meteora_core.routing import IGNORE
from meteora_core.training.encoding import Batch

CHUNK = 256
"""Tokens whose logits exist at once."""

_SCALED = (
    "final_logit_softcapping",
    "logit_scale",
    "logits_scaling",
    "output_multiplier_scale",
    "lm_head_multiplier",
    "logits_soft_cap",
    "output_logit_soft_cap",
    "output_multiplier",
    "softcap",
)
"""Settings under which architectures scale or cap their logits."""

_PROBED: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
"""What :func:`_only_head_follows` found, by model."""

_PROBE_TOKENS = 4
_PROBE_LOGIT = 60.0
"""The largest logit of the probe: well above the caps that are in use."""


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Weighted sum of CE(hidden W^T, targets) over positions, gradients for ``hidden`` only; also the plain CE of every position.

    ``d/dh = (softmax(h W^T) - onehot) W`` is computed with the loss, chunk by chunk, so that the (tokens, vocabulary) matrix is never kept.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
        losses = torch.empty(hidden.shape[0], dtype=torch.float64 if hidden.dtype == torch.float64 else torch.float32, device=hidden.device)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, hidden.shape[0], CHUNK):
            part = hidden[start : start + CHUNK]
            wanted = targets[start : start + CHUNK, None]
            logits = part @ weight.t()
            wide = logits if logits.dtype == torch.float64 else logits.float()
            logsum = torch.logsumexp(wide, -1, keepdim=True)
            torch.sub(logsum, wide.gather(-1, wanted), out=losses[start : start + CHUNK, None])
            if gradient is not None:
                probabilities = wide.sub_(logsum).exp_()
                probabilities.scatter_add_(-1, wanted, torch.full_like(wanted, -1, dtype=probabilities.dtype))
                if weights is not None:
                    probabilities *= weights[start : start + CHUNK, None]
                torch.mm(probabilities.to(hidden.dtype), weight, out=gradient[start : start + CHUNK])
        ctx.save_for_backward(*([] if gradient is None else [gradient]))
        ctx.mark_non_differentiable(losses)
        return (losses if weights is None else losses * weights).sum(), losses

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * outputs[0].to(gradient.dtype), None, None, None


def lm_loss_sum(model: nn.Module, batch: Batch, *, chunked: bool = True) -> Tensor:
    """Sum of the next-token cross-entropy over all positions that have a target (prompt and response); see :func:`lm_losses`."""
    return lm_losses(model, batch, chunked=chunked)[0]


def lm_losses(model: nn.Module, batch: Batch, weights: Tensor | None = None, *, chunked: bool = True) -> tuple[Tensor, Tensor]:
    """Weighted sum of the next-token cross-entropy, and the cross-entropy of every position.

    Args:
        model: A causal LM, possibly wrapped by PEFT.
        batch: On the model's device.
        weights: float (batch, tokens), the weight of each position; None is 1 everywhere.
        chunked: Compute logits a few hundred tokens at a time. It is only done where it is exact: a frozen output layer without bias, no scaling or
            capping of logits, no wrapper that must see the call. Each model's own logits are compared once, on a few made-up hidden states.

    Returns:
        A float32 scalar (float64 for a float64 model) with gradients, and (batch * tokens,) of the same type without; 0 where there is no target.
    """
    flat = batch.targets.reshape(-1)
    weights = None if weights is None else weights.reshape(-1)
    head = _plain_head(model) if chunked else None
    if head is None:
        logits = model(**batch.model_inputs(), use_cache=False).logits
        logits = logits.reshape(-1, logits.shape[-1])
        losses = F.cross_entropy(logits if logits.dtype == torch.float64 else logits.float(), flat, ignore_index=IGNORE, reduction="none")
        return (losses if weights is None else losses * weights).sum(), losses.detach()
    decoder, weight = head
    hidden = decoder(**batch.model_inputs(), use_cache=False)[0]
    keep = (flat != IGNORE).nonzero().squeeze(1)
    picked = hidden.reshape(-1, hidden.shape[-1]).index_select(0, keep)
    if weights is not None:
        weights = weights.index_select(0, keep)
    with torch.autocast(hidden.device.type, enabled=False):
        total, some = _ChunkedCrossEntropy.apply(picked.to(weight.dtype), weight, flat.index_select(0, keep), weights)  # type: ignore[no-untyped-call]
    return total, some.new_zeros(flat.shape[0]).index_copy_(0, keep, some)


def _plain_head(model: nn.Module) -> tuple[nn.Module, Tensor] | None:
    """The decoder and the output weight, where ``logits = hidden W^T`` is all that follows the decoder; else None."""
    from transformers import PreTrainedModel

    inner: Any = model
    if hasattr(inner, "get_base_model"):
        inner = inner.get_base_model()
    if not isinstance(inner, PreTrainedModel):
        return None
    config = inner.config.get_text_config()
    if any(getattr(config, name, None) not in (None, 1, 1.0) for name in _SCALED):
        return None
    head = inner.get_output_embeddings()
    decoder = inner.base_model
    if type(head) is not nn.Linear or head.bias is not None or head.weight.requires_grad or decoder is inner or head.weight.is_meta:
        return None
    if type(head.weight) not in (nn.Parameter, Tensor) or is_sharded(head.weight):
        return None
    if inner not in _PROBED:
        _PROBED[inner] = _only_head_follows(inner, decoder, head.weight)
    return (decoder, head.weight) if _PROBED[inner] else None


class _Hidden:
    """A decoder's output with nothing but the last hidden state in it."""

    def __init__(self, last_hidden_state: Tensor) -> None:
        self.last_hidden_state = last_hidden_state

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)

    def __getitem__(self, place: Any) -> Any:
        return (self.last_hidden_state,)[place]


@torch.no_grad()
def _only_head_follows(model: Any, decoder: nn.Module, weight: Tensor) -> bool:
    """Whether the model makes ``hidden W^T`` of its decoder's hidden states: given some in the decoder's place, it is asked for logits. No layer runs.

    A model that cannot be asked so is taken at the word of its configuration (:data:`_SCALED`): True.
    """
    drawn = torch.randn(1, _PROBE_TOKENS, weight.shape[1], generator=torch.Generator().manual_seed(0))
    hidden = drawn.to(weight.device, weight.dtype)
    ids = torch.zeros(1, _PROBE_TOKENS, dtype=torch.int64, device=weight.device)
    stages = {decoder, model.get_decoder() or decoder}  # some models (OPT) call the inner one
    before = {stage: stage.__dict__.get("forward") for stage in stages}
    layers = {module for stage in stages for module in stage.modules()} - stages

    def refuse(module: nn.Module, _: Any) -> None:
        if module in layers:
            raise RuntimeError("a layer would run, and what watches the layers would see it")

    with torch.autocast(weight.device.type, enabled=False):
        largest = float((hidden @ weight.t()).abs().max())
        hidden = hidden * (_PROBE_LOGIT / max(largest, 1e-6))
        expected = (hidden @ weight.t()).double()
        for stage in stages:
            stage.__dict__["forward"] = lambda *_, **__: _Hidden(hidden)
        guard = register_module_forward_pre_hook(refuse)
        try:
            logits = model.forward(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
        except Exception:
            return True
        finally:
            guard.remove()
            for stage, forward in before.items():
                del stage.__dict__["forward"]
                if forward is not None:
                    stage.__dict__["forward"] = forward
    if logits.shape != expected.shape:
        return False
    tolerance = 2e-2 if weight.dtype in (torch.float16, torch.bfloat16) else 1e-3
    return bool((logits.to(expected.device).double() - expected).abs().max() <= tolerance * _PROBE_LOGIT)


def count_targets(batch: Batch) -> int:
    """Positions that the language-model loss counts."""
    return int((batch.targets != IGNORE).sum())


def count_gate_labels(batch: Batch) -> int:
    """Positions that the gate loss counts."""
    return int((batch.gate_labels != IGNORE).sum())
