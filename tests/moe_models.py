"""Small random models with experts and latent attention, made and saved by transformers itself; weights then made to speak up.

`write_moe_model(folder, "deepseek_v3", …)` writes a Hugging Face folder with the tokenizer of the other tiny models.
"""

from __future__ import annotations

import json
import runpy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

_TINY = Path(__file__).with_name("conftest.py")
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
COMMON: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "moe_intermediate_size": 48,
    "num_experts_per_tok": 3,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": 319,
}
DEEPSEEK: dict[str, Any] = COMMON | {
    "num_key_value_heads": 4,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "q_lora_rank": 40,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 12,
    "rope_parameters": YARN,
    "first_k_dense_replace": 1,
}
SETTINGS: dict[str, dict[str, Any]] = {
    "qwen3_moe": COMMON
    | {"num_key_value_heads": 2, "num_experts": 8, "head_dim": 32, "norm_topk_prob": True, "decoder_sparse_step": 1},
    "deepseek_v2": DEEPSEEK | {"routed_scaling_factor": 1.0, "n_shared_experts": 2},
    "deepseek_v3": DEEPSEEK | {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5, "norm_topk_prob": True},
}


def write_moe_model(
    folder: Path,
    family: str,
    *,
    seed: int = 0,
    gain: float = 1.3,
    head_gain: float = 6.0,
    dtype: torch.dtype = torch.float32,
    **settings: Any,
) -> Path:
    """Write a random model of `family` whose config has `settings`, and return its folder.

    Rows have a length of `gain`, those of the head of `head_gain`, so that blocks matter and predictions are not all alike.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(family, **{**SETTINGS[family], **settings})
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    generator = torch.Generator().manual_seed(seed)
    path = folder / "model.safetensors"
    weights = {
        name: _random(name, tensor, gain, head_gain, generator).to(dtype) for name, tensor in load_file(path).items()
    }
    save_file(weights, path, metadata={"format": "pt"})
    write_tokenizer(folder, config.vocab_size)
    return folder


def _random(name: str, tensor: torch.Tensor, gain: float, head_gain: float, generator: torch.Generator) -> torch.Tensor:
    values = torch.randn(tensor.shape, generator=generator)
    if "norm" in name:
        return 1 + 0.1 * values
    if name.endswith("e_score_correction_bias"):
        return 0.1 * values
    if name.endswith("embed_tokens.weight"):
        return values
    scaled: torch.Tensor = values * ((head_gain if name == "lm_head.weight" else gain) / tensor.shape[-1] ** 0.5)
    return scaled


def write_tokenizer(folder: Path, vocab_size: int) -> None:
    """Write a byte-level tokenizer of at most `vocab_size` tokens beside the weights, cut as DeepSeek's Qwen distills cut."""
    runpy.run_path(str(_TINY))["_write_tokenizer"](folder, "qwen2", vocab_size)
    path = folder / "config.json"
    eos = json.loads((folder / "tokenizer.json").read_text())["added_tokens"][-1]["id"]
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({**settings, "bos_token_id": eos - 1, "eos_token_id": eos}, indent=2))


def reference_logits(folder: Path, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
    """Return transformers' logits [windows, length, vocabulary] in float32."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        return np.asarray(model(torch.from_numpy(tokens)).logits.numpy(), dtype=np.float32)


def change_config(folder: Path, changes: Mapping[str, Any]) -> None:
    """Change single keys of a folder's config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}, indent=2))
