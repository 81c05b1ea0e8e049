"""What Linux tells of the first processor: the fields of /proc/cpuinfo, and its instruction sets."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

PROC = Path("/proc")


def processor_fields(proc: Path = PROC) -> dict[str, str]:
    """Return the first processor's fields, none where the system does not tell."""
    try:
        text = (proc / "cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    return fields(text.partition("\n\n")[0])


def fields(text: str) -> dict[str, str]:
    """Return the `name: value` lines of a file in /proc."""
    pairs = (line.partition(":") for line in text.splitlines())
    return {name.strip(): value.strip() for name, colon, value in pairs if colon}


def instruction_sets(processor: Mapping[str, str]) -> list[str]:
    """Return the instruction sets among a processor's fields: x86 flags, or ARM features, in the system's order."""
    return f"{processor.get('flags', '')} {processor.get('Features', '')}".split()
