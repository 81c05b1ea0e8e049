"""Tiny checkpoints made in code: small random models in Hugging Face's own layout, byte for byte by hand.

`make_model(...)` is a fixture that returns a function: it writes a checkpoint folder and returns its path. Equal arguments
give equal bytes. The folder is fresh: a test may damage it.
"""

from __future__ import annotations

import json
import os
import runpy
import subprocess
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

MakeModel = Callable[..., Path]
WriteGguf = Callable[..., Path]

LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
SPECIALS = {
    "llama": ("<|begin_of_text|>", "<|eot_id|>"),
    "qwen2": ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
    "qwen3": ("<|endoftext|>", "<|im_end|>"),
}
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}"
)
# The regular expressions of Llama 3's and Qwen 2's tokenizer.json, by which exporters tell them apart.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PRE_TOKENIZERS = {"llama": _WORDS % "{1,3}", "qwen2": _WORDS % "", "qwen3": _WORDS % ""}
_TEXT = (
    "the quick brown fox jumps over the lazy dog, then 12 + 30 = 42; a thinker thinks: wait, let me think again.\n" * 4
)


@pytest.fixture
def one_core() -> Iterator[None]:
    """Let torch compute with one thread: small products are no faster on more, and much slower on a busy machine."""
    from r1q.models.threads import torch_threads

    with torch_threads(1):
        yield


@pytest.fixture(scope="session")
def write_gguf() -> WriteGguf:
    """Return the writer of small GGUF files in tests/tiny_gguf.py; it shares no code with our exporter."""
    script = Path(__file__).with_name("tiny_gguf.py")
    return cast(WriteGguf, runpy.run_path(str(script))["write_tiny_gguf"])


@pytest.fixture(scope="session")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory, write_gguf: WriteGguf) -> Path:
    """Return a float32 Llama as GGUF: 264 tokens, a context of 128, BOS added. It is shared: do not write to it."""
    return write_gguf(tmp_path_factory.mktemp("gguf") / "Tiny-F32.gguf")


@pytest.fixture
def echo_file(tmp_path: Path) -> Path:
    """Return an artifact of the echo runtime: 24 tokens, a context of 48."""
    path = tmp_path / "small.echo"
    path.write_text('{"vocab": 24, "context": 48}')
    return path


@pytest.fixture(scope="session")
def moe_models() -> SimpleNamespace:
    """Return what is in tests/moe_models.py: small models with experts, and transformers' logits of them."""
    return SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("moe_models.py"))))


@pytest.fixture
def make_model(tmp_path: Path) -> MakeModel:
    """Return `make(family="llama", **options) -> Path`; see `write_tiny_model` for the options."""
    made = 0

    def make(family: str = "llama", **options: Any) -> Path:
        nonlocal made
        made += 1
        return write_tiny_model(tmp_path / f"tiny-{family}-{made}", family, **options)

    return make


