"""The routed experts of a block: what each reads, as lessons that need no other's; and what they make, coded, added in one order.

Every expert reads the same normed hidden states, of which it sees the tokens that the coded model's router sends to it; those inputs
are kept once for all experts. Statistics are of what an expert is *seen* reading: its own tokens (`routed`), all tokens (`all`), or
its own and, where these are fewer than `few`, the tokens that the router would send next (`hybrid`).

An expert that saw fewer than `few` tokens has no second moments worth the name: its lesson is plain, and comes after the others.

The exact stream goes its own ways: the float model's router decides for it. Only the shared expert makes good what the residual
stream has drifted; eight routed ones that each did would overshoot.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from r1q.calibration.lesson import Lesson, Others
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
class Routed:
    """What all routed experts of a block read, [tokens, hidden_size], and where the tokens go, in the coded model and the `exact` one.

    `order` is that of the lessons, in which results are added, too; the last of them are `leaning` on `others`, what all of them read:
    the rows' mean squares, and the sums of what down projections read in the lessons that were learnt so far.
    """

    walk: BlockWalk
    rows: Tensor
    routes: moe.Routes
    exact: tuple[Tensor, moe.Routes] | None
    tile: int
    others: Others
    order: tuple[int, ...] = ()
    leaning: tuple[int, ...] = ()

    @property
    def exact_rows(self) -> Tensor | None:
        """What the float model's experts read, where it runs beside."""
        return None if self.exact is None else self.exact[0]

    def lesson(self, expert: int) -> Lesson:
        """Return an expert's lesson; that of one which leans on the others shall be asked for when all before it are learnt."""
        tokens, note = _seen(self, expert)
        leans = expert in self.leaning
        return Lesson(
            expert=expert,
            rows=self.rows,
            exact=None if leans else self.exact_rows,
            tokens=tokens,
            tile=self.tile,
            few=self.walk.coverage.few,
            note=note,
            others=self.others if leans else None,
        )

    def learn(self, squares: Tensor, tokens: int) -> None:
        """Take note of Σx² [inner] that an expert's down projection read."""
        known = self.others
        inner = known.inner + squares.to(known.inner.device)
        self.others = Others(mean=known.mean, inner=inner, tokens=known.tokens + tokens)

    def add_results(self, expert: int, streams: Streams) -> None:
        """Add what an expert makes, coded, to the coded stream, and what the float model's makes to the exact one.

        For all experts, in the order of `order`, when they are coded. An expert's coded weights leave the walk.
        """
        names = [f"{kind}.weight" for kind in moe.kinds(expert)]
        weights = {name: self.walk.coded.pop(name) for name in names}
        _add_results(weights, streams.coded, expert, self.rows, *self.routes.of(expert), self.tile)
        if self.exact is not None and streams.exact is not None:
            rows, routes = self.exact
            weights = {name: self.walk.exact[name] for name in names}
            _add_results(weights, streams.exact, expert, rows, *routes.of(expert), self.tile)


def routed_experts(walk: BlockWalk, streams: Streams) -> Routed:
    """Return the routed experts of a block whose streams are behind attention, before the shared expert adds to them."""
    experts = walk.config.experts
    if experts is None:
        raise ValueError("a block without experts")
    found = _keep_inputs(walk, streams, experts)
    counts = torch.bincount(found.routes.experts.flatten(), minlength=experts.count).tolist()
    care = walk.coverage
    care.tokens[:] = counts
    short = [care.seen != "all" and count < care.few for count in counts]
    found.order = tuple(sorted(range(experts.count), key=lambda one: (short[one], one)))
    filled = care.seen == "hybrid" and len(found.rows) >= care.few
    found.leaning = () if filled else tuple(one for one in range(experts.count) if short[one])
    return found


def shared_stages(walk: BlockWalk, streams: Streams) -> Iterator[Stage]:
    """Yield the stages of the shared expert, if there is one, and add what it makes to the streams."""
    experts = walk.config.experts
    if experts is None or not experts.shared_inner:
        return
    hidden = walk.config.hidden_size
    yield walk.reading(streams, mlp_input, ("ffn_gate_shexp", "ffn_up_shexp"), hidden)

    def inner(weights: Weights, stream: Tensor) -> Tensor:
        return moe.shared_inner(weights, mlp_input(weights, walk.config, stream))

    yield from walk.adding(streams, inner, "ffn_down_shexp", experts.shared_inner)


def _keep_inputs(walk: BlockWalk, streams: Streams, experts: Experts) -> Routed:
    """Return the normed hidden states of all tokens, in the walk's dtype, and their routes."""
    rows, routes = _normed(walk, streams.coded, walk.coded, experts)
    exact = None if streams.exact is None else _normed(walk, streams.exact, walk.exact, experts)
    tile = walk.windows * streams.coded.shape[1]
    total = torch.zeros(walk.config.hidden_size, dtype=torch.float64, device=rows.device)
    for start in range(0, len(rows), tile):
        total += rows[start : start + tile].to(torch.float32, copy=True).square().sum(0, dtype=torch.float64)
    inner = torch.zeros(experts.inner, dtype=torch.float64, device=rows.device)
    others = Others(mean=total / len(rows), inner=inner, tokens=0)
    return Routed(walk=walk, rows=rows, routes=routes, exact=exact, tile=tile, others=others)


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


def _seen(routed: Routed, expert: int) -> tuple[Tensor | None, str]:
    """Return the tokens that an expert's statistics are of (None: all), and what is to be noted of them."""
    care, (own, _) = routed.walk.coverage, routed.routes.of(expert)
    if care.seen == "all":
        return None, ""
    if len(own) >= care.few:
        return own, ""
    if expert in routed.leaning:
        return own, (
            f"expert {expert}: {len(own)} tokens, fewer than {care.few}: importance shrunk toward the layer's mean, "
            "rounded by importance"
        )
    choice = routed.routes.choice[:, expert].clone()
    choice[own] = -torch.inf
    # Stable, so that equal scores (of closed groups) give the same tokens everywhere.
    next_best = choice.sort(descending=True, stable=True).indices[: care.few - len(own)]
    note = f"expert {expert}: {len(own)} tokens, filled up to {care.few} with those that come next to it"
    return torch.cat((own, next_best)).sort().values, note


def _add_results(
    weights: Mapping[str, Tensor], stream: Tensor, expert: int, rows: Tensor, tokens: Tensor, share: Tensor, tile: int
) -> None:
    """Add what `expert` makes of `rows` at its `tokens` to the hidden states, weighed by the router."""
    flat = stream.view(-1, stream.shape[-1])
    for start in range(0, len(tokens), tile):
        here = slice(start, start + tile)
        inner = moe.expert_inner(weights, expert, rows[tokens[here]].float())
        flat.index_add_(0, tokens[here], share[here, None] * linear(weights, f"ffn_down_exps.{expert}", inner))
