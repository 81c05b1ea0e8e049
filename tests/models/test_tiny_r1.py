"""tiny-r1: its problems are right, its split is clean, its files fit together, and it solves what it was never shown."""

import ast
import json
import operator
import random
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from tokenizers import Tokenizer

from r1q.models.tiny_r1_files import CONFIG, QWEN2_SPLIT, VOCAB_ROWS
from r1q.models.tiny_r1_model import TinyR1, answer_of, load_weights, round_weights, solve
from r1q.models.tiny_r1_tasks import BOS, EOS, LEVELS, TRAINING_ONLY, columns, draw, evaluate, is_held_out, sample
from r1q.models.train_tiny import Plan, load_state, make_batch, make_optimizers, save_state, train_step

FOLDER = Path(__file__).resolve().parents[2] / "models" / "tiny_r1"
OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}


pytestmark = pytest.mark.usefixtures("one_core")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(FOLDER / "tokenizer.json"))


def python_value(text: str) -> int:
    """Python's own value of an expression, precedence and brackets included."""

    def value(node: ast.expr) -> int:
        if isinstance(node, ast.BinOp):
            return int(OPERATORS[type(node.op)](value(node.left), value(node.right)))
        assert isinstance(node, ast.Constant)
        assert isinstance(node.value, int)
        return node.value

    return value(ast.parse(text.replace("×", "*").replace(" ", ""), mode="eval").body)


@pytest.mark.parametrize("level", [*LEVELS, *TRAINING_ONLY])
@pytest.mark.parametrize("held_out", [False, True])
def test_every_answer_and_every_equation_of_a_trace_is_right(level: str, held_out: bool) -> None:
    rng = random.Random(f"{level}{held_out}")
    for _ in range(300):
        problem = draw(rng, level, held_out)
        assert problem.answer == str(python_value(problem.expression))
        assert problem.held_out == held_out
        equations = re.findall(r"([\d+×-][\d+× -]*) ?= ?(\d+)", problem.trace)
        assert equations
        assert all(python_value(left) == int(right) for left, right in equations)


def test_the_written_method_by_hand() -> None:
    assert columns(457, "+", 285) == "7+5=12, 5+8+1=14, 4+2+1=7"
    assert columns(402, "-", 57) == "12-7=5, 10-5-1=4, 4-0-1=3"
    assert columns(457, "×", 8) == "7×8=56, 5×8+5=45, 4×8+4=36"
    assert evaluate((("", 45), ("+", 12), ("×", 3))) == 171


def test_the_split_is_disjoint_in_expressions_and_in_swapped_orders() -> None:
    train = {problem.expression for problem in sample("train", 2000, held_out=False)}
    kept = {problem.expression for problem in sample("kept", 2000, held_out=True)}
    assert not train & kept
    for a, b in ((3, 58), (712, 96), (4, 9)):
        for sign in "+×":
            assert is_held_out((("", a), (sign, b))) == is_held_out((("", b), (sign, a)))


def test_problems_fit_and_repeat_from_their_seed(tokenizer: Tokenizer) -> None:
    problems = sample("length", 2000, held_out=False)
    rng = random.Random("length")
    problems += [draw(rng, level, held_out=False) for level in TRAINING_ONLY for _ in range(300)]
    texts = [problem.prompt + problem.completion for problem in problems]
    assert max(len(row.ids) for row in tokenizer.encode_batch(texts, add_special_tokens=False)) <= 160
    assert problems[:2000] == sample("length", 2000, held_out=False)


def test_tokenizer_round_trips_anything_normal_form_c_keeps(tokenizer: Tokenizer) -> None:
    text = "Größe 世界 漢字かな 🙂👩‍👩‍👧 İ’ll\tdef f(x):\r\n    return x ** 2  # ½ ١٢\n\n\n  <b>&amp;</b>\x00\x7f end "
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids) == text
    rng = random.Random(0)
    for _ in range(200):
        noise = "".join(chr(rng.choice((rng.randrange(32, 127), rng.randrange(0x4E00, 0x9FA5), 10))) for _ in range(40))
        assert tokenizer.decode(tokenizer.encode(noise, add_special_tokens=False).ids) == noise


