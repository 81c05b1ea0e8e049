"""OnnxFolder: an ONNX model folder whose every claim is checked before a runtime sees it: graphs, external data, genai_config.json.

External data is where such folders have been unsafe (CVE-2022-25882, 2024-27318, 2026-27489, 2026-34446): a tensor may only lie in a
regular file directly in the folder, no link of either kind, wholly inside the file, in bytes that no other tensor claims, or that the
other claims too, all of them and no more (a head tied to the embedding). genai_config.json can name libraries to load: refused.
"""

from __future__ import annotations

import json
import os
import stat
import weakref
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from io import FileIO
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from r1q.core.errors import InputError
from r1q.core.files import is_bare_name
from r1q.core.onnx_graph import OnnxGraph, OnnxTensor, parse_graph
from r1q.core.onnx_schema import BITS, STORED

Array = NDArray[Any]
MODEL, ALL_LOGITS, CONFIG = "model.onnx", "model_all_logits.onnx", "genai_config.json"
MAX_GRAPH_BYTES = 1 << 26
MAX_CONFIG_BYTES = 1 << 20
MAX_GRAPHS = 16
SLAB_BYTES = 1 << 24
# What onnxruntime-genai would load as code, or read or write elsewhere, if a configuration says so.
_UNSAFE_KEYS = (
    "custom_ops_library", "library_path", "enable_profiling", "ep.context_file_path",
    "session.model_external_initializers_file_folder_path",
)  # fmt: skip
_FLOATS = ("float32", "float16", "float64", "bfloat16")
_MEND = "download or export it again"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class OnnxFolder:
    """An opened and checked folder. `graphs` by file name; `main` names the one that generates; `nbytes` of graphs and data."""

    path: Path
    main: str
    graphs: Mapping[str, OnnxGraph]
    config: Mapping[str, Any]
    nbytes: int
    _files: Mapping[str, _DataFile]

    @classmethod
    def open(cls, path: Path | str, *, finite: bool = True) -> OnnxFolder:
        """Open and check the folder `path`, or the folder of the .onnx file `path`, and every graph that it names.

        With `finite` every float initializer is read once and must be finite: the scales and norms of a quantized model (a tenth of
        its bytes), everything of a float one. Raises `InputError` that names the file, the tensor and the way out.
        """
        path = Path(path)
        folder, given = (path.parent, path.name) if path.suffix.lower() == ".onnx" else (path, None)
        if not folder.is_dir():
            raise InputError(f"{folder}: no such folder; give a folder with {MODEL} or an .onnx file in it")
        config = _read_config(folder)
        main = given or _decoder_file(folder, config)
        graphs: dict[str, OnnxGraph] = {}
        total = 0
        for name in _graph_names(folder, main, config):
            with _open_regular(folder / name) as file:
                data = _read_whole(file, folder / name, MAX_GRAPH_BYTES, "external data keeps weights out of it")
            graphs[name] = parse_graph(folder / name, data)
            total += len(data)
        files, data_bytes = _check_external(folder, graphs)
        opened = cls(
            path=folder,
            main=main,
            graphs=MappingProxyType(graphs),
            config=config,
            nbytes=total + data_bytes,
            _files=MappingProxyType(files),
        )
        if finite:
            opened.check_finite()
        return opened

    @property
    def graph(self) -> OnnxGraph:
        """The graph that generates."""
        return self.graphs[self.main]

    def read(self, tensor: OnnxTensor) -> Array:
        """Return an initializer in its stored dtype (see `OnnxTensor.array`), mapped from its file: read-only."""
        if tensor.location is None or not tensor.nbytes:
            return tensor.array(tensor.inline)
        return tensor.array(self._map(tensor, 0, tensor.nbytes))

    def read_rows(self, tensor: OnnxTensor, start: int, stop: int) -> Array:
        """Return rows [start, stop) along the first axis of an initializer of whole bytes a value; only they are mapped."""
        rows, *sides = tensor.shape
        if not 0 <= start <= stop <= rows or BITS[tensor.dtype] < 8:
            raise ValueError(f"rows {start}:{stop} of {tensor.name}, {tensor.dtype} {list(tensor.shape)}")
        if tensor.location is None or start == stop or not tensor.nbytes:
            return (
                tensor.array(tensor.inline)[start:stop] if start < stop else np.empty((0, *sides), STORED[tensor.dtype])
            )
        row = tensor.nbytes // rows
        part = replace(tensor, shape=(stop - start, *sides), nbytes=row * (stop - start))
        return part.array(self._map(tensor, start * row, stop * row))

    def check_finite(self, tensors: Iterable[OnnxTensor] | None = None) -> None:
        """Raise `InputError` for a float initializer (of `tensors`, else of every graph) that holds a NaN or an infinity."""
        if tensors is None:
            tensors = (tensor for graph in self.graphs.values() for tensor in graph.initializers.values())
        seen: set[tuple[str, int, int]] = set()
        for tensor in tensors:
            place = (tensor.location or "", tensor.offset, tensor.nbytes)
            if tensor.dtype not in _FLOATS or (tensor.location is not None and place in seen):
                continue
            seen.add(place)
            self._check_finite(tensor)

    def _check_finite(self, tensor: OnnxTensor) -> None:
        done = 0
        for slab in self._slabs(tensor):
            values = (slab.astype(np.uint32) << 16).view(np.float32) if tensor.dtype == "bfloat16" else slab
            finite = np.isfinite(values)
            if not finite.all():
                index = done + int(np.argmin(finite))
                place = list(np.unravel_index(index, tensor.shape)) if tensor.shape else []
                where = self.path / (tensor.location or "")
                raise InputError(
                    f"{where}: tensor {tensor.name!r} holds {values[np.argmin(finite)]} at {[int(i) for i in place]}; {_MEND}"
                )
            done += len(values)

    def _slabs(self, tensor: OnnxTensor) -> Iterator[Array]:
        """Yield a tensor's values flat, in slabs that are mapped one at a time."""
        if tensor.location is None:
            yield tensor.array(tensor.inline).reshape(-1)
            return
        for start in range(0, tensor.nbytes, SLAB_BYTES):
            stop = min(start + SLAB_BYTES, tensor.nbytes)
            flat = OnnxTensor(name=tensor.name, dtype=tensor.dtype, shape=(-1,), nbytes=stop - start)
            yield flat.array(self._map(tensor, start, stop))

    def _map(self, tensor: OnnxTensor, start: int, stop: int) -> Array:
        return self._files[tensor.location or ""].map(tensor.offset + start, tensor.offset + stop)


