"""torch: a float Hugging Face folder, one of our checkpoints, or a GPTQ folder, run as float numbers by our own decoder.

Codes are dequantized when the artifact is opened: this runtime is the reference for what weights mean, not for how fast few bits
can be. On the CPU it computes in bfloat16 as users of transformers do, or in float32.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from r1q.core.checkpoint import JOB, MANIFEST, QuantizedCheckpoint
from r1q.core.closing import Closing
from r1q.core.errors import InputError, MissingError, ResourceError, UsageError
from r1q.models.config import ModelConfig
from r1q.models.decoder import Cache, Decoder
from r1q.models.forward import Configured, TensorReader
from r1q.models.gptq_source import GptqSource, is_gptq
from r1q.models.source import ModelSource
from r1q.models.threads import torch_threads
from r1q.models.tokenizer import Tokenizer
from r1q.runtimes.base import Compute, Floats, Options, check_sequences, check_tokens, choose_context
from r1q.runtimes.cores import physical_cores

DTYPES: Mapping[Compute, torch.dtype] = {"bf16": torch.bfloat16, "f32": torch.float32}
_LOGITS_BYTES = 64 << 20  # of a slab of logits in the compute dtype, beside the float32 rows that are returned


class Torch:
    """The adapter."""

    name = "torch"
    formats = ("hf", "checkpoint", "gptq")

    def versions(self) -> Mapping[str, str]:
        """Return torch's version and the instructions it computes with."""
        return {"torch": torch.__version__, "torch CPU": torch.backends.cpu.get_cpu_capability()}

    def open(self, path: Path, options: Options) -> TorchSession:
        """Open a folder: a float model, an r1q checkpoint, or a GPTQ folder, told apart by their files.

        Raises InputError for a folder that is refused, UsageError for options that do not go together, MissingError without a GPU
        where one is asked for, ResourceError where memory does not suffice.
        """
        dtype, device = DTYPES[_compute(options)], _device(options)
        source, tokens = open_source(path)
        if options.device == "gpu" and options.gpu_layers not in (0, -1, source.config.num_layers):
            raise UsageError(
                f"torch puts all {source.config.num_layers} blocks on the GPU or none: leave GPU layers out"
            )
        started = time.perf_counter()
        with _within_memory(f"{path}: not enough memory to load it", options.device):
            return TorchSession(source, Tokenizer.open(tokens), options, dtype=dtype, device=device, started=started)


def open_source(path: Path) -> tuple[TensorReader, Path]:
    """Return the model in a folder, whichever of the three formats it has, and the folder with its tokenizer.

    Raises InputError for a folder that is none of them, or whose headers are not sound.
    """
    if (path / MANIFEST).is_file() or (path / JOB).is_file():
        checkpoint = QuantizedCheckpoint.open(path)
        config = ModelConfig.read(checkpoint.sidecar, name=checkpoint.model_name)
        return Configured(config, checkpoint), checkpoint.sidecar
    if is_gptq(path):
        return GptqSource.open(path), path
    return ModelSource.open(path), path


