"""r1q inspect: what a file or folder is."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--tensors", is_flag=True, help="List every tensor.")
@click.option("--template", is_flag=True, help="Show the chat template whole.")
@click.option("--json", "as_json", is_flag=True, help="Everything as one JSON object, on stdout.")
def inspect(path: Path, tensors: bool, template: bool, as_json: bool) -> None:
    """Say what PATH is: any GGUF or safetensors file, Hugging Face or GPTQ folder, or r1q's own. Reads no weights."""
    import json

    from r1q.plan.inspect import inspect_path
    from r1q.plan.render import make_console
    from r1q.plan.render_inspect import show_inspection

    found = inspect_path(path)
    if as_json:
        click.echo(json.dumps(found.to_dict()))
    else:
        show_inspection(make_console(quiet=False), found, tensors=tensors, template=template)
