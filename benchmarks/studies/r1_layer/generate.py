"""Write a random checkpoint of DeepSeek-R1's exact layers in 8-bit floats, one dense and one with experts: generate.py FOLDER.

Names, shapes and dtypes of both layers are those of scripts/r1_headers.py: 12.1 GB with all 256 experts (`--experts N` for fewer). The
vocabulary is the embedded model's, since layers alone are measured. Weights are normal, with log-normal scales by input column and a
few columns ten times larger, as trained models have; each block of 128 × 128 is scaled so that its largest weight is the largest
8-bit float. Some 10 MB of weights are in memory at a time.
"""

import argparse
import json
import math
import runpy
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from r1q.core.grids import to_bfloat16
from r1q.core.safetensors_file import write_safetensors
from r1q.models.embedded import EMBEDDED

HEADERS = runpy.run_path(str(Path(__file__).parents[3] / "scripts" / "r1_headers.py"))
PUBLISHED_DENSE, PUBLISHED_SPARSE = 0, 3  # layers of the published model that become the first and the second here
VOCABULARY, BLOCK, ROWS, LARGEST = 512, 128, 256, 448.0
TENSORS_OF_A_SHARD = 96
CHANGES = {
    "vocab_size": VOCABULARY,
    "num_hidden_layers": 2,
    "first_k_dense_replace": 1,
    "num_nextn_predict_layers": 0,
    "bos_token_id": 500,
    "eos_token_id": 501,
}
Tensor = tuple[str, str, tuple[int, ...]]


def shards(experts: int) -> Iterator[list[Tensor]]:
    """Yield the tensors of each shard: the ends, the dense layer, the layer with experts in several."""
    yield [
        (name, dtype, (VOCABULARY, *shape[1:]) if len(shape) > 1 else shape) for name, dtype, shape in HEADERS["ends"]()
    ]
    yield list(HEADERS["layer"](PUBLISHED_DENSE))
    sparse = [
        (name.replace(f"layers.{PUBLISHED_SPARSE}.", "layers.1."), dtype, shape)
        for name, dtype, shape in HEADERS["layer"](PUBLISHED_SPARSE, experts)
    ]
    for start in range(0, len(sparse), TENSORS_OF_A_SHARD):
        yield sparse[start : start + TENSORS_OF_A_SHARD]


def to_e4m3(values: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Return the nearest 8-bit floats (e4m3fn, ties to even) of `values`, whose magnitudes are at most 448."""
    bits = values.view(np.uint32)
    magnitude = bits & np.uint32(0x7FFFFFFF)
    # Three bits of mantissa of the twenty-three are left; the exponent's bias goes from 127 to 7.
    normal = ((magnitude + np.uint32(0x7FFFF) + ((magnitude >> 20) & 1)) >> 20) - np.uint32(120 << 3)
    small = np.rint(magnitude.view(np.float32) * np.float32(512)).astype(np.uint32)
    codes = np.where(magnitude < np.float32(2.0**-6).view(np.uint32), small, normal)
    codes |= (bits >> 24) & np.uint32(0x80)
    return codes.astype(np.uint8)


def coded(shape: tuple[int, ...], random: np.random.Generator) -> Iterator[NDArray[np.generic]]:
    """Yield a matrix in 8-bit floats, some rows at a time, then the scales of its blocks."""
    rows, columns = shape
    spread, scales = column_spread(columns, random), []
    edges = range(0, columns, BLOCK)
    for start in range(0, rows, ROWS):
        weights = random.standard_normal((min(ROWS, rows - start), columns), dtype=np.float32)
        weights *= spread
        tops = np.maximum.reduceat(np.abs(weights), [*range(0, len(weights), BLOCK)], axis=0)
        scale = (np.maximum.reduceat(tops, edges, axis=1) / np.float32(LARGEST)).astype(np.float32)
        for block, place in enumerate(range(0, len(weights), BLOCK)):
            weights[place : place + BLOCK] /= np.repeat(scale[block], BLOCK)[:columns]
        np.clip(weights, -LARGEST, LARGEST, out=weights)  # the division rounds
        yield to_e4m3(weights)
        scales.append(scale)
    yield np.concatenate(scales)


def column_spread(columns: int, random: np.random.Generator) -> NDArray[np.float32]:
    """Return the standard deviation of each column's weights."""
    spread = np.exp(0.35 * random.standard_normal(columns, dtype=np.float32)) * np.float32(0.6 / math.sqrt(columns))
    spread[random.choice(columns, columns // 500, replace=False)] *= 10
    return spread


def plain(name: str, shape: tuple[int, ...], random: np.random.Generator) -> NDArray[np.float32]:
    """Return a norm, the embedding, the head, or a router whose experts are sent unequal numbers of tokens."""
    values = random.standard_normal(shape, dtype=np.float32)
    if name.endswith("e_score_correction_bias"):
        return np.float32(0.05) * values
    if len(shape) == 1:
        return np.float32(1) + np.float32(0.1) * values
    return values if name.endswith("embed_tokens.weight") else values / np.float32(math.sqrt(shape[-1]))


def pieces(tensors: list[Tensor], random: np.random.Generator) -> Iterator[NDArray[np.generic]]:
    """Yield the data of a shard; the scales of a matrix are made with it."""
    for name, dtype, shape in tensors:
        if dtype == "F8_E4M3":
            yield from coded(shape, random)
        elif not name.endswith("weight_scale_inv"):
            values = plain(name, shape, random)
            yield to_bfloat16(values) if dtype == "BF16" else values


def main(folder: Path, experts: int = HEADERS["EXPERTS"]) -> None:
    """Write the checkpoint."""
    folder.mkdir(parents=True)
    for path in EMBEDDED.iterdir():
        if path.name.startswith(("tokenizer", "special", "chat", "generation")):
            shutil.copyfile(path, folder / path.name)
    config = {**HEADERS["CONFIG"], **CHANGES, "n_routed_experts": experts}
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    random, index = np.random.default_rng(7), {}
    for number, tensors in enumerate(shards(experts)):
        file = f"model-{number:05d}.safetensors"
        write_safetensors(folder / file, tensors, pieces(tensors, random), metadata={"format": "pt"})
        index |= dict.fromkeys((name for name, _, _ in tensors), file)
        print(file, flush=True)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write a random checkpoint with DeepSeek-R1's exact layers.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--experts", type=int, default=HEADERS["EXPERTS"], help="routed experts, a multiple of 16")
    main(**vars(parser.parse_args()))
