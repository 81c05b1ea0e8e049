"""Recipe: which tensor gets which Scheme. A preset or grid, and ordered rules before it; resolved before any weight is read."""

from __future__ import annotations

import fnmatch
import tomllib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from r1q.core.errors import InputError, UsageError, unknown_name
from r1q.core.files import is_bare_name
from r1q.core.mixtures import EXPERT_MIXTURES, MIXTURES, ROUTERS, ModelShape, fallback_grid, mixture_grid, never_coded
from r1q.core.scheme import FLOAT_GRIDS, GGML_GRIDS, GRIDS, INT_GRIDS, WHOLE_ROW, Scheme
from r1q.core.tensors import TensorSpec

# `--bits N` for a GGUF file alone: the preset of that size which llama.cpp's users take.
BITS_PRESETS: Mapping[int, str] = {2: "q2_k", 3: "q3_k_m", 4: "q4_k_m", 5: "q5_k_m", 6: "q6_k", 8: "q8_0"}
PRESETS = (*MIXTURES, *EXPERT_MIXTURES, *FLOAT_GRIDS)
_MAX_RECIPE_BYTES = 1 << 20
_LONGEST_NAME = 100  # characters: it becomes a part of file names
_INTEGER_KEYS = ("group_size", "symmetric")


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

    `name` labels folders and files. Vectors, norms and the routers of experts stay float32 always.
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
            value = tomllib.loads(text.decode())
        except FileNotFoundError:
            raise UsageError(f"no recipe file {path}; presets are {', '.join(PRESETS)}") from None
        except (OSError, ValueError, RecursionError) as error:  # numbers of thousands of digits, deep nesting
            raise InputError(f"{path} is not a readable TOML recipe: {error}") from error
        return cls.from_dict(value, default_name=path.stem, where=str(path))

    @classmethod
    def from_dict(cls, value: Mapping[str, object], *, default_name: str, where: str) -> Recipe:
        """Build a recipe from TOML's form: `name`, `base`, and `[[rules]]` of `tensors` and `grid`.

        >>> Recipe.from_dict({"base": "q4_k_m", "rules": [{"tensors": "*.ffn_down.weight", "grid": "q6_k"}]},
        ...                  default_name="mine", where="mine.toml").rules[0].scheme.grid
        'q6_k'
        """
        unknown = set(value) - {"name", "base", "rules", *_INTEGER_KEYS}
        if unknown:
            raise InputError(f"{where}: unknown key {sorted(unknown)[0]!r}; a recipe has name, base and rules")
        name, base, rules = value.get("name", default_name), value.get("base"), value.get("rules", [])
        if not isinstance(name, str) or not is_bare_name(name) or not name.isprintable() or len(name) > _LONGEST_NAME:
            raise InputError(f"{where}: name must be a word that a file can carry")
        if not isinstance(base, str):
            raise InputError(f"{where}: base is missing; name a preset or grid for the tensors that no rule matches")
        if not isinstance(rules, Sequence):
            raise InputError(f"{where}: rules must be [[rules]] tables")
        found = tuple(_rule(rule, where) for rule in rules)
        if base in INT_GRIDS:
            return cls(name=name, base=_scheme(base, value, where), rules=found)
        if set(value) & set(_INTEGER_KEYS):
            raise InputError(f"{where}: group_size and symmetric are of integers; {base} has its own blocks")
        try:
            return replace(cls.named(base), name=name, rules=found)
        except UsageError as error:
            raise InputError(f"{where}: {error}") from error

    def to_dict(self) -> dict[str, object]:
        """Return the recipe as JSON or TOML can hold it; `from_dict` reads it back."""
        base = {"base": self.base} if isinstance(self.base, str) else _spelled(self.base, "base")
        rules = [{"tensors": rule.tensors, **_spelled(rule.scheme, "grid")} for rule in self.rules]
        return {"name": self.name, **base, "rules": rules}


def _spelled(scheme: Scheme, key: str) -> dict[str, object]:
    if scheme.facts.family != "int":
        return {key: scheme.grid}
    return {key: scheme.grid, "group_size": scheme.group_size, "symmetric": scheme.symmetric}


def _rule(value: object, where: str) -> Rule:
    if not isinstance(value, Mapping) or not {"tensors", "grid"} <= set(value) <= {"tensors", "grid", *_INTEGER_KEYS}:
        raise InputError(
            f'{where}: a rule is tensors = "glob" and grid = "name", and group_size and symmetric for integers'
        )
    tensors, grid = value["tensors"], value["grid"]
    if not isinstance(tensors, str) or not isinstance(grid, str):
        raise InputError(f"{where}: tensors and grid of a rule are strings")
    if grid not in GRIDS:
        raise InputError(f"{where}: {unknown_name('grid', grid, GRIDS)}")
    return Rule(tensors=tensors, scheme=_scheme(grid, value, where))


