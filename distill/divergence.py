"""The Kullback–Leibler divergence of a student's next tokens from its teacher's, over the whole vocabulary, some positions at a time.

KL = Σ p_teacher · (ln p_teacher − ln p_student), in nats a token (Hinton 2015, at temperature 1). Nothing is cut to the likeliest
tokens: the teacher's logits are made again at every step, and no more than `_LOGITS` of them exist at once.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from r1q.distill.network import Network

_LOGITS = 1 << 24  # 64 MB in float32; those of the student are made a second time on the way back where there are more


def divergence(student: Network, teacher: Network, tokens: Tensor, weights: Tensor) -> Tensor:
    """Return the mean divergence in nats a token, over all positions of `tokens` [windows, length] by `weights` of the same shape.

    Differentiable in the student's tensors alone.
    """
    with torch.no_grad():
        truth = teacher.hidden(tokens).flatten(0, 1)
        teaching = teacher.head
    states, flat = student.hidden(tokens).flatten(0, 1), weights.flatten()
    step = max(1, _LOGITS // student.config.vocab_size)
    total = states.new_zeros(())
    for start in range(0, len(flat), step):
        part = slice(start, start + step)
        given = (states[part], student.head, truth[part], teaching, flat[part])
        if len(flat) > step and torch.is_grad_enabled():
            total = total + checkpoint(_summed, *given, use_reentrant=False)
        else:
            total = total + _summed(*given)
    return total / flat.sum()


def _summed(states: Tensor, head: Tensor, truth: Tensor, teaching: Tensor, weights: Tensor) -> Tensor:
    """Return Σ weight · KL over positions: states [n, hidden] against truth [n, teacher's hidden]."""
    with torch.no_grad():
        wanted = F.log_softmax(F.linear(truth.to(teaching.dtype), teaching).float(), dim=-1)
    given = F.log_softmax(F.linear(states.to(head.dtype), head).float(), dim=-1)
    return (weights * (wanted.exp() * (wanted - given)).sum(-1)).sum()
