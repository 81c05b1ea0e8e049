"""The Kullback–Leibler divergence of a student's next tokens from its teacher's, over the whole vocabulary, some positions at a time.

KL = Σ p_teacher · (ln p_teacher − ln p_student), in nats a token (Hinton 2015, at temperature 1). Nothing is cut to the likeliest
tokens (`top.py` does that): the teacher's logits are made again at every step, and no more than `_LOGITS` of them exist at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from r1q.distill.network import Network

_LOGITS = 1 << 24  # 64 MB in float32; those of the student are made a second time on the way back where there are more


def divergence_loss(student: Network, teacher: Network) -> Callable[[Tensor, Tensor], Tensor]:
    """Return `divergence` of these two as a function of tokens and weights.

    The teacher's matrices say in which dtype this machine multiplies fastest.
    """
    dtype = teacher.head.dtype

    def loss(tokens: Tensor, weights: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            return divergence(student, teacher, tokens, weights)

    return loss


def divergence(student: Network, teacher: Network, tokens: Tensor, weights: Tensor) -> Tensor:
    """Return the mean divergence in nats a token, over all positions of `tokens` [windows, length] by `weights` of the same shape.

    Differentiable in the student's tensors alone.
    """
    with torch.no_grad():
        truth = teacher.hidden(tokens).flatten(0, 1)
        teaching = teacher.head

    def summed(states: Tensor, head: Tensor, weights: Tensor, truth: Tensor) -> Tensor:
        return _summed(states, head, weights, truth, teaching)

    return mean_over_positions(student, tokens, weights, summed, [truth])


def mean_over_positions(
    student: Network, tokens: Tensor, weights: Tensor, summed: Callable[..., Tensor], truth: Sequence[Tensor]
) -> Tensor:
    """Return Σ summed / Σ weights over all positions, so many at a time that few logits exist at once.

    `summed` is called with the student's states [n, hidden], its head, the weights [n], and the same n rows of each tensor of `truth`.
    """
    states, flat = student.hidden(tokens).flatten(0, 1), weights.flatten()
    step = max(1, _LOGITS // student.config.vocab_size)
    total = states.new_zeros(())
    for start in range(0, len(flat), step):
        part = slice(start, start + step)
        given = (states[part], student.head, flat[part], *(each[part] for each in truth))
        if len(flat) > step and torch.is_grad_enabled():
            total = total + checkpoint(summed, *given, use_reentrant=False)
        else:
            total = total + summed(*given)
    return total / flat.sum()


def _summed(states: Tensor, head: Tensor, weights: Tensor, truth: Tensor, teaching: Tensor) -> Tensor:
    """Return Σ weight · KL over positions: states [n, hidden] against truth [n, teacher's hidden]."""
    with torch.no_grad():
        wanted = F.log_softmax(F.linear(truth.to(teaching.dtype), teaching).float(), dim=-1)
    given = F.log_softmax(F.linear(states.to(head.dtype), head).float(), dim=-1)
    return (weights * (wanted.exp() * (wanted - given)).sum(-1)).sum()
