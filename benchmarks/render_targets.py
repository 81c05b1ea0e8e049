"""The targets and profiles as tables: what `r1q bench --list-targets` shows."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from r1q.benchmarks.profiles import own_table, profiles
from r1q.benchmarks.targets import TARGETS


def target_table() -> RenderableType:
    """Return the targets that can be measured here, and the profiles that can be emulated or estimated."""
    real = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    real.add_column("target")
    real.add_column("", overflow="fold")
    for target in TARGETS.values():
        real.add_row(target.name, target.about)
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for heading in ("profile", "device", "memory", "GB/s", "from"):
        table.add_column(heading, justify="right" if heading in ("memory", "GB/s") else "left", overflow="fold")
    for profile in profiles().values():
        memory = f"{profile.memory / 2**30:g} GiB"
        table.add_row(profile.name, profile.device, memory, f"{profile.bandwidth / 1e9:g}", profile.source)
    explained = (
        "profiles: --estimate NAME adds a column of estimated tokens/s (60 % of the bandwidth / bytes that a token touches, never "
        f"measured); --target NAME emulates one with a CPU; your own in {own_table()}"
    )
    return Group(real, Text(), table, Text(), Text(explained, "dim"))
