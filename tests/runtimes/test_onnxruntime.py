"""Our onnxruntime loop on the real exporter's folders: the contract, our own forward pass as the judge, and folders that lie."""

import hashlib
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from r1q.core.errors import InputError, MissingError, ResourceError, UsageError  # noqa: E402
from r1q.core.onnx_file import OnnxFolder  # noqa: E402
from r1q.runtimes.base import Options, Runtime  # noqa: E402
from r1q.runtimes.contract import CHECKS, Case, Check  # noqa: E402
from r1q.runtimes.onnx_decoder import read_decoder  # noqa: E402
from r1q.runtimes.table import load_runtime  # noqa: E402

pytestmark = pytest.mark.runtime
ROOT = Path(__file__).resolve().parents[2]
NAMES = [
    "onnxruntime",
    *(["onnxruntime-genai"] if __import__("importlib.util").util.find_spec("onnxruntime_genai") else []),
]
Exported = Callable[..., Path]
EditConfig = Callable[[Path, str, Any], None]
LONG = np.random.default_rng(11).integers(0, 512, 700).tolist()


@pytest.fixture(params=NAMES)
def runtime(request: pytest.FixtureRequest) -> Runtime:
    return load_runtime(request.param)


@pytest.mark.parametrize(
    ("kind", "level", "tolerance"),
    [
        ("f32", 1, 1e-3),
        ("int4", 1, 1e-3),
        # Level 4 rounds activations to int8, in steps of 1/127 of the largest of 32: 2^-24 more in a sum can move one by a step.
        ("int4", 4, 0.5),
    ],
)
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.name)
def test_contract(
    check: Check, runtime: Runtime, kind: str, level: int, tolerance: float, onnx_folder: Exported
) -> None:
    check.run(Case(runtime=runtime, path=onnx_folder(kind, level), tolerance=tolerance, options=Options(threads=1)))


@pytest.mark.parametrize("kind", ["f32", "int4"])
def test_logits_are_those_of_our_forward_pass(
    runtime: Runtime, kind: str, onnx_folder: Exported, forward_logits: Callable[[str, list[int]], Any]
) -> None:
    # 700 tokens: over the 256 rows and the 512 tokens that are computed at once, in every way to ask for them.
    wanted = forward_logits(kind, LONG)
    tolerance = 5e-5 * float(np.abs(wanted).max())  # float32 sums of up to 700 terms, in another order
    with runtime.open(onnx_folder(kind, 1), Options(context=1024)) as session:
        np.testing.assert_allclose(session.logits(LONG, first=0), wanted, atol=tolerance)
        np.testing.assert_allclose(session.logits(LONG, first=600), wanted[600:], atol=tolerance)
        np.testing.assert_allclose(session.prefill(0, LONG), wanted[-1], atol=tolerance)
        session.drop(0, 690)
        for position in range(690, 700):
            np.testing.assert_allclose(session.step([(0, LONG[position])])[0], wanted[position], atol=tolerance)


def test_sequences_of_different_lengths_step_together(runtime: Runtime, onnx_folder: Exported) -> None:
    texts = [LONG[10 * index : 10 * index + 5 + 3 * index] for index in range(4)]
    with runtime.open(onnx_folder("int4", 1), Options(context=64, sequences=4, threads=1)) as session:
        alone = [session.logits(text)[-3:] for text in texts]
        for sequence, text in enumerate(texts):
            session.prefill(sequence, text[:-3])
        for position, order in enumerate([(2, 0, 3, 1), (3, 1, 0), (1, 2, 3, 0)]):
            rows = session.step([(sequence, texts[sequence][position - 3]) for sequence in order])
            for row, sequence in zip(rows, order, strict=True):
                if sequence != 2 or position == 0:  # it missed a token
                    np.testing.assert_allclose(row, alone[sequence][position], atol=1e-3)


