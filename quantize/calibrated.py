"""A calibrated run: hidden states that walk through the model block by block, and the blocks coded on their way.

After every block its file, the hidden states behind it and a journal line are on disk, in this order; so a killed run goes on with the
block it was in, from the same numbers.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from r1q.calibration.expert_stages import Coverage
from r1q.calibration.stages import BlockWalk, Stage, Streams
from r1q.core import journal
from r1q.core.checkpoint import QuantizedCheckpoint, TensorRecord
from r1q.core.errors import InputError, MissingError
from r1q.core.files import TEMP_PREFIX, sha256_file, writing
from r1q.core.journal import FinishedFile
from r1q.core.mixtures import ROUTERS
from r1q.core.qtensor import Floats
from r1q.core.recipe import PlannedTensor
from r1q.core.safetensors_file import SafetensorsFile, write_safetensors
from r1q.core.scheme import Scheme
from r1q.core.tensors import TensorSpec
from r1q.models.block import Weights, rms_norm
from r1q.models.block_weights import BlockWeights
from r1q.models.config import ModelConfig
from r1q.models.forward import RowReader, embed
from r1q.models.rope import Rotation, rotation
from r1q.quantize.engine import Engine
from r1q.quantize.gptq.factor import factorize, shrink
from r1q.quantize.matrix import Fit, code_matrix
from r1q.quantize.run import (
    SLAB_WEIGHTS,
    STATE_STEM,
    Event,
    Finished,
    Request,
    Slab,
    block_files,
    stored_slabs,
    write_block,
)
from r1q.quantize.source import FloatSource

Tokens = NDArray[np.int64]
# Grids that look at no statistics: nothing is lost where there are none.
_EIGHT_BITS = tuple(Scheme(grid=grid) for grid in ("q8_0", "f32", "f16", "bf16"))


class ModelReader(FloatSource, RowReader, Protocol):
    """A model to calibrate: weights, names and config. `models.source.ModelSource` is one."""

    @property
    def config(self) -> ModelConfig:
        """The model's config."""


@contextmanager
def computing(engine: Engine) -> Iterator[None]:
    """Compute with the engine's number of threads, without gradients; what was set before comes back.

    Raises `MissingError` where torch cannot use the engine's device.
    """
    try:
        torch.empty(1, device=engine.device)
    except (RuntimeError, AssertionError) as error:
        why = str(error).splitlines()[0]
        raise MissingError(f"--device {engine.device}: torch cannot use it here ({why}); take cpu") from None
    before = torch.get_num_threads()
    torch.set_num_threads(engine.threads)
    try:
        with torch.no_grad():
            yield
    finally:
        torch.set_num_threads(before)


