"""llama.cpp in this process, through llama-cpp-python's low-level API. Opens GGUF files.

Two contexts over one model: the first holds the sequences and computes one row of logits for each; the second, made when `logits` is
first called, computes many rows for one text. So a session that only generates never pays for the rows it does not use.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np

from r1q.core.closing import Closing
from r1q.core.errors import InputError, MissingError, ResourceError, UsageError
from r1q.core.gguf_file import GgufFile
from r1q.runtimes import llama_log
from r1q.runtimes.base import Floats, Options, check_sequences, check_tokens, choose_context
from r1q.runtimes.cores import physical_cores

GGML_TYPES = {"f32": llama_cpp.GGML_TYPE_F32, "f16": llama_cpp.GGML_TYPE_F16, "q8_0": llama_cpp.GGML_TYPE_Q8_0}
BATCH = 2048  # llama-bench's n_batch and n_ubatch, so that its numbers compare with ours
MICRO_BATCH = 512
ROWS = 256  # rows of logits that `logits` asks for at once: the scored half of a 512-token window


class LlamaCpp:
    """The adapter."""

    name = "llama-cpp"
    formats = ("gguf",)

    def versions(self) -> Mapping[str, str]:
        """Return the versions of llama-cpp-python and of the llama.cpp in it, and what the build can use."""
        return {
            "llama-cpp-python": importlib.metadata.version("llama-cpp-python"),
            "llama.cpp": llama_cpp.llama_version().decode() if hasattr(llama_cpp, "llama_version") else "unknown",
            "llama.cpp build": " ".join(llama_cpp.llama_print_system_info().decode().split()),
        }

    def open(self, path: Path, options: Options) -> LlamaSession:
        """Check the GGUF with our own reader, then let llama.cpp open it.

        Raises InputError, ResourceError, MissingError (llama.cpp refuses it, or was built without a GPU) with llama.cpp's own reason.
        """
        GgufFile.open(path)
        if options.device == "gpu" and not llama_cpp.llama_supports_gpu_offload():
            raise MissingError(
                "this llama-cpp-python was built without a GPU: reinstall it with CMAKE_ARGS='-DGGML_CUDA=on', or use the device cpu"
            )
        llama_log.capture()
        llama_cpp.llama_backend_init()
        started = time.perf_counter()
        model = llama_cpp.llama_model_load_from_file(str(path).encode(), _model_params(options))
        if not model:
            if llama_log.ran_out_of_memory():
                raise ResourceError(f"{path}: not enough memory to load it: {llama_log.reason()}")
            raise InputError(f"{path}: llama.cpp refuses to load it: {llama_log.reason()}")
        try:
            return LlamaSession(model, options, started=started)
        except BaseException:
            llama_cpp.llama_model_free(model)
            raise


class LlamaSession(Closing):
    """A loaded model, a context for its sequences, and one for scoring texts when that is asked for."""

    runtime = "llama-cpp"

    def __init__(self, model: Any, options: Options, *, started: float) -> None:
        vocabulary = llama_cpp.llama_model_get_vocab(model)
        self._model = model
        self._vocabulary = vocabulary
        self._options = options
        self.device: str = options.device
        self.threads = options.threads or physical_cores()
        self.vocab = int(llama_cpp.llama_vocab_n_tokens(vocabulary))
        self.context = choose_context(options.context, int(llama_cpp.llama_model_n_ctx_train(model)))
        self.sequences = options.sequences
        adds_bos = llama_cpp.llama_vocab_get_add_bos(vocabulary)
        self.bos: int | None = int(llama_cpp.llama_vocab_bos(vocabulary)) if adds_bos else None
        self._held = [0] * self.sequences
        self._scorer: _Context | None = None
        self._closed = False
        self._context = self._new_context(sequences=self.sequences, rows=self.sequences)
        self.load_seconds = time.perf_counter() - started

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text` by the GGUF's own tokenizer; special tokens spelled out in it become their ids."""
        self._check([])
        data = text.encode()
        room = len(data) + 16  # a token stands for at least one byte
        ids = (llama_cpp.llama_token * room)()
        count = llama_cpp.llama_tokenize(self._vocabulary, data, len(data), ids, room, False, True)
        if count < 0:
            raise InputError(f"llama.cpp could not split a text of {len(data)} bytes into tokens: {llama_log.reason()}")
        return list(ids[:count])

    def prefill(self, sequence: int, tokens: Sequence[int]) -> Floats:
        """Append `tokens` to `sequence`, 2048 at a time; return the logits [vocab] after the last."""
        self._check([sequence])
        held = self._held[sequence]
        check_tokens(tokens, vocab=self.vocab, held=held, context=self.context)
        size = self._context.batch
        for start in range(0, len(tokens), size):
            part = tokens[start : start + size]
            positions = np.arange(held + start, held + start + len(part))
            wanted = np.zeros(len(part), dtype=np.int8)
            wanted[-1] = start + len(part) == len(tokens)
            try:
                self._context.decode(part, positions, sequence, wanted)
            except BaseException:
                self._context.forget(sequence, held)
                raise
        self._held[sequence] = held + len(tokens)
        return self._context.row((len(tokens) - 1) % size)

    def step(self, pairs: Sequence[tuple[int, int]]) -> Floats:
        """Append one token to each named sequence in one batch; return logits [pairs, vocab] in the order given."""
        sequences = [sequence for sequence, _ in pairs]
        self._check(sequences)
        for sequence, token in pairs:
            check_tokens((token,), vocab=self.vocab, held=self._held[sequence], context=self.context)
        if not pairs:
            raise UsageError("no tokens were given")
        try:
            self._context.decode([token for _, token in pairs], [self._held[s] for s in sequences], sequences, 1)
        except BaseException:
            for sequence in sequences:
                self._context.forget(sequence, self._held[sequence])
            raise
        for sequence in sequences:
            self._held[sequence] += 1
        return self._context.every_row(len(pairs))

    def drop(self, sequence: int, start: int = 0) -> None:
        """Forget the tokens of `sequence` from `start` on."""
        self._check([sequence])
        start = min(max(start, 0), self._held[sequence])
        self._context.forget(sequence, start)
        self._held[sequence] = start

    def set_threads(self, count: int) -> None:
        """Let `count` threads compute from now on; what they compute stays the same but for the order of sums in long contexts."""
        self._check([])
        self._context.set_threads(count)
        self.threads = count

    def logits(self, tokens: Sequence[int], first: int = 0) -> Floats:
        """Return the logits [len(tokens) − first, vocab] from position `first` on, computed in a context of their own."""
        self._check([])
        check_tokens(tokens, vocab=self.vocab, held=0, context=self.context)
        if not 0 <= first < len(tokens):
            raise UsageError(f"there is no position {first} in {len(tokens)} tokens")
        if self._scorer is None:
            self._scorer = self._new_context(sequences=1, rows=min(ROWS, self.context))
        scorer = self._scorer
        scorer.forget(0, 0)
        rows = np.empty((len(tokens) - first, self.vocab), dtype=np.float32)
        start = 0
        while start < len(tokens):
            end = min(start + MICRO_BATCH, scorer.batch + start, len(tokens), max(start, first) + scorer.rows)
            positions = np.arange(start, end)
            scorer.decode(tokens[start:end], positions, 0, positions >= first)
            for position in range(max(start, first), end):
                rows[position - first] = scorer.row(position - start)
            start = end
        return rows

    def close(self) -> None:
        """Free the contexts, then the model."""
        if self._closed:
            return
        self._closed = True
        self._context.close()
        if self._scorer is not None:
            self._scorer.close()
        llama_cpp.llama_model_free(self._model)

    def _check(self, sequences: Sequence[int]) -> None:
        # A freed context in the hands of llama.cpp is a crash, not an error: ask first.
        if self._closed:
            raise UsageError("this session is closed: open the artifact again")
        check_sequences(sequences, count=self.sequences)

    def _new_context(self, *, sequences: int, rows: int) -> _Context:
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = self.context * sequences
        params.n_batch, params.n_ubatch = BATCH, MICRO_BATCH
        params.n_seq_max = sequences
        if hasattr(params, "n_outputs_max"):
            params.n_outputs_max = rows
        params.n_threads = params.n_threads_batch = self.threads
        params.type_k = params.type_v = GGML_TYPES[self._options.cache]
        if self._options.flash_attention is False:
            params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.offload_kqv = params.op_offload = self._options.device == "gpu"
        pointer = llama_cpp.llama_init_from_model(self._model, params)
        if not pointer:
            if llama_log.ran_out_of_memory():
                raise ResourceError(f"not enough memory for a context of {params.n_ctx} tokens: {llama_log.reason()}")
            raise MissingError(f"llama.cpp could not make a context of {params.n_ctx} tokens: {llama_log.reason()}")
        return _Context(pointer, self.vocab, rows)