def test_the_folder_or_its_graph_can_be_named(runtime: Runtime, onnx_folder: Exported) -> None:
    folder = onnx_folder("f32", 1)
    with (
        runtime.open(folder, Options(context=24)) as left,
        runtime.open(folder / "model.onnx", Options(context=24)) as right,
    ):
        np.testing.assert_array_equal(left.prefill(0, LONG[:8]), right.prefill(0, LONG[:8]))
        assert (left.vocab, left.bos, left.device, left.context) == (512, right.bos, "cpu", 24)
        assert left.encode("<think>") == right.encode("<think>") != []


def test_a_graph_with_every_position_alone_gives_the_same(runtime: Runtime, onnx_copy: Callable[..., Path]) -> None:
    folder = onnx_copy("f32", 1)
    with runtime.open(folder, Options(context=700)) as session:
        wanted, last = session.logits(LONG), session.prefill(0, LONG)
    (folder / "model_all_logits.onnx").replace(folder / "model.onnx")
    assert read_decoder(OnnxFolder.open(folder)).every == "model.onnx"
    with runtime.open(folder, Options(context=700)) as session:
        np.testing.assert_allclose(session.logits(LONG, first=300), wanted[300:], atol=1e-3)
        np.testing.assert_allclose(session.prefill(0, LONG), last, atol=1e-3)


def test_without_every_position_scoring_is_refused_and_generating_goes_on(
    runtime: Runtime, onnx_copy: Callable[..., Path]
) -> None:
    folder = onnx_copy("f32", 1)
    (folder / "model_all_logits.onnx").unlink()
    with runtime.open(folder, Options(context=24)) as session:
        with pytest.raises(
            UsageError, match=r"last position only: export it again with r1q, which adds model_all_logits"
        ):
            session.logits([1, 2, 3])
        assert session.prefill(0, [1, 2, 3]).shape == (512,)


def test_a_text_that_ends_in_the_padding_token_has_its_own_logits(
    runtime: Runtime, onnx_copy: Callable[..., Path], edit_config: EditConfig
) -> None:
    folder = onnx_copy("f32", 1)
    edit_config(folder, "model.pad_token_id", LONG[7])
    with runtime.open(folder, Options(context=24)) as session:
        np.testing.assert_allclose(session.prefill(0, LONG[:8]), session.logits(LONG[:8])[-1], atol=1e-3)


def test_the_folder_is_left_as_it_is(runtime: Runtime, onnx_copy: Callable[..., Path]) -> None:
    folder = onnx_copy("int4", 4)

    def state() -> dict[str, str]:
        return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}

    before = state()
    with runtime.open(folder, Options(context=24, threads=1)) as session:
        session.logits([1, 2, 3])
        assert session.threads == 1
    assert state() == before


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model.context_length", 1 << 40, "context_length is 1099511627776, not a whole number from 1 to 16777216"),
        ("model.context_length", 2048, "no rotary table of 2048 positions"),
        ("model.context_length", True, "context_length is True"),
        ("model.decoder.num_hidden_layers", 10**9, "num_hidden_layers is 1000000000"),
        ("model.decoder.num_hidden_layers", 7, "has no input 'past_key_values.6.key'"),
        ("model.decoder.num_hidden_layers", 5, "wants the input 'past_key_values.5.key"),
        ("model.decoder.num_key_value_heads", 3, "has not 3 heads"),
        ("model.decoder.head_size", 63, "cache 'past_key_values.0.key' is"),
        ("model.decoder.head_size", -64, "head_size is -64"),
        ("model.vocab_size", 511, "not of 511 tokens"),
        ("model.eos_token_id", [512], "not an id or a list of ids below 512"),
        ("model.decoder.inputs.past_key_names", "past", "not a name with one %d"),
        ("model.decoder.inputs.past_key_names", "%d%d", "not a name with one %d"),
        ("model.decoder.inputs", None, "inputs.input_ids is missing"),
        ("model.decoder.outputs.logits", "nothing", "has no output 'nothing'"),
    ],
)
def test_a_configuration_that_is_not_its_graphs_is_refused(
    key: str, value: object, message: str, onnx_copy: Callable[..., Path], edit_config: EditConfig
) -> None:
    folder = onnx_copy("int4", 4)
    edit_config(folder, key, value)
    with pytest.raises(InputError, match=message.replace("[", r"\[")):
        load_runtime("onnxruntime").open(folder, Options())


