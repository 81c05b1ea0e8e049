"""OnnxDecoder: what an ONNX folder says of the decoder in it, held against its graphs, so that a runtime can make its buffers.

The layout is onnxruntime-genai's: genai_config.json names the inputs and outputs; keys and values go through GroupQueryAttention, the
one operator that can write into the buffer it reads, so that a token costs no copy of the cache.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from r1q.core.errors import InputError, UsageError
from r1q.core.onnx_file import ALL_LOGITS, CONFIG, OnnxFolder
from r1q.core.onnx_graph import OnnxGraph, OnnxValue
from r1q.runtimes.base import Options

MAX_CONTEXT = 1 << 24
MAX_VOCAB = 1 << 24
MAX_LAYERS = 4096
MAX_HEADS = 1 << 12
MAX_HEAD_SIZE = 1 << 12
CACHE_TYPES = ("float32", "float16", "int8", "uint8")
LOGIT_TYPES = ("float32", "float16")
_NO_FLASH = "ORT_GQA_DISABLE_FLASH_ATTENTION"
_ATTENTION = "GroupQueryAttention"
_MEND = "export it again with r1q export or onnxruntime-genai's model builder"


@dataclass(frozen=True, slots=True, kw_only=True)
class Names:
    """What a graph's inputs and outputs are called; caches layer by layer, keys before values, `past` and `present` in one order."""

    ids: str
    mask: str
    logits: str
    past: tuple[str, ...]
    present: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sides:
    """How long axes are: caches are [batch, `heads`, context, `head_size`], logits [batch, positions, `vocab`]."""

    heads: int
    head_size: int
    vocab: int
    context: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Kinds:
    """What values are stored in; `cache_width` is the last axis of a cache: `head_size`, or half of it for two values a byte."""

    cache: str
    cache_width: int
    logits: str


@dataclass(frozen=True, slots=True, kw_only=True)
class OnnxDecoder:
    """A decoder in a folder. `main` is the graph that generates.

    `every` is the one with logits for every position: `main` itself where it gives them, None where no graph does.
    """

    folder: Path
    main: str
    every: str | None
    names: Names
    sides: Sides
    kinds: Kinds
    eos: tuple[int, ...]


def read_decoder(folder: OnnxFolder) -> OnnxDecoder:
    """Return the decoder of a checked folder. Raises InputError for one that says too little, too much, or not what its graphs say."""
    return _Reader(folder).decoder()


