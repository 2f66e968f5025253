"""Benchmarks of a whole random model: decoding, prefill and a training step, for the base model, one PEFT LoRA, MeteoRA and fused MeteoRA."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from meteora_core.bench.contenders import Setting
from meteora_core.bench.layers import machine_name
from meteora_core.bench.shapes import ModelShape
from meteora_core.bench.timing import Timing, capture, medians, peak_memory
from meteora_core.errors import UsageError
from meteora_core.progress import SILENT, Progress
from meteora_core.ranges import check_range
from meteora_core.reading import first_line

if TYPE_CHECKING:
    from meteora_core.adapters.bank import AdapterBank

_log = logging.getLogger(__name__)

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
BASES = {
    "graph": "transformers' eager code in a CUDA graph",
    "eager": "transformers' eager code, launched kernel by kernel",
    "compiled": "transformers' code under torch.compile (max-autotune) in a CUDA graph",
}
"""How the base model, and all others with it, runs in each mode."""
_COMPILED = ("base", "fused")
"""The models that are measured in the mode "compiled"; compiling others takes minutes and answers no question."""
_SPARE = 512
"""Number of places in a static cache after the context; each timed step fills one."""


@dataclass(frozen=True)
class EndToEndRow:
    """One model in one mode.

    Attributes:
        work: The work, "decode, batch B", "prefill of M" or "training step of M".
        name: Name of the model, base, peft, meteora or fused.
        milliseconds: Median time in milliseconds.
        tokens_per_second: Tokens per second of all sequences together.
        ratio: Time relative to the base model in the same mode.
        peak_mib: Peak memory in MiB in addition to the memory in use before; None for devices other than CUDA.
        mode: Mode of the measurement, a key of :data:`BASES`.
    """

    work: str
    name: str
    milliseconds: float
    tokens_per_second: float
    ratio: float
    peak_mib: float | None
    mode: str


@dataclass
class EndToEnd:
    """Results of a run.

    ``bases`` describes the base of each mode that was measured; ``skipped`` lists the measurements that were not possible, with the reason.
    """

    shape: str
    layers: int
    adapters: int
    rank: int
    top_k: int
    dtype: str
    machine: str
    bases: dict[str, str] = field(default_factory=dict)
    rows: list[EndToEndRow] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """The results as a dictionary for JSON."""
        return asdict(self)


def random_model(shape: ModelShape, layers: int, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """A Llama of this shape with random weights, created on ``device``."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.ffn,
        num_hidden_layers=layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=8192,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            model: nn.Module = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    return model.eval().requires_grad_(False)


def random_bank(model: nn.Module, adapters: int, rank: int, dtype: torch.dtype) -> AdapterBank:
    """Random adapters of one rank on all seven linears of every layer."""
    from meteora_core.adapters.bank import AdapterBank
    from meteora_core.adapters.peft_folder import AdapterInfo
    from meteora_core.adapters.stack import Stack

    total = adapters * rank
    modules = {}
    for path, module in model.named_modules():
        if path.rpartition(".")[2] in TARGETS and isinstance(module, nn.Linear):
            place: dict[str, Any] = {"dtype": dtype, "device": module.weight.device}
            lora_A = torch.randn(total, module.in_features, **place) * module.in_features**-0.5
            lora_B = torch.randn(total, module.out_features, **place) * 0.02
            modules[path] = Stack(lora_A, lora_B, (rank,) * adapters, torch.full((adapters,), 2.0))
    infos = tuple(AdapterInfo(f"random{index}", "random", "", None, rank, 2.0 * rank, False, 0.0) for index in range(adapters))
    return AdapterBank(infos, modules)


@dataclass(frozen=True)
class ModelSizes:
    """Sizes at which a whole model is measured.

    Attributes:
        batches: Numbers of sequences that decode together, one measurement for each.
        context: Number of tokens in the cache while decoding.
        prefill: Number of tokens of the prefill; 0 skips it.
        training: Number of tokens of the training step; 0 skips it.
    """

    batches: Sequence[int] = (1, 8)
    context: int = 512
    prefill: int = 2048
    training: int = 0


