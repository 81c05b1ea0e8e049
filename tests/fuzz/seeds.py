"""Where fuzzing starts, and how it goes on: small valid files of every kind, words worth trying, and mutations that keep a form.

Byte mutations of a coverage-guided fuzzer seldom get past a header length or a JSON brace; these change a value inside the form
and put lengths, offsets and counts right again, sometimes wrongly. Everything random comes from the given generator.
"""

from __future__ import annotations

import json
import math
import random
import struct
from collections.abc import Callable, Mapping

CONFIG_KINDS = ("config", "generation", "index", "manifest", "artifacts", "job")
INTEGERS = (
    0, 1, 2, 3, 4, 7, 8, 31, 32, 33, 63, 64, 127, 128, 255, 256, 1 << 16, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 32,
    1 << 40, (1 << 53) + 1, 1 << 62, (1 << 63) - 1, 1 << 63, (1 << 64) - 1, -1, -2, -(1 << 31), -(1 << 63),
)  # fmt: skip
ODD_VALUES: tuple[object, ...] = (
    *INTEGERS, 10**400, 1e308, 5e-324, -0.0, 0.5, float("nan"), float("inf"), float("-inf"), True, False, None, "", "a", "\0", "\n",
    "\ud800", "é", "..", "../x", "/etc/passwd", "x" * 300, "C:x", "x.safetensors", "%s{}", [], {}, [[]], [None], [0, 0], {"": 0},
)  # fmt: skip
GGUF_KEYS = (
    "general.architecture", "general.type", "general.alignment", "general.file_type", "general.name", "split.count", "split.no",
    "tokenizer.ggml.tokens", "tokenizer.ggml.scores", "tokenizer.ggml.token_type", "tokenizer.ggml.merges",
    "tokenizer.ggml.bos_token_id", "tokenizer.ggml.add_bos_token", "tokenizer.chat_template", "llama.block_count",
    "llama.attention.head_count", "llama.attention.head_count_kv", "llama.context_length", "imatrix.chunk_count",
    "imatrix.chunk_size", "imatrix.datasets", "r1q.version", "quantize.imatrix.file",
)  # fmt: skip
GGUF_NAMES = (
    "token_embd.weight",
    "blk.0.attn_q.weight",
    "blk.1.ffn_up.weight",
    "output.weight",
    "a.in_sum2",
    "a.counts",
    "b.in_sum2",
)
_FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


def text(value: str | bytes) -> bytes:
    """Return a GGUF string: length and bytes."""
    raw = value.encode("utf-8", "surrogatepass") if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def scalar(rng: random.Random, kind: int) -> bytes:
    """Return a value of GGUF's scalar type `kind`, often an extreme one."""
    width = struct.calcsize("<" + _FORMATS[kind])
    if kind in (6, 12):
        return struct.pack("<" + _FORMATS[kind], rng.choice([0.0, 1.0, -1.0, float("nan"), float("inf"), 1e30, 0.25]))
    return (rng.choice(INTEGERS) % (1 << 8 * width)).to_bytes(width, "little")


def gguf_entry(key: str, kind: int, payload: bytes) -> bytes:
    """Return one metadata entry."""
    return text(key) + struct.pack("<I", kind) + payload


def gguf_array(key: str, element: int, count: int, payload: bytes) -> bytes:
    """Return one metadata entry that is an array."""
    return gguf_entry(key, 9, struct.pack("<IQ", element, count) + payload)


def gguf(
    keys: list[bytes], tensors: list[tuple[str, list[int], int, bytes]], align: int = 32, version: int = 3
) -> bytes:
    """Return a GGUF file of (name, dimensions, type number, data) tensors with offsets and padding as they should be."""
    infos, data = b"", b""
    for name, dims, kind, stored in tensors:
        data += b"\0" * (-len(data) % align)
        infos += text(name) + struct.pack("<I", len(dims)) + b"".join(struct.pack("<Q", d % (1 << 64)) for d in dims)
        infos += struct.pack("<IQ", kind, len(data))
        data += stored
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(keys)) + b"".join(keys) + infos
    return head + b"\0" * (-len(head) % align) + data


