"""The command line's skin: the list of commands, each loaded when it is named, and errors as one line and an exit code."""

from __future__ import annotations

import difflib
import importlib
import sys
from typing import Any, NamedTuple

import click

from r1q import __version__
from r1q.core.allocator import restart_on_huge_pages
from r1q.core.errors import R1qError
from r1q.core.untrusted import printable

LONGEST_MESSAGE = 1000
# What allocates and frees large arrays all the time; `plan` measures how fast that is.
_CALIBRATING = ("calibrate", "distill", "heal", "plan", "quantize")
CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


class Lazy(NamedTuple):
    """A command that is not loaded: the module that holds it under its name, and the first sentence of its help."""

    module: str
    help: str


COMMANDS = {
    "bench": Lazy(
        "r1q.commands.bench",
        "Measure ARTIFACTS: speed, memory, and what quantization cost against the float model.",
    ),
    "compare": Lazy(
        "r1q.commands.compare",
        "Compare two files of `r1q bench --format json` or jsonl, row by row, each number with its 95 % interval.",
    ),
    "distill": Lazy(
        "r1q.commands.distill",
        "Make a smaller model of TEACHER: prune its widths, then train it on the teacher's own predictions.",
    ),
    "doctor": Lazy(
        "r1q.commands.doctor",
        "Say what is installed and what this machine has: runtimes and how to get them, versions, CPU, memory, disk.",
    ),
    "export": Lazy(
        "r1q.commands.export",
        "Write another format from CHECKPOINT, a folder that `r1q quantize` made or anybody's GPTQ folder; codes are copied.",
    ),
    "heal": Lazy(
        "r1q.commands.heal",
        "Train the scales and norms of OUTPUT, a folder of r1q quantize, on the float model's predictions.",
    ),
    "inspect": Lazy(
        "r1q.commands.inspect",
        "Say what PATH is: any GGUF or safetensors file, Hugging Face or GPTQ folder, or r1q's own.",
    ),
    "calibrate": Lazy(
        "r1q.commands.calibrate",
        "Write llama.cpp's importance matrix of MODEL: which inputs of its layers are large on calibration text.",
    ),
    "plan": Lazy(
        "r1q.commands.plan",
        "Say what r1q quantize would make of MODEL: bytes, disk, memory, time; reads headers alone.",
    ),
    "traces": Lazy(
        "r1q.commands.traces",
        "Let MODEL answer generated problems itself, and keep how it thought: the text it is best calibrated on.",
    ),
    "quantize": Lazy("r1q.commands.quantize", "Quantize MODEL into a file that runs here."),
    "report": Lazy(
        "r1q.commands.report",
        "Draw RUNS, files of `r1q bench --format json` or jsonl, as one page of HTML that needs no network.",
    ),
    "serve": Lazy(
        "r1q.commands.serve",
        "Serve ARTIFACT to OpenAI clients: chat, completions, streaming; thoughts apart from answers; metrics for Prometheus.",
    ),
    "ship": Lazy(
        "r1q.commands.ship",
        "Pack PATH, an output folder or checkpoint, into a folder that a stranger can check and run; or check such a folder.",
    ),
    "trim": Lazy(
        "r1q.commands.trim",
        "Leave the tokens out of MODEL that CORPUS never uses: a smaller embedding and head, the same logits for all that stay.",
    ),
    "verify": Lazy(
        "r1q.commands.verify",
        "Prove that each PATH (an output folder or an artifact in it) is whole and holds its checkpoint's weights, every one.",
    ),
}


class _Refusal(click.ClickException):
    """One line on stderr and the exit code of the error."""

    def __init__(self, message: str, exit_code: int) -> None:
        # A file's own words may be in it, and as long as the file.
        super().__init__(printable(message if len(message) <= LONGEST_MESSAGE else f"{message[:LONGEST_MESSAGE]}…"))
        self.exit_code: int = exit_code  # type: ignore[misc]  # click declares it on the class


class _Group(click.Group):
    """Loads a command when it is named, and turns errors raised on purpose into one line and an exit code.

    A traceback that reaches a user is a bug.
    """

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = getattr(importlib.import_module(COMMANDS[cmd_name].module), cmd_name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        # As click does it, from the table alone: its own way loads every command for one line of help.
        names = self.list_commands(ctx)
        width = formatter.width - 6 - max(map(len, names))
        with formatter.section("Commands"):
            formatter.write_dl(
                [(name, click.Command(name, help=COMMANDS[name].help).get_short_help_str(width)) for name in names]
            )

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args[0] not in COMMANDS and not args[0].startswith("-") and not ctx.resilient_parsing:
            near = [repr(name) for name in difflib.get_close_matches(args[0], COMMANDS)]
            hint = f" Did you mean {' or '.join(near)}?" if near else ""
            ctx.fail(f"No such command {args[0]!r}.{hint}")
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except R1qError as error:
            raise _Refusal(str(error), error.exit_code) from error
        except KeyboardInterrupt:
            raise _Refusal(
                "interrupted; what is finished is kept, and the same command goes on from there", 130
            ) from None
        except MemoryError:
            raise _Refusal("out of memory; close other programs or take a smaller model", 5) from None
        except OSError as error:
            raise _Refusal(f"{error.filename or 'a file'}: {error.strerror or error}", 3) from error


@click.group(cls=_Group, context_settings=CONTEXT)
@click.version_option(__version__, prog_name="r1q")
def main() -> None:
    """Quantize reasoning models of the DeepSeek-R1 family, and measure what it cost.

    \b
    r1q quantize --bits 4             the small embedded model, no download
    r1q quantize ./my-model --bits 4  a Hugging Face checkpoint folder
    r1q bench --target cpu            speed and accuracy of what that made
    """


def start() -> None:
    """Run the command line as a program of its own."""
    if len(sys.argv) > 1 and sys.argv[1] in _CALIBRATING:
        restart_on_huge_pages()
    main()
