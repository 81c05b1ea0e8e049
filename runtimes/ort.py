"""The one place that imports onnxruntime and onnxruntime-genai: telemetry off before, log off the terminal, failures as our errors."""

from __future__ import annotations

import os
import re
from typing import Any

from r1q.core.errors import InputError, MissingError, R1qError, ResourceError

_FATAL = 4  # OrtLoggingLevel: what is left to say comes as an error
_OUT_OF_MEMORY = ("failed to allocate", "bad allocation", "bad_alloc", "out of memory", "cannot allocate")
_PREFIX = re.compile(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ")
_LONGEST = 400


def load_onnxruntime() -> Any:
    """Import and return onnxruntime. Raises MissingError where it is absent or does not load."""
    # Official builds send usage data unless this is set before the import (onnxruntime 1.29 and later).
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    try:
        import onnxruntime
    except ModuleNotFoundError as error:
        raise MissingError("the runtime needs onnxruntime: pip install 'r1q[onnx]'") from error
    except (ImportError, OSError, RuntimeError) as error:
        raise MissingError(f"onnxruntime is installed but does not load: {error}") from error
    onnxruntime.disable_telemetry_events()  # where something else had imported it before
    onnxruntime.set_default_logger_severity(_FATAL)
    return onnxruntime


def load_genai() -> Any:
    """Import and return onnxruntime_genai. Raises MissingError where it is absent or does not load."""
    load_onnxruntime()  # it finds onnxruntime's library by itself, but telemetry has to be off first
    try:
        import onnxruntime_genai
    except ModuleNotFoundError as error:
        raise MissingError("the runtime needs onnxruntime-genai: pip install 'r1q[genai]'") from error
    except (ImportError, OSError, RuntimeError) as error:
        raise MissingError(f"onnxruntime-genai is installed but does not load: {error}") from error
    onnxruntime_genai.disable_telemetry_events()
    return onnxruntime_genai


def errors() -> tuple[type[Exception], ...]:
    """Return every kind of error that onnxruntime raises: its own have no common base but Exception."""
    native = vars(load_onnxruntime().capi.onnxruntime_pybind11_state).values()
    own = (kind for kind in native if isinstance(kind, type) and issubclass(kind, Exception))
    return (*own, RuntimeError, ValueError, MemoryError)


def reason(error: BaseException) -> str:
    """Return onnxruntime's own words as one line without its code numbers, and not more of them than a line takes."""
    text = _PREFIX.sub("", " ".join(str(error).split()))
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"


def refused(where: object, what: str, error: BaseException) -> R1qError:
    """Return the error for a folder that `what` ("onnxruntime", …) fails to load."""
    if _ran_out_of_memory(error):
        return ResourceError(f"{where}: not enough memory to load it: {reason(error)}")
    return InputError(f"{where}: {what} refuses to load it: {reason(error)}")


def failed(what: str, error: BaseException) -> R1qError:
    """Return the error for a computation that failed."""
    if _ran_out_of_memory(error):
        return ResourceError(f"{what} ran out of memory: {reason(error)}; open it with a shorter context")
    return MissingError(f"{what} failed to compute: {reason(error)}")


def _ran_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError) or any(sign in str(error).lower() for sign in _OUT_OF_MEMORY)
