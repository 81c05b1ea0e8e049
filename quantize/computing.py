"""How torch computes while a calibrated run is at work: with the engine's threads, in its dtype, without gradients."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from r1q.core.errors import MissingError
from r1q.models.threads import torch_threads
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
    with torch_threads(engine.threads), torch.no_grad():
        yield


def engine_dtype(engine: Engine) -> torch.dtype:
    """Return the dtype that the engine multiplies in."""
    found: torch.dtype = getattr(torch, engine.compute)
    return found
