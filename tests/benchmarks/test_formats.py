"""Results as JSON, CSV and Markdown, read by parsers that are not ours; llama-bench's keys; and what an interruption leaves."""

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from r1q.benchmarks.course import Event
from r1q.benchmarks.formats import read_results, to_csv, to_json, to_jsonl, to_markdown
from r1q.benchmarks.result import BenchResult, Failure, Samples, Speed
from r1q.benchmarks.show import exit_code, show_bench
from r1q.cli import main
from r1q.core.errors import InputError

# From tools/llama-bench/README.md: what its JSON has.
LLAMA_BENCH = [
    "build_commit",
    "cpu_info",
    "gpu_info",
    "backends",
    "model_filename",
    "model_type",
    "model_size",
    "model_n_params",
    "n_batch",
    "n_ubatch",
    "n_threads",
    "type_k",
    "type_v",
    "n_gpu_layers",
    "flash_attn",
    "n_prompt",
    "n_gen",
    "n_depth",
    "test_time",
    "avg_ns",
    "stddev_ns",
    "avg_ts",
    "stddev_ts",
    "samples_ns",
    "samples_ts",
]


def result(name: str = "Model", **more: object) -> BenchResult:
    from r1q.benchmarks.machine import Machine

    machine = Machine(cpu="Imaginary 9000", cores=4, logical=8, memory=1, system="Linux", features=())
    speed = Speed(
        load_seconds=0.5,
        context=640,
        first_token=Samples(tokens=128, seconds=(0.5, 0.25)),
        prefill=Samples(tokens=512, seconds=(1.0, 2.0)),
        decode=Samples(tokens=128, seconds=(4.0, 8.0)),
        deeper=(Samples(tokens=128, seconds=(8.0, 8.0), depth=512),),
        base_memory=1,
        peak_memory=2,
    )
    facts = {
        "artifact": f"out/{name}.gguf", "name": name, "format": "gguf", "grid": "q4_0", "bytes": 1000, "weights": 2000,
        "bits_per_weight": 4.0, "target": "cpu", "runtime": "llama-cpp", "device": "cpu", "threads": 2, "machine": machine,
        "versions": {"llama.cpp": "b9000"}, "command": (), "time": "2026-01-01T00:00:00+00:00", "speed": speed,
    }  # fmt: skip
    return BenchResult(**{**facts, **more})  # type: ignore[arg-type]


def test_scripts_made_for_llama_bench_find_its_keys() -> None:
    (row,) = json.loads(to_json([result()]))
    assert [key for key in LLAMA_BENCH if key not in row] == []
    # 32 and 16 tokens/s; 4 and 8 s.
    assert (row["n_prompt"], row["n_gen"], row["n_depth"]) == (0, 128, 0)
    assert row["samples_ts"] == [32, 16]
    assert (row["avg_ts"], row["avg_ns"]) == (24, 6 * 10**9)
    assert row["stddev_ts"] == pytest.approx(8 * 2**0.5)
    tests = [(one["n_prompt"], one["n_gen"], one["n_depth"], one["avg_ts"]) for one in row["tests"]]
    assert tests == [(128, 0, 0, 384), (512, 0, 0, 384), (0, 128, 0, 24), (0, 128, 512, 16)]
    assert all(set(LLAMA_BENCH) == set(one) for one in row["tests"])


def test_what_was_not_timed_has_no_keys_of_llama_bench() -> None:
    (row,) = json.loads(to_json([result(speed=None)]))
    assert row["tests"] == []
    assert "avg_ts" not in row


@pytest.mark.parametrize("write", [to_json, to_jsonl])
def test_results_come_back_from_both_kinds_of_file(tmp_path: Path, write) -> None:  # type: ignore[no-untyped-def]
    results = [result("A"), result("B", speed=None, notes=("so",))]
    path = tmp_path / "results"
    path.write_text(write(results))
    assert read_results(path) == results


@pytest.mark.parametrize("text", ["", "\n", "[]", "[3]", "[", "hello", '{"schema": 2}'])
def test_another_file_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "results"
    path.write_text(text)
    with pytest.raises(InputError):
        read_results(path)


def test_csv_has_every_number_under_its_name() -> None:
    rows = list(csv.DictReader(io.StringIO(to_csv([result("A,B"), result("C", speed=None)]))))
    assert rows[0]["name"] == "A,B"
    assert float(rows[0]["decode_tokens_per_second.value"]) == 24
    assert float(rows[0]["decode@512.tokens_per_second.value"]) == 16
    assert rows[1]["decode_tokens_per_second.value"] == ""


