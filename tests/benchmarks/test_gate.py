"""Changes and limits: intervals against scipy-free arithmetic by hand, verdicts, and the commands' exit codes."""

import dataclasses
import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from rich.console import Console

from r1q.benchmarks.changes import judge, show_changes
from r1q.benchmarks.formats import to_json, to_jsonl
from r1q.benchmarks.gate import T975, Limit, compare, parse_limits
from r1q.benchmarks.machine import Machine
from r1q.benchmarks.result import BenchResult, Quality, Samples, Speed
from r1q.cli import main
from r1q.core.errors import UsageError

MACHINE = Machine(cpu="Imaginary 9000", cores=4, logical=8, memory=16 << 30, system="Linux 6", features=())


def result(decode: list[float], kld: list[float], *, grid: str = "q4_0", sha: str = "a", cpu: str = "") -> BenchResult:
    """Return a result that decoded at these rates in tokens/s, with these divergences."""
    timing = Samples(tokens=128, seconds=(1.0, 1.0))
    speed = Speed(
        load_seconds=1.0,
        context=512,
        first_token=timing,
        prefill=timing,
        decode=Samples(tokens=1, seconds=tuple(1 / rate for rate in decode)),
        base_memory=1,
        peak_memory=1000,
    )
    quality = Quality(
        text="t", text_sha256=sha, windows=1, length=512, first=256, nll=(1.0,) * len(kld), kld=tuple(kld),
        same_top=(True,) * len(kld), reference="r", reference_nll=(1.0,) * len(kld),
    )  # fmt: skip
    return BenchResult(
        artifact="m.gguf", name="m", format="gguf", grid=grid, bytes=100, weights=100, bits_per_weight=8.0, target="cpu",
        runtime="llama-cpp", device="cpu", threads=4, machine=dataclasses.replace(MACHINE, cpu=cpu or MACHINE.cpu), versions={},
        command=(), time="", speed=speed, quality=quality,
    )  # fmt: skip


def change(before: BenchResult, after: BenchResult, metric: str):  # type: ignore[no-untyped-def]
    return next(one for one in compare(before, after) if one.metric == metric)


def test_the_table_of_t_holds_against_the_density_integrated() -> None:
    for freedom in (1, 2, 3, 5, 10, 30):
        constant = math.gamma((freedom + 1) / 2) / (math.sqrt(freedom * math.pi) * math.gamma(freedom / 2))
        x = np.linspace(0, T975[freedom - 1], 400_001)
        density = constant * (1 + x**2 / freedom) ** (-(freedom + 1) / 2)
        assert float(np.trapezoid(density, x)) == pytest.approx(0.475, abs=2e-5), freedom


def test_welch_by_hand() -> None:
    # 10, 12, 14: mean 12, variance 4; 20, 21, 22: mean 21, variance 1. Error √(4/3 + 1/3) = 1.291;
    # (5/3)²/((16/9 + 1/9)/2) = 2.941 degrees of freedom, of which 2 count: t 4.303.
    found = change(result([10, 12, 14], [0.1] * 3), result([20, 21, 22], [0.1] * 3), "decode")
    assert (found.before, found.after) == (pytest.approx(12), pytest.approx(21))
    half = 4.303 * math.sqrt(5 / 3)
    assert found.low == pytest.approx((9 - half) / 12)
    assert found.high == pytest.approx((9 + half) / 12)
    assert found.real


def test_pairs_of_the_same_tokens_are_known_better_than_two_samples() -> None:
    rng = np.random.default_rng(0)
    base = rng.exponential(0.1, 200)
    more = base + rng.normal(0.01, 0.002, 200)
    paired = change(result([1, 1], base.tolist()), result([1, 1], more.tolist()), "kld")
    apart = change(result([1, 1], base.tolist()), result([1, 1], more.tolist(), sha="b"), "kld")
    assert paired.real
    assert not apart.real
    half = 1.96 * float((more - base).std(ddof=1)) / math.sqrt(200)
    assert paired.high - paired.low == pytest.approx(2 * half / base.mean(), rel=0.05)


