"""The HTTP application: OpenAI's routes over a service, /health and /metrics, and every error in OpenAI's form."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from r1q import __version__
from r1q.serve import replies
from r1q.serve.jobs import Event, Job, Piece, Refused
from r1q.serve.replies import ChatForm, Form, TextForm
from r1q.serve.schema import ChatCompletion, ErrorBody, Health, ModelCard, ModelList, TextCompletion
from r1q.serve.service import Service
from r1q.serve.wire import ChatRequest, CompletionRequest

_ERRORS: dict[int | str, dict[str, Any]] = {
    code: {"model": ErrorBody, "description": what}
    for code, what in {
        400: "The request cannot be answered as it is.",
        401: "The API key is missing or wrong.",
        404: "There is no such model or page.",
        413: "The request is too large.",
        429: "The queue is full; Retry-After says when to come again.",
        500: "The model failed.",
        503: "The server is stopping.",
    }.items()
}
# What an event of a stream is to OpenAPI: its `data` is a chunk as JSON, or [DONE].
_EVENT = {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}
_STREAM: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/event-stream": {"schema": _EVENT}}, "description": "The answer."}
}


def make_app(service: Service) -> FastAPI:
    """Return the application; the engine's events must come through `to_loop` on the loop that runs it."""
    # The interactive pages of FastAPI load scripts from elsewhere; /openapi.json is all a client needs.
    app = FastAPI(title="r1q serve", version=__version__, docs_url=None, redoc_url=None)
    _add_models(app, service)
    _add_answers(app, service)
    _add_state(app, service)
    _add_errors(app, service)
    return app


def to_loop(loop: asyncio.AbstractEventLoop) -> Callable[[Sequence[tuple[Job, Event]]], None]:
    """Return what an engine posts to: it hands a turn's events to their jobs on `loop`, in one call."""

    def deliver(events: Sequence[tuple[Job, Event]]) -> None:
        for job, told in events:
            job.deliver(told)

    def post(events: Sequence[tuple[Job, Event]]) -> None:
        try:
            loop.call_soon_threadsafe(deliver, events)
        except RuntimeError:  # the loop is closed: nobody is left to tell
            return

    return post


def _add_models(app: FastAPI, service: Service) -> None:
    card = {"id": service.name, "object": "model", "created": service.created, "owned_by": "r1q"}
    card["max_model_len"] = service.engine.session.context

    @app.get("/v1/models", response_model=ModelList, responses={401: _ERRORS[401]})
    async def models() -> Any:
        """List the one model that is served."""
        return {"object": "list", "data": [card]}

    @app.get("/v1/models/{name:path}", response_model=ModelCard, responses={k: _ERRORS[k] for k in (401, 404)})
    async def model(name: str) -> Any:
        """Say what a model is."""
        if name != service.name:
            raise Refused(404, "invalid_request_error", f"there is no model {name!r} here", code="model_not_found")
        return card


def _add_answers(app: FastAPI, service: Service) -> None:
    @app.post("/v1/chat/completions", response_model=ChatCompletion, responses={**_ERRORS, **_STREAM})
    async def chat(asked: ChatRequest, request: Request) -> Response:
        """Answer a conversation; the thought before the answer is `reasoning_content`."""
        events: asyncio.Queue[Event] = asyncio.Queue()
        job = await asyncio.to_thread(service.chat_job, asked, events.put_nowait)
        return await _answer(service, job, events, request, asked, ChatForm)

    @app.post("/v1/completions", response_model=TextCompletion, responses={**_ERRORS, **_STREAM})
    async def complete(asked: CompletionRequest, request: Request) -> Response:
        """Go on with a text, thoughts and all."""
        events: asyncio.Queue[Event] = asyncio.Queue()
        job = await asyncio.to_thread(service.completion_job, asked, events.put_nowait)
        return await _answer(service, job, events, request, asked, TextForm)