def test_markdown_is_a_table_of_equal_rows_with_remarks_below() -> None:
    failure = Failure(stage="quality", exit_code=5, message="killed")
    text = to_markdown([result("A|B", notes=("busy",)), result("C", failures=(failure,))])
    lines = text.splitlines()
    table = [line.replace("\\|", "") for line in lines if line.startswith("|")]
    assert len({line.count("|") for line in table}) == 1
    assert len(table) == 4
    assert "24.0 ± 11.3" in table[2]
    assert lines[-2:] == ["- busy", "- quality failed: killed"]


def interrupted() -> Iterator[Event | BenchResult]:
    yield Event(stage="speed", artifact="A", done=0, total=2)
    yield result("A")
    raise KeyboardInterrupt


@pytest.mark.parametrize("kind", ["table", "json", "jsonl", "csv", "md"])
def test_what_was_measured_before_an_interruption_is_kept(tmp_path: Path, kind: str) -> None:
    output = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        show_bench(interrupted(), format_name=kind, output=output, quiet=True)
    text = output.read_text()
    assert "A" in text
    assert "24" in text
    if kind in ("json", "jsonl"):
        assert read_results(output) == [result("A")]


def test_the_exit_code_is_that_of_the_worst_row() -> None:
    rows = [result(failures=(Failure(stage="speed", exit_code=code, message=""),)) for code in (4, 5, 3)]
    assert exit_code(rows) == 5
    assert exit_code([result()]) == 0


def run(*arguments: object):  # type: ignore[no-untyped-def]
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_targets_are_listed_in_eighty_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    done = run("bench", "--list-targets")
    assert done.exit_code == 0
    assert max(map(len, done.output.splitlines())) <= 80
    for name in ("cpu", "gpu", "mobile", "laptop-8g", "rtx-4090", "phone-4g"):
        assert any(line.startswith(name) for line in done.output.splitlines())


def test_a_gpu_that_is_not_there_ends_with_4_and_says_what_to_do(tiny_gguf: Path) -> None:
    from r1q.benchmarks import gpu

    if gpu.find_gpus()[0]:
        pytest.skip("there is one")
    done = run("bench", tiny_gguf, "--target", "gpu")
    assert done.exit_code == 4
    assert "no GPU was found to measure on (nvidia-smi" in done.stderr
    assert "CMAKE_ARGS='-DGGML_CUDA=on'" in done.stderr


@pytest.mark.runtime
def test_a_phone_too_small_ends_with_5_and_the_figures_and_the_others_are_measured(tiny_gguf: Path) -> None:
    sizes = ("--prompt", 4, "--prefill", 8, "--generate", 2, "--depths", 0, "--repetitions", 2, "--windows", 1, "-q")
    # 0.4 MB of weights, a cache of 128 tokens, 1.4 MB of activations.
    done = run("bench", tiny_gguf, "--target", "mobile", "--ram", "1MiB", *sizes, "--json")
    assert done.exit_code == 5
    (row,) = [json.loads(line) for line in done.stdout.splitlines()]
    (failure,) = row["failures"]
    assert failure["stage"] == "fit"
    assert "needs 2 MiB (weights 0 MiB, keys and values of 128 tokens 0 MiB, activations 1 MiB)" in failure["message"]
    assert row["speed"] is None
    good = run("bench", tiny_gguf, "--target", "mobile", "--ram", "1GiB", *sizes, "--json", "--estimate", "phone-4g")
    assert good.exit_code == 0, good.output
    (row,) = [json.loads(line) for line in good.stdout.splitlines()]
    assert row["emulated"].startswith("emulated on ")
    assert row["memory_ceiling"] == 1 << 30
    assert row["ceiling"] in ("held by its control group", "watched 50 times a second")
    assert row["speed"]["context"] == 128
    assert [one["profile"] for one in row["predictions"]] == ["phone-4g"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--fail-on", "decode=-5%"], "--fail-on needs a --baseline"),
        (["--depths", "a,b"], "no list of numbers"),
        (["--ram", "lots", "--target", "mobile"], "is no size"),
        (["--format", "xml"], "xml"),
    ],
)
def test_wishes_that_cannot_be_are_refused(tiny_gguf: Path, options: list[str], says: str) -> None:
    done = run("bench", tiny_gguf, *options)
    assert done.exit_code == 2
    assert says in done.stderr
