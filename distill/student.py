"""A student from end to end: pruned from its teacher, distilled, and left behind as an ordinary Hugging Face folder."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch

from r1q import __version__
from r1q.core import journal
from r1q.core.checkpoint import JOB
from r1q.core.errors import InputError
from r1q.core.files import TEMP_PREFIX, json_bytes, remove_leftovers, write_json, writing
from r1q.core.grids import float_bytes
from r1q.core.safetensors_file import write_safetensors
from r1q.distill.divergence import divergence_loss
from r1q.distill.group import ALONE, Group
from r1q.distill.network import Network, load_network, product_dtype
from r1q.distill.prune import choose_kept, write_student
from r1q.distill.ready import copy_model, require_pair, weights_of
from r1q.distill.sizes import Sizes, check_sizes
from r1q.distill.text import Text
from r1q.distill.top import Shelf
from r1q.distill.train import Plan, Progress, distill, load_best
from r1q.models.source import SINGLE, ModelSource

RECORD, WORK, PRUNED = "distillation.json", "distilling", "pruned"
_IMPORTANCE_WINDOWS = 32
_CUT = 2 / 3
_TOKENS_A_CUT = (80e9, 100e9)
"""Minitron's guide: at most a third of the weights at a time, and 80 to 100 billion tokens after each cut."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What was made: the folder, the student's and the teacher's number of weights, and how far training came (None: only pruned)."""

    folder: Path
    parameters: int
    teacher_parameters: int
    reached: Progress | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Keep:
    """What is learned from: the teacher's `top` likeliest tokens and the rest as one, kept in `limit` bytes; 0: all tokens."""

    top: int = 0
    limit: int = 0


def tokens_needed(before: float, after: float) -> tuple[int, float, float]:
    """Return for a cut from `before` to `after` weights how many cuts of a third it is, and the fewest and most tokens to recover.

    >>> cuts, fewest, most = tokens_needed(7e9, 1.5e9)
    >>> cuts, round(fewest / 1e9), round(most / 1e9)
    (4, 320, 400)
    """
    cuts = max(1, math.ceil(math.log(after / before) / math.log(_CUT) - 1e-9))
    return cuts, cuts * _TOKENS_A_CUT[0], cuts * _TOKENS_A_CUT[1]


def make_student(
    source: ModelSource,
    wanted: Sizes | ModelSource,
    text: Text,
    plan: Plan,
    folder: Path,
    *,
    keep: Keep = Keep(),
    group: Group = ALONE,
) -> Iterator[Progress | Outcome]:
    """Fill `folder` with the student, yielding how far it is and at last the outcome; go on where a killed run stopped.

    `wanted` are the sizes to prune to, or a ready student to start from. `plan.steps` 0 prunes and stops. The teacher (16 bits a
    weight where the processor multiplies them) and the student with AdamW's two moments (16 bytes a weight with gradients) are in
    memory, in every process of `group`. Raises `InputError` for impossible sizes, another tokenizer, or a folder that holds something
    else, `UsageError` for another unfinished run there, `ResourceError` for a full disk, `CheckError` where the processes came to
    hold different weights.
    """
    require_student(source, wanted)
    job = _job(source, wanted, text, plan, keep, group)
    made = Outcome(
        folder=folder,
        parameters=student_weights(source, wanted),
        teacher_parameters=weights_of(source),
        reached=None,
    )
    group.wait()  # for none to look at what another has begun to write
    done = _is_done(folder, job)
    if done:
        yield replace(made, reached=_reached(folder))
    group.wait()
    if done:
        if group.is_first:
            shutil.rmtree(folder / WORK, ignore_errors=True)  # of a run that was killed while it tidied up
        return
    if group.is_first:
        _begin(folder, job)
        _prepare(source, wanted, text, folder / WORK / PRUNED)
    group.wait()
    now = None
    for now in _trained(source, text, plan, folder / WORK, keep, group) if plan.steps else ():
        yield now
    if group.is_first:
        _finish(folder, job, now)
    yield replace(made, reached=now)


def _begin(folder: Path, job: dict[str, object]) -> None:
    """Open the job in `folder`, or take up the one there. Raises `InputError` or `UsageError` where it holds something else."""
    _refuse_foreign(folder)
    work = folder / WORK
    with writing(folder):
        work.mkdir(parents=True, exist_ok=True)
    journal.open_job(work, job)
    for place in (folder, work):
        remove_leftovers(place)


def require_student(source: ModelSource, wanted: Sizes | ModelSource) -> None:
    """Raise `InputError` where there cannot be such a student of this teacher."""
    if isinstance(wanted, Sizes):
        check_sizes(source.config, wanted)
    else:
        require_pair(source, wanted)


def student_weights(source: ModelSource, wanted: Sizes | ModelSource) -> int:
    """Return how many weights a student has."""
    return wanted.parameters(source.config) if isinstance(wanted, Sizes) else weights_of(wanted)


