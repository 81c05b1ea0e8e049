"""What a teacher said, kept: never more than the whole divergence, the same from the disk, bounded, and mended where it is damaged."""

from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from r1q.distill.divergence import divergence
from r1q.distill.network import Network, load_network
from r1q.distill.top import Shelf, top_divergence, top_of
from r1q.models.forward import logits
from r1q.models.source import ModelSource

MakeModel = Callable[..., Path]
TOKENS = torch.from_numpy(np.random.default_rng(1).integers(0, 200, (3, 12)))
WEIGHTS = torch.from_numpy(np.random.default_rng(2).random((3, 12)).astype(np.float32))


@pytest.fixture
def sources(make_model: MakeModel) -> tuple[ModelSource, ModelSource]:
    """Return a teacher and a smaller student that knows nothing of it."""
    student = make_model("llama", num_layers=1, intermediate_size=64, seed=2)
    return ModelSource.open(make_model("llama", seed=1)), ModelSource.open(student)


@pytest.fixture
def pair(sources: tuple[ModelSource, ModelSource]) -> tuple[Network, Network]:
    """Return both as networks."""
    return load_network(sources[0]), load_network(sources[1])


def _loss(pair: tuple[Network, Network], count: int) -> Tensor:
    said = [top_of(pair[0], window, count) for window in TOKENS]
    whole = type(said[0])(
        **{name: torch.stack([getattr(one, name) for one in said]) for name in ("ids", "logs", "rest")}
    )
    return top_divergence(pair[1], whole, TOKENS, WEIGHTS)


def test_the_terms_are_those_of_the_likeliest_words_and_one_of_the_rest(
    sources: tuple[ModelSource, ModelSource], pair: tuple[Network, Network]
) -> None:
    truth, given = (np.concatenate(list(logits(source, TOKENS.numpy()))).astype(np.float64) for source in sources)
    p, q = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in (truth, given))
    slow = []
    for wanted, found in zip(p, q, strict=True):
        best = np.argsort(-wanted)[:5]
        p5, q5 = np.append(wanted[best], 1 - wanted[best].sum()), np.append(found[best], 1 - found[best].sum())
        slow.append((p5 * np.log(p5 / q5)).sum())
    assert float(_loss(pair, 5)) == pytest.approx(np.average(slow, weights=WEIGHTS.flatten()), rel=1e-4)


def test_more_words_come_nearer_to_the_whole_from_below(pair: tuple[Network, Network]) -> None:
    whole = float(divergence(pair[1], pair[0], TOKENS, WEIGHTS))
    losses = [float(_loss(pair, count)) for count in (1, 4, 16, 64, 319)]
    assert losses == sorted(losses)
    assert losses[0] < 0.9 * whole
    assert losses[-1] == pytest.approx(whole, rel=1e-4)  # the rest is one word: nothing was merged


def test_what_was_kept_gives_the_same_loss_to_the_bit(pair: tuple[Network, Network], tmp_path: Path) -> None:
    path = tmp_path / "teacher.bin"

    def loss(limit: int = 1 << 30) -> tuple[float, int]:
        shelf = Shelf(path, pair[0], 6, 12, limit)
        found = float(shelf.loss(pair[1], TOKENS, WEIGHTS))
        shelf.close()
        return found, shelf.taken

    first, size = loss()
    assert (path.stat().st_size, size) == (3 * (64 + 12 * 52), 3 * (64 + 12 * 52))
    pair[0].tensors["model.norm.weight"].zero_()  # a teacher that would say something else is not asked
    assert loss() == (first, size)


def test_a_short_or_damaged_record_is_made_again(pair: tuple[Network, Network], tmp_path: Path) -> None:
    path, record = tmp_path / "teacher.bin", 64 + 12 * 52

    def loss(limit: int = 1 << 30) -> float:
        with closing(Shelf(path, pair[0], 6, 12, limit)) as shelf:
            return float(shelf.loss(pair[1], TOKENS, WEIGHTS))

    first = loss()
    data = bytearray(path.read_bytes()[: -record // 2])
    data[100] ^= 1
    path.write_bytes(data)
    assert loss() == first
    assert path.stat().st_size == 4 * record  # one is whole, one is dead, two were made again
    assert loss() == first
    assert path.stat().st_size == 4 * record


def test_no_more_is_kept_than_is_allowed(pair: tuple[Network, Network], tmp_path: Path) -> None:
    sizes, losses = [], set()
    for limit in (0, 1500, 1 << 30):
        with closing(Shelf(tmp_path / str(limit), pair[0], 6, 12, limit)) as shelf:
            losses |= {float(shelf.loss(pair[1], TOKENS, WEIGHTS)) for _ in range(2)}
            sizes.append(shelf.taken)
    assert sizes == [0, 2 * 688, 3 * 688]
    assert len(losses) == 1


def test_a_gradient_reaches_the_student_alone(pair: tuple[Network, Network], tmp_path: Path) -> None:
    student = pair[1]
    for tensor in student.tensors.values():
        tensor.requires_grad_()
    torch.autograd.backward(_loss(pair, 300))
    top = [tensor.grad.clone() for tensor in student.tensors.values() if tensor.grad is not None]
    for tensor in student.tensors.values():
        tensor.grad = None
    torch.autograd.backward(divergence(student, pair[0], TOKENS, WEIGHTS))
    whole = [tensor.grad for tensor in student.tensors.values() if tensor.grad is not None]
    assert len(top) == len(student.tensors)
    for ours, theirs in zip(top, whole, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0.02 * float(theirs.abs().max()))
