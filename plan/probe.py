"""A child process that loads one runtime and says what it is, so that a native library that crashes takes nothing with it.

python -P -m r1q.plan.probe NAME       the last line of stdout is one JSON object: {"formats", "versions"} or {"error"}
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import r1q
from r1q.core.errors import R1qError

_SECONDS = 60
# Asked of torch by a child as well: importing it here would cost seconds, and a gigabyte with CUDA.
_TORCH = (
    "import json, torch; cuda = torch.cuda; there = cuda.is_available(); "
    "print(json.dumps({'version': torch.__version__, 'cuda': torch.version.cuda, "
    "'devices': [cuda.get_device_name(i) for i in range(cuda.device_count())] if there else []}))"
)

Answer = dict[str, object]


def probe_runtime(name: str) -> Answer:
    """Return what the runtime `name` says in a child: formats and versions, or an error in a sentence."""
    return _ask(["-m", "r1q.plan.probe", name])


def probe_torch() -> Answer:
    """Return torch's version, the CUDA it was built for, and the devices it sees; or an error in a sentence."""
    return _ask(["-c", _TORCH])


def _ask(arguments: list[str]) -> Answer:
    # A bare checkout is not installed: the folder that holds the package goes on the child's path. -P keeps the user's own off it.
    package = str(Path(r1q.__file__).resolve().parents[1])
    paths = os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-P", *arguments]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_SECONDS,
            env={**os.environ, "PYTHONPATH": paths},
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"error": f"did not answer within {_SECONDS} seconds"}
    lines = done.stdout.strip().splitlines()
    try:
        answer = json.loads(lines[-1]) if lines and done.returncode == 0 else None
    except ValueError:
        answer = None
    if isinstance(answer, dict):
        return answer
    said = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
    return {"error": f"{_ended(done.returncode)}: {' '.join(said.split())}"}


def _ended(status: int) -> str:
    if status >= 0:
        return f"failed (exit code {status})"
    return f"crashed ({signal.Signals(-status).name if -status in set(signal.Signals) else f'signal {-status}'})"


def main(name: str) -> Answer:
    """Load the runtime `name` here and return its answer."""
    from r1q.runtimes.table import load_runtime

    try:
        runtime = load_runtime(name)
        return {"formats": list(runtime.formats), "versions": dict(runtime.versions())}
    except R1qError as error:
        return {"error": str(error)}


if __name__ == "__main__":
    sys.stdout.write("\n" + json.dumps(main(sys.argv[1])) + "\n")
