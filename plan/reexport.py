"""Export again: another format from a finished checkpoint, without the source model and without quantizing anew."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from r1q.core.artifact import CHECKPOINT, WHERE, OutputFolder, find_reference
from r1q.core.checkpoint import JOB, MANIFEST, QuantizedCheckpoint
from r1q.core.errors import UsageError
from r1q.core.files import write_json
from r1q.core.formats import CHECKPOINT_ONLY, refuse_unfit
from r1q.core.recipe import PlannedTensor
from r1q.models.gptq_source import is_gptq
from r1q.plan.import_gptq import import_gptq
from r1q.plan.job import OUTPUT_ROOT
from r1q.plan.kv_cache import CacheText
from r1q.plan.walk import Exported, export_checkpoint
from r1q.quantize.run import Event


def reexport(
    path: Path, formats: Sequence[str], folder: Path | None = None, cache: CacheText | None = None
) -> Iterator[Event | Exported]:
    """Write `formats` from the checkpoint at `path` into `folder`, or beside the checkpoint; yield each when it is finished.

    `cache` is the text that an 8-bit cache is calibrated on; events tell how far that is.

    `path` is an output folder of `r1q quantize`, the checkpoint in it, or anyone's GPTQ folder (see `plan/import_gptq.py`), of which
    a checkpoint is made first. Raises `UsageError` for what a format cannot hold, before anything is written, and `InputError` for
    what is no finished checkpoint.
    """
    if not formats:
        raise UsageError(f"{CHECKPOINT_ONLY} is what is there already; name a format with --to")
    if is_gptq(path):
        output = OutputFolder(folder or OUTPUT_ROOT / f"{path.resolve().name}-{'-'.join(formats)}")
        yield from import_gptq(path, formats, output)
        yield from export_checkpoint(output, formats, cache)
        return
    output = _open_output(path, folder)
    checkpoint = QuantizedCheckpoint.open(output.checkpoint)
    records = checkpoint.records.values()
    if "gptq" in formats and checkpoint.activations is not None:
        raise UsageError(
            "a GPTQ folder has no place for the ranges of activations that this checkpoint holds; --to onnx has"
        )
    try:
        refuse_unfit((PlannedTensor(spec=r.spec, scheme=r.scheme, wanted=r.wanted) for r in records), formats)
    except UsageError as error:
        source = find_reference(output.checkpoint.parent) or "MODEL"
        raise UsageError(
            f"{error} (an export copies codes and never quantizes: with these options, run r1q quantize {source} -o FOLDER)"
        ) from error
    if output.elsewhere is not None:
        _note_origin(output)
    yield from export_checkpoint(output, formats, cache)


def _open_output(path: Path, folder: Path | None) -> OutputFolder:
    """Return the folder to write into, with the checkpoint that `path` names."""
    is_checkpoint = (path / MANIFEST).is_file() or (path / JOB).is_file()
    checkpoint = path if is_checkpoint else path / CHECKPOINT
    beside = checkpoint.absolute().parent
    if folder is None:
        if checkpoint.name != CHECKPOINT:
            raise UsageError(
                f"{path} is not named {CHECKPOINT!r}, so its artifacts have no place beside it: give -o FOLDER"
            )
        return OutputFolder(path.parent if is_checkpoint else path)
    if folder.absolute() == beside and checkpoint.name == CHECKPOINT:
        return OutputFolder(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())) and _noted(folder) != checkpoint.resolve():
        raise UsageError(f"{folder} exists and holds something else; choose another folder with -o")
    return OutputFolder(folder, elsewhere=checkpoint)


def _noted(folder: Path) -> Path | None:
    """Return the checkpoint that an earlier export into `folder` noted."""
    try:
        where = json.loads((folder / WHERE).read_bytes())
        return Path(where["checkpoint"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _note_origin(output: OutputFolder) -> None:
    """Note where checkpoint and source are on this machine, for `r1q verify` and `r1q bench`."""
    source = find_reference(output.checkpoint.absolute().parent)
    noted: dict[str, object] = {"checkpoint": str(output.checkpoint.resolve())}
    write_json(output.path / WHERE, {**noted, "source": str(source)} if source else noted)
