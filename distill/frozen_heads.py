"""The divergence of a student from its teacher where neither head is trained: the gradient of the states is made on the way."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_LOGITS = 1 << 22
"""Logits that exist at once, in float32 16 MB; some five arrays of them are alive."""


class FrozenHeads(NamedTuple):
    """A student's head and its teacher's, [vocab_size, hidden] each, in the dtype they multiply in; neither is trained."""

    student: Tensor
    teacher: Tensor


def divergence_of_states(states: Tensor, truth: Tensor, heads: FrozenHeads, weights: Tensor) -> Tensor:
    """Return the mean divergence of the student's `states` from the teacher's, `truth`, both [n, hidden], by `weights` [n].

    Only the states get a gradient; it is made on the way, so that no logits are kept and none are made twice.
    """
    return _OfStates.apply(states, truth, heads, weights)  # type: ignore[no-any-return, no-untyped-call]


class _OfStates(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, truth: Tensor, heads: FrozenHeads, weights: Tensor) -> Tensor:
        step = max(1, _LOGITS // len(heads.student))
        slope = torch.empty_like(states) if ctx.needs_input_grad[0] else None
        total, whole = states.new_zeros(()), weights.sum()
        for start in range(0, len(states), step):
            part = slice(start, start + step)
            wanted, given = (
                F.log_softmax(F.linear(of[part].to(head.dtype), head).float(), dim=-1)
                for of, head in ((truth, heads.teacher), (states, heads.student))
            )
            likely = wanted.exp()
            total += (weights[part] * (likely * wanted.sub_(given)).sum(-1)).sum()
            if slope is not None:  # of KL by the student's logits: its probabilities minus the teacher's
                off = given.exp_().sub_(likely).mul_((weights[part] / whole)[:, None])
                slope[part] = off.to(heads.student.dtype) @ heads.student
        ctx.save_for_backward(slope)
        return total / whole

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (slope,) = ctx.saved_tensors
        return None if slope is None else slope * gradients[0], None, None, None
