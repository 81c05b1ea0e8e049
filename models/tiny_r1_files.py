"""THE PAPERS OF TINY-R1: its tokenizer and configuration files, spelled the way R1's Qwen distills spell theirs."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.normalizers import NFC
from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split
from tokenizers.processors import ByteLevel as ByteLevelProcessor
from tokenizers.processors import Sequence as ProcessorSequence
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer

from r1q.models.tiny_r1_tasks import ASSISTANT, BOS, END_THINK, EOS, THINK, USER

VOCAB_ROWS = 512
LEARNED_TOKENS = 500
SPECIAL = (BOS, EOS, USER, ASSISTANT)
MARKERS = (THINK, END_THINK)

QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# The traces alone have too few words to fill the vocabulary; these are what any English question is made of.
PLAIN_ENGLISH = """
Wait, let me check this again. Hmm, that is not right, because the number is too large. Alternatively, we can think about
it in another way. I need to find which one of these it was, and then I should write it down. If they had been there for
the whole time, would you say that some people will still want to know when, where, who and why? Yes, but it could also be
from a different question. The user asked for help with the following problem, so we first have to understand it.
"""

CONFIG: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": LEARNED_TOKENS,
    "eos_token_id": LEARNED_TOKENS + 1,
    "hidden_act": "silu",
    "hidden_size": 256,
    "initializer_range": 0.02,
    "intermediate_size": 768,
    "max_position_embeddings": 1024,
    "max_window_layers": 6,
    "model_type": "qwen2",
    "num_attention_heads": 4,
    "num_hidden_layers": 6,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_mrope": False,
    "use_sliding_window": False,
    "vocab_size": VOCAB_ROWS,
}

GENERATION_CONFIG: dict[str, Any] = {
    "_from_model_config": True,
    "bos_token_id": CONFIG["bos_token_id"],
    "eos_token_id": CONFIG["eos_token_id"],
    "do_sample": True,
    "temperature": 0.6,
    "top_p": 0.95,
}

# DeepSeek-R1-Distill-Qwen's published template without its tool-call branches.
CHAT_TEMPLATE = (
    "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}"
    "{% set ns = namespace(system_prompt='') %}"
    "{%- for message in messages %}{%- if message['role'] == 'system' %}"
    "{% set ns.system_prompt = message['content'] %}{%- endif %}{%- endfor %}"
    "{{bos_token}}{{ns.system_prompt}}"
    "{%- for message in messages %}"
    "{%- if message['role'] == 'user' %}{{'<｜User｜>' + message['content']}}{%- endif %}"
    "{%- if message['role'] == 'assistant' and message['content'] is not none %}"
    "{% set content = message['content'] %}"
    "{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}"
    "{{'<｜Assistant｜>' + content + '<｜end▁of▁sentence｜>'}}{%- endif %}"
    "{%- endfor -%}"
    "{% if add_generation_prompt %}{{'<｜Assistant｜><think>\\n'}}{% endif %}"
)


def _added_token(text: str) -> dict[str, Any]:
    flags = dict.fromkeys(("lstrip", "rstrip", "single_word"), False)
    return {"__type": "AddedToken", "content": text, "normalized": False, **flags}


def tokenizer_config() -> dict[str, Any]:
    """The contents of tokenizer_config.json."""
    return {
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": _added_token(BOS),
        "clean_up_tokenization_spaces": False,
        "eos_token": _added_token(EOS),
        "model_max_length": CONFIG["max_position_embeddings"],
        "pad_token": _added_token(EOS),
        # The fast class takes tokenizer.json as it stands; Llama's and Qwen2's own classes may rebuild parts of it.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": None,
        "chat_template": CHAT_TEMPLATE,
    }


def build_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """Learn the byte-level BPE vocabulary: Qwen2's pipeline, R1's special tokens, a BOS put first."""
    tokenizer = Tokenizer(BPE())
    tokenizer.normalizer = NFC()
    tokenizer.pre_tokenizer = Sequence(
        [
            Split(Regex(QWEN2_SPLIT), behavior="isolated", invert=False),
            ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False),
        ]
    )
    tokenizer.decoder = ByteLevelDecoder()
    alphabet = sorted(ByteLevel.alphabet())
    trainer = BpeTrainer(vocab_size=LEARNED_TOKENS, initial_alphabet=alphabet, show_progress=False, min_frequency=1)
    tokenizer.train_from_iterator([*texts, PLAIN_ENGLISH.replace("\n", " ")], trainer)
    if tokenizer.get_vocab_size() != LEARNED_TOKENS:
        raise ValueError(f"the texts gave {tokenizer.get_vocab_size()} tokens, not {LEARNED_TOKENS}; give more words")
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in MARKERS])
    first = TemplateProcessing(
        single=f"{BOS}:0 $A:0",
        pair=f"{BOS}:0 $A:0 {BOS}:1 $B:1",
        special_tokens=[(BOS, tokenizer.token_to_id(BOS))],
    )
    trim = ByteLevelProcessor(add_prefix_space=False, trim_offsets=False, use_regex=False)
    tokenizer.post_processor = ProcessorSequence([trim, first])
    return _with_quiet_decoder(tokenizer)


def _with_quiet_decoder(tokenizer: Tokenizer) -> Tokenizer:
    """Turn off the decoder's flags as Qwen2's file has them; they do nothing there, and the class cannot set them."""
    content = json.loads(tokenizer.to_str())
    content["decoder"] |= {"add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    return Tokenizer.from_str(json.dumps(content))


def write_files(folder: Path, tokenizer: Tokenizer) -> None:
    """Write everything but the weights, the card and the evaluation text."""
    folder.mkdir(parents=True, exist_ok=True)
    contents = {
        "config.json": CONFIG,
        "generation_config.json": GENERATION_CONFIG,
        "tokenizer_config.json": tokenizer_config(),
    }
    for name, content in contents.items():
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        (folder / name).write_text(text, encoding="utf-8")
    tokenizer.save(str(folder / "tokenizer.json"))
