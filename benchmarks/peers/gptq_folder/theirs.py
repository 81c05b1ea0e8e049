"""The other side: load the GPTQ folder with transformers' AutoModelForCausalLM and score the same tokens.

Usage: theirs.py OUTPUT_FOLDER WORK [BACKEND [DTYPE]]; BACKEND is a name of gptqmodel's (auto, gptq_torch, …). Runs in an environment
with transformers and gptqmodel, and imports nothing of r1q. Prints one JSON line: versions, which kernel class ran how many layers,
perplexity, and the distance of its logits from ours.
"""

import json
import sys
from collections import Counter
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, GPTQConfig


def load(folder: Path, backend: str, dtype: str) -> torch.nn.Module:
    """Return the model of FOLDER/gptq on the CPU."""
    quantization = GPTQConfig(bits=int(folder.name[-1]), backend=backend)  # the rest is read from the folder
    kind = torch.bfloat16 if dtype == "bfloat16" else torch.float16
    model = AutoModelForCausalLM.from_pretrained(
        folder / "gptq", device_map="cpu", dtype=kind, quantization_config=quantization
    ).eval()
    # transformers' own float() refuses packed models. Half floats are exact in float32: what is left is the layers' arithmetic.
    return torch.nn.Module.float(model) if dtype == "float32" else model


@torch.inference_mode()
def main(folder: Path, work: Path, backend: str = "auto", dtype: str = "float16") -> None:
    """Score positions 256…510 of each window of WORK/tokens.npy, sums in float64."""
    model = load(folder, backend, dtype)
    kernels = Counter(type(module).__name__ for module in model.modules() if hasattr(module, "qweight"))
    tokens, ours = np.load(work / "tokens.npy"), np.load(work / f"{folder.name}.ours.npy", mmap_mode="r")
    first, nll, kld, same = tokens.shape[1] // 2, [], [], []
    # All windows at once: gptqmodel's plain kernel unpacks every layer anew in each call.
    table = model(torch.from_numpy(tokens[:, :-1]), logits_to_keep=tokens.shape[1] - 1 - first).logits
    for window, found, reference in zip(torch.from_numpy(tokens), table, ours, strict=True):
        rows = found.double().log_softmax(-1)
        nll.append(-rows.gather(1, window[first + 1 :, None])[:, 0])
        truth = torch.from_numpy(np.array(reference)).double().log_softmax(-1)
        kld.append((truth.exp() * (truth - rows)).sum(-1))
        same.append(truth.argmax(-1) == rows.argmax(-1))
    nlls = torch.cat(nll)
    result = {
        "side": "transformers + gptqmodel",
        "folder": folder.name,
        "tokens": len(nlls),
        "perplexity": nlls.mean().exp().item(),
        "backend": backend,
        "dtype": dtype,
        "kernels": dict(kernels),
        "kld_from_ours": torch.cat(kld).mean().item(),
        "same_top": torch.cat(same).double().mean().item(),
        "versions": {name: version(name) for name in ("torch", "transformers", "gptqmodel", "optimum")},
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
