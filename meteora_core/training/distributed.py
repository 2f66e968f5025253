"""Training in one process or in several: accelerate wraps the model; this module names the modules to wrap and gathers the trained tensors.

Every process sums the losses of its rows and divides the sum by the counts of the whole step, so that the results of all processes add up to the
step's loss. Data parallel and sharded training average gradients over processes; the loss is multiplied by their number to undo that.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from meteora_core.choices import Launcher
from meteora_core.errors import UsageError
from meteora_core.model.sharded import full_tensor, is_zero, like
from meteora_core.training.deepspeed_zero import check_deepspeed, moments, set_moments

T = TypeVar("T")
OnModel = Callable[[Callable[[nn.Module], Any]], Any]
"""A function that calls another function on the model through the model's wrapper; see :meth:`Runtime.run`."""


class TrainStep(nn.Module):
    """A module whose ``forward`` calls a given function on a model, so that the wrapper of this module sees the call.

    Args:
        model: The model that is trained. Sharding treats each of its decoder layers as one unit.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self._no_split_modules = layer_classes(model)

    def forward(self, work: Callable[[nn.Module], T]) -> T:
        """Return ``work(model)``: tensors in tuples, lists and dictionaries."""
        return work(self.model)


def layer_classes(model: nn.Module) -> list[str]:
    """The class names of a transformers model's decoder layers, from the model's ``_no_split_modules``."""
    names: set[str] = set()
    for module in model.modules():
        names.update(getattr(module, "_no_split_modules", None) or ())
    return sorted(names & {type(module).__name__ for module in model.modules()})


def shard_units(model: nn.Module) -> Iterator[nn.Module]:
    """The modules that are gathered and freed as one unit: the decoder layers. The root unit holds the rest (embeddings, final norm)."""
    names = set(layer_classes(model))
    for module in model.modules():
        if type(module).__name__ in names:
            yield module


def shard(step: TrainStep, *, reshard_after_forward: bool = True) -> TrainStep:
    """Shard a model over the default process group with PyTorch's ``fully_shard``, unit by unit; accelerate's FSDP plugin does the same."""
    from torch.distributed.fsdp import fully_shard

    for unit in list(shard_units(step.model)):
        fully_shard(unit, reshard_after_forward=reshard_after_forward)
    fully_shard(step)
    return step


def optimizer_states(parameter: nn.Parameter, optimizer: Any) -> dict[str, Tensor]:
    """The AdamW states of a parameter as whole tensors on the CPU. Every process must call this function."""
    states = moments(parameter, optimizer) if is_zero(parameter) else optimizer.state.get(parameter, {})
    return {key: full_tensor(torch.as_tensor(value)) for key, value in states.items()}


def assign_states(parameter: nn.Parameter, optimizer: Any, values: dict[str, Tensor]) -> None:
    """Restore the result of :func:`optimizer_states`."""
    if is_zero(parameter):
        set_moments(parameter, optimizer, values)
    else:
        optimizer.state[parameter] = {key: value if key == "step" else like(value, parameter) for key, value in values.items()}


class Runtime:
    """The processes that train together, as the training loop uses them.

    Args:
        kind: Launcher that distributes the model.
        rank, world: Number of this process (from 0), and number of processes.
        device: Device of this process; None leaves the choice to the caller.
        accelerator: accelerate's ``Accelerator``; None for a single process, or if PyTorch shards without accelerate.
    """

    def __init__(self, kind: Launcher = "none", rank: int = 0, world: int = 1, device: torch.device | None = None, accelerator: Any = None) -> None:
        self.kind, self.rank, self.world, self.device, self.accelerator = kind, rank, world, device, accelerator
        self._step: Any = None

    @property
    def is_main(self) -> bool:
        """Whether this process writes and prints."""
        return self.rank == 0

    def loading_device(self, device: torch.device) -> torch.device:
        """The device to load the base model on before :meth:`prepare`: the CPU if it will be sharded, so that no GPU ever holds the whole model."""
        return torch.device("cpu") if self.kind == "fsdp" else device

    def prepare(self, model: nn.Module, make_optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer]) -> torch.optim.Optimizer:
        """Wrap the model for this launcher, and create the optimiser for its trained parameters. Parameters may be different objects afterwards."""
        step = TrainStep(model)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if self.accelerator is not None:
            optimizer = make_optimizer(trained)
            self._step, prepared = self.accelerator.prepare(step, optimizer)
            if self.kind == "deepspeed":  # DeepSpeed's engine steps within the backward pass; the wrapper's step and zero_grad do nothing
                return prepared
            return getattr(prepared, "optimizer", prepared)
        if self.kind == "fsdp":
            shard(step)
            trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._step = step
        return make_optimizer(trained)

    def run(self, work: Callable[[nn.Module], T]) -> T:
        """Return ``work(model)``, called through the wrapper of the model."""
        assert self._step is not None
        return self._step(work)

    def backward(self, loss: Tensor) -> None:
        """Compute the gradients of this process's part of the loss; the gradients of all processes are added."""
        loss = loss * self.world
        if self.kind == "deepspeed":  # DeepSpeed divides the loss by the number of accumulated batches
            loss = loss * self.accelerator.gradient_accumulation_steps
        if self.accelerator is not None:
            self.accelerator.backward(loss)
        else:
            loss.backward()  # type: ignore[no-untyped-call]

    def accumulate(self, *, last: bool) -> AbstractContextManager[Any]:
        """The context of one batch: gradients are exchanged between processes only in a step's last batch (in which DeepSpeed makes its step)."""
        if self.kind == "deepspeed":
            self.accelerator.sync_gradients = last
            return nullcontext()
        if last or self.accelerator is None or self.world == 1:
            return nullcontext()
        return self.accelerator.no_sync(self._step)

    def clip(self, parameters: list[nn.Parameter], limit: float, own: Callable[[list[nn.Parameter], float], Tensor] | None = None) -> Tensor:
        """Clip the gradients to a norm of ``limit``, and return the norm before clipping. DeepSpeed has already clipped them in its step.

        Args:
            parameters: Trained parameters.
            limit: Largest norm.
            own: Function that clips the gradients instead of :func:`torch.nn.utils.clip_grad_norm_`, with the same arguments and result.
        """
        if self.kind == "deepspeed":
            return torch.as_tensor(float(self.accelerator.clip_grad_norm_(parameters, limit) or 0.0))
        return (own or torch.nn.utils.clip_grad_norm_)(parameters, limit)

    def total(self, values: Tensor) -> Tensor:
        """The sum of ``values`` over all processes; every process gets it."""
        if self.world > 1:
            values = values.clone()
            torch.distributed.all_reduce(values)
        return values

    def wait(self) -> None:
        """Wait until all processes have called this method."""
        if self.world > 1:
            torch.distributed.barrier()

    def mine(self, picks: list[T]) -> list[T]:
        """The part of a global batch that this process computes."""
        return picks[self.rank :: self.world]


