"""Energy: what the processor's own counters (RAPL) say was used between two moments, where they can be read at all.

Linux shows them under /sys/class/powercap, one folder a package, in microjoules that wrap around. They count the whole package,
whoever computes on it; most systems let only root read them. Nowhere is a number made up: without counters there is none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

POWERCAP = Path("/sys/class/powercap")


@dataclass(frozen=True, slots=True)
class Counters:
    """The packages' counters; `folders` is empty where there are none or reading them is not allowed."""

    folders: tuple[Path, ...]

    def read(self) -> dict[Path, int]:
        """Return every package's counter in microjoules."""
        return {folder: int((folder / "energy_uj").read_text()) for folder in self.folders}

    def joules(self, before: Mapping[Path, int], after: Mapping[Path, int]) -> float:
        """Return the joules of all packages between two readings, each of which may have wrapped around once."""
        total = 0
        for folder in self.folders:
            used = after[folder] - before[folder]
            total += used if used >= 0 else used + int((folder / "max_energy_range_uj").read_text())
        return total / 1e6


def find_counters(root: Path = POWERCAP) -> Counters:
    """Return the counters of whole packages that this process may read."""
    # intel-rapl:0 is a package (AMD's too); intel-rapl:0:0 is a part of it, and would count twice.
    folders = sorted(root.glob("intel-rapl:*")) if root.is_dir() else []
    return Counters(tuple(folder for folder in folders if folder.name.count(":") == 1 and _readable(folder)))


def _readable(folder: Path) -> bool:
    try:
        name = (folder / "name").read_text().strip()
        return name.startswith("package") and int((folder / "energy_uj").read_text()) >= 0
    except (OSError, ValueError):
        return False