class _Context:
    """A llama_context and one batch whose arrays are numpy's, so that filling it is one copy for all tokens."""

    def __init__(self, pointer: Any, vocab: int, rows: int) -> None:
        self._pointer = pointer
        self._memory = llama_cpp.llama_get_memory(pointer)
        self._vocab = vocab
        self.rows = rows
        self.batch = int(llama_cpp.llama_n_batch(pointer))
        self._token = np.zeros(self.batch, dtype=np.int32)
        self._position = np.zeros(self.batch, dtype=np.int32)
        self._count = np.ones(self.batch, dtype=np.int32)
        self._sequence = np.zeros(self.batch, dtype=np.int32)
        self._wanted = np.zeros(self.batch, dtype=np.int8)
        # llama_batch wants a pointer to a list of sequences for every token: each of ours is one int of `_sequence`.
        addresses = self._sequence.ctypes.data + 4 * np.arange(self.batch, dtype=np.uintp)
        self._lists = np.ascontiguousarray(addresses, dtype=np.uintp)
        self._batch = llama_cpp.llama_batch(
            0,
            _pointer(self._token, llama_cpp.llama_token),
            None,
            _pointer(self._position, llama_cpp.llama_pos),
            _pointer(self._count, ctypes.c_int32),
            _pointer(self._lists, ctypes.POINTER(llama_cpp.llama_seq_id)),
            _pointer(self._wanted, ctypes.c_int8),
        )

    def decode(self, tokens: Any, positions: Any, sequences: Any, wanted: Any) -> None:
        """Run one batch; scalars serve all of its tokens. Raises ResourceError or MissingError with llama.cpp's reason."""
        size = len(tokens)
        self._batch.n_tokens = size
        self._token[:size] = tokens
        self._position[:size] = positions
        self._sequence[:size] = sequences
        self._wanted[:size] = wanted
        code = llama_cpp.llama_decode(self._pointer, self._batch)
        if code == 1:
            raise ResourceError(
                f"llama.cpp found no room for {size} more tokens in its context: open it with a longer one"
            )
        if code:
            raise MissingError(f"llama.cpp failed to compute (code {code}): {llama_log.reason()}")

    def row(self, index: int) -> Floats:
        """Return a copy of the logits [vocab] of the batch's token `index`."""
        values = llama_cpp.llama_get_logits_ith(self._pointer, index)
        if not values:
            raise MissingError(f"llama.cpp returned no logits: {llama_log.reason()}")
        return np.ctypeslib.as_array(values, shape=(self._vocab,)).copy()

    def every_row(self, count: int) -> Floats:
        """Return a copy of the logits [count, vocab] of a batch whose every token wanted them."""
        values = llama_cpp.llama_get_logits(self._pointer)
        if not values:
            raise MissingError(f"llama.cpp returned no logits: {llama_log.reason()}")
        return np.ctypeslib.as_array(values, shape=(count, self._vocab)).copy()

    def forget(self, sequence: int, start: int) -> None:
        """Drop what the memory holds of `sequence` from `start` on."""
        llama_cpp.llama_memory_seq_rm(self._memory, sequence, start, -1)

    def set_threads(self, count: int) -> None:
        llama_cpp.llama_set_n_threads(self._pointer, count, count)

    def close(self) -> None:
        llama_cpp.llama_free(self._pointer)


def _pointer(array: Any, kind: Any) -> Any:
    return ctypes.cast(array.ctypes.data, ctypes.POINTER(kind))


def _model_params(options: Options) -> Any:
    params = llama_cpp.llama_model_default_params()
    # −1 means "all" to llama.cpp; on the CPU nothing may go elsewhere, whatever the build can do.
    params.n_gpu_layers = options.gpu_layers if options.device == "gpu" else 0
    return params
