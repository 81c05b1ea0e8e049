"""r1q verify: proof that files hold the weights of their checkpoint."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line, on stdout.")
def verify(path: Path, as_json: bool) -> None:
    """Prove that PATH (an output folder or an artifact in it) is whole and holds its checkpoint's weights, every one."""
    from r1q.export.verified import refuse_failed
    from r1q.export.verify import verify_path

    results = []
    for result in verify_path(path):
        results.append(result)
        click.echo(result.json() if as_json else result.text())
    refuse_failed(results)
