"""A mixture of experts: a router scores the experts for each token, the best few run, and their results are added with weights.

Routed experts are `ffn_gate_exps.7.weight` and so on, looked up one expert at a time: a mapping that reads them when asked keeps one
in memory. A shared expert (`ffn_gate_shexp`, …) runs for every token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from r1q.models.config_moe import Experts
from r1q.models.linear import Weights, linear

ROUTER = "ffn_gate_inp.weight"
CORRECTION = "exp_probs_b.bias"
_TILE = 2048  # tokens that the shared expert takes at once
_TINY = 1e-20  # what DeepSeek-V3 adds to the sum that weights are divided by


@dataclass(frozen=True, slots=True, kw_only=True)
class Routes:
    """Which experts each token reads: `experts` and `weights` [tokens, used], and every expert's `choice` score [tokens, experts]."""

    experts: Tensor
    weights: Tensor
    choice: Tensor

    def of(self, expert: int) -> tuple[Tensor, Tensor]:
        """Return the tokens that read `expert`, in their order, and its weight for each: [n], [n]."""
        tokens, place = torch.where(self.experts == expert)
        return tokens, self.weights[tokens, place]


def route(weights: Weights, experts: Experts, normed: Tensor) -> Routes:
    """Return the routes of `normed` [tokens, hidden_size], computed in float32.

    Groups first, if there are several: those whose `group_best` best experts score most together.
    """
    scores = normed.float() @ weights[ROUTER].float().T
    scores = scores.sigmoid() if experts.gating == "sigmoid" else scores.softmax(dim=-1)
    choice = scores + weights[CORRECTION] if experts.corrected else scores
    if experts.groups > 1:
        grouped = choice.reshape(len(choice), experts.groups, -1)
        best = grouped.topk(experts.group_best, dim=-1).values.sum(-1)
        closed = torch.ones_like(best, dtype=torch.bool)
        closed.scatter_(1, best.topk(experts.groups_used, dim=-1).indices, value=False)
        choice = grouped.masked_fill(closed[..., None], -torch.inf).reshape(choice.shape)
    chosen = choice.topk(experts.used, dim=-1).indices
    share = scores.gather(1, chosen)
    if experts.normalized:
        share = share / (share.sum(-1, keepdim=True) + _TINY)
    return Routes(experts=chosen, weights=share * experts.scale, choice=choice)


def mixture(weights: Weights, experts: Experts, normed: Tensor) -> Tensor:
    """Return what the feed-forward layer adds to the hidden states of `normed` [..., hidden_size]."""
    rows = normed.reshape(-1, normed.shape[-1])
    routes = route(weights, experts, rows)
    result = torch.zeros_like(rows)
    if experts.shared_inner:
        for start in range(0, len(rows), _TILE):
            part = rows[start : start + _TILE]
            result[start : start + _TILE] = linear(weights, "ffn_down_shexp", shared_inner(weights, part))
    add_chosen(result, routes, rows, lambda expert, part: expert_output(weights, expert, part))
    return result.reshape(normed.shape)


def add_chosen(result: Tensor, routes: Routes, rows: Tensor, run: Callable[[int, Tensor], Tensor]) -> None:
    """Add to `result` [tokens, hidden_size] what `run(expert, its tokens' rows)` returns, by its weights; experts in their order."""
    for expert in torch.unique(routes.experts).tolist():
        tokens, share = routes.of(expert)
        result.index_add_(0, tokens, (share[:, None] * run(expert, rows[tokens])).to(result.dtype))


def shared_inner(weights: Weights, rows: Tensor) -> Tensor:
    """Return what ffn_down_shexp reads."""
    return F.silu(linear(weights, "ffn_gate_shexp", rows)) * linear(weights, "ffn_up_shexp", rows)


def expert_inner(weights: Weights, expert: int, rows: Tensor) -> Tensor:
    """Return what the down projection of `expert` reads: [rows, inner]."""
    return F.silu(linear(weights, f"ffn_gate_exps.{expert}", rows)) * linear(weights, f"ffn_up_exps.{expert}", rows)


def expert_output(weights: Weights, expert: int, rows: Tensor) -> Tensor:
    """Return what `expert` makes of `rows` [rows, hidden_size], without its weight."""
    return linear(weights, f"ffn_down_exps.{expert}", expert_inner(weights, expert, rows))


def kinds(expert: int) -> Iterator[str]:
    """Yield the kinds of an expert's three matrices, as they are looked up."""
    return (f"ffn_{part}_exps.{expert}" for part in ("gate", "up", "down"))
