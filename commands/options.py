"""The options that say what to quantize and how: those of r1q quantize and r1q plan."""

from __future__ import annotations

from pathlib import Path

import click
from click.core import ParameterSource

# Every one is a field of plan.job.Job with the same default; help lists them in this order.
MODEL = click.Argument(["model"], required=False)
GRID = (
    click.Option(["--bits"], type=int, metavar="N", help="Bits per weight: 2, 3, 4 (default), 5, 6 or 8."),
    click.Option(
        ["--scheme"],
        metavar="NAME|FILE",
        help="A preset (q4_0, q4_k_m, q6_k, q8_0, bf16, …; w8a8), one grid for every matrix (q4_k) or a recipe file (mix.toml).",
    ),
    click.Option(
        ["--to", "formats"],
        default="gguf",
        show_default=True,
        metavar="FORMAT,…",
        help="gguf, gptq, onnx, several of them with commas, or checkpoint.",
    ),
    click.Option(
        ["--group-size"], type=int, metavar="N", help="Integers in groups of 32, 64, 128, or -1 for a whole row."
    ),
    click.Option(["--asymmetric"], is_flag=True, help="Integers with a zero point a group."),
    click.Option(
        ["--activations"],
        type=click.Choice(["minmax", "percentile", "entropy"]),
        help="How w8a8 finds ranges of inputs.  [default: minmax]",
    ),
    click.Option(
        ["--kv"],
        type=click.Choice(["float", "int8"]),
        default="float",
        show_default=True,
        help="Keys and values of an ONNX folder: int8 takes a quarter of the memory, and a pass over calibration text.",
    ),
    click.Option(["--head-bits"], type=int, metavar="N", help="Bits of an integer head, 4 or 8 (default)."),
)
METHOD = (
    click.Option(
        ["--lora"],
        type=click.Path(path_type=Path),
        metavar="ADAPTER",
        help="Folder of a LoRA adapter (PEFT) to merge first.",
    ),
    click.Option(
        ["--effort"],
        type=click.Choice(["fast", "default", "high"]),
        help="Calibrate: fast (GPTQ), default (and make good what earlier layers shifted), high (and refine every layer).",
    ),
    click.Option(
        ["--heal"],
        type=click.IntRange(min=0),
        metavar="STEPS",
        help="Then train scales and norms, codes untouched, on what the float model predicts.",
    ),
    click.Option(
        ["--calibration"],
        metavar="SPEC",
        help="Text to calibrate on: FILE.txt, FILE.jsonl, a folder, builtin; mixed as a.txt:0.5,builtin:0.5.  [default: builtin]",
    ),
    click.Option(
        ["--samples"], type=click.IntRange(min=1), default=128, show_default=True, help="Windows of calibration text."
    ),
    click.Option(["--seq-len"], type=click.IntRange(min=2), default=512, show_default=True, help="Tokens of a window."),
    click.Option(
        ["--method"],
        type=click.Choice(["rtn", "gptq"]),
        help="rtn: round to nearest, no text. gptq: calibrated.  [default: gptq with --effort or --calibration, else rtn]",
    ),
    click.Option(
        ["--imatrix"],
        type=click.Path(path_type=Path),
        help="Importance matrix of llama-imatrix for rtn to weigh errors by.",
    ),
    click.Option(
        ["--damp"],
        type=click.FloatRange(min=0, max=1, min_open=True, max_open=True),
        default=0.05,
        show_default=True,
        help="Share of the mean diagonal added to second moments.",
    ),
    click.Option(
        ["--moe-calibration"],
        type=click.Choice(["routed", "all", "hybrid"]),
        default="routed",
        show_default=True,
        help="Tokens an expert is calibrated on: those sent to it, all, or those sent to it filled up with the next best.",
    ),
    click.Option(["--device"], default="cpu", show_default=True, help="Where calibration computes: cpu, or cuda."),
    click.Option(
        ["--max-ram"], metavar="SIZE", help="Memory to stay within, such as 6GiB.  [default: what is available]"
    ),
    click.Option(
        ["--threads"],
        type=click.IntRange(min=1),
        help="Threads, of each worker.  [default: all physical cores, shared by the workers]",
    ),
    click.Option(
        ["--workers"],
        default="1",
        show_default=True,
        metavar="N|ray[://HOST:PORT]",
        help="Processes that share a block's work here, or machines: ray (here), ray:auto (this cluster), ray://HOST:PORT.",
    ),
)
OUTPUT = click.Option(
    ["-o", "--output"], type=click.Path(path_type=Path), help="Output folder. [default: r1q-out/<model>-<scheme>]"
)


def asked_formats(formats: str, scheme: str | None) -> tuple[str, ...]:
    """Return what `--to` says; where it says nothing, w8a8 goes to the one format that holds it."""
    from r1q.core.formats import parse_formats
    from r1q.plan.choose import W8A8

    said = click.get_current_context().get_parameter_source("formats") is not ParameterSource.DEFAULT
    return ("onnx",) if not said and scheme is not None and scheme.lower() == W8A8 else parse_formats(formats)
