"""llama.cpp's token ids, from a process of its own: `python -m r1q.export.tokenizer_proof` reads a request and answers it.

Only the vocabulary of the file is loaded. A crash of native code ends the child, not the caller, and leaves a message.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import r1q
from r1q.core.errors import InputError, MissingError
from r1q.core.gguf_file import GgufFile

_SECONDS = 300
_MAX_TOKENS = 1 << 16
_REFUSED = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class NativeTokens:
    """llama.cpp's `ids` of each text (special tokens parsed, none added), of the first one `framed` by what it adds."""

    ids: list[list[int]]
    framed: list[int]
    version: str


def tokenize_apart(gguf: Path, texts: Sequence[str]) -> NativeTokens:
    """Return llama.cpp's tokens of each text, and the version that gave them.

    Raises `InputError` when llama.cpp refuses the file, `MissingError` when it crashes or takes longer than five minutes.
    """
    GgufFile.open(gguf)  # native code reads only what our own reader has checked
    request = json.dumps({"gguf": str(gguf), "texts": list(texts)})
    roots = [str(Path(r1q.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-m", "r1q.export.tokenizer_proof"],
            input=request,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=_SECONDS,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, roots))},
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise MissingError(
            f"{gguf}: llama.cpp did not tokenize {len(texts)} short texts in {_SECONDS} seconds"
        ) from error
    if done.returncode == 0:
        answer: dict[str, Any] = json.loads(done.stdout)
        return NativeTokens(**answer)
    reason = " ".join(done.stderr.split())[-300:] or "no message"
    if done.returncode == _REFUSED:
        raise InputError(f"{gguf}: llama.cpp refuses the vocabulary: {reason}")
    raise MissingError(f"{gguf}: llama.cpp crashed on the vocabulary (exit {done.returncode}): {reason}")


def _main() -> int:
    """Answer one request from standard input on standard output; llama.cpp's own messages go to standard error."""
    import llama_cpp

    request = json.loads(sys.stdin.buffer.read())
    answers = os.dup(1)
    os.dup2(2, 1)  # whatever native code prints must not end up in the answer
    said: list[str] = []

    @llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
    def listen(level: int, message: bytes, data: object) -> None:
        if level >= 3:  # GGML_LOG_LEVEL_WARN; 4 is ERROR
            said.append(message.decode("utf-8", "replace"))

    llama_cpp.llama_log_set(listen, None)
    llama_cpp.llama_backend_init()
    params = llama_cpp.llama_model_default_params()
    params.vocab_only = True
    model = llama_cpp.llama_model_load_from_file(request["gguf"].encode(), params)
    if not model:
        sys.stderr.write("".join(said))
        return _REFUSED
    vocab = llama_cpp.llama_model_get_vocab(model)
    texts = [text.encode() for text in request["texts"]]
    ids = [_tokenize(llama_cpp, vocab, text, False) for text in texts]
    framed = _tokenize(llama_cpp, vocab, texts[0], True)
    llama_cpp.llama_model_free(model)
    version = f"llama-cpp-python {importlib.metadata.version('llama-cpp-python')}"
    with os.fdopen(answers, "w", encoding="utf-8") as out:
        json.dump({"ids": ids, "framed": framed, "version": version}, out)
    return 0


def _tokenize(llama_cpp: Any, vocab: Any, text: bytes, add_special: bool) -> list[int]:
    room = len(text) + 8
    buffer = (llama_cpp.llama_token * room)()
    count = llama_cpp.llama_tokenize(vocab, text, len(text), buffer, room, add_special, True)
    if count < 0:
        raise ValueError(f"{-count} tokens from {len(text)} bytes")
    return list(buffer[:count])


if __name__ == "__main__":
    sys.exit(_main())
