"""The whole bench on small real models: results, events, refusals, and runtimes that die half way."""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from r1q.benchmarks import quality
from r1q.benchmarks.course import Event
from r1q.benchmarks.result import BenchResult
from r1q.benchmarks.run import TEXT, bench
from r1q.cli import main
from r1q.core.errors import InputError, UsageError
from r1q.runtimes.table import RUNTIMES

pytestmark = pytest.mark.runtime
FAST = {"threads": 1, "prompt": 8, "prefill": 16, "generate": 4, "depths": (0, 16), "repetitions": 2, "windows": 2}


def run(artifacts: list[Path], **options: object) -> tuple[list[BenchResult], list[Event]]:
    found = list(bench(artifacts, **{**FAST, **options}))  # type: ignore[arg-type]
    return [one for one in found if isinstance(one, BenchResult)], [one for one in found if isinstance(one, Event)]


def quantized(checkpoint: Path, folder: Path, scheme: str) -> Path:
    """Quantize as a user does and return the output folder, which remembers its source."""
    arguments = ["quantize", str(checkpoint), "--scheme", scheme, "-o", str(folder), "--quiet"]
    done = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return folder


def test_a_file_without_a_reference_has_speed_and_perplexity(tiny_gguf: Path) -> None:
    (result,), events = run([tiny_gguf], command=("r1q", "bench", "x"))
    assert result.exit_code == 0
    assert (result.name, result.grid, result.runtime, result.threads) == ("Tiny-F32", "f32", "llama-cpp", 1)
    assert result.command == ("r1q", "bench", "x")
    assert result.speed is not None
    assert [len(result.speed.prefill.seconds), len(result.speed.prefill.warm_up)] == [2, 1]
    assert (result.speed.first_token.tokens, result.speed.prefill.tokens, result.speed.decode.tokens) == (8, 16, 4)
    assert result.speed.peak_memory > result.speed.base_memory
    assert [(one.depth, len(one.seconds)) for one in result.speed.decodes] == [(0, 2), (16, 2)]
    assert [len(tokens) for one in result.speed.decodes for tokens in one.latencies] == [4] * 4
    assert result.speed.warm_load_seconds is not None
    assert result.traffic is not None
    rate = result.speed.decode.rate
    assert rate is not None
    # After half of the four tokens two are in memory; 20 GB/s were measured.
    assert result.bandwidth_use() == pytest.approx((result.traffic.weight_bytes + 2 * 128 * 2) * rate.value / 20e9)
    assert result.quality is not None
    assert (result.quality.windows, result.quality.length, len(result.quality.nll)) == (2, 128, 126)
    assert result.quality.kld is None
    assert any("give one with --reference" in note for note in result.notes)
    assert result.quality.text == TEXT.name
    assert [event.stage for event in events] == ["speed"] * 3 + ["quality"] * 3
    assert [event.done for event in events] == [0, 1, 2, 0, 1, 2]
    assert BenchResult.from_json(result.to_json()) == result


def test_no_machine_path_but_the_users_own_is_in_the_json(tiny_gguf: Path) -> None:
    (result,), _ = run([tiny_gguf])
    data = json.loads(result.to_json())
    assert data.pop("artifact") == str(tiny_gguf)
    assert "/" not in json.dumps({**data, "machine": {}, "versions": {}})


def test_less_than_asked_for_is_noted(tiny_gguf: Path) -> None:
    (result,), _ = run([tiny_gguf], prefill=512, generate=129, depths=(0, 64))
    assert result.speed is not None
    assert result.speed.deeper == ()
    assert "no decoding at depth 64: with 128 tokens more it is beyond the model's context of 128" in result.notes
    assert (result.speed.prefill.tokens, result.speed.decode.tokens) == (128, 128)
    assert {note for note in result.notes if "whole context" in note} == {
        "prefill is 128 tokens, the model's whole context",
        "generate is 128 tokens, the model's whole context",
    }


