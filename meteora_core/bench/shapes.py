"""Shapes of the models in the benchmarks."""

from __future__ import annotations

from dataclasses import dataclass

from meteora_core.errors import UsageError, did_you_mean


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a Llama-like model.

    Attributes:
        name: Name on the command line.
        hidden: Width of the hidden states h.
        key_value: Number of outputs of k and of v.
        ffn: Width of the feed-forward part.
        heads: Number of attention heads.
        kv_heads: Number of key and value heads.
        layers: Number of decoder layers.
        vocabulary: Number of tokens in the vocabulary.
    """

    name: str
    hidden: int
    key_value: int
    ffn: int
    heads: int
    kv_heads: int
    layers: int
    vocabulary: int

    @property
    def groups(self) -> tuple[tuple[int, tuple[int, ...]], ...]:
        """The number of inputs and the outputs of each linear, for q, k, v; o; gate, up; down."""
        h, kv, ffn = self.hidden, self.key_value, self.ffn
        return ((h, (h, kv, kv)), (h, (h,)), (h, (ffn, ffn)), (ffn, (h,)))

    @property
    def weights(self) -> int:
        """The number of base weights of the seven linears of one layer."""
        return sum(inputs * sum(outputs) for inputs, outputs in self.groups)


SHAPES: dict[str, ModelShape] = {
    shape.name: shape
    for shape in (
        ModelShape("llama3-8b", 4096, 1024, 14336, 32, 8, 32, 128256),
        ModelShape("llama2-13b", 5120, 5120, 13824, 40, 40, 40, 32000),
        ModelShape("smollm2-135m", 576, 192, 1536, 9, 3, 30, 49152),
    )
}


def shape_named(name: str) -> ModelShape:
    """The shape of this name. Raises UsageError if it is unknown."""
    if name not in SHAPES:
        raise UsageError(f"unknown model shape {name!r}", hint=did_you_mean(name, SHAPES) or f"choose from: {', '.join(SHAPES)}")
    return SHAPES[name]
