"""The experts of a block walked one at a time: what each reads, then what it makes, coded, for the tokens that are sent to it.

Every expert reads the same normed hidden states, of which it sees the tokens that the coded model's router sends to it; those inputs
are kept once for all experts. Statistics are of what an expert is *seen* reading: its own tokens (`routed`), all tokens (`all`), or
its own and, where these are fewer than `few`, the tokens that the router would send next (`hybrid`).

An expert that saw fewer than `few` tokens has no second moments worth the name. It comes after the others, to be coded by the mean
squares of its inputs, shrunk toward the layer's mean: (Σ own + few · mean) / (own tokens + few).

The exact stream goes its own ways: the float model's router decides for it. Only the shared expert makes good what the residual
stream has drifted; eight routed ones that each did would overshoot.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from r1q.calibration.moments import add_product, add_second_moment
from r1q.calibration.stage import Stage, Streams
from r1q.models import moe
from r1q.models.block import mlp_input
from r1q.models.config_moe import Experts
from r1q.models.linear import Weights, linear

if TYPE_CHECKING:
    from r1q.calibration.stages import BlockWalk

Seen = Literal["routed", "all", "hybrid"]


@dataclass(slots=True, kw_only=True)
class Coverage:
    """Which tokens experts are calibrated on, `few` being the least that will do; `tokens` of each expert are counted here."""

    seen: Seen = "routed"
    few: int = 0
    tokens: list[int] = field(default_factory=list)


@dataclass(slots=True, kw_only=True)
class _Inputs:
    """What all experts of a block read, [tokens, hidden_size], and where the tokens go; and Σx² of what down projections read."""

    rows: Tensor
    routes: moe.Routes
    exact: tuple[Tensor, moe.Routes] | None
    mean: Tensor
    inner_sum: Tensor
    inner_tokens: int = 0


def expert_stages(walk: BlockWalk, streams: Streams) -> Iterator[Stage]:
    """Yield two stages for each routed expert and add what it makes, coded, to the streams. The shared expert is not among them.

    The streams must be behind attention when the first stage is asked for.
    """
    experts = walk.config.experts
    if experts is None:
        raise ValueError("a block without experts")
    inputs = _keep_inputs(walk, streams, experts)
    yield from _shared(walk, streams, experts)
    counts = torch.bincount(inputs.routes.experts.flatten(), minlength=experts.count).tolist()
    walk.coverage.tokens[:] = counts
    enough = [walk.coverage.seen == "all" or count >= walk.coverage.few for count in counts]
    for expert in sorted(range(experts.count), key=lambda one: (not enough[one], one)):
        yield from _expert(walk, streams, inputs, expert, enough[expert])
        for kind in moe.kinds(expert):
            walk.coded.pop(f"{kind}.weight", None)  # one expert at a time


def _keep_inputs(walk: BlockWalk, streams: Streams, experts: Experts) -> _Inputs:
    """Return the normed hidden states of all tokens, in the walk's dtype, and their routes."""
    hidden = walk.config.hidden_size
    rows, routes = _normed(walk, streams.coded, walk.coded, experts)
    exact = None if streams.exact is None else _normed(walk, streams.exact, walk.exact, experts)
    total = torch.zeros(hidden, dtype=torch.float64, device=rows.device)
    for tokens in _split(torch.arange(len(rows), device=rows.device), _tile(walk, streams)):
        total += rows[tokens].float().square().sum(0, dtype=torch.float64)
    inner = torch.zeros(experts.inner, dtype=torch.float64, device=rows.device)
    return _Inputs(rows=rows, routes=routes, exact=exact, mean=total / len(rows), inner_sum=inner)


def _normed(walk: BlockWalk, stream: Tensor, weights: Weights, experts: Experts) -> tuple[Tensor, moe.Routes]:
    kept = walk.allocate((*stream.shape[:2], walk.config.hidden_size), walk.dtype)
    found = []
    for start in range(0, len(stream), walk.windows):
        here = slice(start, start + walk.windows)
        normed = mlp_input(weights, walk.config, stream[here])
        kept[here] = normed.to(walk.dtype)
        found.append(moe.route(weights, experts, normed.flatten(0, 1)))
    names = ("experts", "weights", "choice")
    whole = moe.Routes(**{name: torch.cat([getattr(routes, name) for routes in found]) for name in names})
    return kept.flatten(0, 1), whole


def _shared(walk: BlockWalk, streams: Streams, experts: Experts) -> Iterator[Stage]:
    if not experts.shared_inner:
        return
    hidden = walk.config.hidden_size
    yield walk.reading(streams, mlp_input, ("ffn_gate_shexp", "ffn_up_shexp"), hidden)

    def inner(weights: Weights, stream: Tensor) -> Tensor:
        return moe.shared_inner(weights, mlp_input(weights, walk.config, stream))

    yield from walk.adding(streams, inner, "ffn_down_shexp", experts.shared_inner)


