"""What a run shows while it works: a bar with block, time left and memory; in a pipe a line now and then."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import psutil
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from r1q.core.tensors import TensorSpec
from r1q.plan.plan import Plan
from r1q.plan.render import duration, show_exported
from r1q.plan.walk import Exported
from r1q.quantize.run import Event, block_files

LINE_SECONDS = 20.0
# What a stage that is named after its last kind of layer has coded.
_STAGES: Mapping[str, tuple[str, ...]] = {
    "attn_v": ("attn_q", "attn_k", "attn_v"),
    "attn_kv_a_mqa": ("attn_q", "attn_q_a", "attn_kv_a_mqa"),
    "ffn_up": ("ffn_gate", "ffn_up"),
    "ffn_up_shexp": ("ffn_gate_shexp", "ffn_up_shexp"),
    "ffn_up_exps": ("ffn_gate_exps", "ffn_up_exps"),
}
_ROUNDED = 0.02  # the time of a weight outside of the blocks, as a share of one that is calibrated


class Work:
    """How much of a run is done and how long the rest will take, from its events. Work is counted in weights."""

    def __init__(self, plan: Plan, *, calibrated: bool) -> None:
        self.blocks = 1 + max((t.spec.layer for t in plan.tensors if t.spec.layer is not None), default=-1)
        self.block, self.kept, self.where = 0, 0, ""
        self._left = {
            _place(t.spec): t.spec.size * (_ROUNDED if calibrated and t.spec.layer is None else 1.0)
            for t in plan.tensors
        }
        self._names = {t.spec.name: _place(t.spec) for t in plan.tensors}
        self._files = {file: [_place(t.spec) for t in tensors] for file, tensors in block_files(plan.tensors).items()}
        self._all = sum(self._left.values())
        self._kept, self._began = 0.0, time.monotonic()

    @property
    def share(self) -> float:
        """The part that is done, from 0 to 1."""
        return 1 - sum(self._left.values()) / self._all

    @property
    def seconds_left(self) -> float | None:
        """How long the rest takes if it goes on like this; None while nothing was done here."""
        here = self.share - self._kept
        return (time.monotonic() - self._began) * (1 - self.share) / here if here > 0.001 else None

    def take(self, event: Event) -> None:
        """Count what `event` says is done."""
        if event.what == "kept":
            self.kept += 1
            self._finish(self._files.get(event.name, ()))
            self._kept, self._began = self.share, time.monotonic()
        elif event.what == "stage":
            _, layer, key = event.name.split(".", 2)
            kind, dot, expert = key.partition(".")
            self.where = event.name
            self._finish(f"blk.{layer}.{one}{dot}{expert}.weight" for one in _STAGES.get(kind, (kind,)))
        elif event.what == "tensor":
            self.where = self._names.get(event.name, event.name)
            self._finish((self.where,))
        elif event.what == "healing":
            self.where = f"healing, {event.name}"
        elif event.what == "done":
            self.where = "writing files"
        if event.what in ("kept", "file"):
            self.block += event.name.startswith("block-")

    def told(self) -> str:
        """Return where the run is, in a line: block, share, time left, memory."""
        left = self.seconds_left
        rest = "" if left is None else f", about {duration(left)} left"
        memory = psutil.Process().memory_info().rss / 1e6
        return f"block {self.block} of {self.blocks}, {100 * self.share:.0f} %{rest}, {memory:.0f} MB of memory"

    def _finish(self, names: Iterable[str]) -> None:
        for name in names:
            self._left.pop(name, None)


def _place(spec: TensorSpec) -> str:
    """Return a tensor's name in a GGUF file, an expert's with its number."""
    return spec.gguf_name if spec.layer is None else f"blk.{spec.layer}.{spec.key}"


def show_run(console: Console, events: Iterator[Event | Exported], plan: Plan, *, calibrated: bool) -> list[Path]:
    """Draw the progress of a run and return the paths of what it made."""
    work, results = Work(plan, calibrated=calibrated), list[Exported]()
    spoken = time.monotonic()
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[told]}"))
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("quantize", total=1.0, told="")
        for event in events:
            if isinstance(event, Exported):
                results.append(event)
                continue
            work.take(event)
            if event.what in ("note", "healed"):
                console.print(f"  {'note: ' * (event.what == 'note')}{event.name}", highlight=False)
            # Events are seconds apart in long runs: each is drawn, instead of whatever stands when a timer ticks.
            progress.update(
                task, completed=work.share, description=work.where or "quantize", told=work.told(), refresh=True
            )
            if event.what == "healing" and not console.is_terminal:
                console.print(f"  {work.where}", highlight=False)
            if not console.is_terminal and event.what == "file" and time.monotonic() - spoken > LINE_SECONDS:
                console.print(f"  {work.told()}", highlight=False)
                spoken = time.monotonic()
    if work.kept:
        console.print(f"resumed: {work.kept} block files were finished before", highlight=False)
    for result in results:
        show_exported(console, result)
    return [result.path for result in results]