def test_tokenizer_is_r1s_in_small(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("1234567890", add_special_tokens=False).tokens == list("1234567890")
    assert tokenizer.encode("12").tokens == [BOS, "1", "2"]
    content = json.loads((FOLDER / "tokenizer.json").read_text(encoding="utf-8"))
    split, byte_level = content["pre_tokenizer"]["pretokenizers"]
    assert split == {"type": "Split", "pattern": {"Regex": QWEN2_SPLIT}, "behavior": "Isolated", "invert": False}
    assert byte_level["use_regex"] is False
    added = {token["content"]: token["special"] for token in content["added_tokens"]}
    assert added == {
        BOS: True,
        EOS: True,
        "<｜User｜>": True,
        "<｜Assistant｜>": True,
        "<think>": False,
        "</think>": False,
    }
    assert tokenizer.token_to_id(BOS) == CONFIG["bos_token_id"]
    assert tokenizer.token_to_id(EOS) == CONFIG["eos_token_id"]
    assert tokenizer.get_vocab_size() < VOCAB_ROWS
    assert VOCAB_ROWS % 32 == 0


def test_the_chat_template_renders_the_training_format() -> None:
    jinja2 = pytest.importorskip("jinja2")
    config = json.loads((FOLDER / "tokenizer_config.json").read_text(encoding="utf-8"))
    template = jinja2.Environment(autoescape=False).from_string(config["chat_template"])
    problem = sample("chat", 1, held_out=True)[0]
    turn = {"role": "user", "content": problem.question}
    assert template.render(messages=[turn], bos_token=BOS, add_generation_prompt=True) == problem.prompt
    earlier = {"role": "assistant", "content": "<think>\nlong\n</think>\n\n7"}
    again = template.render(messages=[turn, earlier, turn], bos_token=BOS, add_generation_prompt=True)
    assert again == f"{BOS}<｜User｜>{turn['content']}<｜Assistant｜>\n\n7{EOS}{problem.prompt.removeprefix(BOS)}"


def test_the_folder_is_complete_small_and_consistent() -> None:
    names = {path.name for path in FOLDER.iterdir()}
    assert names == {
        "README.md",
        "config.json",
        "evaluation.txt",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 12 * 2**20
    assert json.loads((FOLDER / "config.json").read_text(encoding="utf-8")) == CONFIG
    expected = {f"model.{name}": list(tensor.shape) for name, tensor in TinyR1().state_dict().items()}
    with safe_open(str(FOLDER / "model.safetensors"), framework="pt") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 – the file is no mapping
        assert {name: part.get_shape() for name, part in slices.items()} == expected
        assert {part.get_dtype() for part in slices.values()} == {"BF16"}
    widths = {shape[1] for name, shape in expected.items() if name.endswith("proj.weight")}
    assert all(width % 256 == 0 for width in widths)


def test_the_evaluation_text_is_held_out_and_right() -> None:
    text = (FOLDER / "evaluation.txt").read_text(encoding="utf-8")
    assert 60_000 <= len(text.encode()) <= 100_000
    documents = text.split(EOS)
    assert documents.pop() == ""
    drawn = sample("evaluation", len(documents), held_out=True)
    assert [problem.prompt + problem.completion for problem in drawn] == [document + EOS for document in documents]


def test_the_shipped_weights_solve_problems_they_never_saw(tokenizer: Tokenizer) -> None:
    problems = sample("shipped weights", 100, held_out=True)
    texts = solve(load_weights(FOLDER), tokenizer, problems)
    right = sum(answer_of(text) == problem.answer for text, problem in zip(texts, problems, strict=True))
    assert right >= 85


def test_crude_rounding_keeps_grid_points_and_moves_the_rest_by_half_a_step_at_most() -> None:
    torch.manual_seed(0)
    model = TinyR1()
    before = model.layers[0].get_parameter("mlp.up_proj.weight").detach().view(-1, 32)
    after = round_weights(model, 3, 32).layers[0].get_parameter("mlp.up_proj.weight").detach().view(-1, 32)
    step = (before.amax(1) - before.amin(1)) / 7
    assert bool(((after - before).abs().amax(1) <= step * 0.5001).all())
    assert max(len(row.unique()) for row in after) <= 8


def test_a_resumed_run_is_the_unbroken_run(tmp_path: Path, tokenizer: Tokenizer) -> None:
    plan = Plan(tokens=2560, batch_tokens=256, lr=1e-3, seed=5)

    def steps(model: TinyR1, first: int, last: int, optimizers: list[torch.optim.Optimizer]) -> list[float]:
        return [train_step(model, optimizers, make_batch(tokenizer, plan, step), 1e-3) for step in range(first, last)]

    torch.manual_seed(plan.seed)
    whole = TinyR1()
    optimizers = make_optimizers(whole, plan.lr)
    steps(whole, 0, 1, optimizers)
    save_state(tmp_path / "state.pt", whole, optimizers, 1, 2.5)
    unbroken = steps(whole, 1, 3, optimizers)
    fresh = TinyR1()
    taken_up = make_optimizers(fresh, plan.lr)
    assert load_state(tmp_path / "state.pt", fresh, taken_up) == (1, 2.5)
    assert steps(fresh, 1, 3, taken_up) == pytest.approx(unbroken, rel=1e-3)
