"""r1q traces: a model's own answers, to be calibrated on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click


@click.command()
@click.argument("model", required=False)
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), required=True, help="The file to fill, such as traces.jsonl."
)
@click.option("--runtime", default="llama-cpp", show_default=True, help="Runtime adapter that lets the model answer.")
@click.option("--count", type=click.IntRange(min=1), default=256, show_default=True, help="Problems to answer.")
@click.option(
    "--max-tokens", type=click.IntRange(min=1), default=4096, show_default=True, help="Longest answer in tokens."
)
@click.option(
    "--temperature", type=click.FloatRange(min=0), default=0.6, show_default=True, help="R1's own setting is 0.6."
)
@click.option(
    "--top-p", type=click.FloatRange(0, 1, min_open=True), default=0.95, show_default=True, help="R1's own is 0.95."
)
@click.option("--seed", type=int, default=0, show_default=True, help="Which problems, and which answers.")
@click.option(
    "--sequences", type=click.IntRange(min=1), default=4, show_default=True, help="Answers written side by side."
)
@click.option("--threads", type=click.IntRange(min=1), help="Threads. [default: all physical cores]")
@click.option(
    "--tokenizer", type=click.Path(path_type=Path), help="Folder of the tokenizer, where none lies with MODEL."
)
@click.option("-q", "--quiet", is_flag=True, help="No progress; only errors and the file's path.")
def traces(quiet: bool, **options: Any) -> None:
    """Let MODEL answer generated problems itself, and keep how it thought: the text it is best calibrated on.

    MODEL is a float checkpoint (folder, hub id, or none for the embedded one), an output folder of r1q quantize, or a GGUF file.
    Problems are mathematics and logic in English and Chinese; answers begin with <think>. The command can be killed: run it again
    and it goes on.

    \b
    Examples:
      r1q traces ./DeepSeek-R1-Distill-Qwen-1.5B -o traces.jsonl --count 64
      r1q quantize ./DeepSeek-R1-Distill-Qwen-1.5B --effort default --calibration traces.jsonl:0.5,builtin:0.5
    """
    from r1q.plan.render import make_console, show_traces
    from r1q.plan.traces import TraceJob, make_traces

    job = TraceJob(**options)
    show_traces(make_console(quiet), make_traces(job, progress=not quiet))
    if quiet:
        click.echo(str(job.output))
    else:
        click.echo(f"done: {job.output}")
