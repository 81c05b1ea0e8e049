"""DeepSeek-R1's checkpoint without its weights: config.json, and shards whose headers are whole and whose data is a hole.

    python scripts/r1_headers.py FOLDER
    r1q plan FOLDER --effort fast

The files say that they have 688 GB and take a few MB of disk: names, shapes and dtypes of 91,991 tensors are those of the published
checkpoint (8-bit floats with scales of 128 × 128 blocks, the layer that predicts a second token included), one shard a layer.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from pathlib import Path

CONFIG: dict[str, object] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "vocab_size": 129280,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "num_nextn_predict_layers": 1,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "n_shared_experts": 1,
    "n_routed_experts": 256,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "moe_layer_freq": 1,
    "first_k_dense_replace": 3,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-06,
    "max_position_embeddings": 163840,
    "attention_bias": False,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "rope_theta": 10000,
    "rope_scaling": {
        "type": "yarn",
        "factor": 40,
        "original_max_position_embeddings": 4096,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    },
    "quantization_config": {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
    },
    "torch_dtype": "bfloat16",
}
HIDDEN, VOCABULARY, DENSE, EXPERTS, LAYERS = 7168, 129280, 3, 256, 61
SIZES = {"BF16": 2, "F8_E4M3": 1, "F32": 4}
Tensor = tuple[str, str, tuple[int, ...]]


def linear(name: str, rows: int, columns: int) -> Iterator[Tensor]:
    """Yield a layer in 8-bit floats and its scales."""
    yield f"{name}.weight", "F8_E4M3", (rows, columns)
    yield f"{name}.weight_scale_inv", "F32", (math.ceil(rows / 128), math.ceil(columns / 128))


def feed_forward(name: str, inner: int) -> Iterator[Tensor]:
    """Yield gate, up and down."""
    yield from linear(f"{name}.gate_proj", inner, HIDDEN)
    yield from linear(f"{name}.up_proj", inner, HIDDEN)
    yield from linear(f"{name}.down_proj", HIDDEN, inner)


def layer(number: int, experts: int = EXPERTS) -> Iterator[Tensor]:
    """Yield the tensors of a layer; the one behind the last predicts a second token and has five more."""
    stem = f"model.layers.{number}"
    for norm, size in (("input_layernorm", HIDDEN), ("post_attention_layernorm", HIDDEN)):
        yield f"{stem}.{norm}.weight", "BF16", (size,)
    yield from linear(f"{stem}.self_attn.q_a_proj", 1536, HIDDEN)
    yield f"{stem}.self_attn.q_a_layernorm.weight", "BF16", (1536,)
    yield from linear(f"{stem}.self_attn.q_b_proj", 128 * 192, 1536)
    yield from linear(f"{stem}.self_attn.kv_a_proj_with_mqa", 576, HIDDEN)
    yield f"{stem}.self_attn.kv_a_layernorm.weight", "BF16", (512,)
    yield from linear(f"{stem}.self_attn.kv_b_proj", 128 * 256, 512)
    yield from linear(f"{stem}.self_attn.o_proj", HIDDEN, 128 * 128)
    if number < DENSE:
        yield from feed_forward(f"{stem}.mlp", 18432)
    else:
        yield f"{stem}.mlp.gate.weight", "BF16", (experts, HIDDEN)
        yield f"{stem}.mlp.gate.e_score_correction_bias", "F32", (experts,)
        yield from feed_forward(f"{stem}.mlp.shared_experts", 2048)
        for expert in range(experts):
            yield from feed_forward(f"{stem}.mlp.experts.{expert}", 2048)
    if number == LAYERS:
        yield f"{stem}.embed_tokens.weight", "BF16", (VOCABULARY, HIDDEN)
        yield f"{stem}.shared_head.head.weight", "BF16", (VOCABULARY, HIDDEN)
        for norm in ("enorm", "hnorm", "shared_head.norm"):
            yield f"{stem}.{norm}.weight", "BF16", (HIDDEN,)
        yield f"{stem}.eh_proj.weight", "BF16", (HIDDEN, 2 * HIDDEN)


def ends() -> Iterator[Tensor]:
    """Yield what is outside of the layers."""
    yield "model.embed_tokens.weight", "BF16", (VOCABULARY, HIDDEN)
    yield "model.norm.weight", "BF16", (HIDDEN,)
    yield "lm_head.weight", "BF16", (VOCABULARY, HIDDEN)


def write_shard(path: Path, tensors: list[Tensor]) -> None:
    """Write a safetensors file whose data nobody has written: it reads as zeros and takes no room."""
    header: dict[str, object] = {}
    at = 0
    for name, dtype, shape in tensors:
        size = SIZES[dtype] * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header, separators=(",", ":")).encode()
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + at)


def write(folder: Path) -> None:
    """Write the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")
    shards = [list(ends()), *(list(layer(number)) for number in range(LAYERS + 1))]
    weight_map: dict[str, str] = {}
    for number, tensors in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):06d}.safetensors"
        write_shard(folder / name, tensors)
        weight_map |= dict.fromkeys((tensor for tensor, _, _ in tensors), name)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="new")
    write(parser.parse_args().folder)
