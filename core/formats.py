"""What each format can hold: a plan is refused here, with the reason and a command that would work, before weights are read."""

from __future__ import annotations

from collections.abc import Iterable

from r1q.core.errors import UsageError, unknown_name
from r1q.core.recipe import PlannedTensor
from r1q.core.scheme import Scheme

FORMATS = ("gguf", "gptq")
# Formats of the plan that this version cannot write yet, and what the refusal says of them.
COMING = {"onnx": "ONNX export is not in this version"}
CHECKPOINT_ONLY = "checkpoint"


def as_integers(scheme: Scheme) -> Scheme | None:
    """Return the symmetric integer scheme that a scheme is, None when it is none: q4_0 is int4 in groups of 32, q8_0 int8."""
    same = {"q4_0": 4, "q8_0": 8}
    if scheme.grid in same:
        return Scheme(grid=f"int{same[scheme.grid]}", group_size=32)
    return scheme if scheme.facts.family == "int" and scheme.symmetric else None


def refuse_unfit(planned: Iterable[PlannedTensor], formats: Iterable[str]) -> None:
    """Raise `UsageError` for the first tensor that one of `formats` cannot hold, with what would work."""
    tensors = tuple(planned)
    for name in formats:
        if name == "gguf":
            _refuse_for_gguf(tensors)
        elif name == "gptq":
            gptq_scheme(tensors)


def _refuse_for_gguf(tensors: Iterable[PlannedTensor]) -> None:
    for tensor in tensors:
        if tensor.scheme.facts.family == "int":
            raise UsageError(
                f"{tensor.spec.name}: GGUF has no form for {tensor.scheme}; it holds --bits 4 or 8 with --group-size 32, "
                f"or a preset such as --scheme q4_k_m{_elsewhere(tensor.scheme)}"
            )


def _elsewhere(scheme: Scheme) -> str:
    return "; a GPTQ folder holds it: --to gptq" if scheme.symmetric else ""


def gptq_scheme(planned: Iterable[PlannedTensor]) -> Scheme:
    """Return the one integer scheme of all linear layers inside the blocks, as a GPTQ folder needs it.

    Raises `UsageError` for a tensor with another or none. Embedding and head are stored there in float16 and may be anything.
    """
    found: dict[Scheme, str] = {}
    for tensor in planned:
        if tensor.spec.layer is None or not tensor.spec.is_matrix:
            continue
        scheme = as_integers(tensor.scheme)
        if scheme is None:
            raise UsageError(
                f"{tensor.spec.name}: a GPTQ folder has no form for {tensor.scheme}; it holds symmetric integers: "
                "--bits 4 --group-size 32 (or 64, 128, -1) --to gptq"
            )
        found.setdefault(scheme, tensor.spec.name)
        if len(found) > 1:
            (one, first), (other, second) = found.items()
            raise UsageError(
                f"a GPTQ folder has one grid for all layers, not {one} ({first}) beside {other} ({second})"
            )
    if not found:
        raise UsageError("this model has no linear layers that a GPTQ folder could hold")
    return next(iter(found))


def parse_formats(names: str) -> tuple[str, ...]:
    """Return the formats of a comma-separated list; `checkpoint` alone means none. Raises `UsageError` for an unknown one."""
    formats = tuple(dict.fromkeys(part.strip().lower() for part in names.split(",") if part.strip()))
    if formats == (CHECKPOINT_ONLY,):
        return ()
    for name in formats:
        if name in COMING:
            raise UsageError(f"{COMING[name]}; it writes {', '.join(FORMATS)}")
        if name not in FORMATS:
            raise UsageError(unknown_name("format", name, (*FORMATS, CHECKPOINT_ONLY)))
    if not formats:
        raise UsageError(f"--to needs a format: {', '.join(FORMATS)}, or {CHECKPOINT_ONLY} for none")
    return formats