def _prepare(source: ModelSource, wanted: Sizes | ModelSource, text: Text, pruned: Path) -> None:
    """Write the student as it is before any step, if it is not there."""
    if (pruned / "config.json").is_file():
        return
    if not isinstance(wanted, Sizes):
        copy_model(wanted, pruned)
        return
    windows = torch.cat([text.batch(step, 1)[0] for step in range(_IMPORTANCE_WINDOWS)]).numpy()
    write_student(source, wanted, choose_kept(source, windows, wanted), pruned)


def _trained(source: ModelSource, text: Text, plan: Plan, work: Path, keep: Keep, group: Group) -> Iterator[Progress]:
    """Train the pruned student and put the weights of its best measurement in place of the pruned ones."""
    student = load_student(work / PRUNED)
    teacher = load_network(source, matrices=product_dtype())
    whole = divergence_loss(student, teacher)
    if keep.top:
        path = work / f"teacher-{group.rank}.bin"
        with closing(Shelf(path, teacher, keep.top, text.batch(0, 1)[0].shape[1], keep.limit)) as shelf:
            learned = partial(shelf.loss, student)
            yield from distill(learned, student.tensors, text, plan, work, held=whole, group=group)
    else:
        yield from distill(whole, student.tensors, text, plan, work, group=group)
    group.require_equal(student.tensors)
    if group.is_first:
        load_best(work, student.tensors)
        _write_weights(work / PRUNED, student)


def load_student(folder: Path) -> Network:
    """Read a student whose tensors can be trained by several processes: each is a `torch.nn.Parameter`."""
    found = load_network(ModelSource.open(folder))
    return replace(found, tensors={name: torch.nn.Parameter(tensor) for name, tensor in found.tensors.items()})


def _job(
    source: ModelSource, wanted: Sizes | ModelSource, text: Text, plan: Plan, keep: Keep, group: Group
) -> dict[str, object]:
    extra = {} if group.size == 1 else {"processes": group.size}
    return {
        **extra,
        "r1q": __version__,
        "torch": torch.__version__,
        "teacher": source.fingerprint(),
        **({"sizes": asdict(wanted)} if isinstance(wanted, Sizes) else {"student": wanted.fingerprint()}),
        "text": dict(text.record),
        "plan": asdict(plan),
        "top": keep.top,
        "threads": torch.get_num_threads(),
    }


def _refuse_foreign(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        ours = folder.is_dir() and ((folder / WORK / JOB).is_file() or (folder / RECORD).is_file())
        left = folder.is_dir() and all(
            path.name == WORK or path.name.startswith(TEMP_PREFIX) for path in folder.iterdir()
        )
        if not ours and not left:
            raise InputError(f"{folder} exists and holds something else; choose another folder with -o")


def _is_done(folder: Path, job: dict[str, object]) -> bool:
    """Return whether the folder holds the outcome of this job. Raises `InputError` where it is that of another."""
    if not (folder / RECORD).is_file():
        return False
    if _record(folder).get("job") != hashlib.sha256(json_bytes(job)).hexdigest():
        raise InputError(f"{folder} holds a student of another run; choose another folder with -o")
    return True


def _record(folder: Path) -> dict[str, object]:
    try:
        value = json.loads((folder / RECORD).read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{folder / RECORD} is damaged ({error}); delete the folder") from error
    return value if isinstance(value, dict) else {}


def _reached(folder: Path) -> Progress | None:
    reached = _record(folder).get("reached")
    try:
        return Progress(**reached) if isinstance(reached, dict) else None
    except TypeError as error:
        raise InputError(f"{folder / RECORD} is damaged ({error}); delete the folder") from error


def _write_weights(folder: Path, student: Network) -> None:
    entries = [(spec.name, spec.dtype, spec.shape) for spec in student.specs]
    rows = (student.tensors[spec.name].detach().reshape(1, -1).numpy() for spec in student.specs)
    pieces = (float_bytes(spec.dtype.lower(), values) for spec, values in zip(student.specs, rows, strict=True))
    write_safetensors(folder / SINGLE, entries, pieces, metadata={"format": "pt"})


def _finish(folder: Path, job: dict[str, object], now: Progress | None) -> None:
    """Move the student into its place, config.json after the weights and the record last; then drop the state of the training."""
    pruned = folder / WORK / PRUNED
    files = sorted(pruned.iterdir(), key=lambda path: path.name == "config.json")
    with writing(folder):
        for path in files:
            shutil.copyfile(path, folder / path.name)
        record = {"job": hashlib.sha256(json_bytes(job)).hexdigest(), "asked": job}
        write_json(folder / RECORD, record | ({"reached": asdict(now)} if now else {}))
        shutil.rmtree(folder / WORK)
