"""A colour and a pattern for every adapter, distinguishable for colour-blind readers and readable as a background of text.

The seven hues are those of Okabe and Ito (Color Universal Design, 2008) without black. The eighth adapter has the first hue again, with another pattern, so
7 hues and 4 patterns distinguish 28 adapters.
"""

from __future__ import annotations

from dataclasses import dataclass

Rgb = tuple[int, int, int]

HUES: tuple[str, ...] = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7")
PATTERNS: tuple[str, ...] = ("plain", "dashed", "dotted", "double")
BLACK: Rgb = (0, 0, 0)
WHITE: Rgb = (255, 255, 255)
DARK_PAPER: Rgb = (21, 23, 27)
READABLE = 4.6
"""Minimum contrast of text on a tint. WCAG 2 requires 4.5."""


@dataclass(frozen=True)
class Look:
    """Colours and pattern of one adapter.

    Attributes:
        hue: The pure colour, for marks next to text, as "#rrggbb".
        light: The strongest tint on which black text is readable, as "#rrggbb".
        dark: The strongest tint on which white text is readable, as "#rrggbb".
        pattern: One of :data:`PATTERNS`.
    """

    hue: str
    light: str
    dark: str
    pattern: str


def parse(colour: str) -> Rgb:
    """Convert ``"#rrggbb"`` to three integers from 0 to 255."""
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)


def to_hex(rgb: Rgb) -> str:
    """Convert three integers from 0 to 255 to ``"#rrggbb"``."""
    return "#{:02x}{:02x}{:02x}".format(*rgb)


def mix(a: Rgb, b: Rgb, share: float) -> Rgb:
    """Mix two colours in sRGB: ``share`` (0 to 1) of ``a`` and the rest of ``b``, as CSS ``color-mix(in srgb, ...)`` does."""
    red, green, blue = (round(share * x + (1 - share) * y) for x, y in zip(a, b, strict=True))
    return red, green, blue


def luminance(rgb: Rgb) -> float:
    """Relative luminance of a colour as WCAG 2 defines it, from 0 to 1."""
    red, green, blue = (value / 255 / 12.92 if value / 255 <= 0.04045 else ((value / 255 + 0.055) / 1.055) ** 2.4 for value in rgb)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(a: Rgb, b: Rgb) -> float:
    """Contrast ratio of two colours as WCAG 2 defines it, from 1 to 21."""
    lighter, darker = sorted((luminance(a), luminance(b)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


def look(index: int) -> Look:
    """The colours and the pattern of the adapter with this index."""
    hue = HUES[index % len(HUES)]
    pattern = PATTERNS[index // len(HUES) % len(PATTERNS)]
    return Look(hue, to_hex(_under(parse(hue), BLACK, WHITE)), to_hex(_under(parse(hue), WHITE, BLACK)), pattern)


def tint(index: int, weight: float) -> str:
    """Background colour of black text for an adapter with this weight: nearly white at weight 0, the strongest readable tint at 1."""
    strength = 0.15 + 0.85 * min(max(weight, 0.0), 1.0)
    return to_hex(mix(parse(look(index).light), WHITE, strength))


def _under(colour: Rgb, ink: Rgb, towards: Rgb) -> Rgb:
    """Move ``colour`` towards ``towards`` (black or white) until text in the colour ``ink`` is readable on it."""
    for step in range(51):
        candidate = mix(towards, colour, step / 50)
        if contrast(candidate, ink) >= READABLE:
            return candidate
    return towards
