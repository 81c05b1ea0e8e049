"""onnxruntime in this process, by our own loop: an ONNX folder whose caches are written in place.

One buffer holds the keys and values of all sequences, [sequences, heads, context, head size] for each layer, and is bound as what the
graph reads and as what it writes: a step copies no cache and allocates nothing but the logits it returns. Sequences that lie side by
side in the buffer step together, so that the weights are read once for all of them.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from r1q.core.allocator import trim_freed_memory
from r1q.core.closing import Closing
from r1q.core.errors import MissingError, ResourceError, UsageError
from r1q.core.onnx_file import OnnxFolder
from r1q.models.tokenizer import Tokenizer
from r1q.runtimes.base import Floats, Options, check_sequences, check_tokens, choose_context
from r1q.runtimes.cores import physical_cores
from r1q.runtimes.huge_pages import on_huge_pages
from r1q.runtimes.onnx_decoder import OnnxDecoder, check_options, read_decoder, scoring_graph
from r1q.runtimes.ort import errors, failed, load_onnxruntime, refused

ort = load_onnxruntime()
ERRORS = errors()
CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"
CHUNK = 512  # tokens of a text that are computed at once
ROWS = 256  # rows of logits that are computed at once: the scored half of a 512-token window
SPARE_BYTES = 64 << 20  # of logits that nobody asked for, where a graph cannot leave them out
MAX_BINDINGS = 64  # kept ready: a set of bound caches for each stretch of sequences that stepped together

Tokens = NDArray[np.int64]


class OnnxRuntime:
    """The adapter."""

    name = "onnxruntime"
    formats = ("onnx",)

    def versions(self) -> Mapping[str, str]:
        """Return onnxruntime's version and what it can compute on."""
        return {"onnxruntime": ort.__version__, "onnxruntime providers": " ".join(ort.get_available_providers())}

    def open(self, path: Path, options: Options) -> OnnxSession:
        """Check the folder with our own reader, then let onnxruntime open it. `path` is the folder or its .onnx file.

        The folder fixes the type of keys and values: `options.cache` f32 is refused where it is another. Raises InputError,
        ResourceError, MissingError (no CUDA in this library), UsageError for options that it cannot honour.
        """
        decoder = read_decoder(OnnxFolder.open(path))
        _check_cuda(options)
        check_options(decoder, options)
        return OnnxSession(decoder, Tokenizer.open(decoder.folder), options)


def _check_cuda(options: Options) -> None:
    if options.device == "gpu" and CUDA not in ort.get_available_providers():
        raise MissingError(
            "this onnxruntime has no CUDA: pip uninstall onnxruntime, pip install onnxruntime-gpu, or use the device cpu"
        )