def safetensors(header: object, data: bytes) -> bytes:
    """Return a safetensors file with `header` as JSON, its length right."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data


def floats(*values: float) -> bytes:
    """Return little-endian float32."""
    return struct.pack(f"<{len(values)}f", *values)


def legacy_imatrix(entries: list[tuple[bytes, int, tuple[float, ...]]], tail: bytes = b"") -> bytes:
    """Return the older form of an importance matrix: (name, calls, means × calls) entries and what follows them."""
    parts = [struct.pack("<i", len(n)) + n + struct.pack("<ii", calls, len(v)) + floats(*v) for n, calls, v in entries]
    return struct.pack("<i", len(entries)) + b"".join(parts) + tail


def _safetensors_seeds() -> list[bytes]:
    entries = {
        "__metadata__": {"format": "pt"},
        "a.weight": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
        "b": {"dtype": "BF16", "shape": [3], "data_offsets": [16, 22]},
        "c": {"dtype": "U8", "shape": [], "data_offsets": [22, 23]},
        "d": {"dtype": "F64", "shape": [0, 7], "data_offsets": [23, 23]},
    }
    return [safetensors({}, b""), safetensors(entries, bytes(range(23)))]


def _gguf_seeds() -> list[bytes]:
    llama = [
        gguf_entry("general.architecture", 8, text("llama")),
        gguf_entry("llama.block_count", 4, struct.pack("<I", 1)),
        gguf_entry("llama.attention.head_count", 4, struct.pack("<I", 4)),
        gguf_entry("llama.attention.head_count_kv", 4, struct.pack("<I", 2)),
        gguf_array("tokenizer.ggml.tokens", 8, 3, text("a") + text("é") + text("")),
        gguf_array("tokenizer.ggml.scores", 6, 3, floats(0, -1, -2)),
        gguf_array("tokenizer.ggml.token_type", 5, 3, bytes(12)),
        gguf_entry("tokenizer.ggml.bos_token_id", 4, struct.pack("<I", 2)),
        gguf_entry("tokenizer.ggml.add_bos_token", 7, b"\1"),
        gguf_entry("tokenizer.chat_template", 8, text("{{ messages }}")),
        gguf_entry("general.file_type", 4, struct.pack("<I", 15)),
    ]
    tensors = [
        ("token_embd.weight", [32, 3], 2, bytes(54)),
        ("blk.0.attn_norm.weight", [4], 0, floats(1, 1, 1, 1)),
        ("s", [], 1, b"\0\x3c"),
    ]
    scalars = [gguf_entry(f"t.{kind}", kind, struct.pack("<" + code, 1)) for kind, code in _FORMATS.items()]
    arrays = [gguf_array(f"a.{kind}", kind, 2, struct.pack("<2" + code, 0, 1)) for kind, code in _FORMATS.items()]
    aligned = [gguf_entry("general.alignment", 4, struct.pack("<I", 8)), *scalars, *arrays]
    return [gguf([], []), gguf(llama, tensors), gguf(aligned, [("t", [3], 0, floats(1, 2, 3))], 8, 2)]


def _imatrix_seeds() -> list[bytes]:
    keys = [
        gguf_entry("general.type", 8, text("imatrix")),
        gguf_array("imatrix.datasets", 8, 1, text("calibration.txt")),
        gguf_entry("imatrix.chunk_count", 4, struct.pack("<I", 5)),
        gguf_entry("imatrix.chunk_size", 4, struct.pack("<I", 512)),
    ]
    pair = [
        ("blk.0.attn_q.weight.counts", [1, 1], 0, floats(4)),
        ("blk.0.attn_q.weight.in_sum2", [3, 1], 0, floats(4, 8, 2)),
    ]
    silent = [("b.counts", [1], 0, floats(0)), ("b.in_sum2", [2], 0, floats(0, 0))]
    old = legacy_imatrix(
        [(b"blk.0.attn_q.weight", 2, (2.0, 4.0, 8.0)), (b"b", 0, (1.0,))], struct.pack("<ii", 5, 1) + b"d"
    )
    return [gguf(keys, pair), gguf(keys, [*pair, *silent]), old, legacy_imatrix([(b"a", 1, (0.5, 0.25))])]


def _recipe_seeds() -> list[bytes]:
    return [
        b'base = "q4_0"\n',
        b'name = "mine"\nbase = "q4_k_m"\n[[rules]]\ntensors = "*.ffn_down.weight"\ngrid = "q6_k"\n',
        b'base = "int4"\ngroup_size = 64\nsymmetric = false\nrules = [{tensors = "*", grid = "int8", group_size = -1}]\n',
    ]


def _checkpoint_seeds() -> dict[str, list[bytes]]:
    matrix = {
        "name": "w", "kind": "ffn_up", "layer": 0, "part": "weight", "shape": [2, 32], "dtype": "BF16", "grid": "q8_0",
        "group_size": None, "symmetric": True, "wanted": "q8_0", "file": "block-00000.safetensors", "sha256": "0" * 64, "error": 0.01,
    }  # fmt: skip
    vector = {**matrix, "name": "v", "shape": [4], "dtype": "F32", "grid": "f32", "wanted": "f32", "error": 0}
    files = {"block-00000.safetensors": "0" * 64}
    manifest = {"format": 1, "model": "m", "recipe": {"name": "q8_0"}, "files": files, "tensors": [matrix, vector]}
    line = json.dumps({"file": "block-00000.safetensors", "sha256": "0" * 64, "tensors": [matrix, vector]}).encode()
    artifact = {"name": "x.gguf", "bytes": 4, "files": {"x.gguf": "0" * 64}, "manifest_sha256": "0" * 64, "notes": []}
    return {
        "manifest": [json.dumps(manifest).encode()],
        "journal": [b"\n" + line + b"\n\n" + line[:100] + b"\n", line],
        "artifacts": [json.dumps({"gguf": artifact}).encode()],
        "job": [
            b'{"seed": 0, "recipe": {"name": "q4_1"}}',
            b'{\n  "recipe": {\n    "name": "q4_0"\n  },\n  "seed": 0\n}\n',
        ],
    }


def seeds(config: Mapping[str, object], weight_map: Mapping[str, str]) -> dict[str, list[bytes]]:
    """Return small valid files by target; `config` and `weight_map` are those of the targets' own small model."""
    newer = {key: value for key, value in config.items() if not key.startswith("rope")} | {
        "rope_parameters": {"rope_theta": 1e6}
    }
    return {
        "safetensors": _safetensors_seeds(),
        "gguf": _gguf_seeds(),
        "imatrix": _imatrix_seeds(),
        "inspect": _safetensors_seeds() + _gguf_seeds(),
        "config": [json.dumps(config).encode(), json.dumps(newer).encode()],
        "generation": [b'{"eos_token_id": [2, 3]}'],
        "index": [json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}).encode()],
        "recipe": _recipe_seeds(),
        **_checkpoint_seeds(),
    }