def test_a_folder_without_a_configuration_is_refused(onnx_copy: Callable[..., Path]) -> None:
    folder = onnx_copy("int4", 4)
    (folder / "genai_config.json").unlink()
    with pytest.raises(InputError, match="without it nobody knows the model's context"):
        load_runtime("onnxruntime").open(folder, Options())


def change(folder: Path, edit: Callable[[Any], None]) -> Path:
    """Apply `edit` to both graphs of a folder."""
    for name in ("model.onnx", "model_all_logits.onnx"):
        model = onnx.load(str(folder / name), load_external_data=False)
        edit(model)
        (folder / name).write_bytes(model.SerializeToString())
    return folder


def attentions(model: Any) -> list[Any]:
    return [node for node in model.graph.node if node.op_type == "GroupQueryAttention"]


def test_a_graph_whose_caches_cannot_be_shared_is_refused(onnx_copy: Callable[..., Path]) -> None:
    def edit(model: Any) -> None:
        attentions(model)[2].op_type = "MultiHeadAttention"

    folder = change(onnx_copy("int4", 4), edit)
    with pytest.raises(InputError, match="block 2 do not go through GroupQueryAttention, the one operator that adds"):
        load_runtime("onnxruntime").open(folder, Options())


def test_what_the_library_refuses_says_its_reason(runtime: Runtime, onnx_copy: Callable[..., Path]) -> None:
    def edit(model: Any) -> None:
        next(node for node in model.graph.node if node.op_type == "QuickGelu").op_type = "NoSuchOperator"

    folder = change(onnx_copy("int4", 4), edit)
    with pytest.raises(InputError, match=r"refuses to load it: .*NoSuchOperator"):
        runtime.open(folder, Options())


