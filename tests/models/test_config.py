"""ModelConfig: both spellings of transformers read alike, and what the forward pass cannot do is refused with the reason."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from r1q.core.errors import InputError
from r1q.models.config import Llama3Scaling, ModelConfig, config_of

MakeModel = Callable[..., Path]
SCALING: dict[str, Any] = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
# As DeepSeek-R1-Distill-Qwen-1.5B and DeepSeek-R1-Distill-Llama-8B have them.
QWEN2: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "bos_token_id": 151643,
    "eos_token_id": 151643,
    "hidden_act": "silu",
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "max_position_embeddings": 131072,
    "max_window_layers": 21,
    "model_type": "qwen2",
    "num_attention_heads": 12,
    "num_hidden_layers": 28,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_mrope": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {**SCALING, "rope_type": "llama3"},
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "vocab_size": 128256,
}
QWEN3: dict[str, Any] = {
    **{key: value for key, value in QWEN2.items() if key not in ("use_mrope", "rope_theta")},
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "attention_bias": False,
    "head_dim": 128,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "tie_word_embeddings": True,
}


def parse(raw: dict[str, Any], **changes: Any) -> ModelConfig:
    changed = {key: value for key, value in {**raw, **changes}.items() if value is not ...}
    return config_of(changed, where="config.json", name="m")


def test_qwen2_as_the_r1_distillates_spell_it() -> None:
    config = parse(QWEN2)
    assert (config.family, config.head_dim, config.num_kv_heads, config.rope_theta) == ("qwen2", 128, 2, 10000.0)
    assert (config.qkv_bias, config.output_bias, config.mlp_bias, config.qk_norm, config.tied) == (
        True,
        False,
        False,
        False,
        False,
    )
    assert (config.bos_id, config.eos_ids, config.rope_scaling) == (151643, (151643,), None)
    assert config.raw["torch_dtype"] == "bfloat16"


def test_llama_as_the_r1_distillates_spell_it() -> None:
    config = parse(LLAMA)
    assert (config.family, config.head_dim, config.rope_theta, config.rms_norm_eps) == ("llama", 128, 500000.0, 1e-5)
    assert config.rope_scaling == Llama3Scaling(**SCALING)
    assert (config.qkv_bias, config.output_bias, config.mlp_bias, config.qk_norm) == (False, False, False, False)
    assert config.eos_ids == (128001, 128008)


def test_qwen3_has_head_norms_and_its_own_head_size() -> None:
    config = parse(QWEN3, num_attention_heads=16, num_key_value_heads=8)
    assert (config.qk_norm, config.head_dim, config.tied, config.qkv_bias) == (True, 128, True, False)
    assert parse(QWEN3, head_dim=...).head_dim == 128


@pytest.mark.parametrize("raw", [LLAMA, QWEN2, QWEN3], ids=["llama", "qwen2", "qwen3"])
def test_transformers_understands_the_same_from_the_same_json(raw: dict[str, Any], tmp_path: Path) -> None:
    """The new spelling is the one that transformers itself writes after reading the old one."""
    from transformers import AutoConfig

    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "config.json").write_text(json.dumps(raw))
    theirs = AutoConfig.from_pretrained(tmp_path / "old")
    theirs.save_pretrained(tmp_path / "new")
    assert "rope_parameters" in json.loads((tmp_path / "new" / "config.json").read_text())
    old, new = (ModelConfig.read(tmp_path / name, name="m") for name in ("old", "new"))
    facts = [f for f in ModelConfig.__dataclass_fields__ if f != "raw"]
    assert {f: getattr(old, f) for f in facts} == {f: getattr(new, f) for f in facts}
    assert old.num_layers == theirs.num_hidden_layers
    assert old.rope_theta == theirs.rope_parameters["rope_theta"]
    assert old.tied == theirs.tie_word_embeddings
    assert old.head_dim == getattr(theirs, "head_dim", theirs.hidden_size // theirs.num_attention_heads)


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_absent_keys_mean_what_they_mean_to_transformers(name: str) -> None:
    from transformers import AutoConfig

    needed = {
        *(
            "architectures",
            "model_type",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
        ),
        *("num_key_value_heads", "vocab_size", "max_position_embeddings"),
    }
    raw = {key: value for key, value in {"llama": LLAMA, "qwen2": QWEN2, "qwen3": QWEN3}[name].items() if key in needed}
    ours = parse(raw)
    theirs = AutoConfig.for_model(**raw)
    assert ours.rms_norm_eps == theirs.rms_norm_eps
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
    assert ours.tied == theirs.tie_word_embeddings
    assert ours.head_dim == getattr(theirs, "head_dim", theirs.hidden_size // theirs.num_attention_heads)
    assert ours.output_bias == getattr(theirs, "attention_bias", False)
    assert ours.rope_scaling is None


def test_biases_of_llama_are_read() -> None:
    config = parse(LLAMA, attention_bias=True, mlp_bias=True)
    assert config.qkv_bias
    assert config.output_bias
    assert config.mlp_bias


def test_a_window_that_no_layer_is_deep_enough_for_is_no_window() -> None:
    assert parse(QWEN2, use_sliding_window=True, max_window_layers=28).num_layers == 28
    assert parse(QWEN2, use_sliding_window=True, sliding_window=None).num_layers == 28
    assert parse(QWEN2, layer_types=["full_attention"] * 28).num_layers == 28


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "unknown architecture": ({"architectures": ["MistralForCausalLM"]}, "'MistralForCausalLM' is not supported"),
    "a mixture by name": ({"architectures": ["Qwen2MoeForCausalLM"]}, "r1q supports LlamaForCausalLM, Qwen2For"),
    "no architecture": ({"architectures": None, "model_type": ...}, "the architecture None is not supported"),
    "architecture of another type": ({"model_type": "llama"}, "does not go with model_type 'llama'"),
    "architecture not text": ({"architectures": [{"a": 1}]}, "are not text"),
    "already quantized": ({"quantization_config": {"quant_method": "gptq"}}, "is already quantized: take the original"),
    "gelu": ({"hidden_act": "gelu"}, 'hidden_act = "gelu" is not supported'),
    "experts": ({"num_experts": 8}, "num_experts = 8 means a mixture of experts"),
    "local experts": ({"num_local_experts": 8}, "num_local_experts = 8 means a mixture of experts"),
    "sliding by depth": ({"use_sliding_window": True}, "asks for sliding-window attention"),
    "sliding by type": ({"layer_types": ["full_attention", "sliding_attention"]}, "asks for sliding-window attention"),
    "part of the head": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5 is not supported"),
    "part of the head, new": (
        {"rope_theta": ..., "rope_parameters": {"partial_rotary_factor": 0.5}},
        "partial_rotary_factor = 0.5",
    ),
    "yarn of unknown length": ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "original_max_position_embeddings"),
    "yarn with its own factor of attention": (
        {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "attention_factor": 2.0}},
        "attention_factor = 2.0 is not supported with yarn",
    ),
    "linear": (
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0}},
        "the rope type 'linear' is not supported; r1q knows default, llama3 and yarn",
    ),
    "two bases": (
        {"rope_parameters": {"rope_theta": 5.0}},
        "rope_theta = 10000 contradicts rope_parameters, which says 5",
    ),
    "scaling not an object": ({"rope_scaling": "llama3"}, "rope_scaling = 'llama3' is not an object"),
    "scaling without a factor": ({"rope_scaling": {"rope_type": "llama3"}}, "rope_scaling: factor = None is missing"),
    "scaling upside down": (
        {"rope_scaling": {**SCALING, "rope_type": "llama3", "low_freq_factor": 4.0}},
        "low_freq_factor = 4.0 is not below",
    ),
    "no hidden size": ({"hidden_size": ...}, "hidden_size = None is missing"),
    "size as text": ({"hidden_size": "1536"}, "hidden_size = '1536' is not a positive integer"),
    "size true": ({"num_attention_heads": True}, "num_attention_heads = True is not a positive integer"),
    "size zero": ({"vocab_size": 0}, "vocab_size = 0 is not a positive integer"),
    "size beyond belief": ({"intermediate_size": 1 << 40}, "is not a positive integer"),
    "layers beyond belief": ({"num_hidden_layers": 100_000}, "num_hidden_layers = 100000 is more than 4096"),
    "heads that do not group": ({"num_key_value_heads": 5}, "num_key_value_heads = 5 does not divide the 12"),
    "odd heads": ({"head_dim": 127}, "head_dim = 127 is odd"),
    "more heads than width": ({"num_attention_heads": 2048, "num_key_value_heads": 1}, "head_dim = None is missing"),
    "epsilon negative": ({"rms_norm_eps": -1e-6}, "rms_norm_eps = -1e-06 is not a positive number"),
    "epsilon infinite": ({"rms_norm_eps": float("inf")}, "rms_norm_eps = inf is not a positive number"),
    "flag as text": ({"tie_word_embeddings": "no"}, "tie_word_embeddings = 'no' is not true or false"),
    "id as text": ({"eos_token_id": ["</s>"]}, r"eos_token_id = ['</s>'] is not a token id"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_run_is_refused_with_the_key_and_the_reason(name: str) -> None:
    changes, message = REFUSED[name]
    with pytest.raises(InputError) as refused:
        parse(QWEN2, **changes)
    assert message in str(refused.value)
    assert str(refused.value).startswith("config.json: ")
    assert "\n" not in str(refused.value)


def test_a_long_value_is_shortened_in_the_message() -> None:
    with pytest.raises(InputError) as refused:
        parse(QWEN2, quantization_config={"modules": ["x" * 1000]})
    assert len(str(refused.value)) < 250


def test_reading_a_folder_takes_ends_of_text_from_generation_config(make_model: MakeModel) -> None:
    folder = make_model()
    config = ModelConfig.read(folder)
    assert config == ModelConfig.read(folder / "config.json")
    assert config.name == folder.name
    (eos,) = config.eos_ids
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, eos, 8]}))
    assert ModelConfig.read(folder).eos_ids == (eos, 7, 8)


def test_a_model_in_a_download_cache_is_named_after_its_repository(tmp_path: Path, make_model: MakeModel) -> None:
    snapshot = tmp_path / "models--org--R1-Small" / "snapshots" / "0123abc"
    snapshot.parent.mkdir(parents=True)
    make_model().rename(snapshot)
    assert ModelConfig.read(snapshot).name == "R1-Small"
    assert ModelConfig.read(snapshot, name="mine").name == "mine"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is missing; give a folder"),
        (b"[1]", "is not a JSON object"),
        (b"{", "is not valid JSON"),
        (b"\xff", "is not valid JSON"),
        (b"[" * 100_000, "is not valid JSON"),
        (b" " * ((32 << 20) + 1), "that is no settings file"),
    ],
    ids=["missing", "a list", "cut", "not text", "nested", "large"],
)
def test_a_file_that_is_no_config_is_refused_by_name(
    make_model: MakeModel, content: bytes | None, message: str
) -> None:
    path = make_model() / "config.json"
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(InputError, match=message) as refused:
        ModelConfig.read(path.parent)
    assert str(path) in str(refused.value)