@pytest.mark.parametrize(("others", "said"), [(0.1, []), (0.62, ["other programs kept 62% of the processor busy"])])
def test_a_busy_machine_is_said(
    tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch, others: float, said: list[str]
) -> None:
    monkeypatch.setattr("r1q.benchmarks.speed.busy", lambda: others)
    (result,), _ = run([tiny_gguf])
    assert [note.split(":")[0] for note in result.notes if "busy" in note] == said


def test_three_schemes_and_a_stranger_against_one_reference(
    make_model: Callable[..., Path], tmp_path: Path, tiny_gguf: Path
) -> None:
    checkpoint = make_model("llama")
    folders = [quantized(checkpoint, tmp_path / scheme, scheme) for scheme in ("f32", "q8_0", "q4_0")]
    own_text = checkpoint / "evaluation.txt"
    own_text.write_text("the quick brown fox thinks again: 12 + 30 = 42. " * 100)
    (stranger, *results), events = run([tiny_gguf, *folders], reference=checkpoint)
    # Once for all, then its two windows.
    assert [event.stage for event in events].count("reference") == 1 + 2
    # Another model is refused in its own row only, and its speed is kept.
    assert [result.exit_code for result in (stranger, *results)] == [3, 0, 0, 0]
    assert "they are not the same model" in stranger.failures[0].message
    assert stranger.speed is not None
    assert stranger.quality is None
    qualities = [result.quality for result in results if result.quality is not None]
    for one in qualities:
        assert one.reference == checkpoint.name
        # The text beside the reference is the default; a context of 256 makes windows of 256.
        assert one.text_sha256 == hashlib.sha256(own_text.read_bytes()).hexdigest()
        assert (one.length, one.first, len(one.nll)) == (256, 128, 2 * 127)
    found = [one.fidelity() for one in qualities]
    klds = [one.kld.value for one in found if one.kld is not None]
    # A float16 cache is all that the first differs by: 2^-11 of keys and values. 8 and 4 bits come above it, in order.
    assert klds[0] < 1e-5
    assert klds[0] < klds[1] < klds[2]
    assert klds[2] > 1e-4
    assert found[0].top1 is not None
    assert found[0].top1.value > 0.98
    base = qualities[0].reference_perplexity()
    assert base is not None
    assert found[0].perplexity.value == pytest.approx(base.value, rel=1e-3)


def test_float32_file_diverges_from_our_own_forward_by_rounding(
    make_model: Callable[..., Path], tmp_path: Path
) -> None:
    checkpoint = make_model("qwen2", tied=True)
    (path,) = quantized(checkpoint, tmp_path / "out", "f32").glob("*.gguf")
    options = {"cache": "f32", "flash_attention": False, "threads": 1, "context": 256}
    with tempfile.TemporaryFile() as logits:
        base = {"text": str(TEXT), "windows": 3, "logits": logits.fileno()}
        opened, *windows = quality.reference(
            {**base, "checkpoint": str(checkpoint), "limit": 1 << 30, "noise_floor": False}
        )
        assert opened["reference"]["notes"] == []
        given = {**base, "reference": opened["reference"], "options": options}
        facts, *scores = quality.scores({**given, "path": str(path), "runtime": "llama-cpp"})
    assert facts["opened"]["notes"] == []  # the GGUF's own tokenizer agrees
    for own, theirs in zip(windows, scores, strict=True):
        np.testing.assert_allclose(theirs["nll"], own["nll"], atol=1e-3)
        assert max(theirs["kld"]) < 1e-6


def test_a_disk_limit_leaves_fewer_windows_and_says_so(make_model: Callable[..., Path]) -> None:
    window = 4 * 127 * 320
    with tempfile.TemporaryFile() as logits:
        job = {"checkpoint": str(make_model("llama")), "text": str(TEXT), "windows": 2, "logits": logits.fileno()}
        opened, *windows = quality.reference({**job, "limit": window + 1, "noise_floor": False})
        assert os.fstat(logits.fileno()).st_size == window
    assert len(windows) == 1
    assert opened["reference"]["notes"] == [
        "1 of 2 windows are scored: the reference's logits lie on disk, and 0 MiB is the limit"
    ]


