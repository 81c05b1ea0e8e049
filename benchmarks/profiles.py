"""Profiles: devices a model may be meant for, from our table and the user's own; what is estimated for them is never measured."""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

from r1q.benchmarks.traffic import Traffic
from r1q.core.errors import InputError, UsageError, unknown_name
from r1q.runtimes.base import Device

TABLE = Path(__file__).resolve().parent / "targets.toml"
EFFICIENCY = 0.6
"""The share of nominal bandwidth that an estimate counts with: an assumption, too high for models that fit into caches."""
MAX_TABLE = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """A device: `memory` in bytes, `bandwidth` in bytes a second, `share` of memory that a program may take, `source` of the facts."""

    name: str
    about: str
    device: Device
    memory: int
    bandwidth: float
    source: str
    share: float = 0.75
    efficiency: float = EFFICIENCY

    @property
    def usable(self) -> int:
        """Bytes that one program may take there."""
        return int(self.share * self.memory)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """An estimate for `profile`: tokens/s of decoding at `depth`, and whether `needed` bytes fit the `usable` ones there."""

    profile: str
    tokens_per_second: float
    depth: int
    needed: int
    usable: int

    @property
    def fits(self) -> bool:
        """Whether weights, cache and activations fit."""
        return self.needed <= self.usable


def own_table() -> Path:
    """Return where the user's own profiles lie: $XDG_CONFIG_HOME/r1q/targets.toml, or below ~/.config."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "r1q" / TABLE.name


def profiles(own: Path | None = None) -> dict[str, Profile]:
    """Return every profile by name, the user's over ours. Raises InputError with the file, the profile and the key that is wrong."""
    path = own or own_table()
    return {**_ours(), **(_read(path) if path.is_file() else {})}


def find_profile(name: str) -> Profile:
    """Return the profile of `name`. Raises UsageError with the near names."""
    table = profiles()
    if name not in table:
        raise UsageError(unknown_name("profile", name, table))
    return table[name]


def predict(profile: Profile, traffic: Traffic, *, weights: int, context: int, depth: int = 0) -> Prediction:
    """Return the estimate for a file of `weights` bytes at `depth`: nothing but bandwidth is believed to bound it."""
    return Prediction(
        profile=profile.name,
        tokens_per_second=profile.efficiency * profile.bandwidth / traffic.token_bytes(depth),
        depth=depth,
        needed=weights + traffic.cache_bytes(context) + traffic.activation_bytes(),
        usable=profile.usable,
    )


@cache
def _ours() -> Mapping[str, Profile]:
    return _read(TABLE)


def _read(path: Path) -> dict[str, Profile]:
    try:
        data = path.read_bytes()
        if len(data) > MAX_TABLE:
            raise InputError(f"{path} has more than {MAX_TABLE} bytes: that is no table of targets")
        tables = tomllib.loads(data.decode())
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is no table of targets: {error}") from error
    return {name: _profile(path, name, table) for name, table in tables.items()}


def _profile(path: Path, name: str, table: Any) -> Profile:
    known = {field.name for field in fields(Profile)} - {"name"}
    where = f"{path}: [{name}]"
    if not isinstance(table, dict):
        raise InputError(f"{where} is no table; give it memory, bandwidth and source")
    if strange := sorted(set(table) - known):
        raise InputError(f"{where}: {unknown_name('key', strange[0], known)}")
    if absent := [key for key in ("memory", "bandwidth", "source") if key not in table]:
        raise InputError(f"{where} lacks {absent[0]}")
    device = table.get("device", "cpu")
    if device not in ("cpu", "gpu"):
        raise InputError(f"{where}: device is {device!r}; it is cpu or gpu")
    return Profile(
        name=name,
        about=str(table.get("about", name)),
        device=device,
        memory=_size(where, table["memory"]),
        bandwidth=1e9 * _number(where, "bandwidth", table["bandwidth"], 1e6),
        source=str(table["source"]),
        share=_number(where, "share", table.get("share", 0.75), 1),
        efficiency=_number(where, "efficiency", table.get("efficiency", EFFICIENCY), 1),
    )


def _number(where: str, key: str, value: object, most: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= most:
        raise InputError(f"{where}: {key} is {value!r}; it must be a number above 0, at most {most:g}")
    return float(value)


def _size(where: str, value: object) -> int:
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([MGT])iB", value) if isinstance(value, str) else None
    if found is None or not float(found[1]):
        raise InputError(f"{where}: memory is {value!r}; write it like 8GiB")
    return int(float(found[1]) * 1024 ** ("MGT".index(found[2]) + 2))
