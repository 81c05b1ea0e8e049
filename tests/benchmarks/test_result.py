"""BenchResult: numbers worked by hand from its samples, and a JSON round trip that loses nothing."""

import dataclasses
import json
import math

import pytest

from r1q.benchmarks.bandwidth import Bandwidth
from r1q.benchmarks.machine import Machine
from r1q.benchmarks.profiles import Prediction
from r1q.benchmarks.result import BenchResult, Failure, Floor, Quality, Samples, Speed
from r1q.benchmarks.traffic import Traffic
from r1q.core.errors import InputError
from r1q.core.metrics import Estimate

MACHINE = Machine(cpu="Imaginary 9000", cores=4, logical=8, memory=16 << 30, system="Linux 6", features=("avx2",))
SPEED = Speed(
    load_seconds=0.25,
    context=512,
    first_token=Samples(tokens=128, seconds=(0.5, 0.7), warm_up=(9.0,)),
    prefill=Samples(tokens=512, seconds=(1.0, 2.0), warm_up=(9.0,)),
    decode=Samples(tokens=128, seconds=(4.0, 8.0)),
    base_memory=40 << 20,
    peak_memory=900 << 20,
)
QUALITY = Quality(
    text="evaluation.txt",
    text_sha256="ab" * 32,
    windows=1,
    length=6,
    first=3,
    nll=(math.log(2), math.log(8)),
    kld=(0.0, 0.5),
    same_top=(True, False),
    reference="model",
    reference_nll=(math.log(2), math.log(2)),
)
RESULT = BenchResult(
    artifact="out/Model-Q4_0.gguf",
    name="Model-Q4_0",
    format="gguf",
    grid="q4_0",
    bytes=1000,
    weights=1600,
    bits_per_weight=4.5,
    target="cpu",
    runtime="llama-cpp",
    device="cpu",
    threads=2,
    machine=MACHINE,
    versions={"r1q": "0.1.0"},
    command=("r1q", "bench", "out/é.gguf"),
    time="2026-01-01T00:00:00+00:00",
    speed=SPEED,
    quality=QUALITY,
    failures=(Failure(stage="speed", exit_code=5, message="killed"),),
    notes=("short text",),
)


FULL = dataclasses.replace(
    RESULT,
    speed=dataclasses.replace(
        SPEED,
        warm_load_seconds=0.1,
        cold="",
        deeper=(Samples(tokens=4, seconds=(1.0,), depth=512, latencies=((0.1, 0.2),), joules=(1.0,)),),
        gpu_memory=5,
    ),
    quality=dataclasses.replace(
        QUALITY,
        floor=Floor(
            kld=Estimate(value=1e-5, error=None),
            kld_median=1e-6,
            kld_p99=1e-4,
            top1=Estimate(value=1.0, error=0.0),
            perplexity_ratio=Estimate(value=1.0, error=0.1),
        ),
    ),
    traffic=Traffic(weight_bytes=1, touched_weights=2, cache_values=3, width=4, inner=5, vocab=6),
    bandwidth=Bandwidth(read=1e9, triad=2e9, threads=2),
    predictions=(Prediction(profile="phone-4g", tokens_per_second=3.0, depth=0, needed=5, usable=6),),
    emulated="emulated on X",
)


def test_rate_is_the_mean_of_rates_as_llama_bench_has_it() -> None:
    # 512 and 256 tokens/s: mean 384, deviation 128·√2; the mean time would give 341.
    rate = SPEED.prefill.rate
    assert rate is not None
    assert rate.value == 384
    assert rate.error == pytest.approx(128 * math.sqrt(2))
    duration = SPEED.first_token.duration
    assert duration is not None
    assert duration.value == pytest.approx(0.6)
    assert duration.error == pytest.approx(0.1 * math.sqrt(2))


def test_no_samples_have_no_rate_and_one_has_no_deviation() -> None:
    assert Samples(tokens=5, seconds=()).rate is None
    assert Samples(tokens=5, seconds=()).duration is None
    one = Samples(tokens=5, seconds=(2.0,)).rate
    assert one is not None
    assert (one.value, one.error) == (2.5, None)


