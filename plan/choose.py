"""From `--bits`, `--scheme` and `--to` to one recipe, with the reason in a sentence."""

from __future__ import annotations

from dataclasses import dataclass

from r1q.core.errors import UsageError, unknown_name
from r1q.core.recipe import BITS_PRESETS, Recipe

FORMATS = ("gguf",)


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """A recipe and why it was chosen, as the first line of output says it."""

    recipe: Recipe
    reason: str


def choose_recipe(*, bits: int | None, scheme: str | None) -> Choice:
    """Return the recipe that the options mean.

    Raises `UsageError` when both or an unknown one is given.
    """
    if bits is not None and scheme is not None:
        raise UsageError("give --bits or --scheme, not both: --scheme already says the bits")
    if scheme is not None:
        recipe = Recipe.load(scheme)
        return Choice(recipe=recipe, reason=f"{recipe.name}, as --scheme says")
    wanted = 4 if bits is None else bits
    if wanted not in BITS_PRESETS:
        known = ", ".join(str(known) for known in BITS_PRESETS)
        raise UsageError(f"no preset has {wanted} bits; --bits takes {known}")
    preset = BITS_PRESETS[wanted]
    asked = "4 bits (the default)" if bits is None else f"--bits {wanted}"
    return Choice(
        recipe=Recipe.named(preset),
        reason=f"{preset}: {asked} in a GGUF file means llama.cpp's usual {wanted}-bit preset",
    )


def check_formats(names: str) -> tuple[str, ...]:
    """Return the formats of a comma-separated list. Raises `UsageError` for one that cannot be written."""
    formats = tuple(dict.fromkeys(part.strip().lower() for part in names.split(",") if part.strip()))
    for name in formats:
        if name not in FORMATS:
            raise UsageError(unknown_name("format", name, FORMATS))
    if not formats:
        raise UsageError(f"--to needs a format: {', '.join(FORMATS)}")
    return formats