def _scheme(grid: str, value: Mapping[str, object], where: str) -> Scheme:
    group_size, symmetric = value.get("group_size"), value.get("symmetric", True)
    if not (group_size is None or type(group_size) is int) or type(symmetric) is not bool:
        raise InputError(f"{where}: group_size is a number and symmetric is true or false")
    try:
        return Scheme(grid=grid, group_size=group_size, symmetric=symmetric)
    except UsageError as error:
        raise InputError(f"{where}: {error}") from error


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
    if never_coded(spec):
        return PlannedTensor(spec=spec, scheme=Scheme(grid="f32"), wanted="f32")
    wanted = _wanted(recipe, spec, shape)
    if wanted.facts.family == "ggml":
        stored = Scheme(grid=fallback_grid(wanted.grid, spec))
        return PlannedTensor(spec=spec, scheme=stored, wanted=wanted.grid)
    if not wanted.divides(spec.columns):
        raise UsageError(
            f"{spec.name}: rows of {spec.columns} weights do not split into groups of {wanted.group_size}; "
            f"group sizes that do: {', '.join(map(str, group_sizes(spec.columns)))}, or -1 for the whole row"
        )
    return PlannedTensor(spec=spec, scheme=wanted, wanted=wanted.grid)


GROUP_SIZES = (128, 64, 32)


def group_sizes(columns: int) -> list[int]:
    """Return the usual group sizes that divide a row of `columns` weights, largest first."""
    return [size for size in GROUP_SIZES if columns % size == 0]


KV_B_HALVES = ("attn_k_b", "attn_v_b")
"""Kinds that are one matrix, kv_b_proj, outside of r1q and GGUF files."""


def integer_recipe(
    bits: int,
    group_size: int | None,
    symmetric: bool,
    tensors: Iterable[TensorSpec],
    *,
    head_bits: int = 8,
    kept: Collection[str] = (),
    finer: Collection[str] = (),
) -> Recipe:
    """Return the recipe for `bits`-bit integers in every block, with an 8-bit embedding and head (float where 32 does not divide).

    `head_bits` 4 or 8 is the head's; a tied head is the embedding, which then has them too. Kinds that are `kept` stay bfloat16, those
    that are `finer` have 8 bits in the same groups.

    `group_size` None takes the largest of 128, 64 and 32 that divides every row, else the whole row. Symmetric int4 and int8 in
    groups of 32 are llama.cpp's q4_0 and q8_0, and named so.
    """
    matrices = [spec for spec in tensors if spec.is_matrix]
    inside = [spec for spec in matrices if spec.layer is not None and spec.kind not in (*kept, *ROUTERS)]
    if group_size is None:
        common = [size for size in GROUP_SIZES if all(spec.columns % size == 0 for spec in inside)]
        group_size = common[0] if common else WHOLE_ROW
    scheme = Scheme(grid=f"int{bits}", group_size=group_size, symmetric=symmetric)
    tied = not any(spec.kind == "output" for spec in matrices)
    rules = tuple(
        Rule(tensors=spec.gguf_name, scheme=_end_scheme(head_bits if tied or spec.kind == "output" else 8, spec))
        for spec in matrices
        if spec.layer is None
    )
    floats = dict.fromkeys(spec.kind for spec in matrices if spec.layer is not None and spec.kind in kept)
    rules += tuple(Rule(tensors=f"blk.*.{kind}.weight", scheme=Scheme(grid="bf16")) for kind in floats)
    eight = canonical(Scheme(grid="int8", group_size=group_size, symmetric=symmetric))
    rules += tuple(Rule(tensors=f"blk.*.{kind}.weight", scheme=eight) for kind in finer)
    label = f"int{bits}-{'row' if group_size == WHOLE_ROW else f'g{group_size}'}{'' if symmetric else '-asym'}"
    label += "" if head_bits == 8 else f"-head{head_bits}"
    label += "-experts" if finer or set(floats) - set(KV_B_HALVES) else ""
    return Recipe(name=label, base=canonical(scheme), rules=rules)


def _end_scheme(bits: int, spec: TensorSpec) -> Scheme:
    integers = Scheme(grid={4: "q4_0", 8: "q8_0"}[bits])
    return integers if integers.divides(spec.columns) else Scheme(grid="f16")


def canonical(scheme: Scheme) -> Scheme:
    """Return the scheme under its one name: symmetric int4 and int8 in groups of 32 are q4_0 and q8_0."""
    if scheme.symmetric and scheme.group_size == 32 and scheme.grid in ("int4", "int8"):
        return Scheme(grid={"int4": "q4_0", "int8": "q8_0"}[scheme.grid])
    return scheme


def _wanted(recipe: Recipe, spec: TensorSpec, shape: ModelShape) -> Scheme:
    for rule in recipe.rules:
        if rule.matches(spec):
            return canonical(rule.scheme)
    if isinstance(recipe.base, Scheme):
        return canonical(recipe.base)
    return Scheme(grid=mixture_grid(recipe.base, spec, shape))
