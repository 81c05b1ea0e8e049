"""The exact command behind a checkpoint, from what its manifest remembers: run it on the same source and the same codes come out."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from r1q.core.checkpoint import QuantizedCheckpoint
from r1q.core.errors import R1qError
from r1q.core.recipe import Recipe
from r1q.core.untrusted import printable
from r1q.models.embedded import NAME as EMBEDDED_NAME
from r1q.plan.choose import W8A8

RECIPE = "recipe.toml"
_USUAL = {"--device": "cpu", "--moe-calibration": "routed"}  # the command's own defaults, left out


@dataclass(frozen=True, slots=True, kw_only=True)
class Recalled:
    """`command` for a shell; `recipe` the text of recipe.toml where it needs one; `inputs` files that it reads, name and sha256."""

    command: str
    recipe: str | None = None
    inputs: tuple[tuple[str, str], ...] = ()


def recall(checkpoint: QuantizedCheckpoint, formats: Sequence[str]) -> Recalled:
    """Return the command that makes the codes of `checkpoint` and packs them in `formats`."""
    manifest = checkpoint.manifest
    scheme, recipe = _scheme(manifest.get("recipe"))
    words = ["r1q", "quantize", *_model(checkpoint), "--scheme", scheme, "--to", ",".join(formats)]
    inputs: list[tuple[str, str]] = []
    origin, calibration, engine = (_mapping(manifest.get(key)) for key in ("origin", "calibration", "engine"))
    if origin.get("adapter"):
        words += ["--lora", str(origin["adapter"])]
    if "imatrix" in calibration:
        words += ["--imatrix", "imatrix.gguf"]
        inputs.append(("imatrix.gguf", str(calibration["imatrix"])))
    if scheme == W8A8 and checkpoint.activations is not None:
        record = checkpoint.activations.record
        calibration = _mapping(record.get("calibration"))
        words += ["--activations", str(record.get("ranges", "minmax")), *_text_options(calibration)]
        inputs += _texts(calibration)
    if engine:
        words += _engine_options(engine) + _text_options(calibration)
        inputs += _texts(calibration)
    plain = [printable(word) for word in words]
    return Recalled(
        command=shlex.join(plain),
        recipe=recipe,
        inputs=tuple((printable(name), printable(sum_)) for name, sum_ in inputs),
    )


def _scheme(recipe: object) -> tuple[str, str | None]:
    """Return what --scheme is given, and the text of the recipe file where no name means the same."""
    value = _mapping(recipe)
    if value.get("name") == W8A8:
        return W8A8, None
    try:
        found = Recipe.from_dict(value, default_name="recipe", where="the manifest")
        if found == Recipe.named(found.name):
            return found.name, None
    except R1qError:
        pass
    from r1q.plan.fitting import to_toml  # it imports torch, which most parcels do not need

    try:
        return RECIPE, to_toml(Recipe.from_dict(value, default_name="recipe", where="the manifest"))
    except R1qError:  # of another version of r1q
        return str(value.get("name", RECIPE)), None


def _model(checkpoint: QuantizedCheckpoint) -> list[str]:
    origin = _mapping(checkpoint.manifest.get("origin"))
    if repository := origin.get("repository"):
        return [f"{repository}@{origin['commit']}" if origin.get("commit") else str(repository)]
    return [] if checkpoint.model_name == EMBEDDED_NAME else [checkpoint.model_name]


def _engine_options(engine: Mapping[str, object]) -> list[str]:
    """Return the options of how a calibrated run computes; threads too, for sums are taken in their order."""
    given = {f"--{name}": engine.get(name) for name in ("effort", "heal", "damp", "threads")}
    given |= {"--device": engine.get("device"), "--moe-calibration": engine.get("experts")}
    return [
        word
        for name, value in given.items()
        if value is not None and value != _USUAL.get(name)
        for word in (name, str(value))
    ]


def _text_options(calibration: Mapping[str, object]) -> list[str]:
    """Return the options of the text that a run looked at: which, how much of each, and how it was cut."""
    sources = _sources(calibration)
    words = []
    if any(source.get("kind") != "builtin" for source in sources):
        builtin = sum(_number(source.get("share")) for source in sources if source.get("kind") == "builtin")
        parts = [(str(s.get("name")), _number(s.get("share"))) for s in sources if s.get("kind") != "builtin"]
        parts += [("builtin", builtin)] if builtin else []
        texts = [name if len(parts) == 1 else f"{name}:{share:g}" for name, share in parts]
        words = ["--calibration", ",".join(texts)]
    given = {"--samples": calibration.get("asked"), "--seq-len": calibration.get("length")}
    return words + [word for name, value in given.items() if value is not None for word in (name, str(value))]


def _texts(calibration: Mapping[str, object]) -> list[tuple[str, str]]:
    """Return the files of calibration text that are not r1q's own."""
    found = []
    for source in _sources(calibration):
        if source.get("kind") == "builtin":
            continue
        files = source.get("files")
        listed = [_mapping(file) for file in files] if isinstance(files, list | tuple) else [source]
        found += [(str(file.get("name")), str(file.get("sha256"))) for file in listed]
    return found


def _sources(calibration: Mapping[str, object]) -> list[Mapping[str, object]]:
    sources = calibration.get("sources")
    return [_mapping(source) for source in sources] if isinstance(sources, list | tuple) else []


def _mapping(value: object) -> Mapping[str, object]:
    return value if isinstance(value, Mapping) else {}


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else 0.0
