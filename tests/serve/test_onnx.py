"""An ONNX folder is served as a GGUF file is: side by side, streamed, thoughts apart, by either of its runtimes."""

from __future__ import annotations

import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from r1q.plan.job import Job, open_job, plan_job, run_job

pytestmark = pytest.mark.runtime


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the output folder of `r1q quantize --bits 4 --to onnx` on the embedded model."""
    output = tmp_path_factory.mktemp("onnx") / "tiny"
    opened = open_job(Job(bits=4, formats=("onnx",), output=output))
    list(run_job(opened, plan_job(opened)))
    return output


@pytest.mark.parametrize("runtime", ["onnxruntime", "onnxruntime-genai"])
def test_questions_side_by_side_get_the_answers_they_get_alone(runtime: str, folder: Path, run: Any) -> None:
    pytest.importorskip(runtime.replace("-", "_"))
    running = run(folder, "--runtime", runtime, "--parallel", "3", "--context", "256")
    assert f"{runtime} on cpu, 3 × 256 tokens" in running.about
    with running.client() as client:
        (name,) = [model.id for model in client.models.list()]

        def ask(number: int) -> tuple[str, str]:
            messages = [{"role": "user", "content": f"What is {number} + 3?"}]
            asked: dict[str, Any] = {"model": name, "messages": messages, "temperature": 0}
            if number % 2:
                message = client.chat.completions.create(**asked).choices[0].message
                return message.model_extra["reasoning_content"], message.content
            deltas = [chunk.choices[0].delta for chunk in client.chat.completions.create(**asked, stream=True)]
            thoughts = [(delta.model_extra or {}).get("reasoning_content") or "" for delta in deltas]
            return "".join(thoughts), "".join(delta.content or "" for delta in deltas)

        alone = [ask(number) for number in range(12, 18)]
        with ThreadPoolExecutor(6) as pool:
            together = list(pool.map(ask, range(12, 18)))
    assert together == alone
    assert [answer for _, answer in alone] == [str(number + 3) for number in range(12, 18)]
    assert all(thought for thought, _ in alone)
    # A client that leaves, and one that is told, as with llama.cpp.
    running.ask(stream=True).close()
    running.wait("vllm:request_success_total", 1, name=name, finished_reason="abort")
    assert running.end(signal.SIGTERM)[0] == 0
