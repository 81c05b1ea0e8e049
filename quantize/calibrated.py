"""A calibrated run: hidden states that walk through the model block by block, and the blocks coded on their way.

After every block its file, the hidden states behind it and a journal line are on disk, in this order; so a killed run goes on with the
block it was in, from the same numbers.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from r1q.calibration.expert_stages import Coverage
from r1q.calibration.stages import BlockWalk, Streams
from r1q.core import journal
from r1q.core.checkpoint import QuantizedCheckpoint
from r1q.core.errors import InputError
from r1q.core.files import TEMP_PREFIX, sha256_file, writing
from r1q.core.journal import FinishedFile
from r1q.core.mixtures import never_coded
from r1q.core.qtensor import Floats
from r1q.core.recipe import PlannedTensor
from r1q.core.safetensors_file import SafetensorsFile, write_safetensors
from r1q.core.tensors import TensorSpec
from r1q.models.block import Weights, rms_norm
from r1q.models.block_weights import BlockWeights
from r1q.models.forward import RowReader, embed
from r1q.models.rope import Rotation, rotation
from r1q.quantize.block_coding import BlockCoding
from r1q.quantize.block_file import writing_block
from r1q.quantize.computing import computing, engine_dtype
from r1q.quantize.crews import crew_of
from r1q.quantize.engine import Engine
from r1q.quantize.matrix import read_matrix
from r1q.quantize.parts import Parts
from r1q.quantize.run import (
    STATE_STEM,
    Event,
    Finished,
    Request,
    block_files,
    stored_slabs,
)
from r1q.quantize.source import FloatSource
from r1q.quantize.tasks import ModelReader, Site
from r1q.quantize.workers import Crew

Tokens = NDArray[np.int64]


@dataclass(slots=True, kw_only=True)
class Calibrated:
    """Streams of hidden states over calibration `tokens` [windows, length], at the block that comes next.

    `events` collects what had to be done otherwise than asked, a line each, for the block in work; `coverage` the tokens that each of
    its experts was sent. The `crew` codes its matrices.
    """

    source: ModelReader
    tokens: Tokens
    engine: Engine
    folder: Path
    crew: Crew
    events: list[str] = field(default_factory=list)
    coverage: list[int] = field(default_factory=list)
    _streams: Streams | None = None

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

    def begin(self, layer: int, tensors: Sequence[PlannedTensor]) -> BlockCoding:
        """Return what codes block `layer` and has its parts."""
        self.events.clear()
        site = Site.of(self.source, self.engine, self.folder)
        by_key = {tensor.spec.key: tensor for tensor in tensors}
        coding = BlockCoding(site=site, crew=self.crew, layer=layer, by_key=by_key, told=self.events)
        coding.parts.remove_leftovers()
        return coding

    def block(self, coding: BlockCoding) -> Iterator[Event]:
        """Code the matrices of a block that is begun and go behind it; an event follows each stage."""
        walk = self._walk(coding)
        self.coverage = walk.coverage.tokens
        for stage in walk.stages(self._at):
            yield from coding.code(stage, walk.coded)
            del stage  # the next stage's statistics need the room
        if walk.routed is not None:
            yield from coding.code_experts(walk.routed, self._at)
        if not bool(torch.isfinite(self._at.coded).all()):
            raise InputError(
                f"block {coding.layer}, quantized, makes numbers that are not finite; keep more of it in float"
            )

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
        digest = hashlib.sha256()
        write_safetensors(state_file(self.folder, layer), entries, pieces, {"format": "r1q hidden states"}, digest)
        return digest.hexdigest()

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

    def _walk(self, coding: BlockCoding) -> BlockWalk:
        length = self.tokens.shape[1]
        specs = {key: planned.spec for key, planned in coding.by_key.items()}
        kept = {key: self._kept(spec) for key, spec in specs.items() if never_coded(spec)}
        exact: Weights = kept
        if self.engine.exact_stream:
            exact = BlockWeights(
                specs,
                lambda spec: kept[spec.key] if spec.key in kept else read_matrix(self.source, spec, self.engine),
            )
        return BlockWalk(
            config=self.source.config,
            rotation=self._rotation(length),
            exact=exact,
            coded=coding.weights(kept),
            coverage=Coverage(seen=self.engine.experts, few=self.engine.few),
            dtype=engine_dtype(self.engine),
            windows=max(1, self.engine.tile // length),
            allocate=self._allocate,
        )

    def _rotation(self, length: int) -> Rotation:
        return rotation(self.source.config, length, self.engine.device)

    def _vector(self, name: str) -> Tensor:
        return torch.from_numpy(np.array(self.source.read_rows(name, 0, 1)).reshape(-1)).to(self.engine.device)

    def _kept(self, spec: TensorSpec) -> Tensor:
        """Return a norm, a bias or a router, in float32."""
        if spec.is_matrix:
            return read_matrix(self.source, spec, self.engine, torch.float32)
        return self._vector(spec.name)

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
    reader, engine = cast(ModelReader, source), calibrated.engine
    with computing(engine), crew_of(calibrated.workers, engine, folder) as crew:
        run = Calibrated(source=reader, tokens=calibrated.tokens, engine=engine, folder=folder, crew=crew)
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
    store, coding = stored_slabs(run.source, request.importance), None
    if layer is not None:
        run.go_to(layer, finished)
        coding = run.begin(layer, tensors)
        store = coding.store(store)
    elif any(tensor.spec.kind == "output" for tensor in tensors):
        run.go_to(run.source.config.num_layers, finished)
        norm = next(tensor.spec.name for tensor in tensors if tensor.spec.kind == "output_norm")
        store = stored_slabs(run.source, {"output.weight": run.head_importance(norm)})
    with writing_block(folder / file, tensors) as block:
        if coding is not None:
            for event in run.block(coding):
                yield event
                if event.what == "stage":
                    yield from block.grow(store, coding.is_ready)
        yield from block.grow(store)
    entry = FinishedFile(
        file=file,
        sha256=block.sha256,
        records=tuple(block.records),
        events=() if layer is None else tuple(run.events),
        state="" if layer is None else run.save(layer + 1),
        coverage=() if layer is None else tuple(run.coverage),
    )
    journal.append(folder, entry)
    finished[file] = entry
    if layer is not None:
        state_file(folder, layer).unlink(missing_ok=True)
    if coding is not None:
        coding.parts.remove()
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
    for layer, file in enumerate(blocks):
        if file not in kept:
            finished.pop(file, None)
        else:
            Parts.of(folder, layer).remove()  # a kill may have come between the journal's line and this


def state_file(folder: Path, layer: int) -> Path:
    """Return where the hidden states before block `layer` lie."""
    return folder / f"{STATE_STEM}{layer:05d}.safetensors"
