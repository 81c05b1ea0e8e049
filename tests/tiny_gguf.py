"""Small real GGUF files with random weights, written by the `gguf` package, which shares no code with our own exporter."""

import itertools
from pathlib import Path

import gguf
import numpy as np
from gguf.constants import GGMLQuantizationType as Type

VOCAB, HIDDEN, FEED, LAYERS, HEADS, KV_HEADS, CONTEXT = 264, 64, 128, 2, 4, 2, 128
BOS, EOS = 256, 257
MERGES = ["h e", "l l", "o Ġ", "Ġ t", "t h", "i n"]


def byte_letters() -> list[str]:
    """Return GPT-2's printable letter for each byte, in the order of the bytes (its byte-level alphabet)."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    fresh = itertools.count(256)
    return [chr(byte) if byte in shown else chr(next(fresh)) for byte in range(256)]


def write_tiny_gguf(
    path: Path,
    *,
    kind: Type = Type.F32,
    context: int = CONTEXT,
    add_bos: bool = True,
    seed: int = 1,
    scale: float = 1.0,
) -> Path:
    """Write a two-block Llama with seeded random weights; matrices have type `kind`, norms are float32."""
    rng = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, "llama")
    describe(writer, context)
    add_tokenizer(writer, add_bos=add_bos)
    for name, shape in shapes().items():
        if len(shape) == 1:
            writer.add_tensor(name, np.ones(shape, dtype=np.float32))
            continue
        weights = (scale * rng.standard_normal(shape) / np.sqrt(shape[1])).astype(np.float32)
        data = weights if kind == Type.F32 else gguf.quants.quantize(weights, kind)
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def describe(writer: gguf.GGUFWriter, context: int) -> None:
    """Add the hyper-parameters."""
    writer.add_name("tiny")
    writer.add_context_length(context)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(FEED)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_vocab_size(VOCAB)


def add_tokenizer(writer: gguf.GGUFWriter, *, add_bos: bool) -> None:
    """Add a byte-level BPE: 256 bytes, two special tokens, and the tokens that the merges make."""
    tokens = [*byte_letters(), "<s>", "</s>", *(merge.replace(" ", "") for merge in MERGES)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama-bpe")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in ("<s>", "</s>") else 1 for token in tokens])
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(BOS)
    writer.add_eos_token_id(EOS)
    writer.add_add_bos_token(add_bos)


def shapes() -> dict[str, tuple[int, ...]]:
    """Return every tensor's shape, in the order of the file."""
    kv_width = HIDDEN // HEADS * KV_HEADS
    block: dict[str, tuple[int, ...]] = {
        "attn_norm": (HIDDEN,),
        "attn_q": (HIDDEN, HIDDEN),
        "attn_k": (kv_width, HIDDEN),
        "attn_v": (kv_width, HIDDEN),
        "attn_output": (HIDDEN, HIDDEN),
        "ffn_norm": (HIDDEN,),
        "ffn_gate": (FEED, HIDDEN),
        "ffn_up": (FEED, HIDDEN),
        "ffn_down": (HIDDEN, FEED),
    }
    blocks = {f"blk.{layer}.{name}.weight": shape for layer in range(LAYERS) for name, shape in block.items()}
    ends = {"output_norm.weight": (HIDDEN,), "output.weight": (VOCAB, HIDDEN)}
    return {"token_embd.weight": (VOCAB, HIDDEN), **blocks, **ends}
