"""The matrices of one block coded, stage by stage, by a crew: what has its parts on disk already is not coded again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from r1q.calibration.expert_stages import Routed
from r1q.calibration.stage import Stage, Streams
from r1q.core.mixtures import never_coded
from r1q.core.recipe import PlannedTensor
from r1q.models import moe
from r1q.quantize.block_file import Store
from r1q.quantize.event import Event
from r1q.quantize.matrix import coded_matrix, fit_stage, row_slabs
from r1q.quantize.parts import Parts
from r1q.quantize.source import expect
from r1q.quantize.storing import Slab
from r1q.quantize.tasks import ExpertTask, RowsTask, Site, code_expert, fit_arrays, is_coded
from r1q.quantize.workers import Crew, Task, lending


class CodedWeights(MutableMapping[str, Tensor]):
    """Weights of a block as coded, by `TensorSpec.key`: what was put in, and routed experts', read whenever looked up."""

    def __init__(self, held: Mapping[str, Tensor], experts: Mapping[str, Callable[[], Tensor]]) -> None:
        self._held, self._experts = dict(held), experts

    def __getitem__(self, key: str) -> Tensor:
        return self._held[key] if key in self._held else self._experts[key]()

    def __setitem__(self, key: str, value: Tensor) -> None:
        self._held[key] = value

    def __delitem__(self, key: str) -> None:
        self._held.pop(key, None)

    def __contains__(self, key: object) -> bool:
        return key in self._held or key in self._experts  # the mixin's way would read an expert

    def __iter__(self) -> Iterator[str]:
        return iter({**self._held, **dict.fromkeys(self._experts)})

    def __len__(self) -> int:
        return len({*self._held, *self._experts})


