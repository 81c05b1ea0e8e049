"""The embedded model in several grids side by side: what `r1q bench` measures where nothing was quantized yet."""

from __future__ import annotations

from pathlib import Path

from r1q.core.artifact import newest_output
from r1q.plan.job import OUTPUT_ROOT, Job, job_folder, open_job, plan_job, run_job

SCHEMES = ("bf16", "q8_0", "q4_k_m", "q4_0")
"""Float; 8-bit integers in groups of 32; llama.cpp's usual 4-bit mixture; 4-bit integers in groups of 32."""
FOLDER = "side-by-side"  # one level deeper than a user's own outputs: it is never the newest of those


def newest_or_side_by_side() -> list[Path]:
    """Return the newest output folder under ./r1q-out; without one, quantize the embedded model and return those folders."""
    newest = newest_output(OUTPUT_ROOT)
    return [newest] if newest is not None else [_quantize(scheme) for scheme in SCHEMES]


def _quantize(scheme: str) -> Path:
    opened = open_job(Job(scheme=scheme, output=OUTPUT_ROOT / FOLDER / scheme))
    plan = plan_job(opened)
    for _ in run_job(opened, plan):
        pass
    return job_folder(opened.job, plan)
