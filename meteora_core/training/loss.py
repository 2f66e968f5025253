"""The language-model loss. It is computed in chunks, so that the logits of all tokens never exist at the same time."""

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
"""Number of tokens whose logits exist at the same time."""

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
"""Names of configuration entries with which architectures scale or cap their logits."""

_PROBED: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
"""Results of :func:`_only_head_follows`, by model."""

_PROBE_TOKENS = 4
_PROBE_LOGIT = 60.0
"""The largest logit of the probe; it is well above the caps of known architectures."""


class _ChunkedCrossEntropy(torch.autograd.Function):
    """The weighted sum of CE(hidden W^T, targets) over positions, with gradients for ``hidden`` only, and the unweighted CE of every position.

    ``d/dh = (softmax(h W^T) - onehot) W`` is computed together with the loss, chunk by chunk, so that the (tokens, vocabulary) matrix is never stored.
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
        model: A causal language model, possibly wrapped by PEFT.
        batch: Batch on the model's device.
        weights: Weight of each position, float (batch, tokens); None is 1 everywhere.
        chunked: Whether to compute the logits of a few hundred tokens at a time. This is only done for models for which it is exact: the output layer is
            frozen and has no bias, logits are not scaled or capped, and no wrapper must see the call. The first call for a model compares its logits on
            a few random hidden states.

    Returns:
        The sum, a float32 scalar (float64 for a float64 model) with gradients, and the cross-entropy of each position, (batch * tokens,) of the same dtype
        without gradients; 0 for positions without a target.
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
    """The decoder and the output weight W if the logits are exactly ``hidden W^T`` of the decoder's output; otherwise None."""
    from transformers import PreTrainedModel

    causal_lm: Any = model
    if hasattr(causal_lm, "get_base_model"):
        causal_lm = causal_lm.get_base_model()
    if not isinstance(causal_lm, PreTrainedModel):
        return None
    config = causal_lm.config.get_text_config()
    if any(getattr(config, name, None) not in (None, 1, 1.0) for name in _SCALED):
        return None
    head = causal_lm.get_output_embeddings()
    decoder = causal_lm.base_model
    if type(head) is not nn.Linear or head.bias is not None or head.weight.requires_grad or decoder is causal_lm or head.weight.is_meta:
        return None
    if type(head.weight) not in (nn.Parameter, Tensor) or is_sharded(head.weight):
        return None
    if causal_lm not in _PROBED:
        _PROBED[causal_lm] = _only_head_follows(causal_lm, decoder, head.weight)
    return (decoder, head.weight) if _PROBED[causal_lm] else None


class _Hidden:
    """A decoder output that contains only the last hidden state; every other attribute is None."""

    def __init__(self, last_hidden_state: Tensor) -> None:
        self.last_hidden_state = last_hidden_state

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)

    def __getitem__(self, index: Any) -> Any:
        return (self.last_hidden_state,)[index]


@torch.no_grad()
def _only_head_follows(model: Any, decoder: nn.Module, weight: Tensor) -> bool:
    """Whether the model's logits are ``hidden W^T``. The probe replaces the decoder's output with random hidden states; no layer runs.

    If the model cannot run this probe, the result is True: the caller has already checked the model's configuration (:data:`_SCALED`).
    """
    drawn = torch.randn(1, _PROBE_TOKENS, weight.shape[1], generator=torch.Generator().manual_seed(0))
    hidden = drawn.to(weight.device, weight.dtype)
    ids = torch.zeros(1, _PROBE_TOKENS, dtype=torch.int64, device=weight.device)
    stages = {decoder, model.get_decoder() or decoder}  # OPT calls the module of get_decoder(), not base_model
    before = {stage: stage.__dict__.get("forward") for stage in stages}
    layers = {module for stage in stages for module in stage.modules()} - stages

    def refuse(module: nn.Module, _: Any) -> None:
        if module in layers:
            raise RuntimeError("a layer would run, and its hooks would see the probe")

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
    """The number of positions that the language-model loss counts."""
    return int((batch.targets != IGNORE).sum())


def count_gate_labels(batch: Batch) -> int:
    """The number of positions that the gate loss counts."""
    return int((batch.gate_labels != IGNORE).sum())
