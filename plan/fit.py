"""Fit: the grid of every tensor that loses least within a number of bytes. `r1q quantize --fit` and `--bpw`.

What a tensor's error costs is predicted by the Fisher information of the model's own answers (`calibration/sensitivity.py`); each grid
is tried on rows of each tensor; which to take is a multiple-choice knapsack, solved by HiGHS through scipy. The answer is a recipe.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from r1q.calibration.sensitivity import Sensitivity, sensitivities
from r1q.core.errors import ResourceError
from r1q.core.recipe import PlannedTensor, Recipe, Rule, resolve
from r1q.core.scheme import Scheme
from r1q.core.tensors import TensorSpec
from r1q.export.gguf import file_bytes
from r1q.models.source import ModelSource
from r1q.plan.plan import model_shape
from r1q.quantize.rtn import rtn

GRIDS = ("q2_k", "q3_k", "iq4_xs", "iq4_nl", "q4_0", "q4_k", "q5_0", "q5_k", "q6_k", "q8_0")
"""What llama.cpp computes with on every device; of the two a byte apart the better one wins by itself."""
FAST_ON_ARM = ("iq4_nl", "q4_0", "q4_k", "q5_k", "q6_k", "q8_0")
"""What llama.cpp repacks for dotprod and i8mm (`ggml-cpu/repack.cpp`): the others read prompts several times slower on a phone."""
_ROWS = 256  # of a tensor that each grid is tried on
_GAP = 1e-4  # of the best possible loss


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """How far fitting is: `stage` (sensitivity, grids), `done` of `total`."""

    stage: str
    done: int
    total: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One grid that a tensor could have: the bytes it takes, and the nats a token that it is predicted to cost."""

    scheme: Scheme
    bytes: int
    loss: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Fitted:
    """The recipe that was found, the bytes of the file it makes, and the divergence it is predicted to have, in nats a token.

    The prediction is that of plain rounding weighed by importance, of which calibrated coding loses a part.
    """

    recipe: Recipe
    bytes: int
    loss: float


def fit_recipe(
    source: ModelSource, tokens: NDArray[np.int64], *, name: str, budget: int, grids: Sequence[str] = GRIDS
) -> Iterator[Step | Fitted]:
    """Yield steps, and at last the recipe called `name` for a GGUF file of at most `budget` bytes.

    `tokens` [windows, length] are what sensitivities are measured on. Raises `ResourceError` where no choice of `grids` is small
    enough, with the least that is.
    """
    options: dict[str, tuple[Option, ...]] = {}
    found: dict[str, list[Sensitivity]] = {}
    total = source.config.num_layers + 2
    for done, entries in enumerate(sensitivities(source, tokens), start=1):
        for tensor, value in entries.items():
            found.setdefault(tensor, []).append(value)
        yield Step(stage="sensitivity", done=done, total=total)
    matrices = [spec for spec in source.tensors if spec.is_matrix]
    for done, spec in enumerate(matrices, start=1):
        options[spec.name] = tensor_options(source, spec, found[spec.gguf_name], grids)
        yield Step(stage="grids", done=done, total=len(matrices))
    frame = _planned(source, _recipe(name, matrices, {spec.name: options[spec.name][0] for spec in matrices}))
    overhead = file_bytes(source.path, frame, source.config.name, name)
    overhead -= sum(options[spec.name][0].bytes for spec in matrices)
    chosen = choose(options, budget - overhead)
    if chosen is None:
        least = overhead + sum(min(option.bytes for option in each) for each in options.values())
        raise ResourceError(
            f"no choice of grids makes a file of {budget / 1e6:.1f} MB: the smallest has {least / 1e6:.1f} MB; "
            "give more room, or take a smaller model"
        )
    recipe = _recipe(name, matrices, chosen)
    size = file_bytes(source.path, _planned(source, recipe), source.config.name, name)
    yield Fitted(recipe=recipe, bytes=size, loss=sum(option.loss for option in chosen.values()))


def tensor_options(
    source: ModelSource, spec: TensorSpec, felt: Sequence[Sensitivity], grids: Sequence[str]
) -> tuple[Option, ...]:
    """Return what each grid that divides the rows of a matrix would cost: bytes, and loss as every use of the matrix feels it.

    Every n-th row is tried, and stands for its neighbours by its share of the rows' sensitivity.
    """
    schemes = [Scheme(grid=grid) for grid in grids if Scheme(grid=grid).divides(spec.columns)] or [Scheme(grid="f16")]
    rows = np.arange(0, spec.rows, max(1, spec.rows // _ROWS))
    weights = np.stack([source.read_rows(spec.name, int(row), int(row) + 1).reshape(-1) for row in rows])
    importance = sum((each.rows.sum() * each.columns for each in felt), np.zeros(spec.columns)).astype(np.float32)
    options = []
    for scheme in schemes:
        loss = 0.0
        if scheme.facts.family != "float":
            squares = np.square(rtn(weights, scheme, importance).dequantize() - weights, dtype=np.float64)
            loss = sum(_loss(squares, each, rows) for each in felt)
        options.append(Option(scheme=scheme, bytes=spec.rows * scheme.row_bytes(spec.columns), loss=loss))
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


def _recipe(name: str, matrices: Sequence[TensorSpec], chosen: Mapping[str, Option]) -> Recipe:
    rules = tuple(Rule(tensors=spec.gguf_name, scheme=chosen[spec.name].scheme) for spec in matrices)
    return Recipe(name=name, base=Scheme(grid="q8_0"), rules=rules)


def _planned(source: ModelSource, recipe: Recipe) -> tuple[PlannedTensor, ...]:
    return resolve(recipe, source.tensors, model_shape(source.config, calibrated=True))
