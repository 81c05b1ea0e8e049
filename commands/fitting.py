"""What `r1q quantize` does for --fit and --bpw before anything else: make the recipe file, showing how far it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.console import Console

    from r1q.plan.fitting import Budget

_STAGES = {"sensitivity": "what errors cost", "grids": "what each grid would lose", "swaps": "exchanges, measured"}


def fitted_scheme(
    console: Console, fit: str | None, bpw: float | None, swaps: int, options: Mapping[str, Any], formats: str
) -> str:
    """Return the path of the recipe file for a budget, made now or there already, as `--scheme` takes it."""
    from rich.progress import Progress

    from r1q.plan.fit import Fitted
    from r1q.plan.fitting import recipe_path, write_fitted

    _refuse(fit, bpw, options, formats)
    budget = _budget(fit, bpw, options["model"])
    label = budget.label if formats == "gguf" else f"{budget.label}-{formats}"
    budget = replace(budget, label=label, format=formats, cache=options["kv"] == "int8", swaps=swaps)
    path = recipe_path(options["model"], budget, options["output"])
    with Progress(console=console, transient=True) as progress:
        stages = {stage: said for stage, said in _STAGES.items() if stage != "swaps" or swaps}
        tasks = {stage: progress.add_task(said, total=None) for stage, said in stages.items()}
        events = write_fitted(options["model"], budget, path, calibration=options["calibration"])
        found: Fitted | None = None
        for event in events:
            if isinstance(event, Fitted):
                found = event
            else:
                progress.update(tasks[event.stage], completed=event.done, total=event.total)
    if found is None:
        console.print(f"recipe: {path} (made before)", highlight=False)
    else:
        console.print(
            f"recipe: {path}: {found.bytes / 1e6:.1f} MB; predicted divergence {found.loss:.4f} nats a token "
            "by plain rounding",
            highlight=False,
        )
        for swap in (swap for swap in found.swaps if swap.kept):
            console.print(f"exchanged: {swap}", highlight=False)
    return str(path)


def _refuse(fit: str | None, bpw: float | None, options: Mapping[str, Any], formats: str) -> None:
    """Raise where other options choose what a budget chooses, or the format leaves nothing to choose."""
    if options["lora"] is not None:
        raise click.UsageError(
            "--fit and --bpw measure the model without its adapter: leave --lora out, then give it with --scheme RECIPE"
        )
    if fit is not None and bpw is not None:
        raise click.UsageError("give --fit or --bpw, not both")
    if options["bits"] is not None or options["scheme"] is not None:
        raise click.UsageError("--fit and --bpw choose the grids themselves: leave --bits and --scheme out")
    if formats not in ("gguf", "onnx"):
        raise click.UsageError(
            f"--fit and --bpw choose for one file: give --to gguf or --to onnx, not {formats}"
            + (" (a GPTQ folder has one grid for all layers: there is nothing to choose)" if "gptq" in formats else "")
        )
    if options["group_size"] is not None or options["head_bits"] is not None or options["asymmetric"]:
        raise click.UsageError(
            "--fit and --bpw choose groups and bits themselves: leave --group-size, --head-bits and --asymmetric out"
        )


def _budget(fit: str | None, bpw: float | None, model: str | None) -> Budget:
    from r1q.benchmarks.profiles import profiles
    from r1q.benchmarks.room import room_for_file
    from r1q.models.embedded import open_model
    from r1q.plan.fitting import Budget, budget_of_bpw, budget_of_size
    from r1q.plan.holders import FAST_ON_ARM, GRIDS

    if bpw is not None:
        return budget_of_bpw(bpw)
    if fit is None:
        raise ValueError("no budget was asked for")
    devices = profiles()
    if fit not in devices:
        return budget_of_size(fit)
    room = room_for_file(devices[fit], open_model(model).source.config)
    return Budget(label=f"fit-{fit}", bytes=room, grids=FAST_ON_ARM if fit.startswith("phone") else GRIDS)
