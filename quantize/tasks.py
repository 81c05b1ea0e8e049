"""The tasks of a block: a slab of rows of one matrix, or a whole expert. Whoever does one writes its parts; nothing else comes back.

A task is a small value that can be sent to another process. What is large, the factor of a stage or the rows that experts read, is
lent beside it, by name, as arrays; weights are read from the checkpoint by whoever does the task.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from r1q.calibration.lesson import Lesson, first_stage, second_stage
from r1q.calibration.stage import Stage
from r1q.core.qtensor import Floats
from r1q.core.recipe import PlannedTensor
from r1q.models.config import ModelConfig
from r1q.models.forward import RowReader
from r1q.quantize.computing import engine_dtype
from r1q.quantize.engine import Engine
from r1q.quantize.gptq.factor import Factor
from r1q.quantize.matrix import Fit, code_rows, coded_matrix, fit_stage, read_matrix, row_slabs
from r1q.quantize.parts import Parts
from r1q.quantize.source import FloatSource
from r1q.quantize.witness import job_hash, numbers

Arrays = Mapping[str, Tensor]


class ModelReader(FloatSource, RowReader, Protocol):
    """A model to calibrate: weights, names and config. `models.source.ModelSource` is one."""

    @property
    def config(self) -> ModelConfig:
        """The model's config."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """What all tasks of a run work with: the float model, the engine, and the checkpoint folder that parts are written to.

    By `numbers` and `job` workers elsewhere are told from those that may take part (`quantize/witness.py`).
    """

    source: ModelReader
    engine: Engine
    folder: Path
    numbers: str
    job: str

    @classmethod
    def of(cls, source: ModelReader, engine: Engine, folder: Path) -> Site:
        """Return the site of a run of this process."""
        folder = folder.absolute()
        return cls(source=source, engine=engine, folder=folder, numbers=numbers(), job=job_hash(folder))


@dataclass(frozen=True, slots=True, kw_only=True)
class RowsTask:
    """Code `rows` of a matrix of block `layer`. What it is fitted to is lent, as `fit_arrays` names it, but for its numbers.

    `events` is what was done otherwise than asked in its stage.
    """

    layer: int
    planned: PlannedTensor
    rows: slice
    tokens: int
    residual: bool
    damp: float
    events: tuple[str, ...]

    @property
    def name(self) -> str:
        """The tensor."""
        return self.planned.spec.name

    def do(self, site: Site, arrays: Arrays) -> None:
        """Write the part of these rows."""
        fit = self._fit(arrays)
        slabs = code_rows(site.source, self.planned, fit, self.rows, site.engine)
        Parts.of(site.folder, self.layer).write(self.planned, self.rows, slabs, self.events)

    def _fit(self, arrays: Arrays) -> Fit:
        lower, importance = arrays.get("lower"), arrays.get("importance")
        factor = None
        if lower is not None:
            factor = Factor(
                reversed_lower=lower,
                stiffness=arrays["stiffness"].cpu().numpy(),
                damp=self.damp,
                moment=arrays.get("moment"),
            )
        stage = Stage(
            kinds=(self.planned.spec.kind,),
            tokens=self.tokens,
            moment=torch.empty(0),
            drift=arrays.get("drift"),
            residual=self.residual,
        )
        return Fit(stage=stage, factor=factor, importance=None if importance is None else importance.cpu().numpy())


def fit_arrays(fit: Fit) -> dict[str, Tensor]:
    """Return the arrays of what matrices are fitted to, by name, without copies."""
    found: dict[str, Tensor | None] = {"drift": fit.stage.drift, "importance": _tensor(fit.importance)}
    if fit.factor is not None:
        factor = fit.factor
        found |= {"lower": factor.reversed_lower, "stiffness": _tensor(factor.stiffness), "moment": factor.moment}
    return {name: array for name, array in found.items() if array is not None}


def _tensor(array: Floats | None) -> Tensor | None:
    return None if array is None else torch.from_numpy(array)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertTask:
    """Code the three matrices of an expert that has a lesson of its own; the lesson's `rows` and `exact` rows are lent.

    `tokens` are the places of its rows among those, None where they are all its own.
    """

    layer: int
    planned: tuple[PlannedTensor, PlannedTensor, PlannedTensor]
    expert: int
    tokens: NDArray[np.int64] | None
    tile: int
    few: int
    note: str

    @property
    def name(self) -> str:
        """The expert's first tensor."""
        return self.planned[0].spec.name

    @classmethod
    def of(cls, lesson: Lesson, layer: int, planned: Sequence[PlannedTensor]) -> ExpertTask:
        """Return the task of a lesson that leans on no others."""
        gate, up, down = planned
        tokens = None if lesson.tokens is None else lesson.tokens.cpu().numpy()
        return cls(
            layer=layer,
            planned=(gate, up, down),
            expert=lesson.expert,
            tokens=tokens,
            tile=lesson.tile,
            few=lesson.few,
            note=lesson.note,
        )

    def do(self, site: Site, arrays: Arrays) -> None:
        """Write the expert's parts."""
        rows, exact = arrays["rows"], arrays.get("exact")
        lesson = Lesson(
            expert=self.expert,
            rows=rows,
            exact=exact,
            tokens=None if self.tokens is None else torch.from_numpy(self.tokens).to(rows.device),
            tile=self.tile,
            few=self.few,
            note=self.note,
        )
        code_expert(site, self.layer, self.planned, lesson)


def code_expert(site: Site, layer: int, planned: Sequence[PlannedTensor], lesson: Lesson) -> None:
    """Write the parts of an expert's gate, up and down, but those that are there; the last one's with Σx² of what down reads."""
    parts, engine, first = Parts.of(site.folder, layer), site.engine, planned[:2]
    dtype = engine_dtype(engine)
    if not all(is_coded(parts, one, engine) for one in first):
        _code_stage(site, layer, first_stage(lesson, dtype), first, None)
    coded = {one.spec.key: coded_matrix(parts, one, engine) for one in first}
    exact = {}
    if lesson.exact is not None:
        exact = {one.spec.key: read_matrix(site.source, one.spec, engine) for one in planned}
    stage, squares = second_stage(lesson, coded, exact, dtype)
    del coded, exact  # coding needs the room
    _code_stage(site, layer, stage, planned[2:], squares.cpu().numpy())


def is_coded(parts: Parts, planned: PlannedTensor, engine: Engine) -> bool:
    """Return whether every part of a matrix is there and whole."""
    return all(parts.find(planned, rows) is not None for rows in row_slabs(planned.spec, engine))


def _code_stage(
    site: Site, layer: int, stage: Stage, planned: Sequence[PlannedTensor], squares: NDArray[np.float64] | None
) -> None:
    fit, told = fit_stage(stage, layer, [one.scheme for one in planned], site.engine)
    for one in planned:
        for rows in row_slabs(one.spec, site.engine):
            slabs = code_rows(site.source, one, fit, rows, site.engine)
            Parts.of(site.folder, layer).write(one, rows, slabs, told, squares)
