"""The table at several widths: nothing is cut off, nothing is wider than the terminal, what was not measured is a dash."""

import dataclasses
import io
import math

import numpy as np
import pytest
from rich.console import Console

from r1q.benchmarks.bandwidth import Bandwidth
from r1q.benchmarks.machine import Machine
from r1q.benchmarks.profiles import Prediction
from r1q.benchmarks.render import report
from r1q.benchmarks.result import BenchResult, Failure, Quality, Samples, Speed
from r1q.benchmarks.traffic import Traffic

MACHINE = Machine(cpu="Imaginary 9000", cores=4, logical=8, memory=16 << 30, system="Linux 6", features=())


def result(name: str, grid: str, *, kld: float = 0.03, folder: str = "out") -> BenchResult:
    """Return a result with the numbers of a 1.5B model; equal samples have no deviation."""
    speed = Speed(
        load_seconds=1.25,
        context=512,
        first_token=Samples(tokens=128, seconds=(0.75,) * 5),
        prefill=Samples(tokens=512, seconds=(2.0,) * 5),
        decode=Samples(tokens=128, seconds=(8.0, 8.0, 8.0, 8.0, 16.0)),
        base_memory=45 << 20,
        peak_memory=1600 << 20,
    )
    quality = Quality(
        text="evaluation.txt",
        text_sha256="0" * 64,
        windows=8,
        length=512,
        first=256,
        nll=(math.log(12.5),) * 100,
        kld=tuple(np.linspace(0, 2 * kld, 100).tolist()),
        same_top=(True,) * 92 + (False,) * 8,
        reference="DeepSeek-R1-Distill-Qwen-1.5B",
        reference_nll=(math.log(12.251),) * 100,
    )
    return BenchResult(
        artifact=f"{folder}/{name}-{grid.upper()}.gguf",
        name=f"{name}-{grid.upper()}",
        format="gguf",
        grid=grid,
        bytes=1_100_000_000,
        weights=1_777_088_000,
        bits_per_weight=4.953,
        target="cpu",
        runtime="llama-cpp",
        device="cpu",
        threads=4,
        machine=MACHINE,
        versions={},
        command=(),
        time="2026-01-01T00:00:00+00:00",
        speed=speed,
        quality=quality,
    )


LONG = "DeepSeek-R1-Distill-Qwen-1.5B"
ROWS = [result(LONG, grid) for grid in ("bf16", "q8_0", "q4_k_m")]


def lines(results: list[BenchResult], width: int) -> list[str]:
    console = Console(width=width, file=io.StringIO(), color_system=None)
    console.print(report(results, console))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


@pytest.mark.parametrize("width", [72, 80, 100, 120, 160, 200])
@pytest.mark.parametrize(
    "results", [ROWS[:1], ROWS, [*ROWS, result("SmolLM2-135M-Instruct", "q4_0")]], ids=["one", "one model", "two"]
)
def test_every_width_shows_every_number_whole(width: int, results: list[BenchResult]) -> None:
    found = lines(results, width)
    assert max(map(len, found)) <= width
    text = "\n".join(found)
    assert "…" not in text
    for number in ("256", "14.4 ± 3.6", "750 ms", "1.25 s", "1.56 GiB", "4.95", "12.50", "0.0300 ±", "92.0 ± 2.7"):
        assert text.count(number) >= len(results), number


def test_wide_is_one_table_and_narrow_has_every_column_once() -> None:
    assert sum("q4_k_m" in line for line in lines(ROWS, 200)) == 1
    assert sum("q4_k_m" in line for line in lines(ROWS, 80)) in (3, 4)
    for width in (80, 200):
        headers = [line.split() for line in lines(ROWS, width) if line.startswith("grid")]
        assert all(header[0] == "grid" for header in headers)
        words = [word for header in headers for word in header[1:]]
        for name in ("size", "load", "perplexity", "ratio", "KLD"):
            assert words.count(name) == 1, (width, name)


def test_one_model_is_the_title_and_several_are_a_column() -> None:
    assert lines(ROWS, 160)[0].strip() == LONG
    two = lines([ROWS[0], result("SmolLM2-135M-Instruct", "bf16")], 200)
    assert any(line.startswith("model") for line in two)
    assert any(line.startswith("SmolLM2-135M-Instruct ") for line in two)


def test_rows_that_look_alike_are_told_apart_by_their_folder() -> None:
    text = "\n".join(lines([result("M", "q4_0", folder="runs/rtn"), result("M", "q4_0", folder="runs/gptq")], 200))
    assert "rtn/M-Q4_0" in text
    assert "gptq/M-Q4_0" in text


def test_legend_says_what_the_numbers_are() -> None:
    text = " ".join(" ".join(lines(ROWS, 80)).split())
    assert "llama-cpp on Imaginary 9000, 4 threads of 4 cores" in text
    assert "first after 128, prefill 512, decode 128; mean ± sample deviation of 5 runs" in text
    assert "100 tokens scored in 8 windows of 512 of evaluation.txt, ± standard error" in text
    assert f"top-1 against {LONG} in float32, whose perplexity is 12.25 ± 0.00" in text
    assert "45.0 MiB of it before the file was opened" in text


