"""The other side: gptqmodel's own loader opens a folder with experts, and its logits are compared with r1q's.

Usage: experts_theirs.py WORK FAMILY; runs in an environment with gptqmodel, and imports nothing of r1q. Prints one JSON line.
"""

import json
import sys
from collections import Counter
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from gptqmodel import BACKEND, GPTQModel


@torch.inference_mode()
def main(work: Path, family: str) -> None:
    """Compare logits of all positions."""
    loaded = GPTQModel.load(
        str(work / f"{family}-int4" / "gptq"), backend=BACKEND.GPTQ_TORCH, device="cpu", dtype=torch.float16
    )
    model = torch.nn.Module.float(
        loaded.model
    )  # half floats are exact in float32: what is left is the layers' arithmetic
    kernels = Counter(type(module).__name__ for module in model.modules() if hasattr(module, "qweight"))
    found = model(torch.from_numpy(np.load(work / "tokens.npy"))).logits.double().log_softmax(-1)
    truth = torch.from_numpy(np.load(work / f"{family}.npy")).double().log_softmax(-1)
    result = {
        "family": family,
        "kernels": dict(kernels),
        "positions": found.shape[0] * found.shape[1],
        "kld": (truth.exp() * (truth - found)).sum(-1).mean().item(),
        "same_top": (truth.argmax(-1) == found.argmax(-1)).double().mean().item(),
        "top_probability": truth.exp().max(-1).values.mean().item(),
        "versions": {name: version(name) for name in ("torch", "transformers", "gptqmodel", "defuser")},
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
