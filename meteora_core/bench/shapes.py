"""Sizes of the models that are benchmarked."""

from __future__ import annotations

from dataclasses import dataclass

from meteora_core.errors import UsageError, did_you_mean


@dataclass(frozen=True)
class ModelShape:
    """What a Llama-like decoder layer is made of.

    Attributes:
        name: As on the command line.
        hidden: Width h.
        key_value: Outputs of k and v.
        ffn: Width of the feed-forward part.
        heads: Attention heads.
        kv_heads: Key and value heads.
        layers: Decoder layers.
        vocabulary: Tokens.
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
        """(inputs, outputs of each linear) for q, k, v; o; gate, up; down."""
        h, kv, ffn = self.hidden, self.key_value, self.ffn
        return ((h, (h, kv, kv)), (h, (h,)), (h, (ffn, ffn)), (ffn, (h,)))

    @property
    def weights(self) -> int:
        """Base weights of the seven linears of one layer."""
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
    """Look a shape up. Raises UsageError for an unknown name."""
    if name not in SHAPES:
        raise UsageError(f"unknown model shape {name!r}", hint=did_you_mean(name, SHAPES) or f"choose from: {', '.join(SHAPES)}")
    return SHAPES[name]
