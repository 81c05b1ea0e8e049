"""The weights of one block for the forward pass: read at once, but for routed experts, which are read when they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from torch import Tensor

from r1q.core.tensors import TensorSpec

Read = Callable[[TensorSpec], Tensor]


class BlockWeights(Mapping[str, Tensor]):
    """Weights of a block by `TensorSpec.key`. `read` is called for each routed expert's matrix whenever it is looked up."""

    def __init__(self, specs: Mapping[str, TensorSpec], read: Read) -> None:
        self._specs, self._read = specs, read
        self._held = {key: read(spec) for key, spec in specs.items() if spec.expert is None}

    def __getitem__(self, key: str) -> Tensor:
        held = self._held.get(key)
        return self._read(self._specs[key]) if held is None else held

    def __contains__(self, key: object) -> bool:
        return key in self._specs  # Mapping's own way would read an expert

    def __iter__(self) -> Iterator[str]:
        return iter(self._specs)

    def __len__(self) -> int:
        return len(self._specs)

    def get(self, key: str, default: object = None) -> Tensor | None:  # type: ignore[override]  # no other default is asked for
        """Return the weight, or None where the block has none of that name."""
        return self[key] if key in self._specs else None
