"""One child process for each measurement: its memory is its own, and its death is a sentence instead of ours.

    python -P -m r1q.benchmarks.child      first line of stdin: the job; stdout: one JSON object a line

The child lives as long as the parent holds its stdin open, so that a killed parent leaves no child behind. Whatever native code
prints goes to stderr, which is kept for the message of a crash. What arrived before a crash has been handed on already.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import r1q
from r1q.benchmarks.ceiling import Fence
from r1q.core import errors
from r1q.core.errors import MissingError, R1qError, ResourceError

Message = dict[str, Any]
Messages = Generator[Message, None, None]
TAIL = 4096  # bytes of the child's stderr that are looked at
KINDS: Mapping[str, type[R1qError]] = {
    kind.__name__: kind
    for kind in (
        errors.UsageError,
        errors.InputError,
        errors.MissingError,
        errors.ResourceError,
        errors.CheckError,
    )
}


def run(
    target: str,
    job: Mapping[str, Any],
    *,
    what: str,
    memory_limit: int | None = None,
    ceiling: int | None = None,
    files: Sequence[int] = (),
) -> Messages:
    """Run `target` ("module:function") on `job` in a child process and yield its messages as they come.

    The function takes the job and yields JSON-able dicts. `what` names the measurement in an error. `memory_limit` is the
    most address space in bytes that the child may use; `files` are open descriptors that it has under the same numbers. `ceiling` is
    the most memory in bytes that it may hold, as `ceiling.Fence` does it; how is the first message then, `{"ceiling": …}`.

    Raises the R1qError that the child raised, ResourceError when it ran out of memory or was killed, MissingError when it crashed.
    """
    with tempfile.TemporaryFile() as stderr:
        child = subprocess.Popen(
            [sys.executable, "-P", "-m", "r1q.benchmarks.child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            env=_environment(),
            pass_fds=files,
        )
        fence = None
        try:
            if ceiling is not None:
                fence = Fence(child.pid, ceiling)  # the child waits for its job, and has loaded nothing yet
                yield {"ceiling": fence.how}
            yield from _listen(child, {"target": target, "job": dict(job), "memory_limit": memory_limit}, what)
            status = child.wait()
        finally:
            # An interrupt or a caller that stops listening ends here too.
            _end(child)
            passed = fence is not None and fence.passed
            if fence is not None:
                fence.close()
        if passed and ceiling is not None:
            raise ResourceError(f"{what} went over its ceiling of {ceiling / 2**20:.0f} MiB of memory and was ended")
        if status:
            raise _obituary(status, _tail(stderr), what)


def _listen(child: subprocess.Popen[bytes], order: Mapping[str, Any], what: str) -> Iterator[Message]:
    if child.stdin is None or child.stdout is None:
        raise ValueError("the child was started without pipes")
    try:
        child.stdin.write(json.dumps(order).encode() + b"\n")
        child.stdin.flush()
    except BrokenPipeError:
        return  # it died at once: its exit status says how
    for line in child.stdout:
        try:
            message = json.loads(line)
        except ValueError:
            return  # cut off in the middle of a line by its death
        if "error" in message:
            kind = KINDS.get(message["error"]["kind"], MissingError)
            raise kind(message["error"]["message"])
        if "crash" in message:
            error = MissingError(f"{what} crashed: {message['crash']['message']}")
            error.add_note(message["crash"]["trace"])
            raise error
        yield message


def _end(child: subprocess.Popen[bytes]) -> None:
    if child.poll() is None:
        child.kill()
    child.wait()
    for pipe in (child.stdin, child.stdout):
        if pipe is not None:
            with contextlib.suppress(BrokenPipeError):  # closing flushes, and nobody may be there to read
                pipe.close()


def _environment() -> dict[str, str]:
    """Return our environment, with the folder that holds the package on the child's path: a bare checkout is not installed.

    The child itself runs with -P, so that the folder a user happens to stand in is not searched for modules.
    """
    package = str(Path(r1q.__file__).resolve().parents[1])
    paths = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def _tail(stderr: IO[bytes]) -> str:
    size = stderr.seek(0, os.SEEK_END)
    stderr.seek(max(0, size - TAIL))
    lines = stderr.read().decode("utf-8", "replace").strip().splitlines()
    return " ".join(lines[-1].split()) if lines else ""


def _obituary(status: int, tail: str, what: str) -> R1qError:
    """Return the error for a child that ended with `status` and said nothing of it."""
    said = f"; it last said: {tail}" if tail else ""
    if status >= 0:
        return MissingError(f"{what} ended with exit code {status}{said}")
    name = signal.Signals(-status).name if -status in set(signal.Signals) else f"signal {-status}"
    if -status == signal.SIGKILL:
        return ResourceError(
            f"{what} was killed (SIGKILL), most often by the kernel because memory ran out: free some, or take a smaller model{said}"
        )
    if "alloc" in tail.lower() or "out of memory" in tail.lower():
        return ResourceError(f"{what} ran out of memory ({name}): free some, or take a smaller model{said}")
    return MissingError(f"{what} crashed ({name}){said}")