def check_options(decoder: OnnxDecoder, options: Options) -> None:
    """Raise UsageError for options that no runtime of ONNX folders can honour: the folder fixes what its caches are made of."""
    cache = decoder.kinds.cache
    if options.cache == "q8_0":
        raise UsageError("q8_0 is llama.cpp's cache: an ONNX folder with one of 8 bits is made by r1q export --kv int8")
    if options.cache == "f32" and cache != "float32":
        raise UsageError(f"keys and values of this folder are {cache}: leave the cache's type out")
    if options.flash_attention is False and os.environ.get(_NO_FLASH) != "1":
        raise UsageError(f"onnxruntime turns flash attention off by the environment alone: set {_NO_FLASH}=1")
    if options.device == "cpu":
        return
    if options.gpu_layers not in (0, -1, len(decoder.names.past) // 2):
        raise UsageError("onnxruntime puts every block on the GPU or none: leave GPU layers out")
    if cache == "float32":
        # CUDA's GroupQueryAttention has no float32 kernel: the attention would silently be computed by the CPU.
        raise UsageError(
            "onnxruntime's attention on CUDA has no float32: use the device cpu, or a folder made for CUDA"
        )


def scoring_graph(decoder: OnnxDecoder) -> str:
    """Return the graph with logits for every position. Raises UsageError, with the way out, where the folder has none."""
    if decoder.every is None:
        raise UsageError(
            f"{decoder.folder} gives the logits of the last position only: export it again with r1q, which adds {ALL_LOGITS}"
        )
    return decoder.every


class _Reader:
    def __init__(self, folder: OnnxFolder) -> None:
        self.folder = folder
        self.where = folder.path / CONFIG
        if not folder.config:
            raise InputError(f"{self.where} is missing or empty: without it nobody knows the model's context; {_MEND}")

    def decoder(self) -> OnnxDecoder:
        layers = self.integer("model.decoder.num_hidden_layers", MAX_LAYERS)
        names = Names(
            ids=self.name("model.decoder.inputs.input_ids"),
            mask=self.name("model.decoder.inputs.attention_mask"),
            logits=self.name("model.decoder.outputs.logits"),
            past=self.caches("inputs.past", layers),
            present=self.caches("outputs.present", layers),
        )
        sides = Sides(
            heads=self.integer("model.decoder.num_key_value_heads", MAX_HEADS),
            head_size=self.integer("model.decoder.head_size", MAX_HEAD_SIZE),
            vocab=self.integer("model.vocab_size", MAX_VOCAB),
            context=self.integer("model.context_length", MAX_CONTEXT),
        )
        main, every = self.graphs(names.logits)
        kinds = [_check_graph(self.folder.graphs[name], names, sides) for name in (main, every) if name is not None]
        if kinds[0] != kinds[-1]:
            raise InputError(f"{self.folder.path}: {main} and {every} differ in their caches or logits; {_MEND}")
        return OnnxDecoder(
            folder=self.folder.path, main=main, every=every, names=names, sides=sides, kinds=kinds[0],
            eos=self.eos(sides.vocab),
        )  # fmt: skip

    def graphs(self, logits: str) -> tuple[str, str | None]:
        """Return the graph that generates, and the one with logits for every position if there is one."""
        main = self.folder.main
        for name in (main, ALL_LOGITS):
            graph = self.folder.graphs.get(name)
            if graph is not None and not _only_last(graph, logits):
                return main, name
        return main, None

    def caches(self, kind: str, layers: int) -> tuple[str, ...]:
        patterns = [self.pattern(f"model.decoder.{kind}_{part}_names") for part in ("key", "value")]
        return tuple(pattern.replace("%d", str(layer)) for layer in range(layers) for pattern in patterns)

    def eos(self, vocab: int) -> tuple[int, ...]:
        value = self.value("model.eos_token_id")
        ids = value if isinstance(value, list) else [value]
        if not all(isinstance(item, int) and not isinstance(item, bool) and 0 <= item < vocab for item in ids):
            self.fail("model.eos_token_id", f"is {str(value)[:40]}, not an id or a list of ids below {vocab}")
        return tuple(ids)

    def integer(self, key: str, most: int) -> int:
        value = self.value(key)
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
            self.fail(key, f"is {str(value)[:40]}, not a whole number from 1 to {most}")
        return value

    def name(self, key: str) -> str:
        value = self.value(key)
        if not isinstance(value, str) or not value:
            self.fail(key, f"is {str(value)[:40]}, not a name")
        return value

    def pattern(self, key: str) -> str:
        value = self.name(key)
        if value.count("%d") != 1 or value.count("%") != 1:
            self.fail(key, f"is {value[:40]!r}, not a name with one %d for the layer")
        return value

    def value(self, key: str) -> Any:
        found: Any = self.folder.config
        for part in key.split("."):
            if not isinstance(found, Mapping) or part not in found:
                self.fail(key, "is missing")
            found = found[part]
        return found

    def fail(self, key: str, what: str) -> NoReturn:
        raise InputError(f"{self.where}: {key} {what}; {_MEND}")


def _only_last(graph: OnnxGraph, logits: str) -> bool:
    shape = graph.outputs[logits].shape if logits in graph.outputs else None
    return shape is not None and len(shape) == 3 and shape[1] == 1


def _check_graph(graph: OnnxGraph, names: Names, sides: Sides) -> Kinds:
    """Hold one graph against what the folder says of it. Raises InputError with the value that differs."""

    def need(kept: bool, what: str) -> None:
        if not kept:
            raise InputError(f"{graph.path}: {what}; {_MEND}")

    asked = (names.ids, names.mask, *names.past)
    for name in asked:
        need(name in graph.inputs, f"has no input {name!r}")
    for name in (names.logits, *names.present):
        need(name in graph.outputs, f"has no output {name!r}")
    others = [name for name in graph.inputs if name not in asked]
    need(not others, f"wants the input {', '.join(others[:3])!r}, which a plain decoder has not")
    for name in (names.ids, names.mask):
        need(graph.inputs[name].dtype == "int64", f"input {name!r} is {graph.inputs[name].dtype}, not int64")
    logits = graph.outputs[names.logits]
    need(_fits(logits, (None, None, sides.vocab)), f"logits are {logits.shape}, not of {sides.vocab} tokens")
    need(logits.dtype in LOGIT_TYPES, f"logits are {logits.dtype}, not one of {', '.join(LOGIT_TYPES)}")
    first = graph.inputs[names.past[0]]
    width = _check_attention(graph, names, sides, need)
    for name in names.past:
        value = graph.inputs[name]
        need(
            _fits(value, (None, sides.heads, None, width)),
            f"cache {name!r} is {value.shape}, not {sides.heads} × {width}",
        )
        need(
            value.dtype == first.dtype in CACHE_TYPES,
            f"cache {name!r} is {value.dtype}: all are one of {', '.join(CACHE_TYPES)}",
        )
    return Kinds(cache=first.dtype, cache_width=width, logits=logits.dtype)


def _check_attention(graph: OnnxGraph, names: Names, sides: Sides, need: Callable[[bool, str], None]) -> int:
    """Check that every layer's keys and values go through one GroupQueryAttention and back; return a cache's last axis."""
    nodes = {node.input(3): node for node in graph.nodes if node.op_type == _ATTENTION}
    widths = set()
    for layer in range(len(names.past) // 2):
        pair = slice(2 * layer, 2 * layer + 2)
        node = nodes.get(names.past[pair.start])
        need(
            node is not None and (node.inputs[3:5], node.outputs[1:3]) == (names.past[pair], names.present[pair]),
            f"keys and values of block {layer} do not go through {_ATTENTION}, the one operator that adds to a cache in place",
        )
        assert node is not None
        need(
            node.attributes.get("kv_num_heads") == sides.heads, f"{node} has not {sides.heads} heads of keys and values"
        )
        table = graph.initializers.get(node.input(7))
        need(
            not node.attributes.get("do_rotary")
            or (table is not None and len(table.shape) == 2 and table.shape[0] >= sides.context),
            f"{node} has no rotary table of {sides.context} positions, the context that {CONFIG} promises",
        )
        widths.add(sides.head_size // 2 if node.attributes.get("kv_cache_bit_width") == 4 else sides.head_size)
    need(len(widths) == 1, "some caches hold 4 bits a value and some do not")
    return widths.pop()


def _fits(value: OnnxValue, sides: tuple[int | None, ...]) -> bool:
    """Return whether a value has these sides, where both say one. A name in the graph's shape is a free side."""
    if value.shape is None or len(value.shape) != len(sides):
        return False
    pairs = zip(value.shape, sides, strict=True)
    return all(has == wanted for has, wanted in pairs if isinstance(has, int) and wanted is not None)