class _DataFile:
    """An open file of external data; it is closed with the object."""

    def __init__(self, path: Path) -> None:
        self.path, self._file = path, _open_regular(path)
        self.size = os.fstat(self._file.fileno()).st_size
        weakref.finalize(self, self._file.close)

    def map(self, start: int, stop: int) -> Array:
        """Return bytes [start, stop) as a read-only view of the file; as bytes, for the offset need not suit a dtype."""
        try:
            return np.asarray(np.memmap(self._file, dtype=np.uint8, mode="r", offset=start, shape=(stop - start,)))
        except (OSError, ValueError) as error:
            raise InputError(f"{self.path}: cannot be read: {error}") from error


def _decoder_file(folder: Path, config: Mapping[str, Any]) -> str:
    decoder = config.get("model", {}).get("decoder", {}) if isinstance(config.get("model", {}), Mapping) else {}
    name = decoder.get("filename", MODEL) if isinstance(decoder, Mapping) else MODEL
    if not (folder / name).exists() and not (folder / name).is_symlink():
        raise InputError(f"{folder} has no {name}; give a folder with {MODEL} or an .onnx file")
    return str(name)


def _graph_names(folder: Path, main: str, config: Mapping[str, Any]) -> list[str]:
    named = [value for key, value in _entries(config) if key.endswith("filename") and value.lower().endswith(".onnx")]
    more = [ALL_LOGITS] if os.path.lexists(folder / ALL_LOGITS) else []
    names = list(dict.fromkeys([main, *named, *more]))
    if len(names) > MAX_GRAPHS:
        raise InputError(f"{folder / CONFIG} names {len(names)} graphs; {MAX_GRAPHS} is the most")
    return names


