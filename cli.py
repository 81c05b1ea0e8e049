"""The command line: read arguments, one library call, render. Heavy imports happen inside the commands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from r1q import __version__
from r1q.core.errors import R1qError
from r1q.core.untrusted import printable

OUTPUT_ROOT = Path("r1q-out")
LONGEST_MESSAGE = 1000
CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


class _Refusal(click.ClickException):
    """One line on stderr and the exit code of the error."""

    def __init__(self, message: str, exit_code: int) -> None:
        # A file's own words may be in it, and as long as the file.
        super().__init__(printable(message if len(message) <= LONGEST_MESSAGE else f"{message[:LONGEST_MESSAGE]}…"))
        self.exit_code: int = exit_code  # type: ignore[misc]  # click declares it on the class


class _Group(click.Group):
    """Turns errors raised on purpose into one line and an exit code; a traceback that reaches a user is a bug."""

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


@main.command()
@click.argument("model", required=False)
@click.option("--bits", type=int, metavar="N", help="Bits per weight: 2, 3, 4 (default), 5, 6 or 8.")
@click.option(
    "--scheme",
    metavar="NAME|FILE",
    help="A preset (q4_0, q4_k_m, q6_k, q8_0, bf16, …), one grid for every matrix (q4_k) or a recipe file (mix.toml).",
)
@click.option(
    "--to", "formats", default="gguf", show_default=True, metavar="FORMAT,…", help="gguf, gptq, both, or checkpoint."
)
@click.option("--group-size", type=int, metavar="N", help="Integers in groups of 32, 64, 128, or -1 for a whole row.")
@click.option("--asymmetric", is_flag=True, help="Integers with a zero point a group.")
@click.option(
    "--method", type=click.Choice(["rtn"]), default="rtn", show_default=True, help="rtn: round to nearest, no data."
)
@click.option(
    "--imatrix", type=click.Path(path_type=Path), help="Importance matrix of llama-imatrix to weigh errors by."
)
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="Output folder. [default: r1q-out/<model>-<scheme>]"
)
@click.option(
    "--dry-run", is_flag=True, help="Print the plan (sizes, grids, fallbacks) and stop before reading weights."
)
@click.option("--strict", is_flag=True, help="Refuse instead of falling back where rows do not fit a grid.")
@click.option("-q", "--quiet", is_flag=True, help="No progress; only errors and the result's path.")
def quantize(
    model: str | None,
    bits: int | None,
    scheme: str | None,
    formats: str,
    group_size: int | None,
    asymmetric: bool,
    method: str,
    imatrix: Path | None,
    output: Path | None,
    dry_run: bool,
    strict: bool,
    quiet: bool,
) -> None:
    """Quantize MODEL into a file that runs here.

    MODEL is a Hugging Face checkpoint folder (safetensors) of a Llama, Qwen2 or Qwen3 model (DeepSeek-R1's distills and their like),
    or a hub id, org/name or org/name@revision, which is downloaded. Without MODEL the small embedded model is taken.
    The command can be killed at any moment: run it again and it goes on.

    \b
    Examples:
      r1q quantize --bits 4
      r1q quantize ./DeepSeek-R1-Distill-Qwen-1.5B --scheme q4_k_m
      r1q quantize ./model --scheme bf16 -o reference
      r1q quantize deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B --bits 4 --to gguf,gptq

    A recipe file is TOML: base = "q4_k_m" and [[rules]] of tensors = "*.ffn_down.weight", grid = "q6_k".
    """
    from r1q.core.artifact import OutputFolder
    from r1q.core.formats import parse_formats
    from r1q.models.embedded import open_model
    from r1q.plan.choose import Wish, choose_recipe
    from r1q.plan.plan import make_plan
    from r1q.plan.render import make_console, show_plan, show_run
    from r1q.plan.walk import quantize_model

    console = make_console(quiet)
    wish = Wish(
        bits=bits, scheme=scheme, group_size=group_size, symmetric=not asymmetric, formats=parse_formats(formats)
    )
    opened = open_model(model, progress=not quiet)
    choice = choose_recipe(wish, opened.source.tensors)
    console.print(choice.reason, highlight=False)
    plan = make_plan(opened.source, choice.recipe, wish.formats, imatrix)
    show_plan(console, plan)
    if strict and plan.fallbacks:
        raise click.UsageError(f"--strict: {plan.fallback_lines()[0]}")
    folder = output or OUTPUT_ROOT / f"{plan.model}-{plan.recipe.name}"
    if dry_run:
        return
    events = quantize_model(opened, plan, OutputFolder(folder), method=method)
    for path in show_run(console, events, plan):
        if quiet:
            click.echo(str(path))
    console.print(f"next: r1q bench {folder}", highlight=False)


@main.command()
@click.argument("artifacts", nargs=-1, type=click.Path(path_type=Path))
@click.option("--target", default="cpu", show_default=True, help="Where to run: cpu.")
@click.option("--runtime", metavar="NAME", help="Runtime adapter. [default: the one that opens the format]")
@click.option("--threads", type=click.IntRange(min=1), help="Threads. [default: all physical cores]")
@click.option(
    "--reference", type=click.Path(path_type=Path), help="Float checkpoint to compare with. [default: the source]"
)
@click.option(
    "--text", type=click.Path(path_type=Path), help="Evaluation text. [default: the model's own, or a built-in one]"
)
@click.option(
    "--windows", type=click.IntRange(min=1), default=8, show_default=True, help="Windows of 512 tokens to score."
)
@click.option(
    "--repetitions", type=click.IntRange(min=2), default=5, show_default=True, help="Timed runs, after a warm-up."
)
@click.option(
    "--prompt", type=click.IntRange(min=1), default=128, show_default=True, help="Tokens before the first token."
)
@click.option(
    "--prefill", type=click.IntRange(min=1), default=512, show_default=True, help="Tokens of the prefill rate."
)
@click.option(
    "--generate", type=click.IntRange(min=1), default=128, show_default=True, help="Tokens of the decode rate."
)
@click.option("--json", "as_json", is_flag=True, help="JSON lines with every raw sample and the machine, on stdout.")
@click.option("-q", "--quiet", is_flag=True, help="No progress, only the result.")
def bench(artifacts: tuple[Path, ...], as_json: bool, quiet: bool, **options: Any) -> None:
    """Measure ARTIFACTS: speed, memory, and what quantization cost against the float model.

    An artifact is a .gguf file or a folder that `r1q quantize` made. Without one, the newest folder in ./r1q-out is taken, or else
    the embedded model. Each is opened in a process of its own; perplexity, KL divergence and top-1 agreement follow
    llama-perplexity: 512-token windows, the second half scored.

    \b
    Examples:
      r1q bench
      r1q bench r1q-out/tiny-r1-bf16 r1q-out/tiny-r1-q4_k_m --windows 16
      r1q bench model.gguf --reference ./model --text my.txt --json
    """
    import sys

    from r1q.benchmarks.run import bench as measure
    from r1q.benchmarks.show import show_bench

    chosen = artifacts or (_default_artifact(quiet or as_json),)
    results = measure(chosen, command=("r1q", *sys.argv[1:]), **options)
    code = show_bench(results, as_json=as_json, quiet=quiet)
    if code:
        raise click.exceptions.Exit(code)


def _default_artifact(quiet: bool) -> Path:
    """Return the newest folder under ./r1q-out, or the embedded model in 4 bits, made now."""
    from r1q.core.artifact import OutputFolder, newest_output
    from r1q.models.embedded import open_model
    from r1q.plan.choose import Wish, choose_recipe
    from r1q.plan.plan import make_plan
    from r1q.plan.walk import quantize_model

    newest = newest_output(OUTPUT_ROOT)
    if newest is None:
        opened = open_model(None)
        plan = make_plan(opened.source, choose_recipe(Wish(), opened.source.tensors).recipe, ("gguf",))
        newest = OUTPUT_ROOT / f"{plan.model}-{plan.recipe.name}"
        for _ in quantize_model(opened, plan, OutputFolder(newest), method="rtn"):
            pass
    click.echo(f"benching {newest}", err=True)
    return newest


@main.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("--to", "formats", required=True, metavar="FORMAT,…", help="gguf, gptq, or both.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Output folder. [default: beside the checkpoint]")
def export(checkpoint: Path, formats: str, output: Path | None) -> None:
    """Write another format from CHECKPOINT, a folder that `r1q quantize` made: codes are copied, never made again."""
    from r1q.core.formats import parse_formats
    from r1q.plan.reexport import reexport
    from r1q.plan.render import make_console, show_exported

    for result in reexport(checkpoint, parse_formats(formats), output):
        show_exported(make_console(quiet=False), result)


@main.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line, on stdout.")
def verify(path: Path, as_json: bool) -> None:
    """Prove that PATH (an output folder or an artifact in it) is whole and holds its checkpoint's weights, every one."""
    from r1q.export.verified import refuse_failed
    from r1q.export.verify import verify_path

    results = []
    for result in verify_path(path):
        results.append(result)
        click.echo(result.json() if as_json else result.text())
    refuse_failed(results)


@main.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--tensors", is_flag=True, help="List every tensor.")
@click.option("--template", is_flag=True, help="Show the chat template whole.")
@click.option("--json", "as_json", is_flag=True, help="Everything as one JSON object, on stdout.")
def inspect(path: Path, tensors: bool, template: bool, as_json: bool) -> None:
    """Say what PATH is: any GGUF or safetensors file, Hugging Face or GPTQ folder, or r1q's own. Reads no weights."""
    import json

    from r1q.plan.inspect import inspect_path
    from r1q.plan.render import make_console
    from r1q.plan.render_inspect import show_inspection

    found = inspect_path(path)
    if as_json:
        click.echo(json.dumps(found.to_dict()))
    else:
        show_inspection(make_console(quiet=False), found, tensors=tensors, template=template)


@main.command()
@click.option("--gpu", is_flag=True, help="Ask torch too which GPUs it sees (imports it, in a process of its own).")
@click.option("--json", "as_json", is_flag=True, help="Everything as one JSON object, on stdout.")
def doctor(gpu: bool, as_json: bool) -> None:
    """Say what is installed and what this machine has: runtimes and how to get them, versions, CPU, memory, disk."""
    import json

    from r1q.plan.doctor import examine, refuse_unusable
    from r1q.plan.render import make_console
    from r1q.plan.render_doctor import show_diagnosis

    found = examine(Path.cwd(), gpu=gpu)
    if as_json:
        click.echo(json.dumps(found.to_dict()))
    else:
        show_diagnosis(make_console(quiet=False), found)
    refuse_unusable(found)