def test_logits_in_half_precision_come_as_float32(
    runtime: Runtime, onnx_copy: Callable[..., Path], onnx_folder: Exported
) -> None:
    def edit(model: Any) -> None:
        head = model.graph.node[-1]
        head.output[0] = "wide"
        model.graph.node.append(onnx.helper.make_node("Cast", ["wide"], ["logits"], to=onnx.TensorProto.FLOAT16))
        model.graph.output[0].type.tensor_type.elem_type = onnx.TensorProto.FLOAT16

    folder = change(onnx_copy("f32", 1), edit)
    with runtime.open(onnx_folder("f32", 1), Options(context=24)) as session:
        wanted = session.logits(LONG[:8])
    with runtime.open(folder, Options(context=24)) as session:
        rows = session.logits(LONG[:8])
        assert rows.dtype == np.float32
        np.testing.assert_array_equal(rows, wanted.astype(np.float16).astype(np.float32))
        np.testing.assert_allclose(session.prefill(0, LONG[:8]), wanted[-1], rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize(("kind", "width"), [("int8", 8), ("uint8", 4)])
def test_quantized_caches_are_bound_as_the_graph_says(
    kind: str, width: int, onnx_copy: Callable[..., Path], onnx_folder: Exported
) -> None:
    scale = 16 / 127 if width == 8 else 16 / 7  # for keys and values up to 16
    head_size = 64

    def edit(model: Any) -> None:
        graph = model.graph
        graph.initializer.append(onnx.numpy_helper.from_array(np.array([scale], np.float32), "scale"))
        for value in [*graph.input[2:], *graph.output[1:]]:
            value.type.tensor_type.elem_type = onnx.TensorProto.INT8 if width == 8 else onnx.TensorProto.UINT8
            value.type.tensor_type.shape.dim[3].dim_value = sizes[0] * width // 8
        for node in attentions(model):
            node.input.extend([""] * (12 - len(node.input)) + ["scale", "scale"])
            node.attribute.append(onnx.helper.make_attribute("kv_cache_bit_width", width))
            node.attribute.extend(onnx.helper.make_attribute(f"{part}_quant_type", "PER_TENSOR") for part in "kv")

    sizes = [head_size]
    folder = onnx_copy("f32", 1)
    sizes[0] = read_decoder(OnnxFolder.open(folder)).sides.head_size
    change(folder, edit)
    assert read_decoder(OnnxFolder.open(folder)).kinds.cache == kind
    runtime = load_runtime("onnxruntime")
    with runtime.open(onnx_folder("f32", 1), Options(context=64)) as session:
        wanted = session.logits(LONG[:32])
    with runtime.open(folder, Options(context=64, sequences=2)) as session:
        rows = session.logits(LONG[:32])
        session.prefill(1, LONG[:20])
        for token in LONG[20:32]:
            stepped = session.step([(1, token)])[0]
    np.testing.assert_allclose(stepped, rows[-1], atol=1e-3)
    spread = float(wanted.std())
    assert 1e-4 * spread < np.abs(rows - wanted).mean() < spread / (2 if width == 8 else 0.5)
    with pytest.raises(UsageError, match=f"keys and values of this folder are {kind}"):
        runtime.open(folder, Options(cache="f32"))


def test_what_cannot_be_honoured_is_refused(
    runtime: Runtime, onnx_folder: Exported, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = onnx_folder("f32", 1)
    monkeypatch.delenv("ORT_GQA_DISABLE_FLASH_ATTENTION", raising=False)
    with pytest.raises(UsageError, match="set ORT_GQA_DISABLE_FLASH_ATTENTION=1"):
        runtime.open(folder, Options(flash_attention=False))
    with pytest.raises(UsageError, match=r"q8_0 is llama.cpp's cache: .* r1q export --kv int8"):
        runtime.open(folder, Options(cache="q8_0"))
    with pytest.raises(UsageError, match="trained for 1024"):
        runtime.open(folder, Options(context=1025))
    with pytest.raises(MissingError, match="has no CUDA"):
        runtime.open(folder, Options(device="gpu"))


def test_our_reader_refuses_before_the_library_sees_the_folder(
    runtime: Runtime, onnx_copy: Callable[..., Path]
) -> None:
    folder = onnx_copy("int4", 4)
    os.truncate(folder / "model.onnx.data", 4096)
    with pytest.raises(InputError, match="of a file of 4096"):
        runtime.open(folder, Options())


def test_memory_that_is_not_there_is_said(onnx_copy: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("r1q.runtimes.onnxruntime")

    def no_memory(*_: object, **__: object) -> None:
        raise MemoryError("Unable to allocate")

    monkeypatch.setattr(module.np, "empty", no_memory)
    with pytest.raises(
        ResourceError, match=r"keys and values of 1 × 1024 tokens \(\d+ MB\): ask for a shorter context"
    ):
        load_runtime("onnxruntime").open(onnx_copy("int4", 4), Options())


@pytest.mark.parametrize("name", NAMES)
def test_nothing_reaches_the_terminal_and_no_usage_data_is_sent(name: str, onnx_folder: Exported) -> None:
    code = (
        "import os, sys; from pathlib import Path\n"
        "from r1q.runtimes.table import load_runtime; from r1q.runtimes.base import Options\n"
        "with load_runtime(sys.argv[1]).open(Path(sys.argv[2]), Options(threads=1)) as s: s.logits([1, 2, 3]); s.prefill(0, [1])\n"
        "assert os.environ['ORT_DISABLE_TELEMETRY'] == '1'"
    )
    environment = {key: value for key, value in os.environ.items() if key != "ORT_DISABLE_TELEMETRY"}
    command = [sys.executable, "-c", code, name, str(onnx_folder("int4", 4))]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")


def test_versions_name_the_library_and_what_it_computes_on() -> None:
    versions = load_runtime("onnxruntime").versions()
    assert versions["onnxruntime"][0].isdigit()
    assert "CPUExecutionProvider" in versions["onnxruntime providers"]
    for name in NAMES[1:]:
        assert load_runtime(name).versions().keys() == {"onnxruntime-genai", "onnxruntime"}
