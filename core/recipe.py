"""Recipe: which tensor gets which Scheme. A preset or grid, and ordered rules before it; resolved before any weight is read."""

from __future__ import annotations

import fnmatch
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from r1q.core.errors import InputError, UsageError, unknown_name
from r1q.core.mixtures import MIXTURES, ModelShape, fallback_grid, mixture_grid
from r1q.core.scheme import FLOAT_GRIDS, GGML_GRIDS, GRIDS, Scheme
from r1q.core.tensors import TensorSpec

# `--bits N` for a GGUF file alone: the preset of that size which llama.cpp's users take.
BITS_PRESETS: Mapping[int, str] = {2: "q2_k", 3: "q3_k_m", 4: "q4_k_m", 5: "q5_k_m", 6: "q6_k", 8: "q8_0"}
PRESETS = (*MIXTURES, *FLOAT_GRIDS)
_MAX_RECIPE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """Tensors whose Hugging Face or GGUF name matches the glob `tensors` get `scheme`. The first rule that matches wins."""

    tensors: str
    scheme: Scheme

    def matches(self, tensor: TensorSpec) -> bool:
        """Return whether this rule speaks of `tensor`."""
        return any(fnmatch.fnmatchcase(name, self.tensors) for name in (tensor.name, tensor.gguf_name))


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """What each matrix becomes: the first matching rule, else `base`, a preset's mixture or one scheme for all.

    `name` labels folders and files. Vectors and norms stay float32 always.
    """

    name: str
    base: str | Scheme
    rules: tuple[Rule, ...] = ()

    @classmethod
    def named(cls, name: str) -> Recipe:
        """Return the recipe of a preset (`q4_k_m`) or of one grid for every matrix (`q4_k`).

        Raises `UsageError` with the near names for anything else.
        """
        if name in PRESETS:
            return cls(name=name, base=Scheme(grid=name) if name in FLOAT_GRIDS else name)
        if name in GGML_GRIDS:
            return cls(name=name, base=Scheme(grid=name))
        raise UsageError(unknown_name("preset or grid", name, {*PRESETS, *GGML_GRIDS}))

    @classmethod
    def load(cls, spelling: str) -> Recipe:
        """Return the recipe that `--scheme` means: a preset, a grid, or the path of a TOML file."""
        path = Path(spelling)
        if path.suffix != ".toml":
            return cls.named(spelling.lower())
        try:
            with open(path, "rb") as file:
                text = file.read(_MAX_RECIPE_BYTES + 1)
            if len(text) > _MAX_RECIPE_BYTES:
                raise InputError(f"{path} is larger than a recipe can be ({_MAX_RECIPE_BYTES} bytes)")
            return cls.from_dict(tomllib.loads(text.decode()), default_name=path.stem, where=str(path))
        except FileNotFoundError:
            raise UsageError(f"no recipe file {path}; presets are {', '.join(PRESETS)}") from None
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise InputError(f"{path} is not a readable TOML recipe: {error}") from error

    @classmethod
    def from_dict(cls, value: Mapping[str, object], *, default_name: str, where: str) -> Recipe:
        """Build a recipe from TOML's form: `name`, `base`, and `[[rules]]` of `tensors` and `grid`.

        >>> Recipe.from_dict({"base": "q4_k_m", "rules": [{"tensors": "*.ffn_down.weight", "grid": "q6_k"}]},
        ...                  default_name="mine", where="mine.toml").rules[0].scheme.grid
        'q6_k'
        """
        unknown = set(value) - {"name", "base", "rules"}
        if unknown:
            raise InputError(f"{where}: unknown key {sorted(unknown)[0]!r}; a recipe has name, base and rules")
        name, base, rules = value.get("name", default_name), value.get("base"), value.get("rules", [])
        if not isinstance(name, str) or not name or "/" in name:
            raise InputError(f"{where}: name must be a word that a file can carry")
        if not isinstance(base, str):
            raise InputError(f"{where}: base is missing; name a preset or grid for the tensors that no rule matches")
        if not isinstance(rules, Sequence):
            raise InputError(f"{where}: rules must be [[rules]] tables")
        return replace(cls.named(base), name=name, rules=tuple(_rule(rule, where) for rule in rules))

    def to_dict(self) -> dict[str, object]:
        """Return the recipe as JSON or TOML can hold it; `from_dict` reads it back."""
        base = self.base if isinstance(self.base, str) else self.base.grid
        rules = [{"tensors": rule.tensors, "grid": rule.scheme.grid} for rule in self.rules]
        return {"name": self.name, "base": base, "rules": rules}


def _rule(value: object, where: str) -> Rule:
    if not isinstance(value, Mapping) or set(value) != {"tensors", "grid"}:
        raise InputError(f'{where}: a rule is tensors = "glob" and grid = "name", nothing else')
    tensors, grid = value["tensors"], value["grid"]
    if not isinstance(tensors, str) or not isinstance(grid, str):
        raise InputError(f"{where}: tensors and grid of a rule are strings")
    if grid not in GRIDS:
        raise InputError(f"{where}: {unknown_name('grid', grid, GRIDS)}")
    return Rule(tensors=tensors, scheme=Scheme(grid=grid))


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedTensor:
    """One tensor and the scheme it will have; `wanted` is the grid before a fallback, equal to the scheme's where there was none."""

    spec: TensorSpec
    scheme: Scheme
    wanted: str

    @property
    def bytes(self) -> int:
        """Bytes the tensor will take."""
        return self.spec.rows * self.scheme.row_bytes(self.spec.columns)

    @property
    def fell_back(self) -> bool:
        """Whether the rows did not split into the wanted grid's blocks."""
        return self.wanted != self.scheme.grid


def resolve(recipe: Recipe, tensors: Iterable[TensorSpec], shape: ModelShape) -> tuple[PlannedTensor, ...]:
    """Return what every tensor becomes.

    Raises `UsageError` for a rule that matches nothing and for rows that no fallback can hold.
    """
    specs = tuple(tensors)
    for rule in recipe.rules:
        if not any(spec.is_matrix and rule.matches(spec) for spec in specs):
            raise UsageError(f"recipe {recipe.name}: the rule {rule.tensors!r} matches no matrix of this model")
    return tuple(_resolve_one(recipe, spec, shape) for spec in specs)


def _resolve_one(recipe: Recipe, spec: TensorSpec, shape: ModelShape) -> PlannedTensor:
    if not spec.is_matrix:
        return PlannedTensor(spec=spec, scheme=Scheme(grid="f32"), wanted="f32")
    wanted = _wanted(recipe, spec, shape)
    if wanted.facts.family == "ggml":
        stored = Scheme(grid=fallback_grid(wanted.grid, spec))
        return PlannedTensor(spec=spec, scheme=stored, wanted=wanted.grid)
    return PlannedTensor(spec=spec, scheme=wanted, wanted=wanted.grid)


def _wanted(recipe: Recipe, spec: TensorSpec, shape: ModelShape) -> Scheme:
    for rule in recipe.rules:
        if rule.matches(spec):
            return rule.scheme
    if isinstance(recipe.base, Scheme):
        return recipe.base
    return Scheme(grid=mixture_grid(recipe.base, spec, shape))
