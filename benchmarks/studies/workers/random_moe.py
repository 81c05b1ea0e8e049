"""Write a random Qwen3-MoE model with many small experts and the embedded model's tokenizer: for timings, not for talking.

Usage: random_moe.py FOLDER [EXPERTS]. Two layers, 1,024 wide, experts of 512; 64 of them are 201 million weights.
"""

import argparse
import json
import shutil
from pathlib import Path

import numpy as np

from r1q.core.safetensors_file import write_safetensors
from r1q.models.embedded import EMBEDDED

HIDDEN, INNER, HEADS, SIZE, LAYERS = 1024, 512, 8, 64, 2


def main(folder: Path, experts: int) -> None:
    """Write config, tokenizer and weights."""
    folder.mkdir(parents=True, exist_ok=True)
    own = json.loads((EMBEDDED / "config.json").read_text())
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        if (EMBEDDED / name).is_file():
            shutil.copyfile(EMBEDDED / name, folder / name)
    config = {
        **{"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "hidden_act": "silu"},
        **{"hidden_size": HIDDEN, "intermediate_size": INNER, "moe_intermediate_size": INNER, "num_experts": experts},
        **{"num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": 2, "head_dim": SIZE},
        **{"num_experts_per_tok": 4, "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []},
        **{"vocab_size": own["vocab_size"], "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": False},
        **{"max_position_embeddings": 4096, "attention_bias": False, "torch_dtype": "float32"},
        **{"bos_token_id": own.get("bos_token_id"), "eos_token_id": own.get("eos_token_id")},
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (own["vocab_size"], HIDDEN),
        "lm_head.weight": (own["vocab_size"], HIDDEN),
        "model.norm.weight": (HIDDEN,),
    }
    for layer in range(LAYERS):
        stem = f"model.layers.{layer}"
        shapes |= {f"{stem}.{name}_layernorm.weight": (HIDDEN,) for name in ("input", "post_attention")}
        shapes |= {f"{stem}.self_attn.{name}_norm.weight": (SIZE,) for name in ("q", "k")}
        shapes |= {f"{stem}.self_attn.{name}_proj.weight": (2 * SIZE, HIDDEN) for name in ("k", "v")}
        shapes |= {f"{stem}.self_attn.q_proj.weight": (HEADS * SIZE, HIDDEN)}
        shapes |= {
            f"{stem}.self_attn.o_proj.weight": (HIDDEN, HEADS * SIZE),
            f"{stem}.mlp.gate.weight": (experts, HIDDEN),
        }
        for expert in range(experts):
            inner = f"{stem}.mlp.experts.{expert}"
            shapes |= {f"{inner}.{name}_proj.weight": (INNER, HIDDEN) for name in ("gate", "up")}
            shapes |= {f"{inner}.down_proj.weight": (HIDDEN, INNER)}
    random = np.random.default_rng(0)

    def values(shape: tuple[int, ...]) -> np.ndarray:
        if len(shape) == 1:
            return np.ones(shape, np.float32)
        return random.standard_normal(shape, dtype=np.float32) / np.float32(shape[-1] ** 0.5)

    entries = [(name, "F32", shape) for name, shape in shapes.items()]
    write_safetensors(folder / "model.safetensors", entries, (values(shape) for shape in shapes.values()))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="new")
    parser.add_argument("experts", type=int, nargs="?", default=64)
    asked = parser.parse_args()
    main(asked.folder, asked.experts)
