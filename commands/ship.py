"""r1q ship: a parcel for a stranger, and its check."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--for", "target", metavar="TARGET", help="What it is packed for: laptop, phone, gpu or server.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="The new folder. [default: parcel-TARGET]")
@click.option("--results", type=click.Path(path_type=Path), help="Results of r1q bench --json, for the card's table.")
@click.option("--check", is_flag=True, help="Check the parcel PATH instead: every bit is as it was sent.")
def ship(path: Path, target: str | None, output: Path | None, results: Path | None, check: bool) -> None:
    """Pack PATH, an output folder or checkpoint, into a folder that a stranger can check and run; or check such a folder.

    A parcel has the artifacts, a model card with the licence's duties, run.sh and run.ps1, an Ollama Modelfile, a Prometheus scrape
    configuration, for clusters a Kubernetes manifest, and sums of every file and tensor.

    \b
    Examples:
      r1q ship r1q-out/tiny-r1-q4_k_m --for laptop -o parcel
      r1q ship r1q-out/model-q4_k_m --for server --results bench.jsonl
      r1q ship --check parcel
    """
    if check:
        if target or output or results:
            raise click.UsageError("--check takes the parcel alone: leave --for, -o and --results out")
        _check(path)
        return
    if target is None:
        raise click.UsageError("say what it is for: --for laptop, phone, gpu or server (or --check a parcel)")
    from r1q.ship.parcel import pack

    packed = pack(path, target, output or Path(f"parcel-{target}"), results=results)
    for name, size in packed.files.items():
        click.echo(f"{size:>14,}  {name}")
    for note in packed.notes:
        click.echo(f"note: {note}")
    click.echo(f"done: {packed.path}\nnext: r1q ship --check {packed.path}")


def _check(path: Path) -> None:
    from r1q.core.errors import CheckError
    from r1q.core.untrusted import printable
    from r1q.ship.seal import check_parcel, list_files

    defects = list(check_parcel(path))
    for defect in defects:
        click.echo(printable(defect.text()))
    if defects:
        raise CheckError(f"{path}: {len(defects)} things are not as they were sent; get the parcel again")
    click.echo(f"{path}: all {len(list_files(path))} files are as they were sent")
