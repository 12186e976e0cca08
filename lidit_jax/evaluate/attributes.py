"""Adjectives of T2I-CompBench's colour, shape and texture prompts; its shapes include sizes."""

from collections.abc import Mapping


def words(text: str) -> frozenset[str]:
    """Returns the set of whitespace-separated words of a text."""
    return frozenset(text.split())


KINDS: Mapping[str, frozenset[str]] = {
    "color": words("red green blue yellow brown black white gold silver gray grey purple pink orange beige tan"),
    "shape": words(
        """oblong teardrop pentagonal spherical cubic cylindrical diamond round pyramidal conical square rectangular
        triangular oval circular crescent big small tall short long"""
    ),
    "texture": words("plastic glass rubber fluffy metallic wooden fabric leather"),
}
ATTRIBUTES = frozenset().union(*KINDS.values())