class OnnxSession(Closing):
    """The graph that generates, the caches of its sequences, and the graph for scoring texts when that is asked for."""

    runtime = "onnxruntime"

    def __init__(self, decoder: OnnxDecoder, tokenizer: Tokenizer, options: Options) -> None:
        self.device = "cpu" if options.device == "cpu" else "cuda:0"
        self.threads = options.threads or physical_cores()
        self.vocab = decoder.sides.vocab
        self.context = choose_context(options.context, decoder.sides.context)
        self.sequences = options.sequences
        self.bos = tokenizer.bos_id if tokenizer.adds_bos else None
        self._tokenizer = tokenizer
        self._decoder = decoder
        self._held = [0] * self.sequences
        trim_freed_memory()
        started = time.perf_counter()
        self._cache = _Cache(decoder, self.sequences, self.context, self.device)
        self._graph: _Graph | None = _Graph(decoder, decoder.main, self.threads, self.device)
        self.load_seconds = time.perf_counter() - started
        self._every: _Graph | None = None
        self._scratch: _Cache | None = None

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text` by the folder's own tokenizer; special tokens spelled out in it become their ids."""
        self._open([])
        return self._tokenizer.encode(text, add_special=False)

    def prefill(self, sequence: int, tokens: Sequence[int]) -> Floats:
        """Append `tokens` to `sequence`, at most 512 at a time; return the logits [vocab] after the last."""
        graph, held = self._open([sequence]), self._held[sequence]
        check_tokens(tokens, vocab=self.vocab, held=held, context=self.context)
        row = np.empty((1, self.vocab), dtype=np.float32)
        _append(graph, self._cache, sequence, tokens, held, row)
        self._held[sequence] = held + len(tokens)
        logits: Floats = row[0]
        return logits

    def step(self, pairs: Sequence[tuple[int, int]]) -> Floats:
        """Append one token to each named sequence; neighbours in one batch. Returns logits [pairs, vocab] in the order given."""
        graph = self._open([sequence for sequence, _ in pairs])
        for sequence, token in pairs:
            check_tokens((token,), vocab=self.vocab, held=self._held[sequence], context=self.context)
        if not pairs:
            raise UsageError("no tokens were given")
        order = sorted(range(len(pairs)), key=lambda index: pairs[index][0])
        rows = np.empty((len(pairs), self.vocab), dtype=np.float32)
        for start, stop in _neighbours([pairs[index][0] for index in order]):
            batch = [pairs[index] for index in order[start:stop]]
            ids = np.array([[token] for _, token in batch], dtype=np.int64)
            lengths = [self._held[sequence] + 1 for sequence, _ in batch]
            graph.run(self._cache, batch[0][0], ids, lengths, rows[start:stop, None])
        for sequence, _ in pairs:
            self._held[sequence] += 1
        return rows if order == sorted(order) else rows[np.argsort(order)]

    def drop(self, sequence: int, start: int = 0) -> None:
        """Forget the tokens of `sequence` from `start` on: what the buffer holds there is written over."""
        self._open([sequence])
        self._held[sequence] = min(max(start, 0), self._held[sequence])

    def logits(self, tokens: Sequence[int], first: int = 0) -> Floats:
        """Return the logits [len(tokens) − first, vocab] from position `first` on, computed in a cache of their own.

        Raises UsageError where the folder has no graph with the logits of every position.
        """
        graph = self._open([])
        check_tokens(tokens, vocab=self.vocab, held=0, context=self.context)
        if not 0 <= first < len(tokens):
            raise UsageError(f"there is no position {first} in {len(tokens)} tokens")
        every = self._scoring(graph)
        if self._scratch is None:
            self._scratch = _Cache(self._decoder, 1, self.context, self.device)
        rows = np.empty((len(tokens) - first, self.vocab), dtype=np.float32)
        if first:
            # Nobody asked for logits here: the graph that generates computes one row for each part.
            _append(graph, self._scratch, 0, tokens[:first], 0, rows[:1])
        for start in range(first, len(tokens), ROWS):
            part = tokens[start : start + ROWS]
            ids = np.array([part], dtype=np.int64)
            done = start - first
            every.run(self._scratch, 0, ids, [start + len(part)], rows[None, done : done + len(part)])
        return rows

    def close(self) -> None:
        """Free the graphs and the caches."""
        self._graph = self._every = self._scratch = None
        self._cache.free()

    def _open(self, sequences: Sequence[int]) -> _Graph:
        if self._graph is None:
            raise UsageError("this session is closed: open the artifact again")
        check_sequences(sequences, count=self.sequences)
        return self._graph

    def _scoring(self, graph: _Graph) -> _Graph:
        if self._every is None:
            every = scoring_graph(self._decoder)
            same = every == self._decoder.main
            self._every = graph if same else _Graph(self._decoder, every, self.threads, self.device)
        return self._every


def _append(graph: _Graph, cache: _Cache, row: int, tokens: Sequence[int], held: int, last: Floats) -> None:
    """Append `tokens` to row `row` of a cache that holds `held`, in parts; write the logits after the last to `last` [1, vocab]."""
    size = CHUNK if graph.only_last else max(1, min(CHUNK, SPARE_BYTES // last.nbytes))
    rows = 1 if graph.only_last else min(size, len(tokens))
    spare = last[None] if graph.only_last else np.empty((1, rows, last.shape[1]), dtype=np.float32)
    for start in range(0, len(tokens), size):
        part = np.array([tokens[start : start + size]], dtype=np.int64)
        made = spare[:, : 1 if graph.only_last else part.shape[1]]
        graph.run(cache, row, part, [held + start + part.shape[1]], made)
    if not graph.only_last:
        last[:] = made[0, -1:]


def _neighbours(sequences: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield [start, stop) of every stretch of consecutive numbers in a sorted list.

    >>> list(_neighbours([0, 1, 3]))
    [(0, 2), (2, 3)]
    """
    start = 0
    for stop in range(1, len(sequences) + 1):
        if stop == len(sequences) or sequences[stop] != sequences[stop - 1] + 1:
            yield start, stop
            start = stop


class _Cache:
    """Keys and values of `sequences`, a buffer [sequences, heads, context, width] for each of them and each layer.

    Memory is the system's until it is written to. On Linux numpy asks for pages of 2 MB for arrays of 4 MB and more: there a first
    token takes one for each head of each buffer, which at a context of 8,192 with heads of 64 floats is all of them.
    """

    def __init__(self, decoder: OnnxDecoder, sequences: int, context: int, device: str) -> None:
        kinds, names = decoder.kinds, decoder.names
        shape = (sequences, decoder.sides.heads, context, kinds.cache_width)
        self.dtype = np.dtype(kinds.cache)
        self.device = device.partition(":")[0]
        self.row_shape = shape[1:]
        self._stride = int(np.prod(self.row_shape)) * self.dtype.itemsize
        size = len(names.past) * sequences * self._stride
        try:
            self._buffers = [self._buffer(shape) for _ in names.past]
        except ERRORS as error:
            raise ResourceError(
                f"not enough memory for keys and values of {sequences} × {context} tokens ({size >> 20} MB): ask for a shorter context"
            ) from error
        self.bindings: dict[object, Any] = {}

    def _buffer(self, shape: tuple[int, ...]) -> tuple[Any, int]:
        """Return a buffer (the object that owns it) and its address."""
        if self.device == "cpu":
            array = np.empty(shape, dtype=self.dtype)
            return array, array.ctypes.data
        value = ort.OrtValue.ortvalue_from_shape_and_type(shape, self.dtype.type, self.device, 0)
        return value, value.data_ptr()

    def addresses(self, row: int) -> list[int]:
        """Return where row `row` begins in each buffer."""
        return [address + row * self._stride for _, address in self._buffers]

    def free(self) -> None:
        """Forget the buffers and whatever is bound to them."""
        self.bindings.clear()
        self._buffers.clear()


class _Graph:
    """One graph, opened by onnxruntime."""

    def __init__(self, decoder: OnnxDecoder, name: str, threads: int, device: str) -> None:
        self.only_last = name != decoder.every
        self._names = decoder.names
        self._logits = np.dtype(decoder.kinds.logits)
        try:
            providers = [CPU] if device == "cpu" else [CUDA, CPU]
            with on_huge_pages():
                self._session = ort.InferenceSession(
                    str(decoder.folder / name), session_options(threads), providers=providers
                )
        except ERRORS as error:
            raise refused(decoder.folder / name, "onnxruntime", error) from error

    def run(self, cache: _Cache, row: int, ids: Tokens, lengths: Sequence[int], logits: Floats) -> None:
        """Append `ids` [batch, tokens] to rows `row`… of a cache, then `lengths` long; fill `logits` [batch, positions, vocab].

        `logits` is contiguous float32, one position where the graph gives the last one only. A batch of several has one token each.
        """
        names, batch = self._names, len(ids)
        mask = np.zeros((batch, max(lengths)), dtype=np.int64)
        for index, length in enumerate(lengths):
            mask[index, :length] = 1
        made = logits if self._logits == logits.dtype else np.empty(logits.shape, dtype=self._logits)
        try:
            binding = self._binding(cache, row, batch)
            # Bound anew each time: on the CPU that costs microseconds, and on a GPU binding is what copies the input.
            binding.bind_input(names.ids, "cpu", 0, np.int64, ids.shape, ids.ctypes.data)
            binding.bind_input(names.mask, "cpu", 0, np.int64, mask.shape, mask.ctypes.data)
            binding.bind_output(names.logits, "cpu", 0, self._logits.type, made.shape, made.ctypes.data)
            self._session.run_with_iobinding(binding)
        except ERRORS as error:
            raise failed("onnxruntime", error) from error
        if made is not logits:
            logits[:] = made

    def _binding(self, cache: _Cache, row: int, batch: int) -> Any:
        """Return a binding of `batch` rows of a cache, as past and as present."""
        key = (self, row, batch)
        if key not in cache.bindings:
            if len(cache.bindings) >= MAX_BINDINGS:
                cache.bindings.clear()
            binding = self._session.io_binding()
            shape = (batch, *cache.row_shape)
            for past, present, address in zip(self._names.past, self._names.present, cache.addresses(row), strict=True):
                binding.bind_input(past, cache.device, 0, cache.dtype.type, shape, address)
                binding.bind_output(present, cache.device, 0, cache.dtype.type, shape, address)
            cache.bindings[key] = binding
        return cache.bindings[key]


def session_options(threads: int) -> Any:
    """Return how a graph is opened.

    Measured with 135M parameters in 4 bits on 2 cores: waiting threads that sleep instead of spinning decode at 0.6 to 0.7 times the
    speed, and no arena takes a tenth more memory at its peak (450 MB against 410), so onnxruntime's own defaults stay: both on. Memory
    patterns, denormals as zero, a lower graph optimization: no difference above the noise of 7 %.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1  # a decoder has no branches worth a second pool
    options.log_severity_level = 4  # failures come as errors
    return options
