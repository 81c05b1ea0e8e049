"""genai_config.json: what onnxruntime-genai must know of an ONNX folder, with R1's sampling and a length that fits into memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from r1q.export.gguf_metadata import R1_SAMPLING, is_r1_template, read_generation
from r1q.models.config import ModelConfig
from r1q.models.tokenizer import Tokenizer

MAX_LENGTH = 4096  # genai reserves keys and values for all of it: the whole context can be gigabytes
# Families under the names that onnxruntime-genai has for decoders with the same inputs and outputs.
_TYPES = {"qwen3_moe": "qwen3", "deepseek_v2": "llama", "deepseek_v3": "llama"}
_THINK, _END_THINK = "<think>", "</think>"


def genai_config(config: ModelConfig, sidecar: Path, context: int, filename: str) -> dict[str, object]:
    """Return the content of genai_config.json for the graph `filename`; `sidecar` holds tokenizer and generation config.

    Keys are those of onnxruntime-genai's `src/config.cpp`.
    """
    tokenizer = Tokenizer.open(sidecar)
    generation = read_generation(sidecar)
    eos = list(config.eos_ids) or [token for token in (tokenizer.eos_id,) if token is not None]
    pad = config.raw.get("pad_token_id", generation.get("pad_token_id"))
    thought = {"bor_token_id": tokenizer.token_id(_THINK), "eor_token_id": tokenizer.token_id(_END_THINK)}
    heads, size = config.cached_heads
    decoder = {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "filename": filename,
        "head_size": size,
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_heads,
        "num_hidden_layers": config.num_layers,
        "num_key_value_heads": heads,
        "inputs": {
            "input_ids": "input_ids",
            "attention_mask": "attention_mask",
            "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
    }
    model: dict[str, object] = {
        "bos_token_id": config.bos_id if config.bos_id is not None else (eos[0] if eos else 0),
        "eos_token_id": eos,
        "pad_token_id": pad if isinstance(pad, int) else (eos[0] if eos else 0),
        **{key: token for key, token in thought.items() if token is not None},
        "context_length": context,
        "vocab_size": config.vocab_size,
        "type": _TYPES.get(config.family, config.family),
        "decoder": decoder,
    }
    return {"model": model, "search": _search(generation, tokenizer.chat_template, min(MAX_LENGTH, context))}


def _search(generation: Any, template: str | None, max_length: int) -> dict[str, object]:
    """Return sampling: R1's for R1's chat template, where generation_config.json does not say its own."""
    asked = {
        **(R1_SAMPLING if is_r1_template(template) else {}),
        **{k: v for k, v in generation.items() if v is not None},
    }
    numbers = {"temperature": 1.0, "top_p": 1.0, "top_k": 50, "repetition_penalty": 1.0}
    sampled = bool(asked.get("do_sample", "temperature" in asked))
    return {
        "do_sample": sampled,
        **{key: asked.get(key, default) for key, default in numbers.items()},
        "num_beams": 1,
        "num_return_sequences": 1,
        "min_length": 0,
        "max_length": max_length,
        "no_repeat_ngram_size": 0,
        "length_penalty": 1.0,
        "diversity_penalty": 0.0,
        "early_stopping": True,
        "past_present_share_buffer": True,
    }
