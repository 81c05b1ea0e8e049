"""What is predicted from shapes is what a process takes: peaks of real runs, beyond that of a run which needs only the program."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from r1q.plan.job import Job, open_job, plan_job, planned_engine, workload
from r1q.plan.memory import memory_parts

MakeModel = Callable[..., Path]
ROOT = Path(__file__).resolve().parents[2]
RUN = """
import sys
from pathlib import Path
from r1q.cli import main
main(sys.argv[1:], standalone_mode=False)
lines = Path("/proc/self/status").read_text().splitlines()
print("peak", next(line for line in lines if line.startswith("VmHWM")).split()[1])
"""
pytestmark = pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="peaks are read from /proc")


def measured(job: Job) -> int:
    """Return the peak resident bytes of `r1q quantize` in a process of its own; getrusage would tell the parent's, if larger."""
    options: list[object] = ["--scheme", job.scheme, "--effort", job.effort, "--calibration", job.calibration]
    options += ["--samples", job.samples, "--seq-len", job.seq_len, "--to", "checkpoint", "-o", job.output, "-q"]
    command = [sys.executable, "-c", RUN, "quantize", job.model, *options]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split()[-1]) * 1024


def predicted(job: Job) -> int:
    opened = open_job(job)
    plan = plan_job(opened)
    return sum(memory_parts(workload(opened, plan), planned_engine(opened, plan)).values())


def test_the_predicted_peak_is_the_measured_one(make_model: MakeModel, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{n} + {n * n} = {n + n * n}; wait, let me think again.\n" for n in range(3000)))
    small = make_model("llama", num_layers=1)
    # Wide inside: a tile takes 100 MB, the second moments 67 MB, the kept inputs of 4,096 tokens 34 MB or 67 MB.
    large = make_model("llama", hidden_size=256, intermediate_size=4096, num_layers=1)

    def job(name: str, model: Path, samples: int, seq_len: int, effort: str) -> Job:
        return Job(
            model=str(model),
            scheme="q4_0",
            formats=(),
            effort=effort,
            calibration=str(text),
            samples=samples,
            seq_len=seq_len,
            output=tmp_path / name,
        )

    measured(job("warm", small, 1, 32, "fast"))  # compiles kernels where none are kept, which takes memory of its own
    nothing = job("nothing", small, 1, 32, "fast")
    base = measured(nothing)
    for effort in ("fast", "default"):
        whole = job(effort, large, 16, 256, effort)
        beyond = predicted(whole) - predicted(nothing)
        assert beyond > 180e6
        assert measured(whole) - base == pytest.approx(beyond, rel=0.15), effort
