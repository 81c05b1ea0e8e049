"""gptqmodel's own run: a Hugging Face folder to a GPTQ folder, int4 symmetric, on windows that r1q and the other peers see too.

Usage: quantize.py CHECKPOINT CALIBRATION FOLDER GROUP_SIZE [WINDOWS [LENGTH]]
Runs in gptqmodel's environment and imports nothing of r1q. Everything but windows, bits and group size is gptqmodel's default.
"""

import sys
from pathlib import Path

from gptqmodel import GPTQModel, QuantizeConfig
from transformers import AutoTokenizer


def windows(checkpoint: Path, text: Path, count: int, length: int) -> list[dict[str, list[int]]]:
    """Return the first windows of the text, each `length` consecutive tokens, without BOS."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    # 64 characters a token is more than any prose has: what the windows cannot hold is not tokenized.
    head = text.read_text(encoding="utf-8")[: count * length * 64]
    ids = tokenizer(head, add_special_tokens=False)["input_ids"]
    if len(ids) < count * length:
        sys.exit(f"{text} has {len(ids)} tokens; {count} windows of {length} were asked for")
    cut = [ids[start : start + length] for start in range(0, count * length, length)]
    return [{"input_ids": window, "attention_mask": [1] * length} for window in cut]


def main(checkpoint: Path, text: Path, folder: Path, group_size: int, count: int = 32, length: int = 512) -> None:
    """Quantize and write FOLDER."""
    model = GPTQModel.load(str(checkpoint), QuantizeConfig(bits=4, group_size=group_size, sym=True), device="cpu")
    model.quantize(windows(checkpoint, text, count, length))
    model.save(str(folder))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), *map(int, sys.argv[4:]))
