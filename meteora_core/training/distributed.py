"""One process, or one of several that train together: accelerate does the wrapping, this module says what is wrapped and gathers what trains.

Every process computes its rows' share of a step's sums, divided by the counts of the whole step, so the shares of all processes add up to the
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
"""Runs work on the model, whatever wraps it; see :meth:`Runtime.run`."""


class TrainStep(nn.Module):
    """Runs any work on a model inside its own ``forward``, so that whatever wraps this module sees the call.

    Args:
        model: What trains. Its decoder layers are what sharding makes units of.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self._no_split_modules = layer_classes(model)

    def forward(self, work: Callable[[nn.Module], T]) -> T:
        """``work(model)``; it returns tensors in tuples, lists and dictionaries."""
        return work(self.model)


def layer_classes(model: nn.Module) -> list[str]:
    """The class names of a transformers model's decoder layers, as the model itself states them."""
    names: set[str] = set()
    for module in model.modules():
        names.update(getattr(module, "_no_split_modules", None) or ())
    return sorted(names & {type(module).__name__ for module in model.modules()})


def shard_units(model: nn.Module) -> Iterator[nn.Module]:
    """The wrap policy: each decoder layer is gathered and freed as one; what is left (embeddings, final norm) forms the root's unit."""
    names = set(layer_classes(model))
    for module in model.modules():
        if type(module).__name__ in names:
            yield module


def shard(step: TrainStep, *, reshard_after_forward: bool = True) -> TrainStep:
    """Shard a step over the default process group by PyTorch's ``fully_shard``, unit by unit; accelerate does the same from its plugin."""
    from torch.distributed.fsdp import fully_shard

    for unit in list(shard_units(step.model)):
        fully_shard(unit, reshard_after_forward=reshard_after_forward)
    fully_shard(step)
    return step


def optimizer_states(parameter: nn.Parameter, optimizer: Any) -> dict[str, Tensor]:
    """AdamW's states of a parameter as whole tensors on the CPU; every process must call this."""
    found = moments(parameter, optimizer) if is_zero(parameter) else optimizer.state.get(parameter, {})
    return {key: full_tensor(torch.as_tensor(value)) for key, value in found.items()}


def assign_states(parameter: nn.Parameter, optimizer: Any, values: dict[str, Tensor]) -> None:
    """Restore what :func:`optimizer_states` gave."""
    if is_zero(parameter):
        set_moments(parameter, optimizer, values)
    else:
        optimizer.state[parameter] = {key: value if key == "step" else like(value, parameter) for key, value in values.items()}


class Runtime:
    """What the loop asks of the processes.

    Args:
        kind: How the model is spread.
        rank, world: Which process this is, and of how many.
        device: Its device; None leaves the choice to the caller.
        accelerator: accelerate's; None for one process, or where PyTorch alone shards.
    """

    def __init__(self, kind: Launcher = "none", rank: int = 0, world: int = 1, device: torch.device | None = None, accelerator: Any = None) -> None:
        self.kind, self.rank, self.world, self.device, self.accelerator = kind, rank, world, device, accelerator
        self._step: Any = None

    @property
    def is_main(self) -> bool:
        """Whether this process writes and prints."""
        return self.rank == 0

    def loading_device(self, device: torch.device) -> torch.device:
        """Where a base is loaded that nothing has to run before it is prepared: on the CPU if it will be sharded, so that no GPU ever holds the whole."""
        return torch.device("cpu") if self.kind == "fsdp" else device

    def prepare(self, model: nn.Module, make_optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer]) -> torch.optim.Optimizer:
        """Wrap the model for this kind of run, and make the optimiser over what trains in it. Parameters may be other objects afterwards."""
        step = TrainStep(model)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if self.accelerator is not None:
            optimizer = make_optimizer(trained)
            self._step, prepared = self.accelerator.prepare(step, optimizer)
            if self.kind == "deepspeed":  # its engine steps within the backward pass; the wrapper's step and zero_grad do nothing
                return prepared
            return getattr(prepared, "optimizer", prepared)
        if self.kind == "fsdp":
            shard(step)
            trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._step = step
        return make_optimizer(trained)

    def run(self, work: Callable[[nn.Module], T]) -> T:
        """``work(model)``, seen by whatever wraps the model."""
        assert self._step is not None
        return self._step(work)

    def backward(self, loss: Tensor) -> None:
        """Gradients of this process's share of the loss; the processes' gradients add up."""
        loss = loss * self.world
        if self.kind == "deepspeed":  # it divides by the accumulation
            loss = loss * self.accelerator.gradient_accumulation_steps
        if self.accelerator is not None:
            self.accelerator.backward(loss)
        else:
            loss.backward()  # type: ignore[no-untyped-call]

    def accumulate(self, *, last: bool) -> AbstractContextManager[Any]:
        """Around a batch: gradients go over the network only with a step's last one (DeepSpeed steps then)."""
        if self.kind == "deepspeed":
            self.accelerator.sync_gradients = last
            return nullcontext()
        if last or self.accelerator is None or self.world == 1:
            return nullcontext()
        return self.accelerator.no_sync(self._step)

    def clip(self, parameters: list[nn.Parameter], limit: float, own: Callable[[list[nn.Parameter], float], Tensor] | None = None) -> Tensor:
        """Scale gradients down to a norm of ``limit``, and return the norm before; DeepSpeed did so in its step. ``own`` limits in another way."""
        if self.kind == "deepspeed":
            return torch.as_tensor(float(self.accelerator.clip_grad_norm_(parameters, limit) or 0.0))
        return (own or torch.nn.utils.clip_grad_norm_)(parameters, limit)

    def total(self, values: Tensor) -> Tensor:
        """The sum over processes, in every process."""
        if self.world > 1:
            values = values.clone()
            torch.distributed.all_reduce(values)
        return values

    def wait(self) -> None:
        """Until all processes are here."""
        if self.world > 1:
            torch.distributed.barrier()

    def mine(self, picks: list[T]) -> list[T]:
        """This process's part of a batch of all processes."""
        return picks[self.rank :: self.world]


SINGLE = Runtime()
"""One process without a launcher."""


def start_runtime(device: str = "auto") -> Runtime:
    """What this process is: one that a launcher started (torchrun's environment says so), or a single one.

    Args:
        device: The wish in the settings; "cpu" keeps the processes off the GPUs.

    Raises:
        UsageError: The model should be sharded where nothing can shard.
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
    if sharding and accelerator.distributed_type != DistributedType.FSDP:  # accelerate says nothing when it leaves the plugin aside
        raise UsageError(
            f"--launcher fsdp, but accelerate would not shard: it runs as {accelerator.distributed_type.value}",
            hint="use --launcher ddp, or an accelerate that can shard on this device",
        )
    kind: Launcher = "deepspeed" if zero else "fsdp" if sharding else "ddp"
    device_used = torch.device("cpu") if on_cpu else accelerator.device
    return Runtime(kind, accelerator.process_index, accelerator.num_processes, device_used, accelerator)


def cannot_shard() -> UsageError:
    """What to say where there is no device to shard over."""
    return UsageError("--launcher fsdp needs GPUs: nothing can be sharded on this machine's CPU", hint="use --launcher ddp, which runs on CPUs too")
