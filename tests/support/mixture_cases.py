"""Inputs and a plain per-token loop that the kernel tests share."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Case:
    """One layer's inputs."""

    x: Tensor
    base: Tensor
    gate: Tensor
    lora_A: Tensor
    lora_B: Tensor
    scaling: Tensor
    offsets: Tensor

    @property
    def arguments(self) -> tuple[Tensor, ...]:
        return self.x, self.base, self.gate, self.lora_A, self.lora_B, self.scaling, self.offsets

    @property
    def floats(self) -> tuple[Tensor, ...]:
        return self.x, self.base, self.gate, self.lora_A, self.lora_B

    def wanting_grad(self) -> Case:
        for tensor in self.floats:
            tensor.requires_grad_()
        return self

    def copy(self, dtype: torch.dtype) -> Case:
        return Case(*(tensor.detach().to(dtype).clone() for tensor in self.floats), self.scaling, self.offsets)


def make(ranks: list[int], hidden: int, out: int, lead: tuple[int, ...], dtype: torch.dtype = torch.float64, seed: int = 0, device: str = "cpu") -> Case:
    """Random inputs; logits are of order 1, adapters as large as the base."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).to(device, dtype)

    total = sum(ranks)
    return Case(
        draw(*lead, hidden),
        draw(*lead, out),
        draw(len(ranks), hidden, scale=hidden**-0.5),
        draw(total, hidden, scale=hidden**-0.5),
        draw(total, out, scale=max(total / len(ranks), 1) ** -0.5),
        (torch.rand(len(ranks), generator=generator) + 0.5).to(device),
        torch.tensor([0, *itertools.accumulate(ranks)], device=device),
    )


def by_loop(case: Case, top_k: int, temperature: float = 1.0, allowed: list[bool] | None = None) -> Tensor:
    """The definition, one token and one adapter at a time, in float64."""
    hidden = case.x.shape[-1]
    tokens = case.x.detach().double().cpu().reshape(-1, hidden)
    gate, lora_A, lora_B, scaling = (tensor.detach().double().cpu() for tensor in (case.gate, case.lora_A, case.lora_B, case.scaling))
    bounds = case.offsets.tolist()
    output = case.base.detach().double().cpu().reshape(tokens.shape[0], -1).clone()
    for index, token in enumerate(tokens):
        logits = [float(row @ token) for row in gate]
        order = sorted((i for i in range(len(logits)) if allowed is None or allowed[i]), key=lambda i: (-logits[i], i))[:top_k]
        powers = torch.softmax(torch.tensor([logits[i] / temperature for i in order], dtype=torch.float64), 0)
        for power, adapter in zip(powers, order, strict=True):
            for row in range(bounds[adapter], bounds[adapter + 1]):
                output[index] += power * scaling[adapter] * (lora_A[row] @ token) * lora_B[row]
    return output.view(case.base.shape)