def _expert(walk: BlockWalk, streams: Streams, inputs: _Inputs, expert: int, enough: bool) -> Iterator[Stage]:
    gate, up, down = moe.kinds(expert)
    own, share = inputs.routes.of(expert)
    seen, note = _seen(walk, inputs, expert, own, enough)
    enough = enough or len(seen) >= walk.coverage.few > 0
    exact = None if inputs.exact is None else {f"{k}.weight": walk.exact[f"{k}.weight"] for k in (gate, up, down)}
    tile = _tile(walk, streams)
    first, second = _Sums(walk, inputs.rows, exact), _Sums(walk, inputs.inner_sum, exact)
    for tokens in _split(seen, tile):
        rows = inputs.rows[tokens].float()
        first.add(rows, None if inputs.exact is None else inputs.exact[0][tokens].float(), enough)
    yield first.stage((gate, up), len(seen), enough, _shrunk(first.squares, inputs.mean, len(seen), walk), note)
    del first  # the next sums need the room
    for tokens in _split(seen, tile):
        inner = moe.expert_inner(walk.coded, expert, inputs.rows[tokens].float())
        wanted = None
        if exact is not None and inputs.exact is not None:
            wanted = moe.expert_inner(exact, expert, inputs.exact[0][tokens].float())
        second.add(inner, wanted, enough)
    inputs.inner_sum += second.squares
    inputs.inner_tokens += len(seen)
    mean = inputs.inner_sum / inputs.inner_tokens if inputs.inner_tokens else torch.ones_like(inputs.inner_sum)
    yield second.stage((down,), len(seen), enough, _shrunk(second.squares, mean, len(seen), walk), "")
    _add_results(walk.coded, streams.coded, expert, inputs.rows, own, share, tile)
    if exact is not None and inputs.exact is not None and streams.exact is not None:
        _add_results(exact, streams.exact, expert, inputs.exact[0], *inputs.exact[1].of(expert), tile)


def _seen(walk: BlockWalk, inputs: _Inputs, expert: int, own: Tensor, enough: bool) -> tuple[Tensor, str]:
    """Return the tokens that an expert's statistics are of, and what is to be noted of them."""
    care = walk.coverage
    if care.seen == "all":
        return torch.arange(len(inputs.rows), device=own.device), ""
    if enough:
        return own, ""
    if care.seen == "hybrid" and len(inputs.rows) >= care.few:
        choice = inputs.routes.choice[:, expert].clone()
        choice[own] = -torch.inf
        # Stable, so that equal scores (of closed groups) give the same tokens everywhere.
        next_best = choice.sort(descending=True, stable=True).indices[: care.few - len(own)]
        note = f"expert {expert}: {len(own)} tokens, filled up to {care.few} with those that come next to it"
        return torch.cat((own, next_best)).sort().values, note
    return own, (
        f"expert {expert}: {len(own)} tokens, fewer than {care.few}: importance shrunk toward the layer's mean, "
        "rounded by importance"
    )


class _Sums:
    """Sums over the tokens that an expert is seen reading: Σx², and where there are enough tokens xᵀx and the drift."""

    def __init__(self, walk: BlockWalk, like: Tensor, exact: object) -> None:
        columns = like.shape[-1]
        self._dtype = walk.dtype
        self.squares = torch.zeros(columns, dtype=torch.float64, device=like.device)
        self.moment = torch.zeros((columns, columns), device=like.device)
        self.drift = None if exact is None else torch.zeros((columns, columns), device=like.device)

    def add(self, inputs: Tensor, wanted: Tensor | None, enough: bool) -> None:
        """Add some tokens' `inputs`, and what the float model reads there."""
        self.squares += inputs.square().sum(0, dtype=torch.float64)
        if not enough:
            return
        add_second_moment(self.moment, inputs, self._dtype)
        if self.drift is not None and wanted is not None:
            add_product(self.drift, wanted - inputs, inputs, self._dtype)

    def stage(self, kinds: tuple[str, ...], tokens: int, enough: bool, importance: Tensor, note: str) -> Stage:
        """Return the stage of these sums."""
        if enough:
            return Stage(kinds=kinds, tokens=tokens, moment=self.moment, drift=self.drift, note=note)
        return Stage(kinds=kinds, tokens=tokens, moment=self.moment[:0], importance=importance, plain=True, note=note)


def _shrunk(squares: Tensor, mean: Tensor, tokens: int, walk: BlockWalk) -> Tensor:
    few = max(walk.coverage.few, 1)
    return (squares + few * mean) / (tokens + few)


def _add_results(
    weights: Weights, stream: Tensor, expert: int, rows: Tensor, tokens: Tensor, share: Tensor, tile: int
) -> None:
    """Add what `expert` makes of `rows` at its `tokens` to the hidden states, weighed by the router."""
    flat = stream.view(-1, stream.shape[-1])
    for start in range(0, len(tokens), tile):
        here = slice(start, start + tile)
        inner = moe.expert_inner(weights, expert, rows[tokens[here]].float())
        flat.index_add_(0, tokens[here], share[here, None] * linear(weights, f"ffn_down_exps.{expert}", inner))


def _split(tokens: Tensor, tile: int) -> Iterator[Tensor]:
    return (tokens[start : start + tile] for start in range(0, len(tokens), tile))


def _tile(walk: BlockWalk, streams: Streams) -> int:
    return walk.windows * streams.coded.shape[1]