def _read_config(folder: Path) -> Mapping[str, Any]:
    """Return genai_config.json, checked: no file outside the folder, no library, nothing that makes genai write; {} without one."""
    path = folder / CONFIG
    if not os.path.lexists(path):
        return MappingProxyType({})
    with _open_regular(path) as file:
        text = _read_whole(file, path, MAX_CONFIG_BYTES, "that is no configuration")
    try:
        config = json.loads(text.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid JSON ({error}); {_MEND}") from error
    if not isinstance(config, dict):
        raise InputError(f"{path}: not a JSON object; {_MEND}")
    for key, value in _entries(config):
        if key.endswith("filename") and not _is_safe_name(value):
            raise InputError(f"{path}: {key} is {value!r}, not the name of a file in the folder; {_MEND}")
        if key in _UNSAFE_KEYS:
            raise InputError(f"{path}: {key} lets a runtime load code or leave the folder; remove it")
    return MappingProxyType(config)


def _entries(value: object) -> Iterator[tuple[str, str]]:
    """Yield every key of nested JSON objects, with its value as text ("" where it is no string)."""
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, Mapping):
            yield from ((key, inner if isinstance(inner, str) else "") for key, inner in item.items())
            waiting += item.values()
        elif isinstance(item, list):
            waiting += item


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        raise ValueError("a key occurs twice")
    return table


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _is_safe_name(name: str) -> bool:
    # A colon names a stream or a drive on Windows; control characters have no place in a name.
    return is_bare_name(name) and ":" not in name and name.isprintable()


def _open_regular(path: Path) -> FileIO:
    """Open a regular file that is no link of either kind; the check is of what was opened, not of what had the name before."""
    try:
        before = os.lstat(path)
        if stat.S_ISLNK(before.st_mode):
            raise InputError(f"{path}: is a symbolic link; put the file itself there (cp -L)")
        if not stat.S_ISREG(before.st_mode):  # opening a pipe would wait for ever
            raise InputError(f"{path}: not a regular file; {_MEND}")
        flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
        file = FileIO(os.open(path, flags), "r")
    except FileNotFoundError as error:
        raise InputError(f"{path}: is missing; {_MEND}") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from error
    after = os.fstat(file.fileno())
    if not stat.S_ISREG(after.st_mode) or after.st_nlink > 1:
        file.close()
        raise InputError(f"{path}: is a hard link ({after.st_nlink} names); put a copy of its own there (cp)")
    return file


def _read_whole(file: FileIO, path: Path, limit: int, hint: str) -> bytes:
    size = os.fstat(file.fileno()).st_size
    if size > limit:
        raise InputError(f"{path}: {size} bytes; {limit} is the most, {hint}")
    try:
        data = file.read(limit + 1)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error}") from error
    if len(data) != size:
        raise InputError(f"{path}: changed while it was read; {_MEND}")
    return data


def _check_external(folder: Path, graphs: Mapping[str, OnnxGraph]) -> tuple[dict[str, _DataFile], int]:
    """Open every file that holds external tensors and hold each tensor's range against it; return the files and their bytes."""
    files: dict[str, _DataFile] = {}
    ranges: set[tuple[str, int, int, str]] = set()
    for graph in graphs.values():
        for tensor in graph.initializers.values():
            if tensor.location is None:
                continue
            name = tensor.location
            if not _is_safe_name(name):
                raise InputError(
                    f"{graph.path}: tensor {tensor.name!r} lies in {name!r}, not a file of the folder; {_MEND}"
                )
            if name not in files:
                files[name] = _DataFile(folder / name)
            stop = tensor.offset + tensor.nbytes
            if stop > files[name].size:
                raise InputError(
                    f"{folder / name}: tensor {tensor.name!r} ends at byte {stop} of a file of {files[name].size}; {_MEND}"
                )
            if tensor.nbytes:
                ranges.add((name, tensor.offset, stop, tensor.name))
    _refuse_overlaps(folder, ranges)
    return files, sum(file.size for file in files.values())


def _refuse_overlaps(folder: Path, ranges: Iterable[tuple[str, int, int, str]]) -> None:
    """Refuse tensors that share some of their bytes; sharing all of them is a tied embedding."""
    last: tuple[str, int, int, str] = ("", 0, 0, "")
    for place in sorted(ranges):
        if place[0] == last[0] and place[1] < last[2] and place[1:3] != last[1:3]:
            raise InputError(f"{folder / place[0]}: tensors {last[3]!r} and {place[3]!r} overlap; {_MEND}")
        last = place
