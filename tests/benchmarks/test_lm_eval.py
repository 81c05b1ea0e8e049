"""lm-eval over our sessions: the same numbers as lm-eval's own transformers adapter, and a task from a local file.

Skipped where lm-eval is not installed: it brings some forty packages, so it is an extra and not in `dev`.
"""

from __future__ import annotations

import importlib.util
import json
import math
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from r1q.benchmarks.tasks import load_tasks
from r1q.cli import main
from r1q.core.errors import UsageError
from r1q.models.embedded import EMBEDDED
from r1q.models.tokenizer import Tokenizer
from r1q.runtimes.base import Options, Session
from r1q.runtimes.table import load_runtime

if importlib.util.find_spec("lm_eval") is None:
    pytest.skip("lm-eval is not installed: pip install 'r1q[lm-eval]'", allow_module_level=True)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # its own dependencies'
    from lm_eval.api.instance import Instance

    from r1q.benchmarks.lm_eval import R1qLM

pytestmark = [pytest.mark.runtime, pytest.mark.filterwarnings("ignore")]


def ask(kind: str, *arguments: tuple[Any, ...]) -> list[Instance]:
    return [Instance(kind, {}, given, index) for index, given in enumerate(arguments)]


def quantized(folder: Path, scheme: str, *model: str) -> Path:
    arguments = ["quantize", *model, "--scheme", scheme, "-o", str(folder), "--quiet"]
    done = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    (path,) = folder.glob("*.gguf")
    return path


def opened(path: Path, **options: Any) -> Session:
    given = {"threads": 1, "cache": "f32", "flash_attention": False, **options}
    return load_runtime("llama-cpp").open(path, Options(**given))


@pytest.fixture
def checkpoint(make_model: Callable[..., Path]) -> Path:
    return make_model(
        "llama", vocab_size=300
    )  # all of them the tokenizer's: padding is never said by us, but is by others


@pytest.fixture
def ours(checkpoint: Path, tmp_path: Path) -> Iterator[R1qLM]:
    path = quantized(tmp_path / "out", "f32", str(checkpoint))
    with opened(path, context=96, sequences=2) as session:
        yield R1qLM(session, Tokenizer.open(checkpoint), max_tokens=40)


@pytest.fixture
def theirs(checkpoint: Path) -> Any:
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=str(checkpoint), device="cpu", dtype="float32", max_length=96, add_bos_token=True)


def test_as_transformers_through_lm_evals_own_adapter(ours: R1qLM, theirs: Any) -> None:
    pairs = (
        ("the quick brown", " fox"),
        ("the quick brown", " dog again"),
        ("12 + 30 =", " 42"),
        ("", "jumps over"),
        ("then, ", "a thinker"),
        ("the lazy dog " * 40, "thinks"),
    )
    found, expected = (lm.loglikelihood(ask("loglikelihood", *pairs)) for lm in (ours, theirs))
    np.testing.assert_allclose([value for value, _ in found], [value for value, _ in expected], atol=2e-3)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]

    texts = (("wait, let me think again.",), ("the quick brown fox jumps over the lazy dog. " * 20,))
    theirs.add_bos_token = False  # else it puts a second BOS before the text, and scores it
    rolled, own = (lm.loglikelihood_rolling(ask("loglikelihood_rolling", *texts)) for lm in (ours, theirs))
    np.testing.assert_allclose(rolled, own, rtol=2e-4)

    theirs.add_bos_token = True
    settings = {"until": ["o"], "max_gen_toks": 24, "do_sample": False}
    prompts = (("the quick brown", settings), ("12 + 30 =", settings), ("dog " * 80, settings))
    said, words = (lm.generate_until(ask("generate_until", *prompts)) for lm in (ours, theirs))
    assert said == words


def test_greedy_words_are_the_ones_called_greedy(ours: R1qLM) -> None:
    first, tokens = "the quick", ours.tokenizer.encode("the quick", add_special=True)
    word = ours.tokenizer.decode([int(ours.session.logits(tokens, first=len(tokens) - 1)[0].argmax())])
    ((value, greedy),) = ours._loglikelihood_tokens([(None, tokens, [int(ours.session.logits(tokens)[-1].argmax())])])
    assert greedy, word
    assert 0 < math.exp(value) <= 1
    sampled = ask("generate_until", (first, {"do_sample": True, "temperature": 3.0, "max_gen_toks": 9}))
    assert ours.generate_until(sampled) == ours.generate_until(sampled)


def test_what_does_not_fit_is_refused(ours: R1qLM) -> None:
    with pytest.raises(UsageError, match="leave no room"):
        ours.generate_until(ask("generate_until", ("x", {"max_gen_toks": 96})))
    with pytest.raises(UsageError, match="open it with more"):
        ours.loglikelihood(ask("loglikelihood", ("x", "dog, " * 97)))


def test_a_task_from_a_local_file_on_the_embedded_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval import simple_evaluate

    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    data = tmp_path / "sums.jsonl"
    tasks = load_tasks("tiny", 10).tasks
    data.write_text("".join(json.dumps({"question": t.prompt, "answer": t.answer}) + "\n" for t in tasks))
    task = {
        "task": "sums",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n\n\n"], "do_sample": False, "max_gen_toks": 200},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    path = quantized(tmp_path / "out", "q8_0")
    with opened(path, context=512, sequences=4, cache="f16", flash_attention=None) as session:
        lm = R1qLM(session, Tokenizer.open(EMBEDDED), think_end="</think>")
        found: Any = simple_evaluate(
            model=lm, tasks=[task], apply_chat_template=True, bootstrap_iters=0, verbosity="ERROR"
        )
        raw = R1qLM(session, Tokenizer.open(EMBEDDED)).generate_until(
            ask(
                "generate_until",
                (lm.apply_chat_template([{"role": "user", "content": tasks[0].prompt}]), {"max_tokens": 200}),
            )
        )
    assert found["results"]["sums"]["exact_match,none"] >= 0.8
    assert "</think>" in raw[0]
    said = [sample["filtered_resps"][0] for sample in found["samples"]["sums"]]
    assert not any("think" in answer for answer in said)
