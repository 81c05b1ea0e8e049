"""r1q report: a page about results."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), default="report.html", show_default=True, help="The page."
)
def report(runs: tuple[Path, ...], output: Path) -> None:
    """Draw RUNS, files of `r1q bench --format json` or jsonl, as one page of HTML that needs no network.

    Trade-offs of size, speed, divergence and right answers; how long models think; where in the model the error is, if the output
    folders still lie where they were benched; every number, the machine, the commands.

    \b
    Examples:
      r1q bench r1q-out/* --reasoning 100 --json > runs.jsonl
      r1q report runs.jsonl -o report.html
    """
    from r1q.benchmarks.formats import read_results
    from r1q.benchmarks.report import page
    from r1q.core.files import atomic_path, writing

    text = page([result for path in runs for result in read_results(path)])
    with writing(output), atomic_path(output) as temporary:
        temporary.write_text(text, encoding="utf-8")
    click.echo(str(output))
