"""r1q quantize: a float model in, files that run here out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

# Every parameter but --dry-run and --quiet is a field of plan.job.Job with the same default; help lists them in this order.
MODEL = click.Argument(["model"], required=False)
GRID = (
    click.Option(["--bits"], type=int, metavar="N", help="Bits per weight: 2, 3, 4 (default), 5, 6 or 8."),
    click.Option(
        ["--scheme"],
        metavar="NAME|FILE",
        help="A preset (q4_0, q4_k_m, q6_k, q8_0, bf16, …), one grid for every matrix (q4_k) or a recipe file (mix.toml).",
    ),
    click.Option(
        ["--to", "formats"],
        default="gguf",
        show_default=True,
        metavar="FORMAT,…",
        help="gguf, gptq, both, or checkpoint.",
    ),
    click.Option(
        ["--group-size"], type=int, metavar="N", help="Integers in groups of 32, 64, 128, or -1 for a whole row."
    ),
    click.Option(["--asymmetric"], is_flag=True, help="Integers with a zero point a group."),
)
METHOD = (
    click.Option(
        ["--effort"],
        type=click.Choice(["fast", "default", "high"]),
        help="Calibrate: fast (GPTQ), default (and make good what earlier layers shifted), high (and train blocks).",
    ),
    click.Option(
        ["--calibration"],
        metavar="SPEC",
        help="Text to calibrate on: FILE.txt, FILE.jsonl, a folder, builtin; mixed as a.txt:0.5,builtin:0.5.  [default: builtin]",
    ),
    click.Option(
        ["--samples"], type=click.IntRange(min=1), default=128, show_default=True, help="Windows of calibration text."
    ),
    click.Option(["--seq-len"], type=click.IntRange(min=2), default=512, show_default=True, help="Tokens of a window."),
    click.Option(
        ["--method"],
        type=click.Choice(["rtn", "gptq"]),
        help="rtn: round to nearest, no text. gptq: calibrated.  [default: gptq with --effort or --calibration, else rtn]",
    ),
    click.Option(
        ["--imatrix"],
        type=click.Path(path_type=Path),
        help="Importance matrix of llama-imatrix for rtn to weigh errors by.",
    ),
    click.Option(
        ["--damp"],
        type=click.FloatRange(min=0, max=1, min_open=True, max_open=True),
        default=0.05,
        show_default=True,
        help="Share of the mean diagonal added to second moments.",
    ),
    click.Option(["--device"], default="cpu", show_default=True, help="Where calibration computes: cpu, or cuda."),
    click.Option(["--threads"], type=click.IntRange(min=1), help="Threads.  [default: all physical cores]"),
)
RUN = (
    click.Option(
        ["-o", "--output"],
        type=click.Path(path_type=Path),
        help="Output folder. [default: r1q-out/<model>-<scheme>]",
    ),
    click.Option(
        ["--dry-run"], is_flag=True, help="Print the plan (sizes, grids, fallbacks) and stop before reading weights."
    ),
    click.Option(["--strict"], is_flag=True, help="Refuse instead of falling back where rows do not fit a grid."),
    click.Option(["-q", "--quiet"], is_flag=True, help="No progress; only errors and the result's path."),
)


@click.command(params=[MODEL, *GRID, *METHOD, *RUN])
def quantize(formats: str, dry_run: bool, quiet: bool, **options: Any) -> None:
    """Quantize MODEL into a file that runs here.

    MODEL is a Hugging Face checkpoint folder (safetensors) of a Llama, Qwen2 or Qwen3 model (DeepSeek-R1's distills and their like),
    or a hub id, org/name or org/name@revision, which is downloaded. Without MODEL the small embedded model is taken.
    The command can be killed at any moment: run it again and it goes on.

    \b
    Examples:
      r1q quantize --bits 4
      r1q quantize ./DeepSeek-R1-Distill-Qwen-1.5B --scheme q4_k_m
      r1q quantize ./DeepSeek-R1-Distill-Qwen-1.5B --bits 4 --effort default
      r1q quantize ./model --scheme q4_0 --effort fast --calibration my.txt --samples 32
      r1q quantize ./model --scheme bf16 -o reference
      r1q quantize deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B --bits 4 --to gguf,gptq

    A recipe file is TOML: base = "q4_k_m" and [[rules]] of tensors = "*.ffn_down.weight", grid = "q6_k".
    """
    from r1q.core.formats import parse_formats
    from r1q.plan.job import Job, job_folder, open_job, plan_job, run_job
    from r1q.plan.render import make_console, show_plan, show_run

    console = make_console(quiet)
    job = Job(formats=parse_formats(formats), **options)
    opened = open_job(job, progress=not quiet)
    console.print(opened.choice.reason, highlight=False)
    plan = plan_job(opened)
    show_plan(console, plan)
    if job.strict and plan.fallbacks:
        raise click.UsageError(f"--strict: {plan.fallback_lines()[0]}")
    if dry_run:
        return
    for path in show_run(console, run_job(opened, plan), plan):
        if quiet:
            click.echo(str(path))
    console.print(f"next: r1q bench {job_folder(job, plan)}", highlight=False)
