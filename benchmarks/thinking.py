r"""Thinking, in the child: an artifact answers every problem several times, at the settings that DeepSeek-R1's makers recommend.

Temperature 0.6, top-p 0.95, no system message, the model's own chat template with `<think>\n` written for it. A
problem's luck at a seed is the same for every artifact, so that what differs between two of them is not chance.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from r1q.benchmarks.machine import resident, versions
from r1q.benchmarks.speaking import Answer, luck, speak
from r1q.benchmarks.tasks import Task, judge
from r1q.calibration.conversations import CLOSE
from r1q.calibration.traces import prompt_ids
from r1q.core.errors import InputError, MissingError, UsageError
from r1q.models.config import ModelConfig
from r1q.models.tokenizer import Tokenizer
from r1q.runtimes.base import Options, Runtime, Session
from r1q.runtimes.table import load_runtime

# Words with which a model turns on itself. Where quantization hurts, they multiply long before answers are wrong.
WAITS = re.compile(r"\b(?:[Ww]ait|Hold on|Hmm|But|Alternatively|Actually)\b|等等|等一下|等下|不对|或者|不过")
GRAM, STRETCH = 16, 128  # tokens


@dataclass(slots=True, kw_only=True)
class _Pair(Answer):
    """An answer to problem number `problem` at seed number `seed`."""

    problem: int
    seed: int


def think(job: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Let one artifact answer.

    The job: path, runtime, options, tokenizer (folder), tasks, seeds, temperature, top_p, max_tokens, sequences, context (the longest
    allowed). Yields `opened` once, then an `answer` (problem, seed, right, said, tokens, how it ended, seconds) as each ends.
    """
    tokenizer = Tokenizer.open(Path(job["tokenizer"]))
    tasks = [Task(**task) for task in job["tasks"]]
    asked = [prompt_ids(tokenizer, task.prompt) for task in tasks]
    longest = max(len(ids) for ids in asked)
    if longest >= job["context"]:
        raise InputError(
            f"problem {1 + max(range(len(asked)), key=lambda i: len(asked[i]))} has {longest} tokens, "
            f"and the context is {job['context']}"
        )
    context = min(longest + job["max_tokens"], job["context"])
    pairs = [
        _Pair(
            problem=problem,
            seed=seed,
            asked=ids,
            key=luck(tasks[problem].prompt, seed),
            max_tokens=job["max_tokens"],
            temperature=job["temperature"],
            top_p=job["top_p"],
        )
        for problem, ids in enumerate(asked)
        for seed in range(job["seeds"])
    ]
    runtime = load_runtime(job["runtime"])
    with _open(runtime, job, context, min(job["sequences"], len(pairs))) as session:
        if session.vocab < tokenizer.vocab_size:
            raise InputError(
                f"the artifact has {session.vocab} tokens and the tokenizer {tokenizer.vocab_size}: it is another model's; "
                "give the right one with --tokenizer"
            )
        yield {"opened": _facts(session, runtime)}
        for pair in speak(session, pairs, vocab=tokenizer.vocab_size, ends=end_ids(tokenizer)):
            yield {"answer": _record(tokenizer, tasks[pair.problem], pair)}


def loops(ids: Sequence[int]) -> bool:
    """Return whether an answer goes round in circles: in some 128 tokens on end, half of the 16-grams had been said twice before.

    A sentence said again to check it is said once before, and a long row of dashes is shorter than that; a circle wears out in its
    third round, whatever its length, and also where words vary in between.
    """
    grams = [tuple(ids[i : i + GRAM]) for i in range(len(ids) - GRAM + 1)]
    before: Counter[tuple[int, ...]] = Counter()
    worn = []
    for gram in grams:
        worn.append(before[gram] >= 2)
        before[gram] += 1
    width = STRETCH - GRAM + 1
    sums = np.cumsum([0, *worn])
    return len(grams) >= width and bool((2 * (sums[width:] - sums[:-width]) >= width).any())


def _record(tokenizer: Tokenizer, task: Task, pair: _Pair) -> dict[str, Any]:
    text = tokenizer.decode(pair.said).rstrip("\ufffd")  # it may have been cut inside a character
    thoughts, closed, content = text.partition(CLOSE)
    thinking = _thinking(tokenizer, pair.said) if closed else len(pair.said)
    # Who ends without closing the thoughts has answered in them; who was cut off in them has not answered.
    said, right = judge(task, content if closed else text) if closed or pair.finished else ("", False)
    return {
        "problem": pair.problem,
        "seed": pair.seed,
        "right": right,
        "said": said,
        "thinking": thinking,
        "answer": len(pair.said) - thinking,
        "truncated": not pair.finished,
        "loop": loops(pair.said),
        "waits": len(WAITS.findall(thoughts)),
        "seconds": float(f"{pair.seconds:.6g}"),
    }


def _thinking(tokenizer: Tokenizer, said: Sequence[int]) -> int:
    """Return how many tokens stand before the closing tag, which is somewhere in `said`; the tag counts to the answer."""
    close = tokenizer.token_id(CLOSE)
    if close is not None and close in said:
        return list(said).index(close)
    low, high = 0, len(said)  # the tag is spelled: the most tokens whose text does not have it whole
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (low, middle - 1) if CLOSE in tokenizer.decode(said[:middle]) else (middle, high)
    return low


def _open(runtime: Runtime, job: Mapping[str, Any], context: int, sequences: int) -> Session:
    options = {**job["options"], "context": context}
    try:
        return runtime.open(Path(job["path"]), Options(**options, sequences=sequences))
    except (UsageError, MissingError):
        if sequences == 1:
            raise
        # A runtime that knows one sequence only refuses more; what else is wrong, it says again.
        return runtime.open(Path(job["path"]), Options(**options, sequences=1))


def end_ids(tokenizer: Tokenizer) -> set[int]:
    """Return the ids that end a turn: the tokenizer's own end of text, and those of the config beside it."""
    own = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    has_config = (tokenizer.folder / "config.json").is_file()
    return {*own, *(ModelConfig.read(tokenizer.folder).eos_ids if has_config else ())}


def _facts(session: Session, runtime: Runtime) -> dict[str, Any]:
    return {
        "sequences": session.sequences,
        "context": session.context,
        "device": session.device,
        "threads": session.threads,
        "load_seconds": session.load_seconds,
        "memory": resident()[0],
        "versions": versions(runtime.versions()),
    }
