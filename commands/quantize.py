"""r1q quantize: a float model in, files that run here out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from r1q.commands.options import GRID, METHOD, MODEL, OUTPUT, asked_formats

RUN = (
    OUTPUT,
    click.Option(
        ["--fit"],
        metavar="SIZE|DEVICE",
        help="The grid of every tensor that loses least in a file of this size (1.2GB) or on this device (phone-4g).",
    ),
    click.Option(["--bpw"], type=float, metavar="N", help="The same for this many bits a weight, such as 4.5."),
    click.Option(
        ["--swaps"],
        type=click.IntRange(min=0, max=1000),
        default=0,
        show_default=True,
        help="With --fit or --bpw: exchanges of room between tensors to measure afterwards; what helps is kept.",
    ),
    click.Option(
        ["--dry-run"], is_flag=True, help="Print the plan (sizes, grids, fallbacks) and stop before reading weights."
    ),
    click.Option(
        ["--strict"],
        is_flag=True,
        help="End at the first thing done otherwise than asked: a fallback grid, raised damping.",
    ),
    click.Option(["--log-json"], type=click.Path(path_type=Path), help="Add a JSON line for every event to this file."),
    click.Option(["-q", "--quiet"], is_flag=True, help="No progress; only errors and the result's path."),
)


@click.command(params=[MODEL, *GRID, *METHOD, *RUN])
def quantize(
    formats: str,
    dry_run: bool,
    log_json: Path | None,
    quiet: bool,
    fit: str | None,
    bpw: float | None,
    swaps: int,
    **options: Any,
) -> None:
    """Quantize MODEL into a file that runs here.

    MODEL is a Hugging Face checkpoint folder (safetensors) of a Llama, Qwen2, Qwen3, Qwen3-MoE or DeepSeek model (R1, its distills and
    their like), or a hub id, org/name or org/name@revision, which is downloaded. Without MODEL the small embedded model is taken.
    The command can be killed at any moment: run it again and it goes on.

    \b
    Examples:
      r1q quantize --bits 4
      r1q quantize ./DeepSeek-R1-Distill-Qwen-1.5B --scheme q4_k_m
      r1q quantize ./DeepSeek-R1-Distill-Qwen-1.5B --bits 4 --effort default
      r1q quantize ./model --scheme q4_0 --effort fast --calibration my.txt --samples 32
      r1q quantize ./model --scheme bf16 -o reference
      r1q quantize ./DeepSeek-R1-Distill-Qwen-7B --fit phone-8g --effort default
      r1q quantize deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B --bits 4 --to gguf,gptq

    A recipe file is TOML: base = "q4_k_m" and [[rules]] of tensors = "*.ffn_down.weight", grid = "q6_k".
    """
    from r1q.core.allocator import return_freed_memory
    from r1q.plan.event_log import logged
    from r1q.plan.job import Job, job_folder, open_job, plan_job, run_job
    from r1q.plan.outlook import outlook
    from r1q.plan.progress import show_run
    from r1q.plan.render import make_console, show_outlook, show_plan

    return_freed_memory()
    console = make_console(quiet)
    if fit or bpw is not None:
        from r1q.commands.fitting import fitted_scheme

        options["scheme"] = fitted_scheme(console, fit, bpw, swaps, options, formats)
    elif swaps:
        raise click.UsageError("--swaps goes with --fit or --bpw")
    job = Job(formats=asked_formats(formats, options["scheme"]), **options)
    opened = open_job(job, progress=not quiet)
    console.print(opened.choice.reason, highlight=False)
    plan = plan_job(opened)
    show_plan(console, plan)
    if job.strict and plan.fallbacks:
        raise click.UsageError(f"--strict: {plan.fallback_lines()[0]}")
    if dry_run:
        show_outlook(console, outlook(opened, plan))
        return
    for path in show_run(console, logged(run_job(opened, plan), log_json), plan, calibrated=job.calibrated):
        if quiet:
            click.echo(str(path))
    console.print(f"next: r1q bench {job_folder(job, plan)}", highlight=False)