def test_summary_holds_the_numbers_of_the_table() -> None:
    summary = RESULT.summary()
    assert summary["decode_tokens_per_second"]["value"] == 24
    assert summary["perplexity"]["value"] == pytest.approx(4)
    assert summary["reference_perplexity"]["value"] == pytest.approx(2)
    assert summary["mean_kld"]["value"] == 0.25
    assert summary["top1_agreement"]["value"] == 0.5
    assert summary["peak_memory"] == 900 << 20


@pytest.mark.parametrize(
    "result",
    [
        RESULT,
        dataclasses.replace(RESULT, speed=None, quality=None),
        FULL,
        dataclasses.replace(
            RESULT,
            quality=dataclasses.replace(QUALITY, kld=None, same_top=None, reference=None, reference_nll=None),
        ),
    ],
    ids=["whole", "nothing measured", "everything", "no reference"],
)
def test_json_is_one_line_and_comes_back_equal(result: BenchResult) -> None:
    line = result.to_json()
    assert "\n" not in line
    assert BenchResult.from_json(line) == result
    assert json.loads(line)["summary"] == json.loads(json.dumps(result.summary()))


def test_a_line_of_schema_1_is_still_read() -> None:
    data = json.loads(RESULT.to_json())
    old = {key: value for key, value in data.items() if key not in ("traffic", "bandwidth", "predictions", "context")}
    old["schema"] = 1
    for key in ("warm_load_seconds", "cold", "deeper", "gpu_memory"):
        del old["speed"][key]
    for timing in ("first_token", "prefill", "decode"):
        old["speed"][timing] = {key: old["speed"][timing][key] for key in ("tokens", "seconds", "warm_up")}
    del old["quality"]["floor"]
    assert BenchResult.from_json(json.dumps(old)) == RESULT


def test_latencies_energy_and_noise_by_hand() -> None:
    # 101 tokens of 0…100 ms in two repetitions: the quantiles are the numbers themselves.
    times = tuple(index / 1000 for index in range(101))
    samples = Samples(tokens=2, seconds=(1.0, 1.25), latencies=(times[:50], times[50:]), joules=(3.0, 5.0))
    assert samples.latency(0.5) == pytest.approx(0.05)
    assert samples.latency(0.99) == pytest.approx(0.099)
    energy = samples.joules_per_token
    assert energy is not None
    assert energy.value == 2
    # Rates 2 and 1.6: mean 1.8, deviation 0.4/√2, which is 15.7 %.
    assert samples.variation == pytest.approx(0.4 / math.sqrt(2) / 1.8)
    assert samples.noisy
    assert not Samples(tokens=2, seconds=(1.0, 1.04)).noisy
    assert Samples(tokens=2, seconds=(1.0,)).latency(0.5) is None


def test_bandwidth_use_by_hand() -> None:
    traffic = Traffic(weight_bytes=900, touched_weights=100, cache_values=10, width=1, inner=1, vocab=1)
    decode = Samples(tokens=20, seconds=(2.0, 2.0), depth=40)
    bandwidth = Bandwidth(read=10_000.0, triad=40_000.0, threads=2)
    result = dataclasses.replace(RESULT, traffic=traffic, bandwidth=bandwidth)
    # 900 bytes of weights and 50 tokens of 10 values of two bytes, ten times a second, of 40 kB/s.
    assert result.bandwidth_use(decode) == pytest.approx(1900 * 10 / 40_000)
    floats = dataclasses.replace(result, compute_bytes=4)
    assert floats.bandwidth_use(decode) == pytest.approx(1400 * 10 / 40_000)
    assert RESULT.bandwidth_use() is None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"schema": 99}, "schema 99"),
        ({"bytes": "many"}, "'many' is not int"),
        ({"speed": {"load_seconds": 1.0}}, "context"),
    ],
)
def test_another_line_is_refused(change: dict[str, object], reason: str) -> None:
    data = {**json.loads(RESULT.to_json()), **change}
    with pytest.raises(InputError, match=reason):
        BenchResult.from_json(json.dumps(data))


def test_no_json_is_refused() -> None:
    with pytest.raises(InputError, match="not a line of r1q bench"):
        BenchResult.from_json("model | size | t/s")


def test_exit_code_is_the_worst_failures() -> None:
    worse = Failure(stage="quality", exit_code=3, message="other vocabulary")
    assert dataclasses.replace(RESULT, failures=(*RESULT.failures, worse)).exit_code == 5
    assert dataclasses.replace(RESULT, failures=()).exit_code == 0
