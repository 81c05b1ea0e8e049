"""The tiny GGUF files of tests/runtimes, here too."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import cast

import pytest


@pytest.fixture(scope="session")
def write_gguf() -> Callable[..., Path]:
    """Return tests/runtimes/conftest.py's writer."""
    place = Path(__file__).parents[1] / "runtimes" / "conftest.py"
    spec = importlib.util.spec_from_file_location("tiny_gguf_writer", place)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return cast(Callable[..., Path], module.write_tiny_gguf)


@pytest.fixture(scope="session")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory, write_gguf: Callable[..., Path]) -> Path:
    """Return a float32 GGUF of 264 tokens, context 128, that adds a BOS."""
    return write_gguf(tmp_path_factory.mktemp("gguf") / "Tiny-F32.gguf")
