"""r1q bench: speed, memory and fidelity of artifacts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

_POSITIVE = click.IntRange(min=1)
_PATH = click.Path(path_type=Path)


def _depths(ctx: click.Context, param: click.Parameter, value: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in value.split(","))
    except ValueError:
        raise click.BadParameter(f"{value!r} is no list of numbers such as 0,512,4096") from None


def _names(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[str, ...]:
    return tuple(filter(None, (part.strip() for part in (value or "").split(","))))


WHERE = (
    click.Option(["--target"], default="cpu", show_default=True, help="cpu, gpu, mobile, or a profile to emulate."),
    click.Option(["--list-targets"], is_flag=True, help="List targets and profiles of devices, and stop."),
    click.Option(["--runtime"], metavar="NAME", help="One runtime.  [default: every one that opens the artifact]"),
    click.Option(["--threads"], type=_POSITIVE, help="Threads.  [default: all physical cores; 4 for mobile]"),
    click.Option(["--ram"], metavar="SIZE", help="Ceiling of an emulated target, such as 4GiB."),
    click.Option(
        ["--estimate", "estimates"],
        callback=_names,
        metavar="NAME,…",
        help="Profiles to estimate tokens/s for, such as phone-8g.",
    ),
)
HOW_LONG = (
    click.Option(["--repetitions"], type=click.IntRange(min=2), default=5, show_default=True, help="Timed runs."),
    click.Option(["--prompt"], type=_POSITIVE, default=128, show_default=True, help="Tokens before the first token."),
    click.Option(["--prefill"], type=_POSITIVE, default=512, show_default=True, help="Tokens of the prefill rate."),
    click.Option(["--generate"], type=_POSITIVE, default=128, show_default=True, help="Tokens of the decode rate."),
    click.Option(
        ["--depths"],
        callback=_depths,
        metavar="N,…",
        default="0,512",
        show_default=True,
        help="Tokens in memory when decoding begins.",
    ),
)
FIDELITY = (
    click.Option(["--reference"], type=_PATH, help="Float checkpoint to compare with.  [default: the source]"),
    click.Option(["--text"], type=_PATH, help="Evaluation text.  [default: the model's own, or a built-in one]"),
    click.Option(["--windows"], type=_POSITIVE, default=8, show_default=True, help="Windows of 512 tokens to score."),
    click.Option(
        ["--noise-floor/--no-noise-floor"],
        default=None,
        help="Score the reference against itself in 16 bits.  [default: below 10⁹ weights]",
    ),
)
REASONING = (
    click.Option(
        ["--reasoning", "problems"],
        is_flag=False,
        flag_value=200,
        type=_POSITIVE,
        metavar="[N]",
        help="Let models think about N problems, 200 if N is left out (then put it last).",
    ),
    click.Option(
        ["--tasks"],
        metavar="SPEC",
        help="builtin, graded, tiny, or FILE.jsonl of prompt, answer, regex.  [default: builtin; tiny for the embedded model]",
    ),
    click.Option(["--seeds"], type=_POSITIVE, default=3, show_default=True, help="Answers to each problem."),
    click.Option(["--max-tokens"], type=_POSITIVE, help="Longest answer in tokens.  [default: 4096; 512 for tiny]"),
    click.Option(["--sequences"], type=_POSITIVE, default=4, show_default=True, help="Answers side by side."),
    click.Option(["--tokenizer"], type=_PATH, help="Folder of the model's tokenizer, where none lies with it."),
)
SHOWN = (
    click.Option(
        ["--format", "format_name"],
        type=click.Choice(["table", "json", "jsonl", "csv", "md", "html"]),
        default="table",
        show_default=True,
        help="jsonl has every raw sample, a line a row.",
    ),
    click.Option(["--json", "as_json"], is_flag=True, help="Short for --format jsonl."),
    click.Option(["-o", "--output"], type=_PATH, help="File to write to instead of stdout."),
    click.Option(["--baseline"], type=_PATH, help="Results to compare with (json or jsonl)."),
    click.Option(["--fail-on"], metavar="LIMITS", help="With --baseline: decode=-5%,kld=+20% ends with 6 if passed."),
    click.Option(["-q", "--quiet"], is_flag=True, help="No progress, only the result."),
)
ARTIFACTS = click.Argument(["artifacts"], nargs=-1, type=_PATH)


@click.command(params=[ARTIFACTS, *WHERE, *HOW_LONG, *FIDELITY, *REASONING, *SHOWN])
def bench(artifacts: tuple[Path, ...], list_targets: bool, ram: str | None, **options: Any) -> None:
    """Measure ARTIFACTS: speed, memory, and what quantization cost against the float model.

    An artifact is a .gguf file, an ONNX, GPTQ or Hugging Face folder, or a folder that `r1q quantize` made. Without one, the newest
    folder in ./r1q-out is taken, or else the embedded model in four grids. A row is an artifact in one runtime, each in a process of
    its own; perplexity, KL divergence and top-1 agreement follow llama-perplexity: 512-token windows, the second half scored.

    \b
    Examples:
      r1q bench
      r1q bench r1q-out/tiny-r1-bf16 r1q-out/tiny-r1-q4_k_m --windows 16
      r1q bench model.gguf --target mobile --ram 3GiB --estimate phone-8g
      r1q bench out --json > new.jsonl
      r1q bench bf16.gguf q4.gguf --reasoning 50 --tasks graded
      r1q bench out --baseline old.jsonl --fail-on decode=-5%,kld=+20%
    """
    if len(artifacts) == 3 and artifacts[0] == Path("compare") and not artifacts[0].exists():
        from r1q.commands.compare import compare

        click.get_current_context().invoke(compare, before=artifacts[1], after=artifacts[2], fail_on=options["fail_on"])
        return
    if list_targets:
        from rich.console import Console

        from r1q.benchmarks.render_targets import target_table

        Console().print(target_table())
        return
    from r1q.plan.memory import parse_size

    _bench(artifacts, ram=None if ram is None else parse_size(ram), **options)


def _bench(
    artifacts: tuple[Path, ...],
    *,
    format_name: str,
    as_json: bool,
    output: Path | None,
    baseline: Path | None,
    fail_on: str | None,
    quiet: bool,
    problems: int | None,
    tasks: str | None,
    seeds: int,
    max_tokens: int | None,
    sequences: int,
    tokenizer: Path | None,
    **options: Any,
) -> None:
    import sys

    from r1q.benchmarks.formats import read_results
    from r1q.benchmarks.gate import parse_limits
    from r1q.benchmarks.reasoner import ReasoningPlan
    from r1q.benchmarks.run import bench as measure
    from r1q.benchmarks.show import exit_code, show_bench
    from r1q.commands.compare import show_verdict
    from r1q.plan.side_by_side import newest_or_side_by_side

    if fail_on and baseline is None:
        raise click.UsageError("--fail-on needs a --baseline to compare with")
    before = None if baseline is None else read_results(baseline)
    limits = parse_limits(fail_on) if fail_on else []
    reasoning = None
    if problems is not None or tasks is not None:
        reasoning = ReasoningPlan(
            count=problems or 200,
            tasks=tasks,
            seeds=seeds,
            max_tokens=max_tokens,
            sequences=sequences,
            tokenizer=tokenizer,
        )
    if not artifacts:
        artifacts = tuple(newest_or_side_by_side())
        click.echo(f"benching {', '.join(map(str, artifacts))}", err=True)
    events = measure(artifacts, command=("r1q", *sys.argv[1:]), reasoning=reasoning, **options)
    results = show_bench(events, format_name="jsonl" if as_json else format_name, output=output, quiet=quiet)
    if before is not None:
        show_verdict(before, results, limits, to_stderr=as_json or format_name != "table")
    if code := exit_code(results):
        raise click.exceptions.Exit(code)
