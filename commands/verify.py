"""r1q verify: proof that files hold the weights of their checkpoint; with --lint, what makes any file slow or heavy."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("paths", nargs=-1, required=True, metavar="PATH…", type=click.Path(path_type=Path))
@click.option("--lint", is_flag=True, help="Name what makes each file slow or heavy instead, whoever made it.")
@click.option("--strict", is_flag=True, help="With --lint: end with exit code 6 when anything is found.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line, on stdout.")
def verify(paths: tuple[Path, ...], lint: bool, strict: bool, as_json: bool) -> None:
    """Prove that each PATH (an output folder or an artifact in it) is whole and holds its checkpoint's weights, every one."""
    if lint:
        _lint(paths, strict, as_json)
        return
    if strict:
        raise click.UsageError("--strict goes with --lint; what verify itself finds always ends with an error")
    from r1q.export.verified import refuse_failed
    from r1q.export.verify import verify_path

    results = []
    for path in paths:
        for result in verify_path(path):
            results.append(result)
            click.echo(result.json() if as_json else result.text())
    refuse_failed(results)


def _lint(paths: tuple[Path, ...], strict: bool, as_json: bool) -> None:
    from r1q.benchmarks.machine import machine
    from r1q.export.lint import lint_path, refuse_found

    features, results = machine().features, []
    for path in paths:
        for result in lint_path(path, features):
            results.append(result)
            click.echo(result.json() if as_json else result.text())
    if strict:
        refuse_found(results)