def test_what_was_not_measured_is_a_dash_and_why_is_said_once() -> None:
    failure = Failure(stage="speed", exit_code=5, message="measuring x was killed (SIGKILL)")
    broken = dataclasses.replace(ROWS[0], speed=None, quality=None, failures=(failure,))
    text = "\n".join(lines([broken, ROWS[1]], 200))
    row = next(line for line in text.splitlines() if line.startswith("bf16"))
    assert row.count("–") == 5 + 6
    assert text.count("killed") == 1
    assert f"speed failed ({LONG} bf16): measuring x was killed (SIGKILL)" in text


def measured() -> BenchResult:
    """Return a row with everything that speed can have."""
    assert ROWS[0].speed is not None
    latencies = (tuple([0.06] * 80 + [0.07] * 20),) * 5
    decode = dataclasses.replace(ROWS[0].speed.decode, latencies=latencies, joules=(256.0,) * 5)
    deep = Samples(tokens=128, seconds=(10.0,) * 5, depth=512)
    speed = dataclasses.replace(
        ROWS[0].speed, decode=decode, deeper=(deep,), warm_load_seconds=0.35, gpu_memory=2 << 30
    )
    traffic = Traffic(weight_bytes=10**9, touched_weights=1, cache_values=0, width=1, inner=1, vocab=1)
    estimates = [
        Prediction(profile=name, tokens_per_second=33.3, depth=0, needed=1, usable=usable)
        for name, usable in (("laptop-8g", 2), ("phone-4g", 0))
    ]
    bandwidth = Bandwidth(read=20e9, triad=18e9, threads=4)
    return dataclasses.replace(
        ROWS[0],
        speed=speed,
        traffic=traffic,
        bandwidth=bandwidth,
        predictions=tuple(estimates),
        emulated="emulated on X1",
    )


def test_everything_that_was_measured_has_its_column() -> None:
    text = "\n".join(lines([measured()], 400))
    # 128 tokens in 8 s (and once 16) are 14.4 tokens/s: of 20 GB/s at 1 GB a token 72 %. 256 J for 128 tokens are 2 J.
    for shown in (
        "12.8 ± 0.0",
        "60 70 70",
        "  72  ",
        "2.00 ± 0.00",
        "1.25 s 350 ms",
        "2.00 GiB",
        "~33.3",
        "too large",
    ):
        assert shown in text, shown
    assert "llama-cpp, emulated on X1" in text
    assert "14.4 ± 3.6 !" in text
    assert "! varies by more than 5 %" in text
    assert "20.0 GB/s that memory was measured to give to 4 threads" in text
    assert "energy: not measured" not in text
    assert "energy: not measured" in "\n".join(lines(ROWS[:1], 400))
    for width in (80, 100, 160):
        found = lines([measured()], width)
        assert max(map(len, found)) <= width
        assert "too large" in "\n".join(found)


def test_two_runtimes_of_one_file_are_told_apart_by_a_column() -> None:
    rows = [ROWS[0], dataclasses.replace(ROWS[0], runtime="torch", notes=("slow",))]
    text = "\n".join(lines(rows, 200))
    assert any(line.startswith("bf16  torch") for line in text.splitlines())
    assert f"note ({LONG} bf16 in torch): slow" in text
    assert "llama-cpp, torch on Imaginary 9000" in text


def test_a_note_that_holds_for_every_row_is_said_once() -> None:
    results = [dataclasses.replace(row, notes=("a short text",)) for row in ROWS]
    text = "\n".join(lines(results, 160))
    assert text.count("note: a short text") == 1


def test_without_a_reference_divergence_is_a_dash() -> None:
    quality = dataclasses.replace(
        ROWS[0].quality,
        kld=None,
        same_top=None,
        reference=None,
        reference_nll=None,  # type: ignore[type-var]
    )
    alone = dataclasses.replace(ROWS[0], quality=quality)
    row = next(line for line in lines([alone], 200) if line.startswith("bf16"))
    assert row.split()[-2:] == ["–", "–"]
    assert not any("ratio" in line for line in lines([alone], 200))


def test_only_a_warm_up_is_no_rate() -> None:
    assert ROWS[0].speed is not None
    empty = Samples(tokens=512, seconds=(), warm_up=(1.0,))
    speed = dataclasses.replace(ROWS[0].speed, first_token=empty, prefill=empty, decode=empty)
    row = next(line for line in lines([dataclasses.replace(ROWS[0], speed=speed)], 200) if line.startswith("bf16"))
    assert row.count("–") == 3


@pytest.mark.parametrize(
    ("kld", "shown"), [(5e-7, "5.0e-07 ± 3e-08"), (4e-4, "4.0e-04 ± 2e-05"), (0.0721, "0.0721 ± 0.0042")]
)
def test_small_divergences_keep_their_digits(kld: float, shown: str) -> None:
    assert shown in "\n".join(lines([result("M", "q8_0", kld=kld)], 160))
