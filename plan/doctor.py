"""Doctor: which runtimes are here and what installs the others, versions, the machine, and where downloads come from and go to."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MappingProxyType
from urllib.parse import urlsplit

from r1q import __version__
from r1q.core.errors import MissingError, R1qError
from r1q.core.formats import FORMATS
from r1q.core.registry import Registry
from r1q.plan.probe import probe_runtime, probe_torch
from r1q.plan.surroundings import Surroundings, find_gpus, look_around
from r1q.runtimes.base import RuntimeFactory
from r1q.runtimes.table import RUNTIMES

LIBRARIES = (
    "numpy",
    "numba",
    "torch",
    "tokenizers",
    "safetensors",
    "gguf",
    "huggingface_hub",
    "jinja2",
    "click",
    "rich",
    "psutil",
)
BUILD = "llama.cpp build"
# A CPU feature as /proc/cpuinfo spells it, and llama.cpp's word for a build that uses it (ggml-cpu's features).
_BUILD_WORDS: Mapping[str, str] = MappingProxyType(
    {
        "f16c": "F16C", "fma": "FMA", "avx2": "AVX2", "avx_vnni": "AVX_VNNI", "avx512f": "AVX512",
        "avx512_vnni": "AVX512_VNNI", "avx512_bf16": "AVX512_BF16", "amx_int8": "AMX_INT8",
        "asimd": "NEON", "asimddp": "DOTPROD", "i8mm": "MATMUL_INT8", "sve": "SVE",
    }
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class RuntimeState:
    """One runtime: `state` is ready, missing (`detail` says what installs it) or broken (`detail` says why)."""

    name: str
    about: str
    state: str
    detail: str = ""
    formats: tuple[str, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)

    @property
    def useful(self) -> bool:
        """Whether it runs here and opens something that r1q writes."""
        return self.state == "ready" and bool(set(self.formats) & set(FORMATS))


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """Everything `r1q doctor` tells. `libraries` maps to None what is not installed; `torch` is None where it was not asked."""

    runtimes: tuple[RuntimeState, ...]
    python: str
    r1q: str
    libraries: Mapping[str, str | None]
    machine: Surroundings
    gpus: tuple[str, ...]
    torch: str | None
    hub: Mapping[str, str]
    advice: tuple[str, ...]

    def to_dict(self) -> dict[str, object]:
        """Return everything as JSON can hold it."""
        runtimes = [
            {"name": r.name, "about": r.about, "state": r.state, "detail": r.detail, "formats": list(r.formats),
             "versions": dict(r.versions)} for r in self.runtimes
        ]  # fmt: skip
        return {
            "runtimes": runtimes, "python": self.python, "r1q": self.r1q, "libraries": dict(self.libraries),
            "machine": asdict(self.machine), "gpus": list(self.gpus), "torch": self.torch, "hub": dict(self.hub),
            "advice": list(self.advice),
        }  # fmt: skip


def examine(folder: Path, *, gpu: bool = False, registry: Registry[RuntimeFactory] = RUNTIMES) -> Diagnosis:
    """Return what is here. Every runtime is loaded in a child process; with `gpu`, torch is asked too what it sees.

    `folder` is where output would go; nothing in it is read.
    """
    runtimes = tuple(_runtime_state(registry, name) for name in registry.names())
    machine = look_around(folder)
    libraries = {name: _version(name) for name in LIBRARIES}
    return Diagnosis(
        runtimes=runtimes,
        python=f"{'.'.join(map(str, sys.version_info[:3]))} at {sys.executable}",
        r1q=__version__,
        libraries=libraries,
        machine=machine,
        gpus=find_gpus(),
        torch=_torch_line() if gpu else None,
        hub=hub_settings(),
        advice=tuple(_advice(runtimes, machine, libraries)),
    )


def refuse_unusable(found: Diagnosis) -> None:
    """Raise `MissingError` when no runtime here opens anything that r1q writes."""
    if not any(runtime.useful for runtime in found.runtimes):
        how = next(
            (f"{r.name} is {r.state}: {r.detail}" for r in found.runtimes if r.state != "ready"), "none is known"
        )
        raise MissingError(f"no runtime here can open what r1q writes ({', '.join(FORMATS)}); {how}")


def hub_settings() -> dict[str, str]:
    """Return where models are downloaded from and kept, as huggingface_hub understands the environment."""
    try:
        from huggingface_hub import constants
    except ImportError:
        return {"huggingface_hub": "not installed"}
    size = "exists" if Path(constants.HF_HUB_CACHE).is_dir() else "not there yet"
    return {
        "cache": f"{constants.HF_HUB_CACHE} ({size})",
        "offline": "yes (HF_HUB_OFFLINE)" if constants.HF_HUB_OFFLINE else "no",
        "endpoint": _without_secrets(constants.ENDPOINT) + (" (HF_ENDPOINT)" if os.environ.get("HF_ENDPOINT") else ""),
    }


def _without_secrets(address: str) -> str:
    """Return a web address without user name, password, query."""
    parts = urlsplit(address)
    host = parts.netloc.rpartition("@")[2]
    return f"{parts.scheme}://{host}{parts.path}"


def _runtime_state(registry: Registry[RuntimeFactory], name: str) -> RuntimeState:
    try:
        entry = registry.entry(name)
    except R1qError as error:  # offered twice
        return RuntimeState(name=name, about="", state="broken", detail=str(error))
    if entry.needs is not None and importlib.util.find_spec(entry.needs) is None:
        how = f"pip install 'r1q[{entry.extra}]'" if entry.extra else f"install {entry.needs}"
        return RuntimeState(name=name, about=entry.about, state="missing", detail=how)
    answer = probe_runtime(name)
    formats, versions = answer.get("formats"), answer.get("versions")
    if "error" in answer or not isinstance(formats, list) or not isinstance(versions, Mapping):
        said = str(answer.get("error", "it does not say its formats and versions"))
        return RuntimeState(name=name, about=entry.about, state="broken", detail=said)
    return RuntimeState(
        name=name,
        about=entry.about,
        state="ready",
        formats=tuple(map(str, formats)),
        versions={str(key): str(value) for key, value in versions.items()},
    )


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _torch_line() -> str:
    answer = probe_torch()
    if "error" in answer:
        return f"cannot be loaded: {answer['error']}"
    devices = answer.get("devices")
    built = f"CUDA {answer['cuda']}" if answer.get("cuda") else "no CUDA"
    names = ", ".join(map(str, devices)) if isinstance(devices, list) and devices else "no GPU"
    return f"{answer.get('version')}, built for {built}, sees {names}"


def _advice(
    runtimes: Sequence[RuntimeState], machine: Surroundings, libraries: Mapping[str, str | None]
) -> Iterator[str]:
    """Yield what could be better here, each with the way to mend it."""
    absent = [name for name, version in libraries.items() if version is None]
    if absent:
        yield f"r1q needs {', '.join(absent)}: pip install --upgrade r1q"
    for runtime in runtimes:
        if runtime.state == "missing":
            yield f"{runtime.name} is not installed: {runtime.detail}"
        unused = unused_features(machine.features, runtime.versions.get(BUILD, ""))
        if unused:
            yield (
                f"this CPU has {', '.join(unused)}, which the installed llama.cpp was built without: CMAKE_ARGS=-DGGML_NATIVE=on "
                "pip install --force-reinstall --no-binary llama-cpp-python llama-cpp-python"
            )


def unused_features(features: Sequence[str], build: str) -> list[str]:
    """Return the CPU features for which llama.cpp has kernels that this build was made without.

    `build` is llama_print_system_info's text; an empty one tells nothing.

    >>> unused_features(["avx2", "avx512f"], "CPU : AVX2 = 1 | AVX512 = 0 | ")
    ['avx512f']
    """
    words = {
        part.split("=")[0].strip()
        for part in build.replace(" : ", "|").split("|")
        if part.split("=")[-1].strip() == "1"
    }
    return [name for name, word in _BUILD_WORDS.items() if words and name in features and word not in words]
