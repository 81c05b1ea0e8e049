"""Running a server: open the artifact, listen, answer, and stop in order when told to.

At the first SIGTERM or SIGINT no new requests are taken (503, and /health says so) and those at hand are finished; after `grace`
seconds, or at a second signal, those that are left are told that the server stops.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import signal
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import uvicorn

from r1q.benchmarks.subjects import find_subjects
from r1q.core.errors import UsageError
from r1q.runtimes.base import Options, Session
from r1q.runtimes.table import load_runtime, runtime_name
from r1q.serve.app import make_app, to_loop
from r1q.serve.engine import Engine
from r1q.serve.guard import Guard, is_loopback
from r1q.serve.meters import Meters
from r1q.serve.service import Service
from r1q.serve.vocabulary import Vocabulary, open_vocabulary

_TOLD_SECONDS = 5  # for the last words to reach clients once everything is given up


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How to serve. `parallel` answers at once, `queue` more waiting; `grace` seconds to finish when told to stop."""

    host: str = "127.0.0.1"
    port: int = 8080
    api_key: str | None = None
    name: str | None = None
    runtime: str | None = None
    context: int | None = None
    parallel: int = 4
    queue: int = 256
    threads: int | None = None
    gpu_layers: int = 0
    grace: float = 30.0
    most_bytes: int = 4 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """An opened artifact: its session, its vocabulary, and the name that clients know it by."""

    name: str
    session: Session
    vocabulary: Vocabulary


def open_artifact(path: Path, settings: Settings) -> Opened:
    """Open an artifact for `settings.parallel` answers at once. Raises what the runtime does; `UsageError` for several in a folder."""
    subjects = find_subjects([path])
    if len(subjects) > 1:
        names = ", ".join(subject.path.name for subject in subjects)
        raise UsageError(f"{path} holds {names}: name one of them")
    subject = subjects[0]
    vocabulary = open_vocabulary(subject.path, subject.format)
    options = Options(
        device="gpu" if settings.gpu_layers else "cpu",
        gpu_layers=settings.gpu_layers,
        threads=settings.threads,
        context=settings.context,
        sequences=settings.parallel,
    )
    session = load_runtime(runtime_name(subject.format, settings.runtime)).open(subject.path, options)
    return Opened(name=settings.name or subject.name, session=session, vocabulary=vocabulary)


def listen(settings: Settings) -> socket.socket:
    """Return a listening socket. Raises `UsageError` where the address or port cannot be had."""
    try:
        found = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, _, _, _, address = found[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        raise UsageError(
            f"cannot listen on {settings.host}:{settings.port} ({error.strerror}); choose another --port or --host"
        ) from error
    return listener


def address_of(listener: socket.socket) -> str:
    """Return the address that clients connect to, such as `http://127.0.0.1:8080/v1`."""
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    return f"http://{shown}:{port}/v1"


def run_server(opened: Opened, listener: socket.socket, settings: Settings, *, ready: Callable[[], None]) -> None:
    """Serve until a signal says stop, then end in order; `ready` is called when requests are taken. Closes the session."""
    asyncio.run(_serve(opened, listener, settings, ready))


async def _serve(opened: Opened, listener: socket.socket, settings: Settings, ready: Callable[[], None]) -> None:
    meters = Meters(opened.name)
    engine = Engine(
        opened.session,
        opened.vocabulary,
        queue=settings.queue,
        post=to_loop(asyncio.get_running_loop()),
        meters=meters,
        pace=settings.threads is None,
    )
    service = Service(name=opened.name, engine=engine, meters=meters, created=int(time.time()))
    engine.start()
    try:
        await _listen(service, listener, settings, ready)
    finally:
        # The engine may be inside a step: the loop goes on meanwhile, for what it has to say.
        await asyncio.to_thread(engine.close)


async def _listen(service: Service, listener: socket.socket, settings: Settings, ready: Callable[[], None]) -> None:
    local = is_loopback(listener.getsockname()[0])
    app = Guard(
        make_app(service),
        key=settings.api_key,
        local=local,
        most_bytes=settings.most_bytes,
        refused=service.meters.refused,
    )
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        lifespan="off",
        ws="none",
        loop="asyncio",
        timeout_keep_alive=75,
        timeout_graceful_shutdown=round(settings.grace) + _TOLD_SECONDS,
    )
    server = _Server(config, service.engine, settings.grace)
    told = asyncio.ensure_future(_tell_when_started(server, ready))
    try:
        await server.serve(sockets=[listener])
    finally:
        told.cancel()


async def _tell_when_started(server: uvicorn.Server, ready: Callable[[], None]) -> None:
    while not server.started:
        await asyncio.sleep(0.005)
    ready()


class _Server(uvicorn.Server):
    """uvicorn, which on a signal first lets the engine finish."""

    def __init__(self, config: uvicorn.Config, engine: Engine, grace: float) -> None:
        super().__init__(config)
        self._engine, self._grace = engine, grace

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Stop in order at SIGTERM and SIGINT; a second one stops at once."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            with contextlib.suppress(NotImplementedError, ValueError, RuntimeError):  # not the main thread, or Windows
                loop.add_signal_handler(number, self._stop)
        try:
            yield
        finally:
            for number in (signal.SIGTERM, signal.SIGINT):
                with contextlib.suppress(NotImplementedError, ValueError, RuntimeError):
                    loop.remove_signal_handler(number)

    def _stop(self) -> None:
        if self.should_exit:
            self._engine.give_up()
            return
        self._engine.drain()
        self.should_exit = True
        asyncio.get_running_loop().call_later(self._grace, self._engine.give_up)


def is_exposed(host: str) -> bool:
    """Return whether machines beside this one may reach a server on `host`."""
    if is_loopback(host):
        return False
    try:
        return not ipaddress.ip_address(host).is_loopback
    except ValueError:
        return True