@dataclass(slots=True, kw_only=True)
class Calibrated:
    """Streams of hidden states over calibration `tokens` [windows, length], at the block that comes next.

    `events` collects what had to be done otherwise than asked, a line each, for the block in work; `coverage` the tokens that each of
    its experts was sent.
    """

    source: ModelReader
    tokens: Tokens
    engine: Engine
    folder: Path
    events: list[str] = field(default_factory=list)
    coverage: list[int] = field(default_factory=list)
    _streams: Streams | None = None
    _told: int = 0

    def embed(self, coded: RowReader) -> None:
        """Begin before the first block: the coded stream from the `coded` embedding, the exact one from the source's."""
        config = self.source.config
        shape = (*self.tokens.shape, config.hidden_size)
        self._streams = Streams(
            coded=self._fill(shape, (embed(coded, window[None])[0] for window in self.tokens)),
            exact=self._fill(shape, (embed(self.source, window[None])[0] for window in self.tokens))
            if self.engine.exact_stream
            else None,
        )

    def go_to(self, layer: int, finished: Finished) -> None:
        """Stand before block `layer`: where the run is already, at the first block, or where a killed run was."""
        if self._streams is not None:
            return
        if layer == 0:
            records = [record for entry in finished.values() for record in entry.records]
            table = {record.spec.name: record for record in records if record.spec.kind == "token_embd"}
            self.embed(QuantizedCheckpoint(self.folder, {}, table))
        else:
            self.resume(layer)

    def block(self, layer: int, tensors: Sequence[PlannedTensor], coded: dict[str, Slab]) -> Iterator[Event]:
        """Code the matrices of block `layer` into `coded`, by name; an event follows each stage."""
        self.events.clear()
        self._told = 0
        by_kind = {tensor.spec.key: tensor for tensor in tensors}
        walk = self._walk(by_kind)
        self.coverage = walk.coverage.tokens
        for stage in walk.stages(self._at):
            fit = self._fit(stage, layer, [by_kind[f"{kind}.weight"].scheme for kind in stage.kinds])
            yield from self._noted()
            for kind in stage.kinds:
                planned = by_kind[f"{kind}.weight"]
                coded[planned.spec.name], walk.coded[f"{kind}.weight"] = code_matrix(
                    self.source, planned, fit, self.engine
                )
            yield Event(what="stage", name=f"blk.{layer}.{stage.kinds[-1]}", count=len(stage.kinds))
            del stage, fit  # the next stage's statistics need the room
        if not bool(torch.isfinite(self._at.coded).all()):
            raise InputError(f"block {layer}, quantized, makes numbers that are not finite; keep more of it in float")

    def _noted(self) -> Iterator[Event]:
        """Yield an event for each line of `events` that is new."""
        yield from (Event(what="note", name=line) for line in self.events[self._told :])
        self._told = len(self.events)

    def head_importance(self, norm: str) -> Floats:
        """Return the mean squared inputs [hidden_size] of the head, behind the norm of that name."""
        config, weight = self.source.config, self._vector(norm)
        total = torch.zeros(config.hidden_size, dtype=torch.float64)
        for window in self._at.coded:
            total += rms_norm(window, weight, config.rms_norm_eps).square().sum(0, dtype=torch.float64).cpu()
        importance: Floats = (total / self.tokens.size).float().numpy()
        if not np.isfinite(importance).all():
            raise InputError(f"{norm}: what it makes of the calibration text is not finite; the weights are broken")
        return importance

    def save(self, layer: int) -> str:
        """Write the hidden states before block `layer` to disk, atomically, and return the file's sha256."""
        named = self._named()
        entries = [(name, "F32", tuple(stream.shape)) for name, stream in named.items()]
        pieces = (window.cpu().numpy().tobytes() for stream in named.values() for window in stream)
        path = state_file(self.folder, layer)
        write_safetensors(path, entries, pieces, metadata={"format": "r1q hidden states"})
        return sha256_file(path)

    def resume(self, layer: int) -> None:
        """Go on before block `layer` from what `save` wrote."""
        file = SafetensorsFile.open(state_file(self.folder, layer))
        shape = (*self.tokens.shape, self.source.config.hidden_size)
        found = {
            name: self._fill(
                shape, (torch.from_numpy(file.read_rows(name, i, i + 1)[0].copy()) for i in range(shape[0]))
            )
            for name in file.tensors
        }
        self._streams = Streams(coded=found["coded"], exact=found.get("exact"))

    @property
    def _at(self) -> Streams:
        if self._streams is None:
            raise ValueError("neither embedded nor resumed")
        return self._streams

    def _named(self) -> dict[str, Tensor]:
        streams = self._at
        return {"coded": streams.coded} | ({} if streams.exact is None else {"exact": streams.exact})

    def _walk(self, by_kind: Mapping[str, PlannedTensor]) -> BlockWalk:
        length = self.tokens.shape[1]
        specs = {key: planned.spec for key, planned in by_kind.items()}
        kept = {key: self._kept(spec) for key, spec in specs.items() if not spec.is_matrix or spec.kind in ROUTERS}
        exact: Weights = kept
        if self.engine.exact_stream:
            exact = BlockWeights(specs, lambda spec: kept[spec.key] if spec.key in kept else self._matrix(spec))
        return BlockWalk(
            config=self.source.config,
            rotation=self._rotation(length),
            exact=exact,
            coded=dict(kept),
            coverage=Coverage(seen=self.engine.experts, few=self.engine.few),
            dtype=getattr(torch, self.engine.compute),
            windows=max(1, self.engine.tile // length),
            allocate=self._allocate,
        )

    def _fit(self, stage: Stage, layer: int, schemes: Sequence[Scheme]) -> Fit:
        """Return the factor of a stage's second moments, and an event where it needed more damping or cannot be had."""
        if stage.note and not all(scheme in _EIGHT_BITS for scheme in schemes):
            self.events.append(f"blk.{layer}.{stage.note}")
        if stage.plain:
            return Fit(stage=stage, factor=None, importance=self._importance(stage, layer))
        importance = (stage.moment.diagonal().flip(0) / stage.tokens).cpu().numpy().astype(np.float32)
        moment = stage.moment.div_(stage.tokens)
        shrink(moment, stage.tokens)
        factor = factorize(moment, self.engine.damp, keep=self.engine.passes > 0)
        where = f"blk.{layer}.{'/'.join(stage.kinds)}"
        if factor is None:
            if not np.isfinite(importance).all():
                raise InputError(f"{where}: its inputs are not finite on the calibration text; the weights are broken")
            self.events.append(f"{where}: second moments are not positive definite, rounded by importance instead")
        elif factor.damp != self.engine.damp:
            self.events.append(f"{where}: damping raised from {self.engine.damp:g} to {factor.damp:g}")
        return Fit(stage=stage, factor=factor, importance=importance)

    def _importance(self, stage: Stage, layer: int) -> Floats | None:
        """Return the importance that a stage without second moments comes with."""
        if stage.importance is None:
            return None
        importance: Floats = stage.importance.cpu().numpy().astype(np.float32)
        if not np.isfinite(importance).all():
            where = f"blk.{layer}.{'/'.join(stage.kinds)}"
            raise InputError(f"{where}: its inputs are not finite on the calibration text; the weights are broken")
        # Where no token has made anything of these columns, all count alike.
        return importance if importance.any() else np.ones_like(importance)

    def _rotation(self, length: int) -> Rotation:
        return rotation(self.source.config, length, self.engine.device)

    def _vector(self, name: str) -> Tensor:
        return torch.from_numpy(np.array(self.source.read_rows(name, 0, 1)).reshape(-1)).to(self.engine.device)

    def _kept(self, spec: TensorSpec) -> Tensor:
        """Return a norm, a bias or a router, in float32."""
        return self._matrix(spec, torch.float32) if spec.is_matrix else self._vector(spec.name)

    def _matrix(self, spec: TensorSpec, dtype: torch.dtype | None = None) -> Tensor:
        """Return a matrix, in the engine's dtype unless another is given."""
        dtype = dtype or getattr(torch, self.engine.compute)
        values = torch.empty(spec.shape, dtype=dtype, device=self.engine.device)
        step = max(1, SLAB_WEIGHTS // spec.columns)
        for start in range(0, spec.rows, step):
            stop = min(start + step, spec.rows)
            rows = np.require(self.source.read_rows(spec.name, start, stop), requirements=["C", "W"])
            values[start:stop] = torch.from_numpy(rows).to(values.dtype)
        return values

    def _fill(self, shape: tuple[int, ...], windows: Iterator[Tensor]) -> Tensor:
        stream = self._allocate(shape, torch.float32)
        for place, window in zip(stream, windows, strict=True):
            place.copy_(window)
        return stream

    def _allocate(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return room for a stream: memory, or, where the engine spills, a file that the system may take back from memory."""
        if not self.engine.spill:
            return torch.empty(shape, dtype=dtype, device=self.engine.device)
        size = int(np.prod(shape))
        # Unlinked when the block ends: the mapping alone keeps the file alive, and a kill leaves nothing.
        with writing(self.folder), tempfile.NamedTemporaryFile(prefix=TEMP_PREFIX, dir=self.folder) as file:
            file.truncate(size * dtype.itemsize)
            return torch.from_file(file.name, shared=True, size=size, dtype=dtype).reshape(shape)


def write_files(source: FloatSource, request: Request, folder: Path, finished: Finished) -> Iterator[Event]:
    """Write the block files that are not `finished`, coded on calibration text, and enter them there."""
    calibrated = request.calibrated
    if calibrated is None:
        raise ValueError("not a calibrated run")
    files = block_files(request.planned)
    _forget_unreachable(folder, files, finished)
    reader = cast(ModelReader, source)
    run = Calibrated(source=reader, tokens=calibrated.tokens, engine=calibrated.engine, folder=folder)
    with computing(calibrated.engine):
        for file, tensors in files.items():
            if file in finished:
                yield Event(what="kept", name=file, count=len(tensors))
                yield from (Event(what="note", name=line) for line in finished[file].events)
                continue
            yield from _write_file(run, request, file, tensors, finished)


def _write_file(
    run: Calibrated, request: Request, file: str, tensors: Sequence[PlannedTensor], finished: Finished
) -> Iterator[Event]:
    layer, folder = tensors[0].spec.layer, run.folder
    coded: dict[str, Slab] = {}
    plain = stored_slabs(run.source, request.importance)
    if layer is not None:
        run.go_to(layer, finished)
        yield from run.block(layer, tensors, coded)
    elif any(tensor.spec.kind == "output" for tensor in tensors):
        run.go_to(run.source.config.num_layers, finished)
        norm = next(tensor.spec.name for tensor in tensors if tensor.spec.kind == "output_norm")
        plain = stored_slabs(run.source, {"output.weight": run.head_importance(norm)})

    def store(planned: PlannedTensor) -> Iterable[Slab]:
        found = coded.pop(planned.spec.name, None)
        return plain(planned) if found is None else (found,)

    done: list[TensorRecord] = []
    yield from write_block(folder / file, tensors, store, done)
    state = "" if layer is None else run.save(layer + 1)
    events = () if layer is None else tuple(run.events)
    entry = FinishedFile(
        file=file,
        sha256=sha256_file(folder / file),
        records=tuple(done),
        events=events,
        state=state,
        coverage=() if layer is None else tuple(run.coverage),
    )
    journal.append(folder, entry)
    finished[file] = entry
    if layer is not None:
        state_file(folder, layer).unlink(missing_ok=True)
    yield Event(what="file", name=file)


def _forget_unreachable(folder: Path, files: Mapping[str, Sequence[PlannedTensor]], finished: Finished) -> None:
    """Take finished blocks off the list from which no hidden states lead on: they would have to be made again anyway."""
    blocks = [file for file, tensors in files.items() if tensors[0].spec.layer is not None]
    reached = 0
    while reached < len(blocks) and blocks[reached] in finished:
        reached += 1
    state = state_file(folder, reached)
    whole = reached == len(blocks) and all(file in finished for file in files)
    if whole or reached == 0 or (state.is_file() and sha256_file(state) == finished[blocks[reached - 1]].state):
        kept = set(blocks[:reached])
    else:
        kept = set()
    for file in blocks:
        if file not in kept:
            finished.pop(file, None)


def state_file(folder: Path, layer: int) -> Path:
    """Return where the hidden states before block `layer` lie."""
    return folder / f"{STATE_STEM}{layer:05d}.safetensors"