def words(target: str) -> list[bytes]:
    """Return the words of a target's format, for the fuzzer's dictionary."""
    numbers = [(n % (1 << 64)).to_bytes(8, "little") for n in INTEGERS]
    if target in ("gguf", "imatrix", "inspect"):
        names = [text(word) for word in (*GGUF_KEYS, *GGUF_NAMES, "llama", "qwen2", "imatrix")]
        return [*numbers, *[n[:4] for n in numbers], *names, b"GGUF", b".in_sum2", b".counts", b"blk."]
    if target == "recipe":
        spelled = "base name rules tensors grid group_size symmetric int2 int4 q4_k_m q8_0 f16 [[rules]] true false -1 1e400 0x"
        return [word.encode() for word in spelled.split()] + [
            b"[" * 40,
            b"{a=",
            b"9" * 40,
            b"1979-05-27T07:32:00Z",
            b'"""',
            b"'''",
        ]
    spelled = "dtype shape data_offsets __metadata__ F32 BF16 U8 null true NaN Infinity -1 1e400 weight_map rope_parameters tensors"
    return [f'"{word}"'.encode() for word in spelled.split()] + [
        b"[" * 40,
        b'{"":',
        b"\\ud800",
        b"\\u0000",
        b"9" * 40,
        *numbers,
    ]


