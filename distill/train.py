"""Distillation: a student's tensors are moved until it predicts what its teacher predicts, and the run can be killed at any step.

AdamW (Loshchilov 2019) on the divergence of next-token predictions; the learning rate warms up and falls along a cosine; gradients are
clipped. Every so many steps the student is measured on text kept apart and its state written. A run that finds a state goes on
from it, and ends with the same weights as one that was never stopped (same machine, versions and threads).
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from r1q.core.errors import InputError
from r1q.core.safetensors_file import SafetensorsFile, write_safetensors
from r1q.distill.group import ALONE, Group, Loss
from r1q.distill.text import Text

STATE, BEST = "state.safetensors", "best.safetensors"
_BETAS, _CLIP, _LAST_LR = (0.9, 0.95), 1.0, 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How long and how fast: `rows` windows a step, `lr` at its highest, measured and saved every `every` steps.

    The run ends early after `patience` measurements without a new best.
    """

    steps: int
    rows: int
    lr: float
    every: int = 50
    patience: int = 4

    def lr_at(self, step: int) -> float:
        """Return the learning rate of a step: a linear rise over a twentieth of the run, then half a cosine to a twentieth of `lr`."""
        warm = max(1, self.steps // 20)
        if step < warm:
            return self.lr * (step + 1) / warm
        turn = math.cos(math.pi * (step - warm) / max(1, self.steps - warm))
        return self.lr * (_LAST_LR + (1 - _LAST_LR) * (1 + turn) / 2)


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """Where a run is after `step` steps: mean `loss` since the last measurement and divergence `held_out`, in nats a token.

    `best` is the lowest `held_out` and `best_step` where it was; `first` the one before any step. `seconds` counts all sittings.
    """

    step: int
    loss: float
    held_out: float
    first: float
    best: float
    best_step: int
    seconds: float

    def is_stuck(self, plan: Plan) -> bool:
        """Return whether the run ends here because it no longer improves."""
        return self.step - self.best_step >= plan.patience * plan.every


def distill(
    loss: Loss,
    parameters: Mapping[str, Tensor],
    text: Text,
    plan: Plan,
    folder: Path,
    *,
    held: Loss | None = None,
    group: Group = ALONE,
) -> Iterator[Progress]:
    """Train `parameters`, on which `loss` hangs, in place until the plan's end or until it no longer improves; yield each measurement.

    `folder` holds the state and, under `BEST`, the parameters of the best measurement. `held` is what is measured on text kept apart,
    None: `loss`. Every process of `group` ends with the same parameters; the first one writes. Raises `InputError` where the loss
    is not a number.
    """
    held = held or loss
    for tensor in parameters.values():
        tensor.requires_grad_()
    optimizer = torch.optim.AdamW(parameters.values(), lr=plan.lr, betas=_BETAS, weight_decay=0.0)
    learn = group.averaged(parameters, loss)
    now = _resume(folder, parameters, optimizer)
    if now is None:
        held_out = measure(held, text, group)
        now = Progress(step=0, loss=0, held_out=held_out, first=held_out, best=held_out, best_step=0, seconds=0)
        if group.is_first:
            _save_best(folder, parameters)
    yield now
    while now.step < plan.steps and not now.is_stuck(plan):
        began, losses = time.monotonic(), []
        stop = min(now.step + plan.every, plan.steps)
        for step in range(now.step, stop):
            losses.append(_step(learn, text.batch(step, plan.rows), optimizer, plan.lr_at(step), group))
        now = _measured(now, stop, losses, measure(held, text, group), time.monotonic() - began)
        if group.is_first:
            if now.best_step == now.step:
                _save_best(folder, parameters)
            _save(folder, parameters, optimizer, now)
        yield now


def measure(loss: Loss, text: Text, group: Group = ALONE) -> float:
    """Return the loss on the text that is kept apart, in nats a token; each process of `group` takes some of it."""
    total = count = 0.0
    with torch.no_grad():
        for tokens, weights in text.validation()[group.rank :: group.size]:
            total += float(loss(tokens, weights)) * float(weights.sum())
            count += float(weights.sum())
    total, count = group.total([total, count])
    return total / count


def load_best(folder: Path, parameters: Mapping[str, Tensor]) -> None:
    """Put the numbers of the best measurement into `parameters`. Raises `InputError` for a damaged file."""
    with SafetensorsFile.open(folder / BEST) as file, torch.no_grad():
        for name, tensor in parameters.items():
            tensor.copy_(torch.from_numpy(file.read(name)))


def _step(loss: Loss, batch: tuple[Tensor, Tensor], optimizer: torch.optim.Optimizer, lr: float, group: Group) -> float:
    """Take one step and return the loss before it. The gradient is that of the whole batch, whoever computes which rows."""
    tokens, weights = (group.share(part) for part in batch)
    found = loss(tokens, weights) * (weights.sum() / batch[1].sum())
    (value,) = group.total([found.item()])
    found = found * group.size  # gradients are averaged over the group, and this is to be their sum
    if not math.isfinite(value):
        raise InputError("the divergence from the teacher is not a number; take a lower --lr and another folder")
    torch.autograd.backward(found)
    for settings in optimizer.param_groups:
        torch.nn.utils.clip_grad_norm_(settings["params"], _CLIP)
        settings["lr"] = lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return value


def _measured(before: Progress, step: int, losses: list[float], held_out: float, seconds: float) -> Progress:
    better = held_out < before.best
    return Progress(
        step=step,
        loss=math.fsum(losses) / len(losses),
        held_out=held_out,
        first=before.first,
        best=held_out if better else before.best,
        best_step=step if better else before.best_step,
        seconds=before.seconds + seconds,
    )


def _save_best(folder: Path, parameters: Mapping[str, Tensor]) -> None:
    entries = [(name, "F32", tuple(tensor.shape)) for name, tensor in parameters.items()]
    write_safetensors(folder / BEST, entries, (tensor.detach().numpy() for tensor in parameters.values()))


def _save(folder: Path, parameters: Mapping[str, Tensor], optimizer: torch.optim.Optimizer, now: Progress) -> None:
    """Write everything the next step hangs on."""
    parts = {
        f"{part}/{name}": tensor
        for name, parameter in parameters.items()
        for part, tensor in (
            ("weight", parameter.detach()),
            ("first", optimizer.state[parameter]["exp_avg"]),
            ("second", optimizer.state[parameter]["exp_avg_sq"]),
        )
    }
    entries = [(name, "F32", tuple(tensor.shape)) for name, tensor in parts.items()]
    facts = {name: getattr(now, name) for name in Progress.__dataclass_fields__}
    metadata = {"progress": json.dumps(facts)}
    write_safetensors(folder / STATE, entries, (tensor.numpy() for tensor in parts.values()), metadata=metadata)


def _resume(folder: Path, parameters: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> Progress | None:
    """Take up the state in `folder`, if there is one, and return where it was."""
    if not (folder / STATE).is_file():
        return None
    with SafetensorsFile.open(folder / STATE) as file:
        try:
            now = Progress(**json.loads(file.metadata["progress"]))
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{folder / STATE} is damaged ({error}); delete it to begin anew") from error
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(torch.from_numpy(file.read(f"weight/{name}")))
                optimizer.state[parameter] = {
                    "step": torch.tensor(float(now.step)),
                    "exp_avg": torch.from_numpy(file.read(f"first/{name}")),
                    "exp_avg_sq": torch.from_numpy(file.read(f"second/{name}")),
                }
    return now
