"""One adapter per prompt, chosen by the nearest centroid of the base model's hidden states."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from meteora_core.data.rows import read_rows
from meteora_core.data.tasks import Task
from meteora_core.evaluation.processes import Processes
from meteora_core.generation.batches import auto_budget
from meteora_core.generation.prompts import Prompt, encode_prompts
from meteora_core.model.vocabulary import padding_token
from meteora_core.progress import Progress
from meteora_core.routers.fixed import one_adapter_each
from meteora_core.routers.folder import FolderRouter

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PROMPTS = 64
"""Largest number of training prompts per adapter from which a centroid is computed."""

LONGEST = 1024
"""Number of tokens, from the end of a prompt, that are read."""


class Centroid(FolderRouter):
    """The adapter whose centroid is nearest: ``argmin_i || h(p) - mean_j h(p_ij) ||`` for a prompt ``p`` and training prompts ``p_ij`` of adapter ``i``.

    ``h(p)`` is the mean, over a prompt's tokens, of the last hidden states of the base model without adapters. The router is a nearest-centroid classifier of
    whole prompts: the training-free form of methods that retrieve adapters by the similarity of prompts (LoraRetriever, arXiv 2402.09997, trains an encoder
    for this). The seed determines the prompts of each adapter.
    """

    needs_rows = True

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.centroids = torch.zeros(0)
        self.pad = 0

    def parameters(self) -> dict[str, Any]:
        """The number and the length of the prompts from which centroids are computed."""
        return {"prompts": PROMPTS, "longest": LONGEST}

    def make(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, progress: Progress, processes: Processes) -> None:
        """Compute the centroids. The adapters are divided among the processes."""
        self.pad = padding_token(model, tokenizer)
        mine = processes.share(list(enumerate(self.names)))
        computed = {}
        with progress.task("centroids of the prompts", total=len(mine), unit="adapters") as bar:
            for index, name in mine:
                rows = read_rows(self.plan.data_dir, name, "train")
                chosen = sorted(random.Random(f"{self.seed}:{name}").sample(range(len(rows)), min(PROMPTS, len(rows))))
                prompts = encode_prompts([rows[row].prompt for row in chosen], tokenizer)
                computed[index] = mean_states(model, [prompt.tokens for prompt in prompts], self.pad).mean(0)
                bar.update(1)
        merged = {index: each for part in processes.gather(computed) for index, each in part.items()}
        self.centroids = torch.stack([merged[index] for index in range(len(self.names))])

    def groups(self, task: Task, allowed: Sequence[int], prompts: Sequence[Prompt]) -> Iterator[Sequence[Prompt]]:
        """For each adapter, the prompts to which its centroid is the nearest."""
        assert self.choice is not None
        if not prompts:
            return iter(())
        self.choice.fix(torch.zeros(len(self.names)))  # the base model alone
        states = mean_states(self._model, [prompt.tokens for prompt in prompts], self.pad)
        nearest = torch.cdist(states, self.centroids[list(allowed)]).argmin(-1).tolist()
        chosen: dict[int, list[Prompt]] = {}
        for prompt, position in zip(prompts, nearest, strict=True):
            chosen.setdefault(allowed[position], []).append(prompt)
        return one_adapter_each(self, chosen)


@torch.inference_mode()
def mean_states(model: nn.Module, texts: Sequence[Sequence[int]], pad: int) -> Tensor:
    """The mean of the last hidden states over the tokens of each text; of longer texts, only the last :data:`LONGEST` tokens are read.

    Args:
        model: A causal language model.
        texts: Token ids of each text.
        pad: Token id of the padding, which does not affect the result.

    Returns:
        float32 (texts, hidden), on the CPU.
    """
    device = next(model.parameters()).device
    decoder, budget = getattr(model, "base_model", model), auto_budget(device)
    ends = [list(text[-LONGEST:]) for text in texts]
    states: list[Tensor | None] = [None] * len(ends)
    waiting = sorted(range(len(ends)), key=lambda index: -len(ends[index]))
    while waiting:
        size = max(1, budget // max(1, len(ends[waiting[0]])))
        batch, waiting = waiting[:size], waiting[size:]
        width = len(ends[batch[0]])
        ids = torch.tensor([ends[index] + [pad] * (width - len(ends[index])) for index in batch], device=device)
        mask = torch.tensor([[1] * len(ends[index]) + [0] * (width - len(ends[index])) for index in batch], device=device)
        hidden = decoder(input_ids=ids, attention_mask=mask, use_cache=False)[0].float()
        means = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        for index, mean in zip(batch, means.cpu(), strict=True):
            states[index] = mean
    return torch.stack([state for state in states if state is not None])
