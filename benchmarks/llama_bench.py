"""The keys of llama-bench's JSON, filled from our results, so that scripts made for it read them: one record a test.

Facts: llama.cpp, tools/llama-bench; `n_prompt` and `n_gen` say which test it is, `avg_ts` is tokens/s, `_ns` are nanoseconds. What a
runtime does not have (batch sizes outside llama.cpp) is null.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from r1q.benchmarks.result import BenchResult, Samples
from r1q.core.metrics import sample_deviation

BATCH, MICRO_BATCH = 2048, 512  # of the llama-cpp adapter


def records(result: BenchResult) -> list[dict[str, Any]]:
    """Return a record for the prompt, for prefill, and for decoding at every depth; none where nothing was timed."""
    if result.speed is None:
        return []
    prompts = [(samples, samples.tokens, 0) for samples in (result.speed.first_token, result.speed.prefill)]
    decodes = [(samples, 0, samples.tokens) for samples in result.speed.decodes]
    return [_record(result, *test) for test in (*prompts, *decodes) if test[0].seconds]


def decode_record(result: BenchResult) -> dict[str, Any]:
    """Return the record of decoding at the least depth, empty where it was not timed: what stands beside a result's own keys."""
    if result.speed is None or not result.speed.decode.seconds:
        return {}
    return _record(result, result.speed.decode, 0, result.speed.decode.tokens)


def _record(result: BenchResult, samples: Samples, prompt: int, generated: int) -> dict[str, Any]:
    nanoseconds = [round(1e9 * seconds) for seconds in samples.seconds]
    rates = [samples.tokens / seconds for seconds in samples.seconds]
    llama = result.runtime == "llama-cpp"
    gpu = result.device if result.target == "gpu" else ""
    return {
        "build_commit": result.versions.get("llama.cpp", ""),
        "cpu_info": result.machine.cpu,
        "gpu_info": gpu,
        "backends": result.runtime if not gpu else f"{result.runtime} (GPU)",
        "model_filename": result.artifact,
        "model_type": f"{result.name} {result.grid}",
        "model_size": result.bytes,
        "model_n_params": result.weights,
        "n_batch": BATCH if llama else None,
        "n_ubatch": MICRO_BATCH if llama else None,
        "n_threads": result.threads,
        "type_k": result.cache,
        "type_v": result.cache,
        "n_gpu_layers": result.gpu_layers,
        "flash_attn": -1 if llama else None,
        "n_prompt": prompt,
        "n_gen": generated,
        "n_depth": samples.depth,
        "test_time": result.time,
        "avg_ns": round(float(np.mean(nanoseconds))),
        "stddev_ns": round(sample_deviation(nanoseconds) or 0),
        "avg_ts": float(np.mean(rates)),
        "stddev_ts": sample_deviation(rates) or 0.0,
        "samples_ns": nanoseconds,
        "samples_ts": rates,
    }