@dataclass(slots=True, kw_only=True)
class BlockCoding:
    """Block `layer` in work: its tensors `by_key`, and the crew that codes them.

    `told` collects what had to be done otherwise than asked, a line each, `coded` the names of what is in parts.
    """

    site: Site
    crew: Crew
    layer: int
    by_key: Mapping[str, PlannedTensor]
    told: list[str]
    coded: set[str] = field(default_factory=set)

    @property
    def parts(self) -> Parts:
        """Where the block's parts are."""
        return Parts.of(self.site.folder, self.layer)

    def weights(self, kept: Mapping[str, Tensor]) -> CodedWeights:
        """Return the block's coded weights, of which only those `kept` in float are there yet."""
        experts = {key: self._reader(one) for key, one in self.by_key.items() if one.spec.expert is not None}
        return CodedWeights(kept, experts)

    def store(self, plain: Store) -> Store:
        """Return what gives a tensor's rows as stored: from its parts, or, where it was not coded, as `plain` does."""

        def stored(planned: PlannedTensor) -> Iterable[Slab]:
            if planned.spec.name not in self.coded:
                return plain(planned)
            return self.parts.slabs(planned, row_slabs(planned.spec, self.site.engine))

        return stored

    def is_ready(self, planned: PlannedTensor) -> bool:
        """Return whether a tensor can be had as stored: it is in parts, or never coded."""
        return planned.spec.name in self.coded or never_coded(planned.spec)

    def code(self, stage: Stage, weights: MutableMapping[str, Tensor]) -> Iterator[Event]:
        """Code a stage's matrices and put them into `weights`; an event follows each line that is told, and the stage."""
        keys = [f"{kind}.weight" for kind in stage.kinds]
        planned = [self.by_key[key] for key in keys]
        slabs = [(one, rows) for one in planned for rows in row_slabs(one.spec, self.site.engine)]
        found = [self.parts.find(one, rows) for one, rows in slabs]
        if all(found):
            yield from self._note(found[0].events if found[0] else ())
        else:
            fit, told = fit_stage(stage, self.layer, [one.scheme for one in planned], self.site.engine)
            yield from self._note(told)
            tasks = [
                RowsTask(
                    layer=self.layer,
                    planned=one,
                    rows=rows,
                    tokens=stage.tokens,
                    residual=stage.residual,
                    damp=0.0 if fit.factor is None else fit.factor.damp,
                    events=tuple(told),
                )
                for (one, rows), part in zip(slabs, found, strict=True)
                if part is None
            ]
            self._expect([*planned, *self._after(planned[-1])])
            with lending(self.crew, fit_arrays(fit)) as lent:
                for _ in self.crew.do(self.site, ((task, lent) for task in tasks)):
                    pass
            del fit, lent
        for key, one in zip(keys, planned, strict=True):
            weights[key] = coded_matrix(self.parts, one, self.site.engine)
            self.coded.add(one.spec.name)
        yield Event(what="stage", name=f"blk.{self.layer}.{stage.kinds[-1]}", count=len(stage.kinds))

    def code_experts(self, routed: Routed, streams: Streams) -> Iterator[Event]:
        """Code all routed experts and add what each makes to the streams; events follow as those of its stages do."""
        # Every expert reads all rows, or a crew of other machines would have to be sent all of them for a part.
        whole = routed.walk.coverage.seen == "all" or not self.crew.sliced
        missing = [one for one in routed.order if one not in routed.leaning and not self._is_coded(one)]
        with lending(self.crew, _rows_of(routed) if whole and missing else {}) as lent:
            finished = self.crew.do(self.site, (self._call(routed, expert, lent, whole=whole) for expert in missing))
            for expert, following in zip_longest(routed.order, routed.order[1:]):
                planned = self._matrices(expert)
                todo = expert in missing or (expert in routed.leaning and not self._is_coded(expert))
                if todo and following is not None:
                    self._expect(self._matrices(following))
                if expert in missing:
                    next(finished)
                elif todo:
                    code_expert(self.site, self.layer, planned, routed.lesson(expert))
                yield from self._learnt(routed, expert, planned)
                routed.add_results(expert, streams)  # while its parts are still in the system's memory

    def _call(self, routed: Routed, expert: int, lent: Any, *, whole: bool) -> tuple[Task, Any]:
        lesson, planned = routed.lesson(expert), self._matrices(expert)
        if not whole:
            lent = self.crew.lend(_rows_of(routed, lesson.tokens))
            lesson = replace(lesson, tokens=None)
        return ExpertTask.of(lesson, self.layer, planned), lent

    def _learnt(self, routed: Routed, expert: int, planned: Sequence[PlannedTensor]) -> Iterator[Event]:
        """Take note of an expert that is coded."""
        for stage in (planned[:2], planned[2:]):
            part = self.parts.first(stage[0], row_slabs(stage[0].spec, self.site.engine))
            yield from self._note(part.events)
            if len(part.squares) and routed.leaning:
                routed.learn(torch.from_numpy(part.squares), routed.lesson(expert).count)
            self.coded |= {one.spec.name for one in stage}
            last = stage[-1].spec
            yield Event(what="stage", name=f"blk.{self.layer}.{last.kind}.{expert}", count=len(stage))

    def _matrices(self, expert: int) -> list[PlannedTensor]:
        return [self.by_key[f"{kind}.weight"] for kind in moe.kinds(expert)]

    def _after(self, planned: PlannedTensor) -> list[PlannedTensor]:
        """Return the matrix that follows in the block, of those that are no routed expert's."""
        others = [one for one in self.by_key.values() if one.spec.is_matrix and one.spec.expert is None]
        return others[others.index(planned) + 1 :][:1]

    def _expect(self, planned: Sequence[PlannedTensor]) -> None:
        """Have what will be coded next read from the disk meanwhile, where that is a disk of this machine."""
        for one in () if self.crew.sliced else planned:
            expect(self.site.source, one.spec.name)

    def _is_coded(self, expert: int) -> bool:
        return all(is_coded(self.parts, one, self.site.engine) for one in self._matrices(expert))

    def _reader(self, planned: PlannedTensor) -> Callable[[], Tensor]:
        return lambda: coded_matrix(self.parts, planned, self.site.engine)

    def _note(self, lines: Sequence[str]) -> Iterator[Event]:
        self.told += lines
        yield from (Event(what="note", name=line) for line in lines)


def _rows_of(routed: Routed, tokens: Tensor | None = None) -> dict[str, Tensor]:
    """Return what experts read, by the names that tasks know, of all tokens or of some."""
    found = {"rows": routed.rows} | ({} if routed.exact_rows is None else {"exact": routed.exact_rows})
    return found if tokens is None else {name: rows[tokens] for name, rows in found.items()}
