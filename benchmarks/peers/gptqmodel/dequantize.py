"""A foreign GPTQ folder's weights, read by r1q alone, as a float Hugging Face folder that llama.cpp's referee can score.

Usage: dequantize.py CHECKPOINT GPTQ_FOLDER OUT; CHECKPOINT is the float folder that GPTQ_FOLDER was made from: its configuration and
tokenizer are copied, its weights are not. Runs in r1q's environment; nothing of gptqmodel is imported. Any group size, ragged last
groups and any g_idx are read; layers that `r1q.export.gptq.read_linear` can read too must come out the same there.
"""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from r1q.core.integers import middle, unpack_bits
from r1q.core.safetensors_file import SafetensorsFile, write_safetensors
from r1q.core.scheme import Scheme
from r1q.export.gptq import read_linear

PARTS = ("qweight", "qzeros", "scales", "g_idx")


def linear(file: SafetensorsFile, stem: str, bits: int, group_size: int) -> NDArray[np.float32]:
    """Return the weight [out, in] of the layer `stem` (it ends with a dot): scale · (code − zero), float32."""
    words, zero_words, scales, g_idx = (file.read(stem + part) for part in PARTS)
    inputs, outputs = len(g_idx), words.shape[1]
    codes = unpack_bits(np.ascontiguousarray(words.T).view(np.uint8), bits, inputs)
    # Version 1 of the format stores zero − 1.
    zeros = unpack_bits(np.ascontiguousarray(zero_words).view(np.uint8), bits, outputs) + np.uint8(1)
    group = g_idx.astype(np.intp)
    centred = codes.astype(np.float32) - zeros.T.astype(np.float32)[:, group]
    weight = centred * scales.T.astype(np.float32)[:, group]
    if inputs % group_size == 0 and (g_idx == np.arange(inputs) // group_size).all():
        scheme = Scheme(grid=f"int{bits}", group_size=group_size)
        same, factors = read_linear(file, f"{stem}weight", scheme, (outputs, inputs))
        again = (same.astype(np.float32) - np.float32(middle(bits))) * np.repeat(factors, group_size, axis=1)
        if not np.array_equal(weight, again):
            sys.exit(f"{stem}weight: two readings of it differ")
    return weight


def main(checkpoint: Path, folder: Path, out: Path) -> None:
    """Write OUT: linears in float32, everything else as GPTQ_FOLDER stores it."""
    said = json.loads((folder / "config.json").read_text())["quantization_config"]
    if said["checkpoint_format"] != "gptq" or said["quant_method"] != "gptq":
        sys.exit(f"{folder}: {said['quant_method']}/{said['checkpoint_format']} is another format")
    bits, group_size = said["bits"], said["group_size"]
    entries, pieces = [], []
    for path in sorted(folder.glob("*.safetensors")):
        file = SafetensorsFile.open(path)
        for name in file.tensors:
            stem, _, part = name.rpartition(".")
            if part == "qweight":
                weight = linear(file, f"{stem}.", bits, group_size)
                entries.append((f"{stem}.weight", "F32", weight.shape))
                pieces.append(weight)
            elif part not in PARTS:
                entries.append((name, file.tensors[name].dtype, file.tensors[name].shape))
                pieces.append(file.read(name))
    out.mkdir(parents=True, exist_ok=True)
    for path in checkpoint.iterdir():
        if path.is_file() and ".safetensors" not in path.name:
            shutil.copyfile(path, out / path.name)
    write_safetensors(out / "model.safetensors", entries, pieces, metadata={"format": "pt"})
    packed = sum(kind == "F32" for _, kind, _ in entries)
    print(json.dumps({"linears": packed, "others": len(entries) - packed, "bits": bits, "group_size": group_size}))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