def write_tiny_model(
    folder: Path,
    family: str = "llama",
    *,
    tied: bool = False,
    shards: int = 1,
    llama3_scaling: bool = False,
    old_config: bool = False,
    dtype: str = "BF16",
    vocab_size: int = 320,
    hidden_size: int = 64,
    intermediate_size: int = 96,
    num_layers: int = 2,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    head_dim: int | None = None,
    seed: int = 0,
    config: Mapping[str, Any] | None = None,
) -> Path:
    """Write a random checkpoint with a byte-level BPE tokenizer of at most `vocab_size` tokens, and return its folder.

    `old_config` spells config.json as transformers 4 did; `config` overrides single keys of it. `head_dim` defaults to 32 for
    qwen3 (which has its own) and to hidden_size / num_heads elsewhere.
    """
    folder.mkdir(parents=True)
    head_dim = head_dim or (32 if family == "qwen3" else hidden_size // num_heads)
    bos, eos = (vocab_size_of_tokenizer(family, vocab_size) - 2 + i for i in range(2))
    rope: dict[str, Any] = {"rope_theta": 500000.0 if family == "llama" else 1000000.0}
    scaling = LLAMA3_SCALING if llama3_scaling else {"rope_type": "default"}
    settings: dict[str, Any] = {
        "architectures": [ARCHITECTURES[family]],
        "model_type": family,
        "hidden_act": "silu",
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": tied,
        "bos_token_id": bos,
        "eos_token_id": eos,
        **({} if family == "qwen2" else {"head_dim": head_dim, "attention_bias": False}),
    }
    if old_config:
        settings |= {**rope, "rope_scaling": LLAMA3_SCALING if llama3_scaling else None, "torch_dtype": "bfloat16"}
    else:
        settings |= {"rope_parameters": {**rope, **scaling}, "dtype": "bfloat16"}
    settings |= config or {}
    _write_json(folder / "config.json", settings)
    _write_json(folder / "generation_config.json", {"eos_token_id": [eos], "temperature": 0.6, "top_p": 0.95})
    _write_tokenizer(folder, family, vocab_size)
    _write_weights(folder, _random_weights(settings, head_dim, seed), dtype, shards)
    return folder


def _random_weights(
    settings: Mapping[str, Any], head_dim: int, seed: int
) -> dict[str, np.ndarray[Any, np.dtype[np.float32]]]:
    hidden, inner, vocabulary = settings["hidden_size"], settings["intermediate_size"], settings["vocab_size"]
    queries, keys = settings["num_attention_heads"] * head_dim, settings["num_key_value_heads"] * head_dim
    family = settings["model_type"]
    attention_bias, mlp_bias = settings.get("attention_bias", False), settings.get("mlp_bias", False)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for layer in range(settings["num_hidden_layers"]):
        block: dict[str, tuple[int, ...]] = {
            "input_layernorm.weight": (hidden,),
            "self_attn.q_proj.weight": (queries, hidden),
            "self_attn.k_proj.weight": (keys, hidden),
            "self_attn.v_proj.weight": (keys, hidden),
            "self_attn.o_proj.weight": (hidden, queries),
            "post_attention_layernorm.weight": (hidden,),
            "mlp.gate_proj.weight": (inner, hidden),
            "mlp.up_proj.weight": (inner, hidden),
            "mlp.down_proj.weight": (hidden, inner),
        }
        if family == "qwen2" or attention_bias:
            block |= {
                "self_attn.q_proj.bias": (queries,),
                "self_attn.k_proj.bias": (keys,),
                "self_attn.v_proj.bias": (keys,),
            }
        if attention_bias:
            block["self_attn.o_proj.bias"] = (hidden,)
        if mlp_bias:
            block |= {"mlp.gate_proj.bias": (inner,), "mlp.up_proj.bias": (inner,), "mlp.down_proj.bias": (hidden,)}
        if family == "qwen3":
            block |= {"self_attn.q_norm.weight": (head_dim,), "self_attn.k_norm.weight": (head_dim,)}
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in block.items()}
    shapes["model.norm.weight"] = (hidden,)
    if not settings["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (vocabulary, hidden)
    rng = np.random.default_rng(seed)
    return {name: _random_tensor(rng, name, shape) for name, shape in shapes.items()}


def _random_tensor(
    rng: np.random.Generator, name: str, shape: tuple[int, ...]
) -> np.ndarray[Any, np.dtype[np.float32]]:
    values = rng.standard_normal(shape, dtype=np.float32)
    if "norm" in name:
        return 1 + values * np.float32(0.1)
    if name.endswith("bias"):
        return values * np.float32(0.2)
    return values * np.float32(1.2 / shape[-1] ** 0.5)


def _write_weights(folder: Path, weights: Mapping[str, np.ndarray[Any, Any]], dtype: str, shards: int) -> None:
    names = list(weights)
    groups = [names[i * len(names) // shards : (i + 1) * len(names) // shards] for i in range(shards)]
    files = [
        f"model-{i + 1:05}-of-{shards:05}.safetensors" if shards > 1 else "model.safetensors" for i in range(shards)
    ]
    for file, group in zip(files, groups, strict=True):
        _write_safetensors(folder / file, {name: (dtype, weights[name]) for name in group})
    if shards > 1:
        weight_map = {name: file for file, group in zip(files, groups, strict=True) for name in group}
        _write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})


def _write_safetensors(path: Path, tensors: Mapping[str, tuple[str, np.ndarray[Any, Any]]]) -> None:
    """Write the format by hand: the readers under test shall not read what their own writer wrote."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, (dtype, values) in tensors.items():
        stored = _stored(values, dtype)
        header[name] = {"dtype": dtype, "shape": values.shape, "data_offsets": [len(data), len(data) + len(stored)]}
        data += stored
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def _stored(values: np.ndarray[Any, Any], dtype: str) -> bytes:
    if dtype == "BF16":
        bits = values.view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16).tobytes()
    return values.astype({"F16": np.float16, "F32": np.float32}[dtype]).tobytes()


def _write_tokenizer(folder: Path, family: str, vocab_size: int) -> None:
    (folder / "tokenizer.json").write_text(_tokenizer_json(family, vocab_size), encoding="utf-8")
    bos, eos = SPECIALS[family]
    settings = {"bos_token": bos, "eos_token": eos, "add_bos_token": family != "qwen3", "chat_template": CHAT_TEMPLATE}
    _write_json(folder / "tokenizer_config.json", {**settings, "tokenizer_class": "PreTrainedTokenizerFast"})


@cache
def _tokenizer_json(family: str, vocab_size: int) -> str:
    tokenizer = Tokenizer(models.BPE())
    if family != "llama":
        tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(PRE_TOKENIZERS[family]), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - 2, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([_TEXT], trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIALS[family]])
    return tokenizer.to_str(pretty=True)


@cache
def vocab_size_of_tokenizer(family: str, vocab_size: int) -> int:
    """Return how many tokens the tiny tokenizer really has; the two special ones are the last."""
    return Tokenizer.from_str(_tokenizer_json(family, vocab_size)).get_vocab_size()


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@pytest.fixture
def mount_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Return `mount(options)`, which mounts a tmpfs of its own (`size=1m`, `size=1m,ro`) and returns its folder."""
    mounted: list[Path] = []

    def mount(options: str) -> Path:
        folder = tmp_path / f"disk{len(mounted)}"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("mounting a tmpfs is not allowed here")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
