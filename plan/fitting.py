"""`--fit` and `--bpw` from end to end: a budget in, a recipe file out, which `r1q quantize` then follows like any other."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from r1q import __version__
from r1q.core.errors import UsageError
from r1q.core.files import atomic_write
from r1q.core.recipe import Recipe
from r1q.models.embedded import open_model
from r1q.models.source import ModelSource
from r1q.plan.fit import Fitted, Step, fit_recipe
from r1q.plan.holders import GRIDS, Holder, gguf_holder, onnx_holder
from r1q.plan.memory import parse_size

OUTPUT_ROOT = Path("r1q-out")
_WINDOWS = 8  # of calibration text; what a layer feels settles after a few thousand tokens
_LENGTH = 512
_HELD_OUT = 4  # windows more, to measure exchanges on
_LEAST_BPW, _MOST_BPW = 1.0, 16.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """What a file may take: `bytes` of the whole file, or `bpw` bits a weight; `label` names the recipe.

    `grids` are those of GGUF to choose from, `format` gguf or onnx; `cache`: its keys and values are of 8 bits. `swaps` exchanges are
    measured.
    """

    label: str
    bytes: int | None = None
    bpw: float | None = None
    grids: Sequence[str] = GRIDS
    format: str = "gguf"
    cache: bool = False
    swaps: int = 0

    @property
    def holder(self) -> Holder:
        """What the format holds."""
        return onnx_holder(cache=self.cache) if self.format == "onnx" else gguf_holder(self.grids)

    def of(self, source: ModelSource) -> int:
        """Return the bytes that the budget means for a model."""
        if self.bytes is not None:
            return self.bytes
        return int((self.bpw or 0.0) * sum(spec.size for spec in source.tensors) / 8)


def budget_of_bpw(bpw: float) -> Budget:
    """Return the budget of so many bits a weight. Raises `UsageError` for a number that no grid reaches."""
    if not _LEAST_BPW <= bpw <= _MOST_BPW:
        raise UsageError(f"--bpw {bpw:g}: give a number from {_LEAST_BPW:g} to {_MOST_BPW:g}")
    return Budget(label=f"bpw-{bpw:g}", bpw=bpw)


def budget_of_size(text: str) -> Budget:
    """Return the budget of a file's size, such as 1.2GB. Raises `UsageError` for what is no size."""
    return Budget(label=f"fit-{text.strip()}", bytes=parse_size(text))


def recipe_path(model: str | None, budget: Budget, output: Path | None) -> Path:
    """Return where the recipe is written: beside the output folder, or in r1q-out under the model's name."""
    if output is not None:
        return output.absolute().with_name(f"{output.name}.toml")
    return OUTPUT_ROOT / f"{open_model(model).source.config.name}-{budget.label}.toml"


def write_fitted(
    model: str | None, budget: Budget, path: Path, *, calibration: str | None = None, progress: bool = False
) -> Iterator[Step | Fitted]:
    """Write the recipe for `budget` to `path`, yielding steps and at last what was found; nothing where the file holds it already.

    Raises `UsageError` where `path` holds something else, and what the model, the text and the budget raise.
    """
    from r1q.calibration.windows import make_windows
    from r1q.models.tokenizer import Tokenizer

    source = open_model(model, progress=progress).source
    spec = calibration or "builtin"
    asked: dict[str, object] = {
        "r1q": __version__,
        "model": source.config.name,
        "bytes": budget.of(source),
        "calibration": spec,
    }
    holder = budget.holder
    asked |= {"grids": holder.words} | ({"swaps": budget.swaps} if budget.swaps else {})
    first = f"# {json.dumps(asked, sort_keys=True)}\n"
    if path.exists():
        if _first_line(path) == first:
            return
        raise UsageError(f"{path} is there and was made for something else; delete it, or choose another -o")
    held = _HELD_OUT if budget.swaps else 0
    tokens = make_windows(spec, Tokenizer.open(source.path), samples=_WINDOWS + held, length=_LENGTH).tokens
    held_out = tokens[len(tokens) - min(held, len(tokens) // 2) :]
    if held and not len(held_out):
        raise UsageError(
            f"{spec} has one window of {_LENGTH} tokens, and --swaps are measured on others; give more text"
        )
    events = fit_recipe(
        source,
        tokens[: len(tokens) - len(held_out)],
        name=budget.label,
        budget=budget.of(source),
        holder=holder,
        swaps=budget.swaps,
        held_out=held_out if held else None,
    )
    for event in events:
        if isinstance(event, Fitted):
            with atomic_write(path) as file:
                file.write((first + to_toml(event.recipe, _said(event))).encode())
        yield event


def _said(found: Fitted) -> list[str]:
    """Return what of the exchanges is told in the recipe."""
    kept = [swap for swap in found.swaps if swap.kept]
    if not found.swaps:
        return []
    return [f"exchanges measured on text kept apart: {len(found.swaps)}, kept: {len(kept)}", *map(str, kept)]


def to_toml(recipe: Recipe, said: Sequence[str] = ()) -> str:
    """Return a recipe as `Recipe.load` reads it, with comments that say how it came to be."""
    value = recipe.to_dict()
    rules = value.pop("rules")
    lines = [*(f"# {line}" for line in said), *(f"{key} = {json.dumps(entry)}" for key, entry in value.items())]
    for rule in rules if isinstance(rules, list) else []:
        lines += ["", "[[rules]]", *(f"{key} = {json.dumps(entry)}" for key, entry in rule.items())]
    return "\n".join(lines) + "\n"


def _first_line(path: Path) -> str:
    with open(path, encoding="utf-8", errors="replace") as file:
        return file.readline(1 << 16)
