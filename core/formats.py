"""What each format can hold: a plan is refused here, with the reason and a command that would work, before weights are read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from r1q.core.errors import UsageError, unknown_name
from r1q.core.mixtures import ROUTERS
from r1q.core.recipe import KV_B_HALVES, PlannedTensor
from r1q.core.scheme import Scheme
from r1q.core.tensors import TensorSpec

FORMATS = ("gguf", "gptq", "onnx")
CHECKPOINT_ONLY = "checkpoint"
ONNX_BITS = (2, 4, 8)
ONNX_HEADS = 16
"""What the length of a head is a multiple of in the CPU kernel of GroupQueryAttention."""
ONNX_BLOCKS = (256, 128, 64, 32, 16)  # what the CPU kernel of MatMulNBits takes


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
        elif name == "onnx":
            _refuse_for_onnx(tensors)


def _refuse_for_gguf(tensors: Iterable[PlannedTensor]) -> None:
    for tensor in tensors:
        if tensor.scheme.facts.family == "int":
            raise UsageError(
                f"{tensor.spec.name}: GGUF has no form for {tensor.scheme}; it holds --bits 4 or 8 with --group-size 32, "
                f"or a preset such as --scheme q4_k_m{_elsewhere(tensor.scheme)}"
            )
    _refuse_mixed_experts(tensors, "a GGUF file", lambda spec: spec.gguf_name)


def _refuse_mixed_experts(tensors: Iterable[PlannedTensor], holder: str, stack: Callable[[TensorSpec], str]) -> None:
    """Raise `UsageError` for experts of one `stack` that have several grids, where `holder` has one for all of them."""
    found: dict[str, Scheme] = {}
    for tensor in tensors:
        if tensor.spec.expert is None:
            continue
        one, other = found.setdefault(stack(tensor.spec), tensor.scheme), tensor.scheme
        if one != other:
            name = tensor.spec.gguf_name
            raise UsageError(f"{name}: {holder} has one grid for all experts of a block, not {one} and {other}")


def _elsewhere(scheme: Scheme) -> str:
    """Return which formats hold integers that GGUF does not, as the end of a sentence."""
    holders = [
        *(["gptq"] if scheme.symmetric else []),
        *(["onnx"] if scheme.facts.bits in ONNX_BITS else []),
    ]
    return f"; --to {','.join(holders)} has one" if holders else ""


def gptq_packs(spec: TensorSpec, scheme: Scheme) -> bool:
    """Return whether a GPTQ folder holds this tensor as packed integers."""
    return spec.layer is not None and spec.is_matrix and scheme.facts.family != "float"


def gptq_scheme(planned: Iterable[PlannedTensor]) -> Scheme:
    """Return the one integer scheme of all linear layers inside the blocks, as a GPTQ folder needs it.

    In a model with experts what is no expert may be float; the halves of kv_b, one matrix there, have to be. Raises `UsageError` for
    a tensor with another scheme or none. Embedding and head are stored there as floats and may be anything.
    """
    found: dict[Scheme, str] = {}
    tensors = tuple(planned)
    sparse = any(tensor.spec.kind in ROUTERS for tensor in tensors)
    for tensor in tensors:
        if tensor.spec.layer is None or not tensor.spec.is_matrix:
            continue
        if sparse and tensor.spec.expert is None and tensor.scheme.facts.family == "float":
            continue
        if tensor.spec.kind in KV_B_HALVES:
            raise UsageError(
                f"{tensor.spec.name}: kv_b_proj is one matrix in a GPTQ folder and two halves here, so it stays bf16 there; quantize "
                "with --to gptq from the beginning"
            )
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


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockForm:
    """How MatMulNBits holds a matrix: `bits` a code, `block` columns a scale; each scale of ours fills `repeats` blocks."""

    bits: int
    block: int
    repeats: int
    symmetric: bool


def onnx_form(scheme: Scheme, columns: int) -> BlockForm | None:
    """Return the form of rows of `columns` weights under `scheme` in ONNX, None for floats (which are stored as float32).

    A group that is no block of the kernel (a whole row, 512) is spelled as several blocks with one scale.
    Raises `UsageError` for what ONNX Runtime has no kernel for.
    """
    if scheme.facts.family == "float":
        return None
    integers = as_integers(scheme) or scheme
    if integers.facts.family != "int" or integers.facts.bits not in ONNX_BITS:
        raise UsageError(
            f"ONNX Runtime has no kernel for {scheme}; it computes with integers: --bits 4 (2, 8) --to onnx, "
            "which a GPTQ folder and, in groups of 32, a GGUF file hold too"
        )
    group = integers.group(columns)
    block = next((block for block in ONNX_BLOCKS if group % block == 0), None)
    if block is None:
        raise UsageError(f"ONNX Runtime has no kernel for groups of {group}: multiples of 16 work, as --group-size 32")
    return BlockForm(bits=integers.facts.bits, block=block, repeats=group // block, symmetric=integers.symmetric)


def expert_forms(scheme: Scheme, columns: Sequence[int]) -> tuple[BlockForm, ...]:
    """Return the forms of an expert's matrices, whose rows have `columns`, in QMoE, which has one block for all of them.

    Raises `UsageError` for floats and for what `onnx_form` refuses.
    """
    forms = [onnx_form(scheme, count) for count in columns]
    blocks = [form.block for form in forms if form is not None]
    if len(blocks) < len(forms):
        raise UsageError(f"ONNX Runtime computes experts in integers, not as {scheme}: --bits 4 (2, 8) --to onnx")
    block = min(blocks)  # powers of two: the least divides the others
    return tuple(
        replace(form, block=block, repeats=form.repeats * form.block // block) for form in forms if form is not None
    )


def _refuse_for_onnx(tensors: Sequence[PlannedTensor]) -> None:
    ranks = {tensor.spec.layer: tensor.spec.size for tensor in tensors if tensor.spec.kind == "attn_kv_a_norm"}
    for spec in (tensor.spec for tensor in tensors if tensor.spec.kind == "attn_kv_a_mqa"):
        turning = spec.rows - ranks[spec.layer]
        if spec.rows % ONNX_HEADS or turning % ONNX_HEADS:
            raise UsageError(
                f"{spec.name}: keys have {spec.rows} numbers, of which {turning} turn; ONNX Runtime's attention wants multiples of "
                f"{ONNX_HEADS}; --to gguf holds this model"
            )
    _refuse_mixed_experts(tensors, "an ONNX folder", lambda spec: str(spec.layer))
    for tensor in tensors:
        if not tensor.spec.is_matrix:
            continue
        try:
            if tensor.spec.expert is None:
                onnx_form(tensor.scheme, tensor.spec.columns)
            else:
                expert_forms(tensor.scheme, (tensor.spec.columns,))
        except UsageError as error:
            raise UsageError(f"{tensor.spec.name}: {error}") from error


def parse_formats(names: str) -> tuple[str, ...]:
    """Return the formats of a comma-separated list; `checkpoint` alone means none. Raises `UsageError` for an unknown one."""
    formats = tuple(dict.fromkeys(part.strip().lower() for part in names.split(",") if part.strip()))
    if formats == (CHECKPOINT_ONLY,):
        return ()
    for name in formats:
        if name not in FORMATS:
            raise UsageError(unknown_name("format", name, (*FORMATS, CHECKPOINT_ONLY)))
    if not formats:
        raise UsageError(f"--to needs a format: {', '.join(FORMATS)}, or {CHECKPOINT_ONLY} for none")
    return formats
