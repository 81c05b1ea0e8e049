"""The runtimes by name, and which of them opens which format. Nothing is imported until a runtime is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from r1q.core.errors import UsageError, unknown_name
from r1q.core.registry import Entry, Registry
from r1q.runtimes.base import Runtime, RuntimeFactory

RUNTIMES: Registry[RuntimeFactory] = Registry(
    "runtime",
    {
        "llama-cpp": Entry(
            target="r1q.runtimes.llama_cpp:LlamaCpp",
            about="llama.cpp in this process, through llama-cpp-python",
            needs="llama_cpp",
            extra="llama-cpp",
        ),
        "torch": Entry(
            target="r1q.runtimes.torch:Torch",
            about="our own decoder in torch: float folders, and codes as the floats they mean",
            needs="torch",
        ),
        "onnxruntime": Entry(
            target="r1q.runtimes.onnxruntime:OnnxRuntime",
            about="onnxruntime in this process, with our own loop: caches written in place",
            needs="onnxruntime",
            extra="onnx",
            prepares=True,
        ),
        "onnxruntime-genai": Entry(
            target="r1q.runtimes.onnxruntime_genai:OnnxRuntimeGenai",
            about="onnxruntime-genai in this process, with its loop",
            needs="onnxruntime_genai",
            extra="genai",
            prepares=True,
        ),
        "echo": Entry(target="r1q.runtimes.echo:Echo", about="says again what it has read; for tests, needs nothing"),
    },
    group="r1q.runtimes",
)

DEFAULTS: Mapping[str, str] = MappingProxyType(
    {"gguf": "llama-cpp", "onnx": "onnxruntime", "hf": "torch", "checkpoint": "torch", "gptq": "torch", "echo": "echo"}
)


def runtime_name(format_name: str, asked: str | None = None) -> str:
    """Return the name of the runtime for a format: the one asked for, if it exists, else the format's own.

    Raises UsageError for an unknown runtime or a format that nothing opens.
    """
    if asked is not None:
        RUNTIMES.entry(asked)
        return asked
    if format_name not in DEFAULTS:
        raise UsageError(unknown_name("artifact format", format_name, DEFAULTS))
    return DEFAULTS[format_name]


def load_runtime(name: str) -> Runtime:
    """Import and return the runtime called `name`; the errors are those of `Registry.load`."""
    return RUNTIMES.load(name)()