def test_a_reference_that_fails_leaves_speed_and_perplexity(make_model: Callable[..., Path], tiny_gguf: Path) -> None:
    (result,), _ = run([tiny_gguf], reference=make_model("llama"), logits_limit=1000)
    assert [(failure.stage, failure.exit_code) for failure in result.failures] == [("reference", 5)]
    assert result.speed is not None
    assert result.quality is not None
    assert result.quality.kld is None


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"target": "tpu"}, "no target named 'tpu'"),
        ({"runtime": "llama"}, "no runtime named 'llama'; did you mean llama-cpp"),
        ({"repetitions": 0}, "repetitions is 0"),
        ({"threads": 0}, "threads is 0"),
        ({"depths": (-1,)}, "none below 0"),
        ({"estimates": ("phone-9g",)}, "no profile named 'phone-9g'; did you mean"),
        ({"ram": 1 << 30}, "--ram is a ceiling for an emulated target such as mobile, and cpu is this machine"),
        ({"target": "rtx-4090"}, "can be estimated .* but not emulated"),
    ],
)
def test_wishes_that_cannot_be_are_refused_first(tiny_gguf: Path, options: dict[str, object], reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        run([tiny_gguf], **options)


def test_damaged_inputs_are_refused_first(tiny_gguf: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(tiny_gguf.read_bytes()[:200])
    with pytest.raises(InputError, match=r"bad\.gguf"):
        next(bench([tiny_gguf, bad]))
    with pytest.raises(InputError, match="cannot be read"):
        next(bench([tiny_gguf], text=tmp_path / "absent.txt"))


DYING = """
import os
from r1q.runtimes.base import Options
from r1q.runtimes.echo import Echo, EchoSession

class Session(EchoSession):
    calls = 0
    def step(self, pairs):
        self.calls += 1
        if self.calls > 4 * 2:
            os.kill(os.getpid(), 9)
        return super().step(pairs)
    def logits(self, tokens, first=0):
        self.calls += 1
        if self.calls > 1:
            import resource
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            os.abort()
        return super().logits(tokens, first)

class Dying(Echo):
    name = "dying"
    formats = ("gguf",)
    def open(self, path, options):
        return Session(264, options.context, options.sequences, load_seconds=0.1)
"""


@pytest.fixture
def dying(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Install a runtime as a third party would, that is killed in the second repetition and aborts in the second window."""
    plugin = tmp_path / "plugin"
    info = plugin / "dying_runtime-1.0.dist-info"
    info.mkdir(parents=True)
    (plugin / "dying_runtime.py").write_text(DYING)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: dying-runtime\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[r1q.runtimes]\ndying = dying_runtime:Dying\n")
    monkeypatch.syspath_prepend(plugin)
    monkeypatch.setenv("PYTHONPATH", str(plugin))
    RUNTIMES.__dict__.pop("entries", None)
    yield
    RUNTIMES.__dict__.pop("entries", None)


@pytest.mark.usefixtures("dying")
def test_a_runtime_that_dies_keeps_what_was_measured_and_the_others_go_on(
    tiny_gguf: Path, tmp_path: Path, write_gguf: Callable[..., Path]
) -> None:
    other = write_gguf(tmp_path / "Other-F32.gguf", seed=2)
    results, _ = run([tiny_gguf, other], runtime="dying", repetitions=3, depths=(0,))
    assert [result.name for result in results] == ["Tiny-F32", "Other-F32"]
    for result in results:
        assert result.speed is not None
        # Eight steps were allowed: the warm-up's four and the first repetition's.
        assert len(result.speed.decode.seconds) == 1
        assert result.quality is not None
        assert result.quality.windows == 1
        assert [(failure.stage, failure.exit_code) for failure in result.failures] == [("speed", 5), ("quality", 4)]
        assert "killed (SIGKILL)" in result.failures[0].message
        assert "crashed (SIGABRT)" in result.failures[1].message
        assert result.exit_code == 5
