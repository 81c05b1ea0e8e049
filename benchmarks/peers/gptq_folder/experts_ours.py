"""GPTQ folders of tiny random models with experts, and r1q's own logits of what those folders hold.

Usage: experts_ours.py WORK; runs in r1q's environment, with transformers. Makes WORK/FAMILY (a float checkpoint of transformers'),
WORK/FAMILY-int4/gptq, WORK/tokens.npy and WORK/FAMILY.npy (logits [windows, length, vocabulary], float32).
"""

import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np

from r1q.models.forward import logits
from r1q.models.gptq_source import GptqSource

ROOT = Path(__file__).resolve().parents[3]
SIZES = {"num_hidden_layers": 2, "hidden_size": 128, "intermediate_size": 128, "moe_intermediate_size": 64}
FAMILIES = {
    "qwen3_moe": SIZES | {"head_dim": 32, "num_experts": 16},
    "deepseek_v3": SIZES
    | {"q_lora_rank": 64, "kv_lora_rank": 64, "qk_nope_head_dim": 32, "v_head_dim": 32, "n_routed_experts": 16},
}


def main(work: Path) -> None:
    """Make everything."""
    make = runpy.run_path(str(ROOT / "tests" / "moe_models.py"))["write_moe_model"]
    tokens = np.random.default_rng(7).integers(0, 300, (4, 256))
    np.save(work / "tokens.npy", tokens)
    for family, sizes in FAMILIES.items():
        make(work / family, family, **sizes)
        out = work / f"{family}-int4"
        command = ["quantize", str(work / family), "--bits", "4", "--to", "gptq", "-o", str(out), "-q"]
        subprocess.run([sys.executable, "-m", "r1q", *command], check=True)
        np.save(work / f"{family}.npy", np.stack(list(logits(GptqSource.open(out / "gptq"), tokens))))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
