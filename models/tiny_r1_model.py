"""TINY-R1 ITSELF: the embedded model in plain torch, how it solves problems and how many it gets right.

It is written out here so that training and its checks need no model library; the names are Hugging Face's, so the
``state_dict`` put under ``model.`` is an ordinary Qwen2 checkpoint.
"""

import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional

from r1q.models.tiny_r1_files import CONFIG, VOCAB_ROWS
from r1q.models.tiny_r1_tasks import END_THINK, LEVELS, Problem

HIDDEN: int = CONFIG["hidden_size"]
HEADS: int = CONFIG["num_attention_heads"]
KV_HEADS: int = CONFIG["num_key_value_heads"]
HEAD: int = HIDDEN // HEADS

TOKEN_LIMIT = 176
"""Tokens a problem and its solution may have when solving; the longest correct one has fewer than 160."""

Cache = list[tuple[Tensor, Tensor]]


class RMSNorm(nn.Module):
    """x / rms(x) · weight, over the last axis."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(HIDDEN))

    def forward(self, x: Tensor) -> Tensor:
        """Normalize in the dtype of the weight."""
        return functional.rms_norm(x, (HIDDEN,), self.weight.to(x.dtype), CONFIG["rms_norm_eps"])


class Attention(nn.Module):
    """Grouped-query attention with biases on q, k and v, as Qwen2 has it."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(HIDDEN, HEADS * HEAD)
        self.k_proj = nn.Linear(HIDDEN, KV_HEADS * HEAD)
        self.v_proj = nn.Linear(HIDDEN, KV_HEADS * HEAD)
        self.o_proj = nn.Linear(HEADS * HEAD, HIDDEN, bias=False)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], past: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Any]:
        """Attend causally over x [rows, tokens, hidden], or with one new token over the past too."""
        rows, tokens, _ = x.shape
        q = rotate(self.q_proj(x).view(rows, tokens, HEADS, HEAD).transpose(1, 2), rope)
        k = rotate(self.k_proj(x).view(rows, tokens, KV_HEADS, HEAD).transpose(1, 2), rope)
        v = self.v_proj(x).view(rows, tokens, KV_HEADS, HEAD).transpose(1, 2)
        if past is not None:
            k, v = torch.cat((past[0], k), dim=2), torch.cat((past[1], v), dim=2)
        present = (k, v)
        k, v = (t.repeat_interleave(HEADS // KV_HEADS, dim=1) for t in present)
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=past is None)
        return self.o_proj(mixed.transpose(1, 2).reshape(rows, tokens, -1)), present


class FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self) -> None:
        super().__init__()
        inner = CONFIG["intermediate_size"]
        self.gate_proj = nn.Linear(HIDDEN, inner, bias=False)
        self.up_proj = nn.Linear(HIDDEN, inner, bias=False)
        self.down_proj = nn.Linear(inner, HIDDEN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """down(silu(gate(x)) · up(x))."""
        out: Tensor = self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Block(nn.Module):
    """One decoder layer, named as Hugging Face names it."""

    def __init__(self) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm()
        self.self_attn = Attention()
        self.post_attention_layernorm = RMSNorm()
        self.mlp = FeedForward()

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], past: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Any]:
        """Return the new hidden state and the keys and values."""
        mixed, present = self.self_attn(self.input_layernorm(x), rope, past)
        x = x + mixed
        return x + self.mlp(self.post_attention_layernorm(x)), present


