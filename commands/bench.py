"""r1q bench: speed, memory and fidelity of artifacts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click


@click.command()
@click.argument("artifacts", nargs=-1, type=click.Path(path_type=Path))
@click.option("--target", default="cpu", show_default=True, help="Where to run: cpu.")
@click.option("--runtime", metavar="NAME", help="Runtime adapter. [default: the one that opens the format]")
@click.option("--threads", type=click.IntRange(min=1), help="Threads. [default: all physical cores]")
@click.option(
    "--reference", type=click.Path(path_type=Path), help="Float checkpoint to compare with. [default: the source]"
)
@click.option(
    "--text", type=click.Path(path_type=Path), help="Evaluation text. [default: the model's own, or a built-in one]"
)
@click.option(
    "--windows", type=click.IntRange(min=1), default=8, show_default=True, help="Windows of 512 tokens to score."
)
@click.option(
    "--repetitions", type=click.IntRange(min=2), default=5, show_default=True, help="Timed runs, after a warm-up."
)
@click.option(
    "--prompt", type=click.IntRange(min=1), default=128, show_default=True, help="Tokens before the first token."
)
@click.option(
    "--prefill", type=click.IntRange(min=1), default=512, show_default=True, help="Tokens of the prefill rate."
)
@click.option(
    "--generate", type=click.IntRange(min=1), default=128, show_default=True, help="Tokens of the decode rate."
)
@click.option("--json", "as_json", is_flag=True, help="JSON lines with every raw sample and the machine, on stdout.")
@click.option("-q", "--quiet", is_flag=True, help="No progress, only the result.")
def bench(artifacts: tuple[Path, ...], as_json: bool, quiet: bool, **options: Any) -> None:
    """Measure ARTIFACTS: speed, memory, and what quantization cost against the float model.

    An artifact is a .gguf file or a folder that `r1q quantize` made. Without one, the newest folder in ./r1q-out is taken, or else
    the embedded model. Each is opened in a process of its own; perplexity, KL divergence and top-1 agreement follow
    llama-perplexity: 512-token windows, the second half scored.

    \b
    Examples:
      r1q bench
      r1q bench r1q-out/tiny-r1-bf16 r1q-out/tiny-r1-q4_k_m --windows 16
      r1q bench model.gguf --reference ./model --text my.txt --json
    """
    import sys

    from r1q.benchmarks.run import bench as measure
    from r1q.benchmarks.show import show_bench
    from r1q.plan.job import newest_or_embedded

    if not artifacts:
        artifacts = (newest_or_embedded(),)
        click.echo(f"benching {artifacts[0]}", err=True)
    results = measure(artifacts, command=("r1q", *sys.argv[1:]), **options)
    code = show_bench(results, as_json=as_json, quiet=quiet)
    if code:
        raise click.exceptions.Exit(code)
