"""A Hugging Face folder from a stranger: its JSON settings, its weight files, and that none of them lies outside of it.

Weights come from `model.safetensors`, or from the shards that `model.safetensors.index.json` names. Pickled weights are never loaded.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from r1q.core.errors import InputError
from r1q.core.files import is_bare_name
from r1q.core.safetensors_file import SafetensorsFile

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
# The largest that is read in earnest is the index of DeepSeek-R1's 91,991 tensors: 9 MB.
MAX_JSON_BYTES = 32 << 20
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in `path` (at most 32 MiB). Raises `InputError` when it is missing, too large or not an object."""
    try:
        if path.exists() and not path.is_file():
            # A pipe would wait for ever, and a device never end.
            raise InputError(f"{path} is not a regular file")
        if path.stat().st_size > MAX_JSON_BYTES:
            raise InputError(f"{path} has more than {MAX_JSON_BYTES} bytes; that is no settings file")
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise InputError(
            f"{path} is missing; give a folder with a Hugging Face checkpoint (config.json, *.safetensors)"
        ) from None
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON ({error}); fetch it again") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} is not a JSON object; fetch it again")
    return value


def contained(folder: Path, name: str) -> Path:
    """Return `folder / name` if `name` is a bare file name and the file, links followed, lies in `folder`.

    Links into the `blobs` of a Hugging Face download cache are allowed when `folder` is a snapshot of that cache.
    Raises `InputError` otherwise.
    """
    if not is_bare_name(name) or ":" in name:
        raise InputError(f"{folder}: the file name {name!r} leaves the folder; the checkpoint is not safe to read")
    root = folder.resolve()
    allowed = [root, root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [root]
    path = folder / name
    if not any(path.resolve().is_relative_to(place) for place in allowed):
        raise InputError(f"{path} is a link that leaves the folder; put the file itself there")
    return path


def open_weights(folder: Path) -> dict[str, SafetensorsFile]:
    """Return the open file of every tensor name."""
    if (folder / SINGLE).exists():
        file = SafetensorsFile.open(contained(folder, SINGLE))
        return dict.fromkeys(file.tensors, file)
    if (folder / INDEX).exists():
        return _open_shards(folder, _weight_map(folder))
    raise InputError(_no_weights(folder))


def _weight_map(folder: Path) -> dict[str, str]:
    index = contained(folder, INDEX)
    table = read_json(index).get("weight_map")
    if not isinstance(table, dict) or not table or not all(isinstance(file, str) for file in table.values()):
        raise InputError(f"{index}: weight_map does not map tensor names to file names; fetch it again")
    return table


def _open_shards(folder: Path, weight_map: Mapping[str, str]) -> dict[str, SafetensorsFile]:
    files: dict[str, SafetensorsFile] = {}
    for shard in sorted(set(weight_map.values())):
        path = contained(folder, shard)
        if path.suffix != ".safetensors":
            raise InputError(
                f"{folder / INDEX} names {shard}, which is not a .safetensors file; convert the checkpoint first"
            )
        if not path.is_file():
            raise InputError(f"{path} is missing, though {INDEX} names it; fetch the shard")
        file = SafetensorsFile.open(path)
        for name in file.tensors:
            if weight_map.get(name) != shard:
                raise InputError(
                    f"{path} holds {name}, which {INDEX} places in {weight_map.get(name)}; fetch both again"
                )
            files[name] = file
    absent = next((name for name in weight_map if name not in files), None)
    if absent is not None:
        raise InputError(f"{folder / weight_map[absent]} lacks {absent}, which {INDEX} places there; fetch both again")
    return files


def _no_weights(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir())
    pickled = next((name for name in names if name.endswith(_PICKLED)), None)
    if pickled:
        return (
            f"{folder} has only pickled weights ({pickled}), which can run code and are never loaded; where you trust them, convert: "
            "transformers' AutoModelForCausalLM.from_pretrained(…).save_pretrained(…) writes safetensors"
        )
    found = _first(name for name in names if name.endswith((".safetensors", ".gguf", ".onnx")))
    return f"{folder} has neither {SINGLE} nor {INDEX}{f' (only {found})' if found else ''}; fetch the checkpoint's weights"


def _first(names: Iterable[str]) -> str | None:
    return next(iter(names), None)