@pytest.mark.parametrize(
    ("rates", "limit", "broken"),
    [
        ([100, 101, 99], -5, False),
        ([90, 91, 89], -5, True),  # ten per cent less, for sure
        ([90, 91, 89], -15, False),  # for sure, but not too much
        ([40, 90, 140], -5, False),  # much less on average, and nobody can tell
        ([150, 151, 149], -5, False),  # faster is no harm
        ([150, 151, 149], 20, True),  # unless a limit says so
    ],
)
def test_a_limit_is_broken_by_what_is_both_real_and_too_much(rates: list[float], limit: float, broken: bool) -> None:
    verdict = judge(
        [result([100, 101, 99], [0.1] * 3)], [result(rates, [0.1] * 3)], [Limit(metric="decode", percent=limit)]
    )
    assert bool(verdict.broken) == broken


def test_what_is_counted_needs_no_interval() -> None:
    before, after = result([1, 1], [0.1] * 3), dataclasses.replace(result([1, 1], [0.1] * 3), bytes=103)
    assert judge([before], [after], [Limit(metric="bytes", percent=2)]).broken
    assert not judge([before], [after], [Limit(metric="bytes", percent=4)]).broken


def test_from_nothing_every_real_change_is_too_much() -> None:
    verdict = judge([result([1, 1], [0.0] * 9)], [result([1, 1], [0.1] * 9)], [Limit(metric="kld", percent=20)])
    assert "from 0" in verdict.broken[0]
    assert not judge([result([1, 1], [0.0] * 9)], [result([1, 1], [0.0] * 9)], [Limit(metric="kld", percent=20)]).broken


def test_limits_are_read_or_refused() -> None:
    assert parse_limits("decode=-5%, kld=+20%") == [Limit(metric="decode", percent=-5), Limit(metric="kld", percent=20)]
    for text, reason in (("decode=5%", "with a sign"), ("", "names no limit"), ("decod=-5%", "did you mean decode")):
        with pytest.raises(UsageError, match=reason):
            parse_limits(text)


def test_what_cannot_be_judged_is_refused() -> None:
    one, limit = result([1, 1], [0.1] * 3), [Limit(metric="decode", percent=-5)]
    with pytest.raises(UsageError, match="no row is in both"):
        judge([one], [result([1, 1], [0.1] * 3, grid="q8_0")])
    with pytest.raises(UsageError, match=r"decode=-5% cannot be judged: the baseline was measured on Imaginary 9000"):
        judge([one], [result([1, 1], [0.1] * 3, cpu="Other")], limit)
    with pytest.raises(UsageError, match="is not in both files"):
        judge([one], [dataclasses.replace(one, speed=None)], limit)


def test_the_table_of_changes_fits_eighty_columns() -> None:
    old, new = (
        [result([100, 101, 99], [0.1] * 3)],
        [result([80, 81, 79], [0.1] * 3), result([1, 1], [0.1] * 3, grid="q8_0")],
    )
    console = Console(width=80, file=io.StringIO(), color_system=None)
    console.print(show_changes(judge(old, new, [Limit(metric="decode", percent=-5)])))
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert max(map(len, text.splitlines())) <= 80
    assert "-20.00 %" in text
    assert "limit broken: m q4_0 in llama-cpp: decode went from 100 to 80" in " ".join(text.split())
    assert "only in after: m q8_0 in llama-cpp" in text


def test_compare_ends_with_6_where_a_limit_is_broken(tmp_path: Path) -> None:
    old, new = tmp_path / "old.jsonl", tmp_path / "new.json"
    old.write_text(to_jsonl([result([100, 101, 99], [0.1] * 3)]))
    new.write_text(to_json([result([80, 81, 79], [0.1] * 3)]))
    for command in (["compare"], ["bench", "compare"]):
        good = CliRunner().invoke(main, [*command, str(old), str(new)])
        assert good.exit_code == 0, good.output
        bad = CliRunner().invoke(main, [*command, str(old), str(new), "--fail-on", "decode=-5%"])
        assert bad.exit_code == 6
        assert "Error: m q4_0 in llama-cpp: decode went from" in bad.stderr
    assert CliRunner().invoke(main, ["compare", str(old), str(tmp_path / "none")]).exit_code == 3
    (tmp_path / "bad").write_text("hello")
    assert CliRunner().invoke(main, ["compare", str(old), str(tmp_path / "bad")]).exit_code == 3
    assert json.loads(new.read_text())[0]["avg_ts"] == pytest.approx(80, abs=0.1)
