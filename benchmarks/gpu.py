"""GPUs: whether there is one to measure on, what was looked for where there is none, and how much of its memory is in use."""

from __future__ import annotations

import ctypes.util
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SECONDS = 10
LOOK = 0.25  # seconds between two looks at the memory in use
INSTALL = (
    "llama.cpp with CUDA: CMAKE_ARGS='-DGGML_CUDA=on' pip install --force-reinstall --no-cache-dir llama-cpp-python; "
    "ONNX Runtime: pip install onnxruntime-gpu; torch: its CUDA build from pytorch.org"
)


def find_gpus(device_files: Path = Path("/dev")) -> tuple[tuple[str, ...], str]:
    """Return the GPUs' names, and what was looked for, a sentence for where there is none."""
    names = [name for name, _, _ in query()]
    if sys.platform == "darwin":
        names.append("Apple GPU (Metal)")
    if not names and (device_files / "kfd").exists():
        names.append("AMD GPU (/dev/kfd)")
    if not names:
        names += [f"GPU ({path})" for path in sorted(device_files.glob("dri/renderD*"))]
    driver = ctypes.util.find_library("cuda")
    looked = [
        "nvidia-smi " + ("names none" if shutil.which("nvidia-smi") else "is not installed"),
        f"NVIDIA's driver is {'there' if driver else 'not there'} (libcuda)",
        f"{device_files} has no nvidia*, kfd (AMD) or dri/renderD* (Vulkan)",
    ]
    return tuple(names), "; ".join(looked)


def query() -> list[tuple[str, int, int]]:
    """Return each NVIDIA GPU's name, and its memory in use and in all in bytes; empty where nvidia-smi does not answer."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    wanted = [tool, "--query-gpu=name,memory.used,memory.total", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(wanted, capture_output=True, text=True, timeout=SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    rows = [line.rsplit(",", 2) for line in done.stdout.splitlines()] if done.returncode == 0 else []
    return [
        (name.strip(), int(used) << 20, int(total) << 20)
        for name, used, total in (row for row in rows if len(row) == 3)
        if used.strip().isdigit() and total.strip().isdigit()
    ]


class MemoryWatch:
    """The most memory in use on all GPUs while it watched, less what was in use before, in bytes; None where nobody tells."""

    def __init__(self) -> None:
        self.peak: int | None = None

    @contextmanager
    def watching(self) -> Iterator[MemoryWatch]:
        """Look at the memory in use every quarter of a second until the end of the block."""
        before, ended = query(), threading.Event()
        base = sum(used for _, used, _ in before)

        def look() -> None:
            while not ended.wait(LOOK):
                used = sum(used for _, used, _ in query())
                self.peak = max(self.peak or 0, used - base)

        watcher = threading.Thread(target=look, daemon=True)
        if before:
            watcher.start()
        try:
            yield self
        finally:
            ended.set()
            if before:
                watcher.join(SECONDS)
