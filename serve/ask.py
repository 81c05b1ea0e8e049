"""One question, without a server: the same engine, prompt and settings as a client would get."""

from __future__ import annotations

import queue
import time
from collections.abc import Iterator, Sequence

from r1q.core.errors import MissingError, UsageError
from r1q.serve.engine import Engine
from r1q.serve.jobs import Event, Job, Piece, Refused
from r1q.serve.meters import Meters
from r1q.serve.run import Opened
from r1q.serve.service import Service
from r1q.serve.wire import ChatRequest


def ask(opened: Opened, question: str, *, pace: bool = False) -> Iterator[Piece]:
    """Yield the answer to `question` piece by piece, thought first, and close the session. With `pace` threads become fewer where
    that is faster.

    Raises `UsageError` for a question that cannot be answered (too long, no chat template), `MissingError` where the model fails.
    """
    events: queue.SimpleQueue[Event] = queue.SimpleQueue()

    def post(told: Sequence[tuple[Job, Event]]) -> None:
        for _, event in told:
            events.put(event)

    meters = Meters(opened.name)
    engine = Engine(opened.session, opened.vocabulary, queue=1, post=post, meters=meters, pace=pace)
    service = Service(name=opened.name, engine=engine, meters=meters, created=int(time.time()))
    engine.start()
    try:
        asked = ChatRequest.model_validate({"messages": [{"role": "user", "content": question}]})
        engine.submit(service.chat_job(asked, events.put))
        while True:
            event = events.get()
            if isinstance(event, Refused):
                raise event
            yield event
            if event.ending is not None:
                return
    except Refused as refused:
        raise (UsageError if refused.status < 500 else MissingError)(refused.message) from refused
    finally:
        engine.close()