SINGLE = Runtime()
"""One process without a launcher."""


def start_runtime(device: str = "auto") -> Runtime:
    """The runtime of this process: one of several if torchrun's environment variables are set, otherwise a single one.

    Args:
        device: Device from the settings; "cpu" keeps the processes off the GPUs.

    Raises:
        UsageError: The launcher shards the model, and there is no GPU to shard it over.
    """
    if not all(name in os.environ for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")):
        return Runtime()
    from accelerate import Accelerator, DistributedType

    on_cpu = device == "cpu" or not torch.cuda.is_available()
    zero = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false") == "true"
    if zero:
        check_deepspeed(0 if on_cpu else torch.cuda.device_count())
    sharding = os.environ.get("ACCELERATE_USE_FSDP", "false") == "true"
    if sharding and on_cpu:
        raise cannot_shard()
    accelerator = Accelerator(cpu=on_cpu)
    if sharding and accelerator.distributed_type != DistributedType.FSDP:  # accelerate ignores its FSDP plugin without a warning
        raise UsageError(
            f"--launcher fsdp, but accelerate would not shard: it runs as {accelerator.distributed_type.value}",
            hint="use --launcher ddp, or an accelerate that can shard on this device",
        )
    kind: Launcher = "deepspeed" if zero else "fsdp" if sharding else "ddp"
    device_used = torch.device("cpu") if on_cpu else accelerator.device
    return Runtime(kind, accelerator.process_index, accelerator.num_processes, device_used, accelerator)


def cannot_shard() -> UsageError:
    """The error for a machine without a device to shard over."""
    return UsageError("--launcher fsdp needs GPUs: nothing can be sharded on this machine's CPU", hint="use --launcher ddp, which runs on CPUs too")
