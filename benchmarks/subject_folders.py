"""Folders as subjects: float, GPTQ and our own checkpoints, and ONNX models; every fact from headers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

from r1q.benchmarks.subjects import Subject
from r1q.benchmarks.traffic import Traffic, cache_values
from r1q.core.artifact import artifact_files
from r1q.core.checkpoint import QuantizedCheckpoint
from r1q.core.errors import InputError
from r1q.core.onnx_file import OnnxFolder
from r1q.core.onnx_graph import OnnxGraph, OnnxNode, OnnxTensor
from r1q.core.onnx_schema import BITS
from r1q.core.safetensors_file import SafetensorsFile
from r1q.core.tensors import TensorSpec
from r1q.models.config import ModelConfig
from r1q.models.gptq_source import GptqSource
from r1q.models.source import ModelSource

_LOOKUPS = ("Gather", "GatherBlockQuantized")
_FLOATS = ("float64", "float32", "float16", "bfloat16")
_EXPERT_BITS = ("expert_weight_bits", 4)
_EXPERT_CODES = (2, 5)  # inputs of QMoE: gate and up of all experts, and down
_TABLES = ("GroupQueryAttention", "RotaryEmbedding", "MultiHeadAttention")  # their initializers are cosines and sines


def folder_subject(path: Path, kind: str) -> Subject:
    """Return the facts of a folder (or of an .onnx file) of format `kind`. Raises InputError for one that is not sound."""
    return {"onnx": _onnx, "gptq": _gptq, "hf": _float, "checkpoint": _checkpoint}[kind](path)


def _float(path: Path) -> Subject:
    source = ModelSource.open(path)
    stored = _entries({source.path / name for name in artifact_files(path)})
    counts = Counter({spec.dtype.lower(): 0 for spec in source.tensors})
    for spec in source.tensors:
        counts[spec.dtype.lower()] += spec.size
    return _hugging_face(path, "hf", counts.most_common(1)[0][0], source.config, source.tensors, stored)


def _gptq(path: Path) -> Subject:
    source = GptqSource.open(path)
    settings = source.folder.settings
    group = "row" if settings.group_size == -1 else settings.group_size
    stored = _entries({file.path for file in source.folder.files()})
    grid = f"gptq int{settings.bits} g{group}{'' if settings.symmetric else ' asym'}"
    return _hugging_face(path, "gptq", grid, source.config, source.tensors, stored)


def _checkpoint(path: Path) -> Subject:
    checkpoint = QuantizedCheckpoint.open(path)
    config = ModelConfig.read(checkpoint.sidecar, name=checkpoint.model_name)
    files = [file for file in path.rglob("*") if file.is_file()]
    sizes = {str(file): file.stat().st_size for file in files}
    return _hugging_face(path, "checkpoint", "r1q checkpoint", config, checkpoint.tensors, sizes, path.parent.name)


def _hugging_face(
    path: Path,
    kind: str,
    grid: str,
    config: ModelConfig,
    tensors: Iterable[TensorSpec],
    stored: Mapping[str, int],
    name: str | None = None,
) -> Subject:
    """Return the subject; `stored` are the bytes of every tensor, or file, as they are on disk."""
    tensors = tuple(tensors)
    weights = sum(spec.size for spec in tensors)
    files = tuple(file for file in artifact_files(path).values() if file.suffix == ".safetensors")
    bits = 8 * sum(stored.values()) / weights
    traffic = _traffic(config, tensors, bits / 8)
    return Subject(
        path=path,
        name=name or path.resolve().name,
        format=kind,
        grid=grid,
        bytes=sum(file.stat().st_size for file in files) or sum(stored.values()),
        weights=weights,
        bits_per_weight=bits,
        context=config.max_position_embeddings,
        traffic=traffic,
        files=files,
    )


def _traffic(config: ModelConfig, tensors: Iterable[TensorSpec], bytes_per_weight: float) -> Traffic:
    used = config.experts.used / config.experts.count if config.experts else 1.0
    touched = sum(
        (used if spec.expert is not None else 1.0) * spec.size
        for spec in tensors
        if spec.kind != "token_embd" or config.tied
    )
    return Traffic(
        # Runtimes here keep floats of these folders in memory, so that what a file spends on average is near enough.
        weight_bytes=int(touched * bytes_per_weight),
        touched_weights=int(touched),
        cache_values=cache_values(config),
        width=config.hidden_size,
        inner=config.intermediate_size,
        vocab=config.vocab_size,
    )


def _entries(paths: Iterable[Path]) -> dict[str, int]:
    files = [SafetensorsFile.open(path) for path in sorted(paths) if path.suffix == ".safetensors"]
    return {f"{file.path}:{name}": entry.stop - entry.start for file in files for name, entry in file.tensors.items()}


def _onnx(path: Path) -> Subject:
    folder = OnnxFolder.open(path, finite=False)
    graph = folder.graph
    readers = _readers(graph)
    data = {
        name: tensor for name, tensor in graph.initializers.items() if tensor.nbytes and not _is_table(readers, name)
    }
    weights = sum(_weights(tensor, readers.get(name, [])) for name, tensor in data.items())
    if not weights:
        raise InputError(f"{path} holds no weights: it is no language model, and cannot be benched")
    model = folder.config.get("model", {})
    context = model.get("context_length") if isinstance(model, Mapping) else None
    # A tied head and the embedding may be one stretch of a file under two names: what is stored once is counted once.
    stored = {(t.location, t.offset, name if t.location is None else ""): t.nbytes for name, t in data.items()}
    names = {tensor.location for tensor in graph.initializers.values() if tensor.location}
    return Subject(
        path=path,
        name=folder.path.resolve().name if folder.path.name != "onnx" else folder.path.resolve().parent.name,
        format="onnx",
        grid=_onnx_grid(graph, data),
        bytes=folder.nbytes,
        weights=weights,
        bits_per_weight=8 * sum(stored.values()) / weights,
        context=context if isinstance(context, int) and context > 1 else 4096,
        traffic=_onnx_traffic(graph, data, readers),
        files=(graph.path, *(folder.path / name for name in sorted(names))),
    )


def _readers(graph: OnnxGraph) -> dict[str, list[OnnxNode]]:
    found: dict[str, list[OnnxNode]] = {}
    for node in graph.nodes:
        for name in node.inputs:
            if name in graph.initializers:
                found.setdefault(name, []).append(node)
    return found


def _is_table(readers: Mapping[str, list[OnnxNode]], name: str) -> bool:
    return all(node.op_type in _TABLES for node in readers.get(name, []))


def _weights(tensor: OnnxTensor, nodes: list[OnnxNode]) -> int:
    """Return how many weights an initializer stands for; 0 for scales, zero points and constants."""
    for node in nodes:
        place = node.inputs.index(tensor.name)
        if node.op_type == "MatMulNBits":
            return _size(node, "K") * _size(node, "N") if place == 1 else 0
        if node.op_type == "QMoE":
            return 8 * tensor.nbytes // _size(node, *_EXPERT_BITS) if place in _EXPERT_CODES else 0
        if node.op_type == "GatherBlockQuantized":
            return 8 * tensor.nbytes // _size(node, "bits", 4) if place == 0 else 0
        if node.op_type in ("DequantizeLinear", "MatMulIntegerToFloat", "DynamicQuantizeMatMul") and place > 1:
            return 0
    integers = BITS[tensor.dtype] <= 8 and len(tensor.shape) > 1
    return tensor.size if tensor.dtype in _FLOATS or integers else 0


def _size(node: OnnxNode, key: str, default: int = 0) -> int:
    """Return an attribute that says how many. Raises InputError for one that is missing and for what is no positive number."""
    found = node.attributes.get(key, default)
    if not isinstance(found, int) or found < 1:
        raise InputError(f"{node}: {key} is {str(found)[:40]}, not a number of something")
    return found


def _share_used(tensor: OnnxTensor, node: OnnxNode) -> float:
    """Return which share of a tensor a token touches: of those of all experts, [experts, …], that of the experts it is sent to."""
    if node.op_type != "QMoE" or not tensor.shape or not tensor.shape[0]:
        return 1.0
    return min(1.0, _size(node, "k", 1) / tensor.shape[0])


def _onnx_grid(graph: OnnxGraph, data: Mapping[str, OnnxTensor]) -> str:
    counts: Counter[str] = Counter()
    for node in graph.nodes:
        if node.op_type == "MatMulNBits":
            zeros = " asym" if node.input(3) else ""
            grid = f"onnx int{_size(node, 'bits', 4)} g{_size(node, 'block_size')}{zeros}"
            counts[grid] += _size(node, "K") * _size(node, "N")
        if node.op_type == "QMoE":
            codes = [data[node.input(place)] for place in _EXPERT_CODES if node.input(place) in data]
            zeros, bits = " asym" if node.input(11) else "", _size(node, *_EXPERT_BITS)
            block = f"g{_size(node, 'block_size')}" if "block_size" in node.attributes else "row"
            grid = f"onnx int{bits} {block}{zeros}"
            counts[grid] += sum(8 * tensor.nbytes // bits for tensor in codes)
    if counts:
        return counts.most_common(1)[0][0]
    for tensor in data.values():
        counts[f"onnx {tensor.dtype}"] += tensor.nbytes
    return counts.most_common(1)[0][0]


def _onnx_traffic(
    graph: OnnxGraph, data: Mapping[str, OnnxTensor], readers: Mapping[str, list[OnnxNode]]
) -> Traffic | None:
    keys = [value for name, value in graph.inputs.items() if name.startswith("past_key_values.")]
    sides = [value.shape for value in keys if value.shape and len(value.shape) == 4]
    values = [side[1] * side[3] for side in sides if isinstance(side[1], int) and isinstance(side[3], int)]
    if not values or len(values) != len(keys):
        return None
    read: dict[tuple[str | None, int, str], float] = {}
    touched = 0.0
    for name, tensor in data.items():
        nodes = [node for node in readers.get(name, []) if node.op_type not in _LOOKUPS]
        if nodes:
            share = _share_used(tensor, nodes[0])
            read[(tensor.location, tensor.offset, name if tensor.location is None else "")] = share * tensor.nbytes
            touched += share * _weights(tensor, nodes)
    # A cache in 32 bits counts as twice the values: callers multiply by two bytes.
    wide = 2 if keys[0].dtype == "float32" else 1
    logits = next((value.shape for value in graph.outputs.values() if value.name == "logits"), None)
    vocab = logits[-1] if logits and isinstance(logits[-1], int) else 0
    widths = [t.shape[-1] for t in data.values() if len(t.shape) == 1]
    return Traffic(
        weight_bytes=int(sum(read.values())),
        touched_weights=int(touched),
        cache_values=wide * sum(values),
        width=Counter(widths).most_common(1)[0][0] if widths else 0,
        inner=max((_size(n, "K") for n in graph.nodes if n.op_type == "MatMulNBits"), default=0),
        vocab=vocab,
    )
