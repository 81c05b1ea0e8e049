"""What the float model makes of text: the states that its head reads, made once for windows that come again, else at every look."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from r1q.core.safetensors_file import SafetensorsFile, write_safetensors
from r1q.distill.network import load_network
from r1q.distill.text import Text, WindowText
from r1q.models.forward import TensorReader, final_states

Truth = Callable[[Tensor], Tensor]
"""Of token ids [rows, length]: what the teacher's head reads of them, [rows, length, hidden_size] in float32."""

_STATES, _ROWS = "states", 4096


def teacher_states(source: TensorReader, text: Text, path: Path) -> Truth:
    """Return what `source` makes of a text, in float32: what quantization cost is small beside the noise of 16 bits.

    Windows of text go through the model once, a block in memory at a time, and what comes of them lies in the file `path`; it is
    taken as it is where it is there. For text that is drawn anew at every step the model is read whole.
    """
    if not isinstance(text, WindowText):
        network = load_network(source)

        def drawn(tokens: Tensor) -> Tensor:
            with torch.no_grad():
                return network.hidden(tokens)

        return drawn
    shape = (*text.windows.shape, source.config.hidden_size)
    if not path.is_file():
        states = final_states(source, text.windows)
        write_safetensors(path, [(_STATES, "F32", shape)], (window.tobytes() for window in states))
        del states
    places = {window.tobytes(): place for place, window in enumerate(text.windows)}

    def remembered(tokens: Tensor) -> Tensor:
        with SafetensorsFile.open(path) as file:
            found = [places[row.tobytes()] for row in tokens.numpy()]
            return torch.from_numpy(np.concatenate([file.read_rows(_STATES, place, place + 1) for place in found]))

    return remembered


def read_head(source: TensorReader, dtype: torch.dtype) -> Tensor:
    """Return the head's weight [vocab_size, hidden_size] in `dtype`."""
    spec = next(s for s in source.tensors if s.kind == ("token_embd" if source.config.tied else "output"))
    head = torch.empty(spec.shape, dtype=dtype)
    for start in range(0, spec.rows, _ROWS):
        stop = min(start + _ROWS, spec.rows)
        rows = np.require(source.read_rows(spec.name, start, stop), dtype=np.float32, requirements=["C", "W"])
        head[start:stop] = torch.from_numpy(rows)
    return head
