"""Write a random model with experts, large enough to be timed, by the generator of the tests: for timings, not for talking.

Qwen3-MoE: four blocks, 1,024 wide, 32 experts of 512, 4 for each token: 213 million weights. DeepSeek-V3: the first block dense,
latent attention with R1's own lengths (latents of 512, 64 numbers that turn) in 16 heads.
"""

import argparse
import runpy
from pathlib import Path

import torch

COMMON = {
    "hidden_size": 1024,
    "intermediate_size": 2048,
    "moe_intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 16,
    "num_experts_per_tok": 4,
    "max_position_embeddings": 2048,
}
SETTINGS = {
    "qwen3_moe": {"num_experts": 32, "num_key_value_heads": 4, "head_dim": 64},
    "deepseek_v3": {
        "n_routed_experts": 32,
        "num_key_value_heads": 16,
        "q_lora_rank": 512,
        "kv_lora_rank": 512,
        "qk_rope_head_dim": 64,
        "qk_nope_head_dim": 128,
        "v_head_dim": 128,
    },
}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", choices=SETTINGS)
    parser.add_argument("folder", type=Path, help="new")
    asked = parser.parse_args()
    models = runpy.run_path(str(Path(__file__).parents[3] / "tests" / "moe_models.py"))
    models["write_moe_model"](
        asked.folder, asked.family, dtype=torch.bfloat16, head_gain=2.0, **COMMON, **SETTINGS[asked.family]
    )