class TinyR1(nn.Module):
    """The whole model; its state_dict, put under ``model.``, is the checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCAB_ROWS, HIDDEN)
        self.layers = nn.ModuleList(Block() for _ in range(CONFIG["num_hidden_layers"]))
        self.norm = RMSNorm()
        deep = 0.02 / math.sqrt(2 * CONFIG["num_hidden_layers"])
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=deep if name.endswith(("o_proj.weight", "down_proj.weight")) else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, tokens: Tensor, cache: Cache | None = None) -> tuple[Tensor, Cache]:
        """Logits [rows, tokens, vocab] of tokens [rows, tokens]; with a cache, tokens follow what it holds."""
        start = cache[0][0].shape[2] if cache else 0
        x = self.embed_tokens(tokens)
        rope = rope_table(start, tokens.shape[1])
        presents: Cache = []
        for index, layer in enumerate(self.layers):
            x, present = layer(x, rope, cache[index] if cache else None)
            presents.append(present)
        return functional.linear(self.norm(x), self.embed_tokens.weight), presents


def rope_table(start: int, count: int) -> tuple[Tensor, Tensor]:
    """cos and sin [count, HEAD] of the positions from start on (RoFormer eq. 34, Hugging Face's half-split order)."""
    frequencies = CONFIG["rope_theta"] ** (-torch.arange(0, HEAD, 2) / HEAD)
    angles = torch.outer(torch.arange(start, start + count).float(), frequencies).repeat(1, 2)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Turn queries or keys [.., tokens, HEAD] by their positions."""
    cos, sin = rope[0].to(x.dtype), rope[1].to(x.dtype)
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-right, left), dim=-1) * sin


def encode(tokenizer: Tokenizer, problem: Problem) -> tuple[list[int], list[int]]:
    """Token ids of the prompt and of the completion."""
    prompt = tokenizer.encode(problem.prompt, add_special_tokens=False).ids
    return prompt, tokenizer.encode(problem.completion, add_special_tokens=False).ids


@torch.inference_mode()
def solve(model: TinyR1, tokenizer: Tokenizer, problems: list[Problem], limit: int = TOKEN_LIMIT) -> list[str]:
    """Greedy completions of all problems at once; prompts of any length are simply fed until they run out."""
    prompts = [encode(tokenizer, problem)[0] for problem in problems]
    stop = CONFIG["eos_token_id"]
    written: list[list[int]] = [[prompt[0]] for prompt in prompts]
    done = [False] * len(prompts)
    cache: Cache | None = None
    for position in range(limit):
        logits, cache = model(torch.tensor([[row[position]] for row in written]), cache)
        for index, best in enumerate(logits[:, 0].argmax(dim=-1).tolist()):
            prompt = prompts[index]
            written[index].append(prompt[position + 1] if position + 1 < len(prompt) else best)
            done[index] |= position + 1 >= len(prompt) and best == stop
        if all(done):
            break
    texts = []
    for prompt, row in zip(prompts, written, strict=True):
        tail = row[len(prompt) :]
        texts.append(tokenizer.decode(tail[: tail.index(stop)] if stop in tail else tail, skip_special_tokens=False))
    return texts


def answer_of(completion: str) -> str:
    """What stands after the thinking; empty when the thinking never ended."""
    return completion.partition(END_THINK)[2].strip()


def scores(model: TinyR1, tokenizer: Tokenizer, problems: list[Problem]) -> dict[str, float]:
    """Percent answered exactly, per level and in ``all``."""
    right: dict[str, list[bool]] = {}
    for level in LEVELS:
        asked = [problem for problem in problems if problem.level == level]
        texts = solve(model, tokenizer, asked)
        right[level] = [answer_of(text) == problem.answer for text, problem in zip(texts, asked, strict=True)]
    table = {level: 100 * sum(hits) / max(1, len(hits)) for level, hits in right.items()}
    return {**table, "all": 100 * sum(map(sum, right.values())) / len(problems)}


def round_weights(model: TinyR1, bits: int, group_size: int) -> TinyR1:
    """A copy whose linear layers are crudely rounded: asymmetric min/max, to nearest, groups along the input."""
    rounded = TinyR1()
    rounded.load_state_dict(model.state_dict())
    for module in rounded.modules():
        if isinstance(module, nn.Linear):
            groups = module.weight.data.view(-1, group_size)
            low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
            step = (high - low).clamp_min(1e-12) / (2**bits - 1)
            groups.copy_(((groups - low) / step).round() * step + low)
    return rounded


def save_weights(model: TinyR1, folder: Path) -> None:
    """Write model.safetensors in bf16 under Hugging Face's names."""
    tensors = {f"model.{name}": tensor.to(torch.bfloat16).contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, str(folder / "model.safetensors"), metadata={"format": "pt"})


def load_weights(folder: Path) -> TinyR1:
    """The shipped model, computed in float32."""
    model = TinyR1()
    tensors = load_file(str(folder / "model.safetensors"))
    model.load_state_dict({name.removeprefix("model."): tensor.float() for name, tensor in tensors.items()})
    return model.eval()
