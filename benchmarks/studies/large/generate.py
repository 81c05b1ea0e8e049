"""Write a random checkpoint of Qwen2-7B's shapes, with a spread of weights as real ones have: generate.py FOLDER [LAYERS].

Weights are normal, with log-normal scales by input column and a few columns ten times larger, as trained models have; the residual
stream stays finite. The tokenizer is the embedded model's; its ids are the first of the vocabulary.
"""

import argparse
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from r1q.core.grids import to_bfloat16
from r1q.core.safetensors_file import write_safetensors
from r1q.models.embedded import EMBEDDED

HIDDEN, INNER, HEADS, KV_HEADS, HEAD, VOCABULARY = 3584, 18944, 28, 4, 128, 152064
CONFIG = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": HIDDEN, "intermediate_size": INNER,
    "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "vocab_size": VOCABULARY, "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0, "max_position_embeddings": 32768, "tie_word_embeddings": False, "hidden_act": "silu",
    "torch_dtype": "bfloat16",
}  # fmt: skip
ROWS = 4096


def shapes(layers: int) -> Iterator[dict[str, tuple[int, ...]]]:
    """Yield the tensors of each shard."""
    yield {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for layer in range(layers):
        stem = f"model.layers.{layer}"
        yield {
            f"{stem}.input_layernorm.weight": (HIDDEN,),
            f"{stem}.self_attn.q_proj.weight": (HEADS * HEAD, HIDDEN),
            f"{stem}.self_attn.q_proj.bias": (HEADS * HEAD,),
            f"{stem}.self_attn.k_proj.weight": (KV_HEADS * HEAD, HIDDEN),
            f"{stem}.self_attn.k_proj.bias": (KV_HEADS * HEAD,),
            f"{stem}.self_attn.v_proj.weight": (KV_HEADS * HEAD, HIDDEN),
            f"{stem}.self_attn.v_proj.bias": (KV_HEADS * HEAD,),
            f"{stem}.self_attn.o_proj.weight": (HIDDEN, HEADS * HEAD),
            f"{stem}.post_attention_layernorm.weight": (HIDDEN,),
            f"{stem}.mlp.gate_proj.weight": (INNER, HIDDEN),
            f"{stem}.mlp.up_proj.weight": (INNER, HIDDEN),
            f"{stem}.mlp.down_proj.weight": (HIDDEN, INNER),
        }
    yield {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCABULARY, HIDDEN)}


def values(name: str, shape: tuple[int, ...], random: np.random.Generator) -> Iterator[bytes]:
    """Yield a tensor's bytes in bfloat16, some rows at a time."""
    if len(shape) == 1:
        middle = 0.0 if name.endswith("bias") else 1.0
        yield to_bfloat16((middle + 0.1 * random.standard_normal(shape)).astype(np.float32)).tobytes()
        return
    rows, columns = shape
    scale = np.exp(0.35 * random.standard_normal(columns, dtype=np.float32)) * np.float32(0.6 / columns**0.5)
    scale[random.choice(columns, columns // 500, replace=False)] *= 10
    for start in range(0, rows, ROWS):
        count = min(ROWS, rows - start)
        yield to_bfloat16(random.standard_normal((count, columns), dtype=np.float32) * scale).tobytes()


def main(folder: Path, layers: int) -> None:
    """Write the checkpoint."""
    folder.mkdir(parents=True)
    for path in EMBEDDED.iterdir():
        if path.name.startswith(("tokenizer", "special", "chat", "generation")):
            shutil.copyfile(path, folder / path.name)
    (folder / "config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": layers}))
    random = np.random.default_rng(7)
    index: dict[str, str] = {}
    for number, tensors in enumerate(shapes(layers)):
        file = f"model-{number:05d}.safetensors"
        entries = [(name, "BF16", shape) for name, shape in tensors.items()]
        pieces = (piece for name, shape in tensors.items() for piece in values(name, shape, random))
        write_safetensors(folder / file, entries, pieces, metadata={"format": "pt"})
        index |= dict.fromkeys(tensors, file)
        print(file, flush=True)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="new")
    parser.add_argument("layers", type=int, nargs="?", default=28)
    asked = parser.parse_args()
    main(asked.folder, asked.layers)