class TorchSession(Closing):
    """A decoder, its cache, and how many tokens each sequence holds."""

    runtime = "torch"

    def __init__(
        self,
        source: TensorReader,
        tokenizer: Tokenizer,
        options: Options,
        *,
        dtype: torch.dtype,
        device: torch.device,
        started: float,
    ) -> None:
        self.threads = options.threads or physical_cores()
        self.context = choose_context(options.context, source.config.max_position_embeddings)
        self.sequences = options.sequences
        self.device: str = "cpu" if device.type == "cpu" else torch.cuda.get_device_name(device)
        self.bos: int | None = tokenizer.bos_id if tokenizer.adds_bos else None
        self._tokenizer = tokenizer
        self._plain_attention = options.flash_attention is False
        self._kind = options.device
        self._held = [0] * self.sequences
        with self._computing():
            self._decoder: Decoder | None = Decoder(source, dtype=dtype, device=device, context=self.context)
            self._cache = self._decoder.new_cache(self.sequences)
        self.vocab = self._decoder.vocab_size
        self.load_seconds = time.perf_counter() - started

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text` by the folder's own tokenizer; special tokens spelled out in it become their ids."""
        self._open([])
        return self._tokenizer.encode(text, add_special=False)

    def prefill(self, sequence: int, tokens: Sequence[int]) -> Floats:
        """Append `tokens` to `sequence`; return the logits [vocab] after the last."""
        decoder = self._open([sequence])
        held = self._held[sequence]
        check_tokens(tokens, vocab=self.vocab, held=held, context=self.context)
        with self._computing():
            hidden = decoder.extend(self._cache, sequence, held, tokens)
            rows = self._rows(decoder, hidden[-1:])
        self._held[sequence] = held + len(tokens)
        return rows.reshape(-1)

    def step(self, pairs: Sequence[tuple[int, int]]) -> Floats:
        """Append one token to each named sequence in one batch; return logits [pairs, vocab] in the order given."""
        decoder = self._open([sequence for sequence, _ in pairs])
        if not pairs:
            raise UsageError("no tokens were given")
        for sequence, token in pairs:
            check_tokens((token,), vocab=self.vocab, held=self._held[sequence], context=self.context)
        # Sorted, neighbours are found whatever order they are named in; `back` is where each pair's row went.
        order = sorted(range(len(pairs)), key=lambda index: pairs[index][0])
        sequences, tokens = zip(*(pairs[index] for index in order), strict=True)
        with self._computing():
            hidden = decoder.step(self._cache, [self._held[s] for s in sequences], sequences, tokens)
            rows = self._rows(decoder, hidden)
        for sequence in sequences:
            self._held[sequence] += 1
        back = np.empty(len(pairs), dtype=np.intp)
        back[order] = np.arange(len(pairs))
        return rows[back]

    def drop(self, sequence: int, start: int = 0) -> None:
        """Forget the tokens of `sequence` from `start` on."""
        self._open([sequence])
        self._held[sequence] = min(max(start, 0), self._held[sequence])

    def logits(self, tokens: Sequence[int], first: int = 0) -> Floats:
        """Return the logits [len(tokens) − first, vocab] from position `first` on; the cache is not touched."""
        decoder = self._open([])
        check_tokens(tokens, vocab=self.vocab, held=0, context=self.context)
        if not 0 <= first < len(tokens):
            raise UsageError(f"there is no position {first} in {len(tokens)} tokens")
        with self._computing():
            return self._rows(decoder, decoder.score(tokens, first))

    def close(self) -> None:
        """Give weights and cache back."""
        self._decoder = None
        self._cache = Cache(keys=(), values=())

    def _open(self, sequences: Sequence[int]) -> Decoder:
        if self._decoder is None:
            raise UsageError("this session is closed: open the artifact again")
        check_sequences(sequences, count=self.sequences)
        return self._decoder

    def _rows(self, decoder: Decoder, hidden: Tensor) -> Floats:
        """Return the logits of normed hidden states as float32 rows, slab by slab. Raises InputError where they are not numbers."""
        rows = np.empty((len(hidden), self.vocab), dtype=np.float32)
        slab = max(1, _LOGITS_BYTES // (self.vocab * hidden.element_size()))
        for start in range(0, len(hidden), slab):
            part = decoder.logits(hidden[start : start + slab])
            torch.from_numpy(rows[start : start + slab]).copy_(part)
        if not np.isfinite(rows).all():
            raise InputError(
                "the model's logits are not finite: its weights or scales are damaged, or too large for its dtype"
            )
        return rows

    @contextlib.contextmanager
    def _computing(self) -> Iterator[None]:
        """Compute with this session's threads and kind of attention; torch's own setting, the process's, is put back."""
        plain = sdpa_kernel([SDPBackend.MATH]) if self._plain_attention else contextlib.nullcontext()
        told = f"not enough memory for {self.sequences} × {self.context} tokens"
        with torch_threads(self.threads), plain, _within_memory(told, self._kind):
            yield


def _compute(options: Options) -> Compute:
    """Return what to compute in: what is asked for, else float32 for a float32 cache, else bfloat16."""
    if options.cache == "q8_0":
        raise UsageError("torch keeps keys and values in the type it computes in: q8_0 is llama.cpp's cache")
    compute: Compute = options.compute or ("f32" if options.cache == "f32" else "bf16")
    if compute == "bf16" and options.cache == "f32":
        raise UsageError("torch keeps keys and values in the type it computes in: a cache of f32 needs compute f32")
    return compute


def _device(options: Options) -> torch.device:
    if options.device == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        built = torch.version.cuda
        why = f"built for CUDA {built}, finds no device" if built else "is built without CUDA"
        raise MissingError(
            f"this torch ({torch.__version__}) {why}: install one from pytorch.org for your GPU, or use the device cpu"
        )
    return torch.device("cuda", torch.cuda.current_device())


@contextlib.contextmanager
def _within_memory(what: str, device: str) -> Iterator[None]:
    """Turn torch's failed allocations, and only those, into ResourceError."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ResourceError(f"{what} on the {device}: a shorter context or fewer sequences need less") from error
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):
            raise
        raise ResourceError(f"{what} on the {device}: a shorter context or fewer sequences need less") from error
