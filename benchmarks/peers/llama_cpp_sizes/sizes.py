"""What llama-quantize itself says a preset makes of five models' shapes: MiB, and bits per weight to two decimals.

Usage: sizes.py TOOLS WORK   (TOOLS: see ../llama_cpp_kld/build.sh). Writes for each model a GGUF file of its shapes whose weights
are a hole in the file, and asks `llama-quantize --dry-run`, which reads no weights. Needs numpy and gguf. Prints a JSON line a model.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np

PRESETS = ["q2_k", "q3_k_m", "iq4_xs", "q4_k_s", "q4_k_m", "q5_k_m", "q6_k", "q8_0"]
# architecture, vocabulary, hidden, feed-forward, layers, heads, key-value heads, tied head
MODELS = {
    "SmolLM2-135M": ("llama", 49152, 576, 1536, 30, 9, 3, True),
    "Qwen2.5-0.5B": ("qwen2", 151936, 896, 4864, 24, 14, 2, True),
    "DeepSeek-R1-Distill-Qwen-1.5B": ("qwen2", 151936, 1536, 8960, 28, 12, 2, False),
    "DeepSeek-R1-Distill-Qwen-7B": ("qwen2", 152064, 3584, 18944, 28, 28, 4, False),
    "DeepSeek-R1-Distill-Llama-8B": ("llama", 128256, 4096, 14336, 32, 32, 8, False),
}


def write_shapes(
    path: Path, arch: str, vocab: int, hidden: int, ffn: int, layers: int, heads: int, kv: int, tied: bool
) -> None:
    """Write a BF16 GGUF with a whole header and no weights."""
    writer, size = gguf.GGUFWriter(path, arch), hidden // heads
    writer.add_context_length(4096)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(ffn)
    writer.add_block_count(layers)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(vocab)
    matrices = {"token_embd": (vocab, hidden)} | ({} if tied else {"output": (vocab, hidden)})
    vectors = {"output_norm.weight": hidden}
    for layer in range(layers):
        block = f"blk.{layer}."
        matrices |= {block + "attn_q": (hidden, hidden), block + "attn_output": (hidden, hidden)}
        matrices |= {block + name: (kv * size, hidden) for name in ("attn_k", "attn_v")}
        matrices |= {block + name: (ffn, hidden) for name in ("ffn_gate", "ffn_up")} | {
            block + "ffn_down": (hidden, ffn)
        }
        vectors |= {block + name + ".weight": hidden for name in ("attn_norm", "ffn_norm")}
        if arch == "qwen2":
            vectors |= {
                block + "attn_q.bias": hidden,
                block + "attn_k.bias": kv * size,
                block + "attn_v.bias": kv * size,
            }
    total = 0
    for name, shape in matrices.items():
        bytes_ = 2 * shape[0] * shape[1]
        writer.add_tensor_info(
            f"{name}.weight", shape, np.dtype(np.uint16), bytes_, raw_dtype=gguf.GGMLQuantizationType.BF16
        )
        total += -(-bytes_ // 32) * 32
    for name, length in vectors.items():
        writer.add_tensor_info(name, (length,), np.dtype(np.float32), 4 * length)
        total += -(-4 * length // 32) * 32
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    os.truncate(path, -(-path.stat().st_size // 32) * 32 + total)


def main(tools: Path, work: Path) -> None:
    """Ask llama-quantize about every model and preset."""
    work.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"LD_LIBRARY_PATH": str(tools / "bin")}
    for model, facts in MODELS.items():
        path = work / f"{model}.gguf"
        write_shapes(path, *facts)
        sizes, bits = {}, {}
        for preset in PRESETS:
            command = [tools / "bin" / "llama-quantize", "--dry-run", path, preset.upper()]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
            found = re.search(r"quant size\s*=\s*([\d.]+) MiB \(([\d.]+) BPW\)", done.stdout + done.stderr)
            if found is None:
                sys.exit(f"{model} {preset}: {done.stdout[-1500:]}{done.stderr[-1500:]}")
            sizes[preset], bits[preset] = float(found[1]), float(found[2])
        print(json.dumps({"model": model, "mib": sizes, "bits_per_weight": bits}), flush=True)
        path.unlink()


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), Path(sys.argv[2]))
