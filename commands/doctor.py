"""r1q doctor: what is installed and what this machine has."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.option("--gpu", is_flag=True, help="Ask torch too which GPUs it sees (imports it, in a process of its own).")
@click.option("--json", "as_json", is_flag=True, help="Everything as one JSON object, on stdout.")
def doctor(gpu: bool, as_json: bool) -> None:
    """Say what is installed and what this machine has: runtimes and how to get them, versions, CPU, memory, disk."""
    import json

    from r1q.plan.doctor import examine, refuse_unusable
    from r1q.plan.render import make_console
    from r1q.plan.render_doctor import show_diagnosis

    found = examine(Path.cwd(), gpu=gpu)
    if as_json:
        click.echo(json.dumps(found.to_dict()))
    else:
        show_diagnosis(make_console(quiet=False), found)
    refuse_unusable(found)
