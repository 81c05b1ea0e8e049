"""r1q serve: an OpenAI-compatible server on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click


@click.command()
@click.argument("artifact", required=False, type=click.Path(path_type=Path))
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; 0.0.0.0 is every one.")
@click.option(
    "--port", type=click.IntRange(0, 65535), default=8080, show_default=True, help="Port; 0 takes a free one."
)
@click.option(
    "--api-key",
    envvar="R1Q_API_KEY",
    show_envvar=True,
    help="Key that clients must send; /health alone is open. [default: none]",
)
@click.option("--name", help="What clients call the model. [default: the artifact's name]")
@click.option("--runtime", metavar="NAME", help="Runtime adapter. [default: the one that opens the format]")
@click.option(
    "--context", type=click.IntRange(min=16), help="Tokens of a request and its answer. [default: the model's, ≤ 4096]"
)
@click.option(
    "--parallel", type=click.IntRange(1, 256), default=4, show_default=True, help="Requests answered at once."
)
@click.option("--queue", type=click.IntRange(min=0), default=256, show_default=True, help="Requests that may wait.")
@click.option(
    "--threads",
    type=click.IntRange(min=1),
    help="Threads. [default: at most all physical cores, fewer where that is faster]",
)
@click.option(
    "--gpu-layers", type=click.IntRange(min=-1), default=0, show_default=True, help="Blocks on the GPU; -1 all."
)
@click.option(
    "--grace", type=click.FloatRange(min=0), default=30, show_default=True, help="Seconds to finish when told to stop."
)
@click.option(
    "--ask",
    "question",
    metavar="TEXT",
    help="Answer one question and end: the thought on stderr, the answer on stdout.",
)
def serve(artifact: Path | None, question: str | None, **options: Any) -> None:
    """Serve ARTIFACT to OpenAI clients: chat, completions, streaming; thoughts apart from answers; metrics for Prometheus.

    ARTIFACT is a .gguf file, an ONNX folder, or a folder that holds one of them; without it, the newest folder in ./r1q-out, or else
    the embedded model. Checkpoints and float folders are served too, slowly, for comparison.
    Requests are answered side by side in one batch. Ctrl-C or SIGTERM finishes what is at hand first.

    \b
    Examples:
      r1q serve
      r1q serve model.gguf --ask "What is 17 + 25?"
      r1q serve model.gguf --context 32768 --parallel 2
      R1Q_API_KEY=secret r1q serve model.gguf --host 0.0.0.0
    """
    import logging
    import sys

    from r1q.core.errors import MissingError
    from r1q.plan.job import newest_or_embedded

    try:
        from r1q.serve.run import Settings, address_of, is_exposed, listen, open_artifact, run_server
    except ModuleNotFoundError as error:
        if error.name not in ("fastapi", "uvicorn", "prometheus_client"):
            raise
        raise MissingError(f"r1q serve needs {error.name}: pip install 'r1q[serve]'") from error

    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)  # below it: a line for every request that is no HTTP
    logging.getLogger("asyncio").setLevel(logging.ERROR)  # and one for every piece that a client did not wait for
    settings = Settings(**{**options, "parallel": 1} if question is not None else options)
    if question is not None:
        _answer(open_artifact(artifact or newest_or_embedded(), settings), question, pace=settings.threads is None)
        return
    listener = listen(settings)
    opened = open_artifact(artifact or newest_or_embedded(), settings)
    if is_exposed(settings.host) and settings.api_key is None:
        click.echo(f"warning: whoever reaches {settings.host} can use this server: set --api-key", err=True)
    # The engine's thread takes the interpreter again after each call into the runtime; 5 ms, Python's default, is several steps.
    sys.setswitchinterval(0.0005)
    session = opened.session
    about = f"{opened.name}: {session.runtime} on {session.device}, {session.sequences} × {session.context} tokens"
    run_server(opened, listener, settings, ready=lambda: click.echo(f"{about}\nready: {address_of(listener)}"))
    click.echo("stopped")


def _answer(opened: Any, question: str, *, pace: bool) -> None:
    from r1q.core.untrusted import printable
    from r1q.serve.ask import ask

    for piece in ask(opened, question, pace=pace):
        click.echo(printable(piece.thought, lines=True), err=True, nl=bool(piece.text))
        click.echo(printable(piece.text, lines=True), nl=False)
    click.echo()
