"""Linear layers and root-mean-square norms on named weights: what every kind of block is made of.

`weights` maps `kind.part` (`attn_q.weight`, `ffn_down.bias`, …) to tensors. A linear layer is multiplied in its weight's dtype.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

Weights = Mapping[str, Tensor]


def linear(weights: Weights, kind: str, inputs: Tensor, *, bias: bool = True) -> Tensor:
    """Return inputs · weightᵀ + bias (unless `bias` says no) of the tensors named `kind`, in the dtype of the inputs."""
    weight, added = weights[f"{kind}.weight"], weights.get(f"{kind}.bias") if bias else None
    if weight.dtype == inputs.dtype:
        return F.linear(inputs, weight, added)
    product = F.linear(inputs.to(weight.dtype), weight).to(inputs.dtype)
    return product if added is None else product + added


def rms_norm(hidden: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Return `hidden` divided by its root mean square over the last axis, times `weight` (Zhang 2019)."""
    return weight * (hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + epsilon))
