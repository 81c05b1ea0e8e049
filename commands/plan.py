"""r1q plan: what r1q quantize would do, and what it would take."""

from __future__ import annotations

from typing import Any

import click

from r1q.commands.options import GRID, METHOD, MODEL, OUTPUT, asked_formats

SHOW = (
    click.Option(["--tensors"], is_flag=True, help="List every tensor with its grid."),
    click.Option(["--json", "as_json"], is_flag=True, help="Everything as one JSON object, on stdout."),
)


@click.command(params=[MODEL, *GRID, *METHOD, OUTPUT, *SHOW])
def plan(formats: str, tensors: bool, as_json: bool, **options: Any) -> None:
    """Say what r1q quantize would make of MODEL: bytes, disk, memory, time; reads headers alone.

    Takes the options of r1q quantize. Memory is counted from shapes; time from counted work and a probe of a few seconds.

    \b
    Examples:
      r1q plan ./DeepSeek-R1-Distill-Qwen-7B --effort default
      r1q plan ./model --scheme q4_k_m --effort fast --max-ram 6GiB --samples 32
    """
    import json

    from r1q.core.allocator import return_freed_memory
    from r1q.plan.job import Job, open_job, plan_job
    from r1q.plan.outlook import outlook
    from r1q.plan.render import make_console, show_outlook, show_plan

    return_freed_memory()  # as a run does: it decides how fast arrays are had
    opened = open_job(Job(formats=asked_formats(formats, options["scheme"]), **options), progress=not as_json)
    planned = plan_job(opened)
    found = outlook(opened, planned)
    if as_json:
        schemes = {tensor.spec.name: str(tensor.scheme) for tensor in planned.tensors}
        click.echo(json.dumps({"recipe": planned.recipe.to_dict(), "tensors": schemes, **found.to_dict()}))
        return
    console = make_console(quiet=False)
    console.print(opened.choice.reason, highlight=False)
    show_plan(console, planned)
    show_outlook(console, found)
    for tensor in planned.tensors if tensors else ():
        console.print(f"  {tensor.spec.gguf_name}: {tensor.scheme}", highlight=False)
