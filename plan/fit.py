"""Fit: the grid of every tensor that loses least within a number of bytes. `r1q quantize --fit` and `--bpw`.

What a tensor's error costs is predicted by the Fisher information of the model's own answers (`calibration/sensitivity.py`); each grid
is tried on rows of each tensor; which to take is a multiple-choice knapsack, solved by HiGHS through scipy. Where asked to, exchanges
are then measured (`swaps.py`). The answer is a recipe.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from r1q.calibration.sensitivity import Sensitivity, sensitivities
from r1q.core.errors import ResourceError
from r1q.core.mixtures import never_coded
from r1q.core.recipe import PlannedTensor, Recipe, Rule, resolve
from r1q.core.scheme import Scheme
from r1q.core.tensors import TensorSpec
from r1q.models.source import ModelSource
from r1q.plan.holders import Holder, gguf_holder
from r1q.plan.plan import model_shape
from r1q.plan.swaps import Option, Stack, Swap, Tokens, swapped
from r1q.quantize.rtn import rtn

_ROWS = 256  # of a tensor that each grid is tried on
_ROWS_OF_AN_EXPERT = 16  # whose grid all experts of a block have
_GAP = 1e-4  # of the best possible loss
_ROUNDS = 8  # of choosing again where what lies around the matrices grew


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """How far fitting is: `stage` (sensitivity, grids, swaps), `done` of `total`."""

    stage: str
    done: int
    total: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Fitted:
    """The recipe that was found, the bytes of the file it makes, and the divergence it is predicted to have, in nats a token.

    The prediction is that of plain rounding weighed by importance, of which calibrated coding loses a part. `swaps` are the exchanges
    that were measured, those taken and those not.
    """

    recipe: Recipe
    bytes: int
    loss: float
    swaps: tuple[Swap, ...] = ()


def fit_recipe(
    source: ModelSource,
    tokens: Tokens,
    *,
    name: str,
    budget: int,
    holder: Holder | None = None,
    swaps: int = 0,
    held_out: Tokens | None = None,
) -> Iterator[Step | Fitted]:
    """Yield steps, and at last the recipe called `name` for an artifact of at most `budget` bytes in `holder`'s format (None: GGUF).

    `tokens` [windows, length] are what sensitivities are measured on, `held_out` what `swaps` exchanges are. Raises `ResourceError`
    where no choice is small enough, with the least that is.
    """
    holder = holder or gguf_holder()
    found: dict[str, list[Sensitivity]] = {}
    total = source.config.num_layers + 2
    for done, entries in enumerate(sensitivities(source, tokens), start=1):
        for tensor, value in entries.items():
            found.setdefault(tensor, []).append(value)
        yield Step(stage="sensitivity", done=done, total=total)
    matrices = [spec for spec in source.tensors if not never_coded(spec)]
    stacks: dict[str, Stack] = {}
    for done, spec in enumerate(matrices, start=1):
        felt = found.get(spec.own_name, [])
        one = Stack(members={spec: importance(spec, felt)}, options=tensor_options(source, spec, felt, holder))
        key = holder.stack(spec)
        stacks[key] = stacks[key] + one if key in stacks else one
        yield Step(stage="grids", done=done, total=len(matrices))
    fitting = _Fitting(source=source, name=name, holder=holder, stacks=stacks)
    chosen = fitting.chosen(budget)
    measured: list[Swap] = []
    if swaps and held_out is not None:
        for swap in swapped(source, held_out, stacks, chosen, swaps, lambda choice: fitting.bytes(choice) <= budget):
            if swap.kept:
                chosen |= swap.to
            measured.append(swap)
            yield Step(stage="swaps", done=len(measured), total=swaps)
    yield Fitted(
        recipe=fitting.recipe(chosen),
        bytes=fitting.bytes(chosen),
        loss=sum(option.loss for option in chosen.values()),
        swaps=tuple(measured),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Fitting:
    """What a choice makes: a recipe, and the bytes of the artifact."""

    source: ModelSource
    name: str
    holder: Holder
    stacks: Mapping[str, Stack]

    def recipe(self, chosen: Mapping[str, Option]) -> Recipe:
        # By a GGUF tensor's name, which all experts of a block share.
        schemes = {s.gguf_name: chosen[key].scheme for key, stack in self.stacks.items() for s in stack.members}
        names = dict.fromkeys(spec.gguf_name for spec in self.source.tensors if spec.gguf_name in schemes)
        rules = tuple(Rule(tensors=name, scheme=schemes[name]) for name in names)
        return Recipe(name=self.name, base=self.holder.base, rules=rules)

    def bytes(self, chosen: Mapping[str, Option]) -> int:
        shape = model_shape(self.source.config, calibrated=True)
        planned: tuple[PlannedTensor, ...] = resolve(self.recipe(chosen), self.source.tensors, shape)
        return self.holder.whole_bytes(self.source, planned, self.name)

    def chosen(self, budget: int) -> dict[str, Option]:
        """Return the choice of least loss whose artifact has at most `budget` bytes. Raises `ResourceError` where there is none."""
        options = {key: stack.options for key, stack in self.stacks.items()}
        least = {key: min(each, key=lambda option: option.bytes) for key, each in options.items()}
        around = self.bytes(least) - sum(option.bytes for option in least.values())
        for _ in range(_ROUNDS):
            found = choose(options, budget - around)
            if found is None:
                break
            excess = self.bytes(found) - budget
            if excess <= 0:
                return found
            around += excess  # padding between tensors, a word more in a graph
        raise ResourceError(
            f"no choice of grids makes a file of {budget / 1e6:.1f} MB: the smallest has {self.bytes(least) / 1e6:.1f} MB; "
            "give more room, or take a smaller model"
        )


def importance(spec: TensorSpec, felt: Sequence[Sensitivity]) -> NDArray[np.float32]:
    """Return what an error in each column of a matrix costs in all its uses [columns], as rounding weighs it."""
    return sum((each.rows.sum() * each.columns for each in felt), np.zeros(spec.columns)).astype(np.float32)


def tensor_options(
    source: ModelSource, spec: TensorSpec, felt: Sequence[Sensitivity], holder: Holder
) -> tuple[Option, ...]:
    """Return what each grid that divides the rows of a matrix would cost: bytes, and loss as every use of the matrix feels it.

    Every n-th row is tried, and stands for its neighbours by its share of the rows' sensitivity.
    """
    # What nobody has felt has the holder's base, but for experts that no token was sent to: they go with the others.
    offered = holder.schemes if felt or spec.expert is not None else (holder.base,)
    offered = (Scheme(grid="bf16"),) if spec.kind in holder.floats else offered
    schemes = [scheme for scheme in offered if scheme.divides(spec.columns)] or [Scheme(grid="f16")]
    tried = _ROWS if spec.expert is None else _ROWS_OF_AN_EXPERT
    rows = np.arange(0, spec.rows, max(1, spec.rows // tried))
    weights = np.stack([source.read_rows(spec.name, int(row), int(row) + 1).reshape(-1) for row in rows])
    weighed = importance(spec, felt)
    weighed = weighed if weighed.any() else np.ones_like(weighed)
    options = []
    for scheme in schemes:
        loss = 0.0
        if scheme.facts.family != "float":
            squares = np.square(rtn(weights, scheme, weighed).dequantize() - weights, dtype=np.float64)
            loss = sum(_loss(squares, each, rows) for each in felt)
        options.append(Option(scheme=scheme, bytes=holder.matrix_bytes(spec, scheme), loss=loss))
    return tuple(options)


def _loss(squares: NDArray[np.float64], felt: Sensitivity, rows: NDArray[np.int64]) -> float:
    tried = felt.rows[rows]
    share = float(felt.rows.sum() / tried.sum()) if tried.any() else 0.0
    return 0.5 * share * float(tried @ (squares @ felt.columns))


def choose(options: Mapping[str, Sequence[Option]], room: int) -> dict[str, Option] | None:
    """Return one option for each tensor with the least loss in sum and at most `room` bytes, None where nothing fits.

    A 0-1 program: Σ x = 1 for each tensor, Σ bytes·x ≤ room, min Σ loss·x; solved to within 0.01 % of the best.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    flat = [(name, option) for name, each in options.items() for option in each]
    if sum(min(option.bytes for option in each) for each in options.values()) > room:
        return None
    order = {name: row for row, name in enumerate(options)}
    places = ([order[name] for name, _ in flat], range(len(flat)))
    one = csr_array((np.ones(len(flat)), places), shape=(len(options), len(flat)))
    sizes = np.array([[option.bytes for _, option in flat]], dtype=np.float64) / max(1, room)
    losses = np.array([option.loss for _, option in flat])
    solved = milp(
        losses / max(losses.max(), 1e-300),
        integrality=np.ones(len(flat), dtype=np.int64),
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(one, 1, 1), LinearConstraint(sizes, -np.inf, 1)],
        options={"mip_rel_gap": _GAP},
    )
    if solved.x is None:
        return None
    return {name: option for (name, option), taken in zip(flat, solved.x, strict=True) if taken > 0.5}
