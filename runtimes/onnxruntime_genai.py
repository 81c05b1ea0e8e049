"""onnxruntime-genai in this process: the same ONNX folder through its own loop, one Generator for each sequence.

Its default takes half of the cores that it counts (one of two), and the folder belongs to the user: what has to differ is laid over
genai_config.json in memory, by the library's own `Config.overlay`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from r1q.core.closing import Closing
from r1q.core.errors import MissingError, UsageError
from r1q.core.onnx_file import OnnxFolder
from r1q.models.tokenizer import Tokenizer
from r1q.runtimes.base import Floats, Options, check_sequences, check_tokens, choose_context
from r1q.runtimes.cores import physical_cores
from r1q.runtimes.huge_pages import on_huge_pages
from r1q.runtimes.onnx_decoder import OnnxDecoder, check_options, read_decoder, scoring_graph
from r1q.runtimes.ort import errors, failed, load_genai, load_onnxruntime, refused

og = load_genai()
ERRORS = errors()
ROWS = 256  # rows of logits that are computed at once: the scored half of a 512-token window


class OnnxRuntimeGenai:
    """The adapter."""

    name = "onnxruntime-genai"
    formats = ("onnx",)

    def versions(self) -> Mapping[str, str]:
        """Return the versions of onnxruntime-genai and of the onnxruntime under it."""
        return {"onnxruntime-genai": og.__version__, "onnxruntime": load_onnxruntime().__version__}

    def open(self, path: Path, options: Options) -> GenaiSession:
        """Check the folder with our own reader, then let onnxruntime-genai open it. `path` is the folder or its .onnx file.

        The folder fixes the type of keys and values: `options.cache` f32 is refused where it is another. Raises InputError,
        ResourceError, MissingError (no CUDA in this library), UsageError for options that it cannot honour.
        """
        decoder = read_decoder(OnnxFolder.open(path))
        if options.device == "gpu" and not og.is_cuda_available():
            raise MissingError(
                "this onnxruntime-genai has no CUDA: install onnxruntime-genai-cuda in its place, or use the device cpu"
            )
        check_options(decoder, options)
        return GenaiSession(decoder, Tokenizer.open(decoder.folder), options)


class GenaiSession(Closing):
    """A model and a Generator for each sequence that holds tokens; a second model for scoring texts where the first gives one row."""

    runtime = "onnxruntime-genai"

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
        self._generators: list[Any] = [None] * self.sequences
        started = time.perf_counter()
        self._model = self._load(decoder.main)
        self.load_seconds = time.perf_counter() - started
        self._scorer: Any = None

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text` by the folder's own tokenizer; special tokens spelled out in it become their ids."""
        self._open([])
        return self._tokenizer.encode(text, add_special=False)

    def prefill(self, sequence: int, tokens: Sequence[int]) -> Floats:
        """Append `tokens` to `sequence`; return the logits [vocab] after the last."""
        self._open([sequence])
        check_tokens(tokens, vocab=self.vocab, held=self._held[sequence], context=self.context)
        return self._append(sequence, tokens)

    def step(self, pairs: Sequence[tuple[int, int]]) -> Floats:
        """Append one token to each named sequence, one Generator after the other; return logits [pairs, vocab]."""
        self._open([sequence for sequence, _ in pairs])
        for sequence, token in pairs:
            check_tokens((token,), vocab=self.vocab, held=self._held[sequence], context=self.context)
        if not pairs:
            raise UsageError("no tokens were given")
        return np.stack([self._append(sequence, [token]) for sequence, token in pairs])

    def drop(self, sequence: int, start: int = 0) -> None:
        """Forget the tokens of `sequence` from `start` on."""
        self._open([sequence])
        start = min(max(start, 0), self._held[sequence])
        if start < self._held[sequence]:
            self._generators[sequence].rewind_to(start)
        self._held[sequence] = start

    def logits(self, tokens: Sequence[int], first: int = 0) -> Floats:
        """Return the logits [len(tokens) − first, vocab] from position `first` on, computed by a Generator of their own.

        Raises UsageError where the folder has no graph with the logits of every position.
        """
        self._open([])
        check_tokens(tokens, vocab=self.vocab, held=0, context=self.context)
        if not 0 <= first < len(tokens):
            raise UsageError(f"there is no position {first} in {len(tokens)} tokens")
        scorer = self._scoring()
        rows = np.empty((len(tokens) - first, self.vocab), dtype=np.float32)
        try:
            scorer.rewind_to(0)
            for start in range(0, len(tokens), ROWS):
                part = np.array(tokens[start : start + ROWS], dtype=np.int32)
                scorer.append_tokens(part)
                skip = max(0, first - start)
                if skip < len(part):
                    # `get_logits` is the last row; the graph's own output has them all.
                    rows[start + skip - first : start + len(part) - first] = scorer.get_output(
                        self._decoder.names.logits
                    )[0, skip:]
        except ERRORS as error:
            self._scorer = None
            raise failed("onnxruntime-genai", error) from error
        return rows

    def close(self) -> None:
        """Free the Generators, then the models."""
        self._generators, self._scorer, self._model = [], None, None

    def _open(self, sequences: Sequence[int]) -> None:
        if self._model is None:
            raise UsageError("this session is closed: open the artifact again")
        check_sequences(sequences, count=self.sequences)

    def _append(self, sequence: int, tokens: Sequence[int]) -> Floats:
        try:
            if self._generators[sequence] is None:
                self._generators[sequence] = self._new_generator(self._model)
            generator = self._generators[sequence]
            generator.append_tokens(np.array(tokens, dtype=np.int32))
            row = generator.get_logits()[0, -1]
        except ERRORS as error:
            # What the Generator holds now is not known.
            self._generators[sequence], self._held[sequence] = None, 0
            raise failed("onnxruntime-genai", error) from error
        self._held[sequence] += len(tokens)
        return np.array(row, dtype=np.float32)

    def _scoring(self) -> Any:
        if self._scorer is None:
            every = scoring_graph(self._decoder)
            self._scorer = self._new_generator(self._model if every == self._decoder.main else self._load(every))
        return self._scorer

    def _load(self, filename: str) -> Any:
        try:
            config = og.Config(str(self._decoder.folder))
            config.overlay(json.dumps(overlay(filename, threads=self.threads, context=self.context)))
            config.clear_providers()
            if self.device != "cpu":
                config.append_provider("cuda")
            with on_huge_pages():
                return og.Model(config)
        except ERRORS as error:
            raise refused(self._decoder.folder / filename, "onnxruntime-genai", error) from error

    def _new_generator(self, model: Any) -> Any:
        params = og.GeneratorParams(model)
        params.set_search_options(max_length=self.context)
        return og.Generator(model, params)


def overlay(filename: str, *, threads: int, context: int) -> dict[str, object]:
    """Return what is laid over a folder's genai_config.json: this graph, these threads, one plain sequence of `context` tokens.

    No token is padding: where a text ends in the folder's padding token (often the end-of-text one), genai 0.18 would return the
    logits of the last token before it.
    """
    options = {"intra_op_num_threads": threads, "inter_op_num_threads": 1, "log_severity_level": 4}
    one = {"num_beams": 1, "num_return_sequences": 1, "batch_size": 1}
    return {
        "model": {"pad_token_id": -1, "decoder": {"filename": filename, "session_options": options}},
        "search": {**one, "max_length": context, "past_present_share_buffer": True},
    }
