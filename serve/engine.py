"""The engine: one thread that owns the session and answers many requests at once.

A turn reads some of the waiting prompts (a slice, so that nobody who is already being answered waits long) and then takes one step
for all answers together. Jobs come in by `submit` and their events go out by `post`, from and to other threads; nothing else of the
session is touched by anyone but this thread, save `encode`, which reads the vocabulary alone.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from r1q.runtimes.base import Floats, Session
from r1q.serve.jobs import Ending, Event, Job, Piece, Refused, join
from r1q.serve.meters import Meters
from r1q.serve.pace import Adjustable, Pace
from r1q.serve.sampling import draw_tokens, log_probability
from r1q.serve.speech import Said
from r1q.serve.vocabulary import Vocabulary

SLICE = 512  # tokens of prompts read in a turn while nobody waits for a step: llama.cpp's micro-batch
SMALLEST_SLICE = 32
WORTH_KEEPING = 0.25  # of a prompt: less than that in common with an earlier one counts for nothing
STALL = 0.2  # seconds that reading prompts may hold up answers in a turn
Post = Callable[[Sequence[tuple[Job, Event]]], None]
logger = logging.getLogger("r1q.serve")


class Engine:
    """Answers jobs with `session`, at most `session.sequences` at once and `queue` more waiting.

    `post` is handed the events of a turn, on the engine's thread; it must pass each to its job's `deliver`. With `pace` the session's
    threads become fewer where that is faster.
    """

    def __init__(
        self,
        session: Session,
        vocabulary: Vocabulary,
        *,
        queue: int,
        post: Post,
        meters: Meters | None = None,
        pace: bool = False,
    ) -> None:
        self.session, self.vocabulary = session, vocabulary
        self.meters = meters or Meters("model")
        self._queue, self._post = queue, post
        self._waiting: deque[Job] = deque()
        self._live: list[Job] = []
        self._held: list[list[int]] = [[] for _ in range(session.sequences)]  # tokens in each sequence
        self._free = list(range(session.sequences))  # the longest unused first
        self._pace = Pace(session.threads) if pace and isinstance(session, Adjustable) else None
        self._rate = 0.0  # tokens of prompts read in a second, lately
        self._mean = 1.0  # seconds a request takes, lately
        self._lock = threading.Condition()
        self._closing: Refused | None = None
        self._given_up: Refused | None = None
        self._ended = False
        self._thread = threading.Thread(target=self._run, name="r1q-engine", daemon=True)

    def start(self) -> None:
        """Begin to answer."""
        self._thread.start()

    @property
    def healthy(self) -> bool:
        """Whether new jobs are taken."""
        return self._thread.is_alive() and self._closing is None

    @property
    def busy(self) -> int:
        """How many jobs are live or waiting."""
        return len(self._live) + len(self._waiting)

    def submit(self, job: Job) -> None:
        """Queue a job. Raises `Refused`: 429 where the queue is full, 503 where the engine is stopping."""
        with self._lock:
            if self._closing is not None or not self._thread.is_alive():
                raise self._closing or Refused(503, "server_error", "the model is not running", code="unavailable")
            # A free sequence takes its job within a turn, so it counts as room.
            if len(self._waiting) >= self._queue + max(0, self.session.sequences - len(self._live)):
                raise self._full()
            job.arrived = time.monotonic()
            self._waiting.append(job)
            self.meters.waiting.set(len(self._waiting))
            self._lock.notify()

    def cancel(self, job: Job) -> None:
        """Forget a job whose client left; nothing more is delivered for it. One that has ended is left alone."""
        with self._lock:
            job.cancelled = True
            self._lock.notify()

    def drain(self) -> None:
        """Take no more jobs; those at hand go on."""
        with self._lock:
            self._closing = Refused(503, "server_error", "the server is stopping", code="stopping", retry=10)

    def give_up(self) -> None:
        """Tell every job at hand that the server is stopping, and end it."""
        self.drain()
        with self._lock:
            self._given_up = self._closing
            self._lock.notify()

    def close(self) -> None:
        """Give up what is at hand, end the thread and close the session."""
        self.give_up()
        with self._lock:
            self._ended = True
            self._lock.notify()
        if self._thread.is_alive():
            self._thread.join()
        self.session.close()

    def _full(self) -> Refused:
        seconds = max(1, min(60, round(self._mean * (len(self._waiting) + 1) / self.session.sequences)))
        message = f"{len(self._waiting)} requests are waiting, which is this server's limit; try again later"
        return Refused(429, "rate_limit_error", message, code="queue_full", retry=seconds)

    def _run(self) -> None:
        while True:
            with self._lock:
                while not (self._live or self._waiting or self._ended):
                    self._lock.wait()
                if self._ended and not (self._live or self._waiting):
                    return
            self._turn()

    def _turn(self) -> None:
        events: list[tuple[Job, Event]] = []
        self._admit(events)
        try:
            self._read_prompts(events)
            self._step(events)
        except Exception:  # a runtime may raise anything; the server outlives it
            logger.exception("the model failed; the requests at hand are told so")
            self._fail(events)
        if events:
            self._post(events)
        meters = self.meters
        meters.running.set(len(self._live))
        used = sum(len(self._held[job.sequence]) for job in self._live)
        meters.cache.set(used / (self.session.context * self.session.sequences))

    def _admit(self, events: list[tuple[Job, Event]]) -> None:
        """Drop jobs whose clients left, or all when the server gives up, and give free sequences to the first in the queue."""
        with self._lock:
            leaving = self._given_up
            for job in [job for job in self._live if job.cancelled or leaving]:
                self._release(job, "abort")
                if leaving and not job.cancelled:
                    events.append((job, leaving))
            for job in [job for job in self._waiting if job.cancelled or leaving]:
                self._waiting.remove(job)
                self.meters.ended(job, "abort")
                if leaving and not job.cancelled:
                    events.append((job, leaving))
            while self._waiting and self._free:
                self._begin(self._waiting.popleft())
            self.meters.waiting.set(len(self._waiting))

    def _begin(self, job: Job) -> None:
        """Give a job the free sequence that already holds most of its prompt, else the longest unused one."""
        common = {sequence: _common(self._held[sequence], job.prompt) for sequence in self._free}
        sequence = max(self._free, key=lambda free: common[free])
        if common[sequence] < WORTH_KEEPING * len(job.prompt):
            sequence = self._free[0]  # a greeting in common is no reason to overwrite somebody's conversation
        self._free.remove(sequence)
        # The last token is always read again: its logits are what the first token is drawn from.
        job.cached = job.fed = min(common[sequence], len(job.prompt) - 1)
        self._forget(sequence, job.fed)
        job.sequence, job.began = sequence, time.monotonic()
        self._live.append(job)
        self.meters.queued.observe(job.began - job.arrived)
        self.meters.prompt_tokens.inc(len(job.prompt))
        self.meters.cache_queries.inc(len(job.prompt))
        self.meters.cache_hits.inc(job.cached)

    def _read_prompts(self, events: list[tuple[Job, Event]]) -> None:
        """Read at most a slice of the prompts that are not read yet, oldest first; those that are done get their first token."""
        reading = [job for job in self._live if not job.prefilled]
        left = self._slice() if len(reading) < len(self._live) else SLICE
        began, read = time.monotonic(), 0
        rows: list[tuple[Job, Floats]] = []
        for job in reading:
            if read >= left:
                break
            part = job.prompt[job.fed : job.fed + left - read]
            with self._paced("prompt", len(part)):
                logits = self.session.prefill(job.sequence, part)
            self._held[job.sequence] += part
            job.fed += len(part)
            read += len(part)
            if job.prefilled:
                rows.append((job, logits))
        if read:
            rate = read / max(time.monotonic() - began, 1e-6)
            self._rate = rate if not self._rate else 0.8 * self._rate + 0.2 * rate
        if rows:
            self._draw([job for job, _ in rows], np.stack([logits for _, logits in rows]), events)

    def _slice(self) -> int:
        return max(SMALLEST_SLICE, min(SLICE, int(self._rate * STALL)))

    def _step(self, events: list[tuple[Job, Event]]) -> None:
        """Feed every answer its latest token and draw the next for all of them."""
        jobs = [job for job in self._live if job.prefilled and job.next >= 0]
        if not jobs:
            return
        with self._paced("step", len(jobs)):
            logits = self.session.step([(job.sequence, job.next) for job in jobs])
        for job in jobs:
            self._held[job.sequence].append(job.next)
        self._draw(jobs, logits, events)

    @contextlib.contextmanager
    def _paced(self, kind: str, tokens: int) -> Iterator[None]:
        """Compute a batch with the threads that batches like it do best with."""
        if self._pace is None:
            yield
            return
        threads = self._pace.threads(kind, tokens)
        if threads != self.session.threads:
            self.session.set_threads(threads)  # type: ignore[attr-defined]  # there is a pace for those alone that can
        began = time.perf_counter()
        yield
        self._pace.note(kind, tokens, time.perf_counter() - began)

    def _draw(self, jobs: list[Job], logits: Floats, events: list[tuple[Job, Event]]) -> None:
        logits = logits if logits.flags.writeable else logits.copy()
        rows = logits[:, : self.vocabulary.size]  # columns beyond are padding, which spells nothing
        kept = [rows[index].copy() if job.top is not None else None for index, job in enumerate(jobs)]
        tokens = draw_tokens(
            rows, [job.sampling for job in jobs], [job.chance for job in jobs], [job.counts for job in jobs]
        )
        now = time.monotonic()
        self.meters.answer_tokens.inc(len(jobs))
        for job, token, row in zip(jobs, tokens.tolist(), kept, strict=True):
            piece = self._say(job, token, row)
            self._clock(job, now)
            if piece.ending is not None:
                self._release(job, piece.ending)
            if not (piece.thought or piece.text or piece.scores or piece.ending):
                continue
            if job.whole:
                # Nobody reads the parts: waking the loop's thread for each would only take the processor from the next step.
                job.kept.append(piece)
                if piece.ending is None:
                    continue
                piece = join(job.kept)
            events.append((job, piece))

    def _say(self, job: Job, token: int, row: Floats | None) -> Piece:
        """Add a drawn token to a job's answer and return what is ready of it."""
        job.next = token
        job.said += 1
        job.thought += job.speech.thinking
        ending: Ending | None = None
        said = Said()
        if token in self.vocabulary.ends and not job.ignore_ends:
            ending = "stop"
        else:
            if job.sampling.penalizes:
                job.counts[token] += 1
            said = job.speech.add(self.vocabulary.spell(token))
            full = len(job.prompt) + job.said >= self.session.context
            ending = "stop" if job.speech.stopped else "length" if job.said >= job.limit or full else None
        scores = () if row is None or job.top is None else (log_probability(row, token, job.top),)
        if ending is None:
            return Piece(thought=said.thought, text=said.text, scores=scores)
        rest = job.speech.finish()
        return Piece(
            thought=said.thought + rest.thought,
            text=said.text + rest.text,
            scores=scores,
            ending=ending,
            usage=job.usage(),
        )

    def _clock(self, job: Job, now: float) -> None:
        if job.said == 1:
            job.first = now
            self.meters.first_token.observe(now - job.arrived)
            self.meters.prefill.observe(now - job.began)
        else:
            self.meters.between.observe(now - job.latest)
        job.latest = now

    def _release(self, job: Job, reason: str) -> None:
        """End a job; its sequence keeps its tokens, for a later prompt that begins with them."""
        self._live.remove(job)
        self._free.append(job.sequence)
        self._mean = 0.9 * self._mean + 0.1 * (time.monotonic() - job.began)
        self.meters.ended(job, reason)

    def _forget(self, sequence: int, start: int) -> None:
        self.session.drop(sequence, start)
        del self._held[sequence][start:]

    def _fail(self, events: list[tuple[Job, Event]]) -> None:
        """Tell every live job that the model failed, and empty every sequence: what they hold is no longer known."""
        told = Refused(500, "server_error", "the model failed on this request; the server's log says why", code="model")
        for job in list(self._live):
            self._release(job, "error")
            events.append((job, told))
        for sequence in range(self.session.sequences):
            try:
                self._forget(sequence, 0)
            except Exception:
                logger.exception("sequence %d cannot be emptied; the server stops", sequence)
                with self._lock:
                    self._given_up = self._closing = told
                    self._ended = True
                return


def _common(held: Sequence[int], prompt: Sequence[int]) -> int:
    """Return how many tokens two sequences have in common at their beginning."""
    count = 0
    for left, right in zip(held, prompt, strict=False):
        if left != right:
            break
        count += 1
    return count