def change_json(rng: random.Random, value: object) -> object:
    """Return `value` with one place inside of it changed: replaced, removed, doubled, renamed, or changed deeper."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        table = dict(value)
        key = rng.choice(list(table))
        act = rng.random()
        if act < 0.08:
            del table[key]
        elif act < 0.16:
            table[str(rng.choice(("", "__metadata__", key + "x", "\ud800", "a\nb")))] = table[key]
        else:
            table[key] = change_json(rng, table[key])
        return table
    if isinstance(value, list) and value and rng.random() < 0.9:
        items = list(value)
        at = rng.randrange(len(items))
        act = rng.random()
        if act < 0.15:
            del items[at]
        elif act < 0.3:
            items.insert(at, rng.choice([items[at], *ODD_VALUES[:8]]))
        else:
            items[at] = change_json(rng, items[at])
        return items
    if type(value) is int and rng.random() < 0.4:
        return value + rng.choice((-1, 1, 8, -8, value))
    return rng.choice(ODD_VALUES)


def _changed_json(rng: random.Random, data: bytes) -> bytes:
    value: object = json.loads(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        value = change_json(rng, value)
    raw = json.dumps(value).encode()
    if rng.random() < 0.05:  # a key twice
        raw = raw.replace(b"}", b', "dtype": "F32"}', 1)
    return raw


def _changed_lines(rng: random.Random, data: bytes) -> bytes:
    return b"\n".join(
        _changed_json(rng, line) if line[:1] == b"{" and rng.random() < 0.7 else line for line in data.split(b"\n")
    )


_WIDTHS = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "BF16": 2, "F16": 2, "I16": 2}


def _laid_out(rng: random.Random, raw: bytes) -> bytes:
    """Return a header whose tensors follow one another as their shapes say, after a change of one side or dtype."""
    table = json.loads(raw)
    end = 0
    for name, facts in table.items():
        if name != "__metadata__":
            if rng.random() < 0.3:
                facts["dtype"] = rng.choice([*_WIDTHS, "U8", "BOOL"])
            if rng.random() < 0.3:
                facts["shape"].insert(rng.randrange(3), rng.choice([0, 1, 2, *INTEGERS]))
            if not all(type(side) is int for side in facts["shape"]):
                raise TypeError("a list among the sides: their product would be enormous")
            size = math.prod(facts["shape"]) * _WIDTHS.get(facts["dtype"], 1)
            facts["data_offsets"] = [end, end := end + size]
    return json.dumps(table).encode()


def _changed_safetensors(rng: random.Random, data: bytes) -> bytes:
    length = int.from_bytes(data[:8], "little")
    raw, rest = data[8 : 8 + length], data[8 + length :]
    raw = _laid_out(rng, raw) if rng.random() < 0.4 else _changed_json(rng, raw)
    try:
        ends = [e["data_offsets"][1] for e in json.loads(raw).values() if isinstance(e, dict) and "data_offsets" in e]
        end = max((e for e in ends if type(e) is int), default=0)
    except (AttributeError, LookupError, TypeError, ValueError, RecursionError):
        end = -1
    if 0 <= end < 4096 and rng.random() < 0.7:
        rest = (rest + bytes(end))[:end]
    return safetensors(raw, rest)


def _some_gguf(rng: random.Random, data: bytes) -> bytes:
    """Return a GGUF file of random keys and tensors, well-formed but for what it says."""
    del data
    keys, align = [], 32
    for _ in range(rng.randrange(6)):
        key, kind = rng.choice(GGUF_KEYS), rng.choice([*_FORMATS, 4, 8, 8, 9])
        if kind == 8:
            keys.append(gguf_entry(key, 8, text(rng.choice(("llama", "imatrix", "model", "qwen3", "a\xffb", "")))))
        elif kind == 9 and rng.random() < 0.5:
            count = rng.randrange(4)
            keys.append(gguf_array(key, 8, count, b"".join(text(rng.choice("ab") * n) for n in range(count))))
        elif kind == 9:
            element, count = rng.choice(list(_FORMATS)), rng.randrange(4)
            keys.append(gguf_array(key, element, count, b"".join(scalar(rng, element) for _ in range(count))))
        else:
            keys.append(gguf_entry(key, kind, scalar(rng, kind)))
    tensors = [_some_tensor(rng, name) for name in rng.sample(GGUF_NAMES, rng.randrange(4))]
    return gguf(keys, tensors, align, rng.choice((2, 3)))


def _some_tensor(rng: random.Random, name: str) -> tuple[str, list[int], int, bytes]:
    kind, block, size = rng.choice(((0, 1, 4), (0, 1, 4), (1, 1, 2), (2, 32, 18), (8, 32, 34), (12, 256, 144)))
    dims = [block * rng.randrange(1, 3), *(rng.randrange(1, 4) for _ in range(rng.randrange(3)))][
        : rng.choice((0, 1, 2, 4))
    ]
    if rng.random() < 0.1 and dims:
        dims[rng.randrange(len(dims))] = rng.choice(INTEGERS)
    count = 1
    for side in dims:
        count *= side
    return name, dims, kind, rng.randbytes(max(0, min(count // block * size, 4096)))


def _some_imatrix(rng: random.Random, data: bytes) -> bytes:
    """Return an importance matrix of either form, well-formed but for its numbers."""
    values = [0.0, 1.0, 2.5, 1e-38, 3e38, -1.0, float("nan"), float("inf")]
    weights = [
        [rng.choice(values[:5] if rng.random() < 0.9 else values) for _ in range(rng.randrange(1, 5))] for _ in range(2)
    ]
    if rng.random() < 0.5:
        names = rng.choice(((b"a", b"b"), (b"a", b"a"), (b"a\0", b"\xff"), (b"", b"x" * 300)))
        calls = rng.choice((0, 1, 3, -1, 1 << 30, 1 << 31)) % (1 << 31)
        return legacy_imatrix(
            [(n, calls, tuple(w)) for n, w in zip(names, weights, strict=True)], rng.randbytes(rng.choice((0, 3, 4, 9)))
        )
    keys = [
        gguf_entry("general.type", 8, text("imatrix")),
        gguf_entry("imatrix.chunk_count", rng.choice((4, 5, 7, 6)), scalar(rng, 4)),
    ]
    tensors = []
    for stem, row in zip("ab", weights, strict=True):
        dims = rng.choice(([len(row)], [len(row), 1], [len(row), 1, 1], [], [1, len(row)]))
        tensors.append((stem + ".in_sum2", dims, 0, floats(*row[: len(row) if dims else 1])))
        counts = rng.choice(([4.0], [0.0], [-1.0], [0.4], [float("nan")], [float("inf")], [1.0, 2.0]))
        tensors.append(
            (stem + rng.choice((".counts", ".counts", ".counts", ".count")), [len(counts)], 0, floats(*counts))
        )
    return gguf(keys, tensors[: rng.choice((1, 2, 4, 4))])


def change(target: str, rng: random.Random, data: bytes) -> bytes:
    """Return `data` changed within its form; bytes without form come back as they are. Raises nothing."""
    acts: dict[str, tuple[Callable[[random.Random, bytes], bytes], ...]] = {
        "safetensors": (_changed_safetensors,),
        "gguf": (_some_gguf,),
        "imatrix": (_some_imatrix,),
        "inspect": (_changed_safetensors, _some_gguf),
        "journal": (_changed_lines,),
        **dict.fromkeys(CONFIG_KINDS, (_changed_json,)),
    }
    try:
        return rng.choice(acts[target])(rng, data) if target in acts else data
    except (ValueError, RecursionError, TypeError, AttributeError, OverflowError, LookupError):
        return data