def _add_state(app: FastAPI, service: Service) -> None:
    @app.get("/health", response_model=Health, responses={503: {"model": Health, "description": "Not ready."}})
    async def health() -> Response:
        """Say whether new requests are taken; needs no key."""
        ready = service.engine.healthy
        return JSONResponse({"status": "ok" if ready else "stopping"}, status_code=200 if ready else 503)

    metrics: dict[int | str, dict[str, Any]] = {
        200: {"content": {"text/plain": {"schema": {"type": "string"}}}},
        401: _ERRORS[401],
    }

    @app.get("/metrics", response_class=Response, responses=metrics)
    async def metrics_text() -> Response:
        """Tell everything that is counted, for Prometheus."""
        return Response(service.meters.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _add_errors(app: FastAPI, service: Service) -> None:
    def reply(refused: Refused) -> JSONResponse:
        service.meters.refused(refused.status)
        headers = {"Retry-After": str(refused.retry)} if refused.retry else None
        return JSONResponse(refused.body(), status_code=refused.status, headers=headers)

    @app.exception_handler(Refused)
    async def refused(request: Request, error: Refused) -> JSONResponse:
        return reply(error)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        # What was sent is not repeated: it may be long, and NaN cannot be said in JSON.
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"][1:])
        message = f"{place}: {first['msg']}" if place else str(first["msg"])
        return reply(Refused(400, "invalid_request_error", message[:500], param=place or None))

    @app.exception_handler(HTTPException)
    async def other(request: Request, error: HTTPException) -> JSONResponse:
        told = reply(Refused(error.status_code, "invalid_request_error", str(error.detail)))
        told.headers.update(error.headers or {})
        return told

    @app.exception_handler(Exception)
    async def broken(request: Request, error: Exception) -> JSONResponse:
        return reply(Refused(500, "server_error", "the server failed on this request; its log says why"))


async def _answer(
    service: Service,
    job: Job,
    events: asyncio.Queue[Event],
    request: Request,
    asked: ChatRequest | CompletionRequest,
    form_type: type[Form],
) -> Response:
    form = form_type(
        id=("chatcmpl-" if form_type is ChatForm else "cmpl-") + secrets.token_hex(16),
        created=int(time.time()),
        model=service.name,
        vocabulary=service.engine.vocabulary,
        scored=job.top is not None,
        usage_chunk=asked.stream_options is not None and asked.stream_options.include_usage,
    )
    service.engine.submit(job)
    if asked.stream:
        return _Stream(service, job, _chunks(form, events))
    try:
        answer = await _gather(events, request)
    finally:
        service.engine.cancel(job)
    return Response(status_code=499) if answer is None else JSONResponse(form.body(answer))


async def _gather(events: asyncio.Queue[Event], request: Request) -> Piece | None:
    """Return the whole answer, or None if the client leaves before it is there. Raises the `Refused` that ends it early."""
    told, gone = asyncio.ensure_future(events.get()), asyncio.ensure_future(_left(request))
    try:
        await asyncio.wait((told, gone), return_when=asyncio.FIRST_COMPLETED)
        event = told.result() if told.done() else None
    finally:
        told.cancel()
        gone.cancel()
    if isinstance(event, Refused):
        raise event
    return event


async def _left(request: Request) -> None:
    """Wait until the client closes its connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _chunks(form: Form, events: asyncio.Queue[Event]) -> AsyncIterator[bytes]:
    if opening := form.opening():
        yield opening
    while True:
        told = await events.get()
        if isinstance(told, Refused):
            # The status is long sent: the error is an event, and the missing end mark says that the answer is not whole.
            yield replies.event(told.body())
            return
        yield form.chunk(told)
        if told.ending is not None:
            return


class _Stream(StreamingResponse):
    """Server-sent events; however the response ends, its job is told."""

    def __init__(self, service: Service, job: Job, chunks: AsyncIterator[bytes]) -> None:
        super().__init__(chunks, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        self._service, self._job = service, job

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send until the answer ends or the client leaves."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._service.engine.cancel(self._job)
