"""Loading of a base model and its tokenizer by a catalog name, a folder or a hub id."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from meteora_core.adapters.magnitudes import check_tensor
from meteora_core.errors import CheckpointError, MeteoraError, UsageError, did_you_mean
from meteora_core.fetch.base_models import download_base, is_ready, model_folder
from meteora_core.fetch.catalog import CATALOG
from meteora_core.model.caches import check_decoding
from meteora_core.model.quantized import quantized_loading
from meteora_core.progress import SILENT, Progress
from meteora_core.reading import first_line
from meteora_core.routing import base_record
from meteora_core.routing.base_record import BaseReference
from meteora_core.text import listed

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "BaseReference",
    "check_whole",
    "fast_cpu_dtype",
    "load_base",
    "load_tokenizer",
    "loaded_by",
    "locate_base",
    "name_reference",
    "pick_device",
    "pick_dtype",
]

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pick_device(wish: str | torch.device | None) -> torch.device:
    """The device of a name; ``"auto"`` or None is the first available of CUDA, MPS and CPU. Raises UsageError for a device that is not available."""
    if wish is None or wish == "auto":
        kind = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        return torch.device(kind)
    try:
        device = torch.device(wish)
    except RuntimeError as error:
        raise UsageError(f"unknown device {wish!r}", hint="examples: auto, cpu, cuda, cuda:1, mps") from error
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise UsageError(f"device {wish} is not available: this machine has {torch.cuda.device_count()} CUDA devices", hint="use --device auto")
    return device


def pick_dtype(wish: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    """The dtype of a name; ``"auto"`` or None is bfloat16 on a GPU that supports it, float16 on an older GPU, and float32 on other devices."""
    if isinstance(wish, torch.dtype):
        return wish
    if wish is None or wish == "auto":
        if device.type == "cuda":
            return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
        return torch.float32
    if wish not in _DTYPES:
        raise UsageError(f"unknown dtype {wish!r}", hint=f"choose from: auto, {', '.join(_DTYPES)}")
    return _DTYPES[wish]


def fast_cpu_dtype() -> tuple[torch.dtype, str]:
    """Choose bfloat16 if this CPU multiplies it clearly faster than float32. A small matrix product of each dtype is timed, which takes a few ms.

    Returns:
        The dtype and a phrase such as ``"bfloat16 products run 2.1 x as fast as float32 ones on this CPU"``.
    """
    import time

    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = torch.randn(256, 512).to(dtype), torch.randn(512, 512).to(dtype)
        times = []
        for _ in range(8):
            began = time.perf_counter()
            for _ in range(4):
                a @ b
            times.append(time.perf_counter() - began)
        seconds[dtype] = sorted(times)[2]
    ratio = seconds[torch.float32] / seconds[torch.bfloat16]
    if ratio > 1.3:
        return torch.bfloat16, f"bfloat16 products run {ratio:.1f} x as fast as float32 ones on this CPU"
    return torch.float32, f"bfloat16 products run only {ratio:.1f} x as fast as float32 ones on this CPU"


def locate_base(reference: BaseReference, *, progress: Progress = SILENT) -> str:
    """The folder or hub id that transformers can load; a catalog model is downloaded if necessary.

    Raises:
        UsageError: The name looks like a catalog name or a path, but is neither.
        DownloadError: A catalog model cannot be fetched.
    """
    name = reference.name
    if name in CATALOG:
        return str(model_folder(name) if is_ready(name) else download_base(name, progress=progress))
    if Path(name).is_dir():
        return name
    if "/" not in name or name.startswith((".", "/", "~")):
        hint = did_you_mean(name, CATALOG) or f"give a folder, a hub id such as meta-llama/Meta-Llama-3-8B, or one of: {', '.join(CATALOG)}"
        raise UsageError(f"no base model {name!r}: it is no folder and no known name", hint=hint)
    return name


def load_tokenizer(reference: BaseReference, *, progress: Progress = SILENT) -> PreTrainedTokenizerBase:
    """The base model's tokenizer, with a padding token (the end-of-sequence token if the tokenizer defines none).

    Raises:
        CheckpointError: It cannot be loaded, or it has no end-of-sequence token.
    """
    from transformers import AutoTokenizer

    source = locate_base(reference, progress=progress)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, revision=reference.revision or "main", trust_remote_code=reference.trust_remote_code)
        tokenizer("a")  # some broken configurations are only noticed here
    except (MeteoraError, MemoryError):
        raise
    except Exception as error:  # whatever a broken file makes transformers raise
        raise _cannot_load("tokenizer", reference, error) from error
    if tokenizer.eos_token_id is None:
        raise CheckpointError(f"the tokenizer of {reference.name} has no end-of-sequence token", hint="set eos_token in its tokenizer_config.json")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_base(
    reference: BaseReference,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
    attention: str | None = None,
    quantization: str | None = None,
    progress: Progress = SILENT,
) -> PreTrainedModel:
    """Load a causal language model in evaluation mode; only safetensors weights are read.

    Args:
        reference: Name and revision of the base model.
        dtype: Dtype of the weights.
        device: Device of the weights; None is the CPU.
        attention: transformers' ``attn_implementation``; None lets transformers choose (usually SDPA).
        quantization: "4bit" (NF4, computing in ``dtype``) or "8bit" with bitsandbytes, on a GPU; None does not quantise.
        progress: Object that progress is reported to.

    Raises:
        CheckpointError: The model cannot be loaded (missing, broken, gated, no network; the message gives the reason), its files lack weights, which
            transformers would initialise at random, or hold NaN or infinity, its end tokens are not token ids, or it cannot decode with a cache.
        UsageError: Quantisation is asked for without a GPU or without bitsandbytes, or by an unknown name.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    device = device or torch.device("cpu")
    quantized = {} if quantization is None else quantized_loading(quantization, dtype, device)
    source = locate_base(reference, progress=progress)
    transformers_logging.disable_progress_bar()
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            source,
            revision=reference.revision or "main",
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=reference.trust_remote_code,
            output_loading_info=True,
            **({} if attention is None else {"attn_implementation": attention}),
            **quantized,
        )
    except (MeteoraError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever a broken file makes transformers raise
        raise _cannot_load("model", reference, error) from error
    check_whole(model, reference, info)
    check_finite(model, reference)
    name_reference(model, reference)
    model = (model if quantized else model.to(device)).eval()
    check_decoding(model)
    return model


def name_reference(model: nn.Module, reference: BaseReference) -> None:
    """Record on a base model the name that it was loaded by; :func:`loaded_by` returns it."""
    base_record(model).reference = reference


def loaded_by(model: nn.Module) -> BaseReference | None:
    """The name by which :func:`load_base` loaded a model; None for other models."""
    return base_record(model).reference


def check_whole(model: PreTrainedModel, reference: BaseReference, info: dict[str, Any]) -> None:
    """Check that the files of a base model contained all of its weights.

    Args:
        model: As transformers loaded it.
        reference: Its name, for the message.
        info: The loading info of ``from_pretrained(..., output_loading_info=True)``.

    Raises:
        CheckpointError: Weights were missing, which transformers draws at random, or an end token is no token id.
    """
    missing = sorted(info.get("missing_keys") or ())
    if missing:
        raise CheckpointError(f"the files of {reference.name} lack weights of the model: {listed(missing)}", hint="copy or download the base model again")
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    for end in ends if isinstance(ends, list | tuple) else [ends]:
        if end is not None and (isinstance(end, bool) or not isinstance(end, int)):
            raise CheckpointError(
                f"{reference.name} names {end!r} as an end token, which is not a token id", hint="correct eos_token_id in its generation_config.json"
            )


def check_finite(model: nn.Module, reference: BaseReference) -> None:
    """Check that the weights of a base model are finite.

    Logits do not always show it: PyTorch's attention on a CPU gives zeros, not NaN, where every score is NaN.

    Args:
        model: The model; weights that are offloaded or quantised to eight or fewer bits are skipped.
        reference: Its name, for the message.

    Raises:
        CheckpointError: A weight contains NaN or infinity.
    """
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and parameter.element_size() > 1:
            check_tensor(f"{name} of the base model {reference.name}", parameter, margin=False)


def _cannot_load(what: str, reference: BaseReference, error: Exception) -> CheckpointError:
    text = first_line(error)
    broken = "copy or download its files again; METEORA_DEBUG=1 shows where transformers failed"
    hint = "check the name and the network; a gated model needs `hf auth login` or HF_TOKEN; a cached one works offline with HF_HUB_OFFLINE=1"
    if Path(reference.name).is_dir():
        hint = broken
    if not isinstance(error, OSError | ValueError):
        text, hint = f"{type(error).__name__}: {text}", broken
    if "Unrecognized configuration class" in text:
        text = text.partition(".\n")[0]
        hint = "Meteora needs a causal language model; encoder-decoder models such as T5 and encoders such as BERT are of another kind"
    if "trust_remote_code" in str(error):
        hint = "this model ships its own code; pass --trust-remote-code only if you trust its authors"
    return CheckpointError(f"cannot load the {what} of {reference.name}: {text}", hint=hint)