def bench_end_to_end(
    shape: ModelShape,
    setting: Setting = Setting(),
    timing: Timing = Timing(seconds=4.0),
    *,
    layers: int | None = None,
    sizes: ModelSizes = ModelSizes(),
    compiled: bool = False,
    progress: Progress = SILENT,
) -> EndToEnd:
    """Measure a random model: decoding of one token per sequence after a filled cache, a prefill, and a training step.

    Args:
        shape: Shape of the model.
        setting: The adapters of the benchmark.
        timing: Dtype, device and time of a measurement.
        layers: Number of decoder layers; None for that of the shape.
        sizes: Sizes at which the model is measured.
        compiled: Whether decoding is also measured with the base and the fused model under ``torch.compile``, on a CUDA GPU with CUDA graphs. Each
            number of sequences takes minutes to compile.
        progress: Receiver of progress reports.
    """
    from peft import LoraConfig, get_peft_model

    from meteora_core.fused.fuse import fuse, unfuse
    from meteora_core.model.attach import attach, detach

    device, dtype, rank = timing.place, timing.dtype, setting.rank
    torch.manual_seed(0)
    count = shape.layers if layers is None else check_range("layers", layers, 1, 1024)
    result = EndToEnd(shape.name, count, setting.adapters, rank, setting.top_k, str(dtype).removeprefix("torch."), machine_name(device))
    model = random_model(shape, count, dtype, device)
    ids = torch.randint(0, shape.vocabulary, (max(sizes.batches), max(sizes.prefill, sizes.training, sizes.context)), device=device)
    taken: dict[tuple[str, str], dict[str, tuple[float, float | None]]] = {}

    def measure(name: str, subject: nn.Module) -> None:
        with progress.task(f"timing {name}", total=None) as task:
            for work, run in _works(subject, ids, sizes, name).items():
                modes = _modes(work) if timing.captured else ("eager",)
                if compiled and "graph" in modes and name in _COMPILED and work.startswith("decode"):
                    modes = (*modes, "compiled")
                for mode in modes:
                    try:
                        timed = run if mode != "compiled" else _decoder(subject, ids[: _tokens_of(work), : sizes.context], compiled=True)
                        taken.setdefault((work, mode), {})[name] = _time(timed, device, graph=mode != "eager", seconds=timing.seconds)
                    except torch.OutOfMemoryError:
                        result.skipped.append(f"{work}, {name}, {mode}: not enough GPU memory")
                        torch.cuda.empty_cache()
                    except Exception as problem:
                        if mode != "compiled":
                            raise
                        result.skipped.append(f"{work}, {name}, {mode}: {first_line(problem)}")
                task.update(1)

    measure("base", model)
    plain = get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(TARGETS), init_lora_weights=False))
    plain.to(dtype)
    measure("peft", plain)
    model = plain.unload()
    model.requires_grad_(False)
    attach(model, random_bank(model, setting.adapters, rank, dtype), top_k=setting.top_k)
    measure("meteora", model)
    if device.type == "cuda":
        try:
            fuse(model)
            measure("fused", model)
            unfuse(model)
        except UsageError as error:
            result.skipped.append(f"fused: {error}")
    detach(model)
    result.bases = {mode: BASES[mode] for mode in dict.fromkeys(mode for _, mode in taken)}
    for (work, mode), found in taken.items():
        for name, (milliseconds, peak) in found.items():
            tokens = _tokens_of(work)
            base = found.get("base", (milliseconds, None))[0]
            result.rows.append(EndToEndRow(work, name, milliseconds, tokens / milliseconds * 1e3, milliseconds / base, peak, mode))
    return result


def _modes(work: str) -> tuple[str, ...]:
    """The modes in which a work is timed if CUDA graphs are wanted: decoding with graphs, prefill both with and without, training without."""
    return {"decode": ("graph",), "prefill": ("graph", "eager")}.get(work.split(",")[0].split(" ")[0], ("eager",))


def _tokens_of(work: str) -> int:
    return int(work.rpartition(" ")[2])


def _works(model: nn.Module, ids: Tensor, sizes: ModelSizes, name: str) -> dict[str, Callable[[], object]]:
    works: dict[str, Callable[[], object]] = {f"decode, batch {batch}": _decoder(model, ids[:batch, : sizes.context]) for batch in sizes.batches}
    if sizes.prefill:
        works[f"prefill of {sizes.prefill}"] = lambda: _prefill(model, ids[:1, : sizes.prefill])
    if sizes.training and name != "fused":
        works[f"training step of {sizes.training}"] = lambda: _train(model, ids[:1, : sizes.training], name)
    return works


def _decoder(model: nn.Module, ids: Tensor, *, compiled: bool = False) -> Callable[[], object]:
    """A function that decodes one token per sequence, after a cache of fixed size that its first call fills, by eager or by compiled code."""
    from transformers import StaticCache

    config: Any = model.config
    cache = StaticCache(config=config, max_cache_len=ids.shape[1] + _SPARE)
    step = ids[:, :1].clone()
    filled: list[bool] = []
    decode: Any = model
    if compiled:
        torch.compiler.reset()
        decode = torch.compile(model, mode="max-autotune-no-cudagraphs", fullgraph=True, dynamic=False)

    def run() -> object:
        with torch.no_grad():
            if not filled:
                filled.append(True)
                model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            return decode(step, past_key_values=cache, use_cache=True)

    return run


def _prefill(model: nn.Module, ids: Tensor) -> object:
    with torch.no_grad():
        return model(ids, use_cache=False, logits_to_keep=1)


def _train(model: nn.Module, ids: Tensor, name: str) -> None:
    """A forward pass with labels and a backward pass. MeteoRA trains its gates, with their cross-entropy; the base model trains nothing."""
    from meteora_core.routing import meteora_of

    if name == "base":
        embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
        model(inputs_embeds=embeddings(ids).requires_grad_(), labels=ids, use_cache=False).loss.backward()
    elif name == "peft":
        model(ids, labels=ids, use_cache=False).loss.backward()
    else:
        labels = torch.zeros_like(ids)
        with meteora_of(model).label_gates(labels) as seen:
            loss = model(ids, labels=ids, use_cache=False).loss
            (loss + 50 * seen.mean_loss(ids.numel())).backward()
    for parameter in model.parameters():
        parameter.grad = None


def _time(run: Callable[[], object], device: torch.device, *, graph: bool, seconds: float) -> tuple[float, float | None]:
    run()
    peak = peak_memory(run, device)
    work = run
    if graph:
        work = capture(run)
    return medians({"it": work}, device, repeats=60, seconds=seconds)["it"], peak
