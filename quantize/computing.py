"""How torch computes while a calibrated run is at work: with the engine's threads, without gradients."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from r1q.core.errors import MissingError
from r1q.quantize.engine import Engine


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
