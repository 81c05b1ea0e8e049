"""A dense decoder as one function of its tensors, so that gradients reach them: what trains and what teaches.

The formulas are those of `models/block.py`. Tensors go by Hugging Face's names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from r1q.core.tensors import TensorSpec
from r1q.models.block import run_block
from r1q.models.config import ModelConfig
from r1q.models.forward import TensorReader
from r1q.models.linear import rms_norm
from r1q.models.rope import rotation


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """A model in memory: `tensors` by name, described by `specs`; tensors may be made anew for every step."""

    config: ModelConfig
    specs: tuple[TensorSpec, ...]
    tensors: Mapping[str, Tensor]

    def hidden(self, tokens: Tensor, *, lean: bool = False) -> Tensor:
        """Return what the head reads of `tokens` [windows, length]: [windows, length, hidden_size], float32.

        `lean` keeps for the way back the states between blocks alone, and makes each block's inner ones a second time.
        """
        turn = rotation(self.config, tokens.shape[1])
        states = self.tensors[self._name("token_embd", None)][tokens].float()

        def block(layer: int, states: Tensor) -> Tensor:
            weights = {spec.key: self.tensors[spec.name] for spec in self.specs if spec.layer == layer}
            return run_block(weights, self.config, states, turn).float()

        for layer in range(self.config.num_layers):
            states = checkpoint(block, layer, states, use_reentrant=False) if lean else block(layer, states)
        return rms_norm(states, self.tensors[self._name("output_norm", None)], self.config.rms_norm_eps)

    @property
    def head(self) -> Tensor:
        """The head's weight [vocab_size, hidden_size]."""
        return self.tensors[self._name("token_embd" if self.config.tied else "output", None)]

    def _name(self, kind: str, layer: int | None) -> str:
        return next(spec.name for spec in self.specs if (spec.kind, spec.layer) == (kind, layer))


def load_network(source: TensorReader, *, matrices: torch.dtype = torch.float32) -> Network:
    """Read a dense model whole; its matrices in the dtype `matrices`, in which linear layers then multiply, vectors in float32."""
    tensors = {}
    for spec in source.tensors:
        values = torch.from_numpy(np.array(source.read_rows(spec.name, 0, spec.rows), dtype=np.float32))
        tensors[spec.name] = values.reshape(spec.shape).to(matrices if len(spec.shape) > 1 else torch.float32)
    return Network(config=source.config, specs=tuple(source.tensors), tensors=tensors)


def product_dtype() -> torch.dtype:
    """Return bfloat16 where this processor multiplies it (AVX-512 BF16, AMX), else float32."""
    supported = torch._C._has_mkldnn and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return torch.bfloat16 if supported else torch.float32


def memory_need(teacher: int, trained: int, config: ModelConfig, positions: int) -> int:
    """Return about how many bytes training takes.

    `teacher` and `trained` are numbers of weights, the latter in float32 with a gradient, two moments and a copy in 16 bits.
    `positions` are the tokens of a step, of whose way through `config` all inner states are kept.
    """
    kept = 4 * positions * config.num_layers * (12 * config.hidden_size + 5 * config.intermediate_size)
    width = torch.finfo(product_dtype()).bits // 8
    return width * teacher + 18 * trained + kept + (1 << 29)
