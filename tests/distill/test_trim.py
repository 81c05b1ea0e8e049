"""A trimmed model beside the whole one: rows bit for bit, logits, tokens of the corpus, text never seen, and the GGUF file.

Logits are sums of hidden_size products of equal numbers; only the order of adding may differ with the number of rows of the head:
5e-5, as in tests/models/test_forward.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from r1q.cli import main
from r1q.core.errors import InputError, UsageError
from r1q.distill import trim
from r1q.distill.trim import RECORD, trim_vocabulary
from r1q.distill.vocabulary import ancestors, byte_alphabet
from r1q.models.embedded import EMBEDDED
from r1q.models.families import EMBEDDING, HEAD
from r1q.models.forward import logits
from r1q.models.source import ModelSource
from r1q.models.tokenizer import Tokenizer

MakeModel = Callable[..., Path]
CORPUS = "the fox thinks: wait, 12 + 30 = 42.\n\nlazy dog\n"
UNSEEN = "Über 9000 quick «jumps» 跳 🦊\t\r\n over </s>"


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.txt"
    path.write_text(CORPUS)
    return path


def kept_of(output: Path) -> list[int]:
    kept: list[int] = json.loads((output / RECORD).read_bytes())["kept"]
    return kept


@pytest.mark.parametrize(
    ("family", "options"),
    [("llama", {"shards": 3}), ("qwen2", {"tied": True}), ("qwen3", {"dtype": "F32"})],
    ids=["llama 3, in shards", "qwen2, tied", "qwen3"],
)
def test_what_stays_is_what_it_was(
    make_model: MakeModel, tmp_path: Path, corpus: Path, family: str, options: dict[str, object]
) -> None:
    model = make_model(family, **options)
    done = trim_vocabulary(ModelSource.open(model), str(corpus), tmp_path / "small")
    kept = kept_of(tmp_path / "small")
    whole, small = ModelSource.open(model), ModelSource.open(tmp_path / "small")
    assert done.tokens == (320, len(kept))
    assert small.config.vocab_size == len(kept) < 320
    assert done.bytes[1] < done.bytes[0]
    for spec in whole.tensors:
        rows = whole.read_rows(spec.name, 0, spec.rows)
        expected = rows[kept] if spec.name in (EMBEDDING, HEAD) else rows
        np.testing.assert_array_equal(small.read_rows(spec.name, 0, small.spec(spec.name).rows), expected)
    old, new = Tokenizer.open(model), Tokenizer.open(tmp_path / "small")
    ids, renamed = (tokenizer.encode(CORPUS, add_special=True) for tokenizer in (old, new))
    assert [kept[number] for number in renamed] == ids
    assert [kept[i] for i in small.config.eos_ids] == list(whole.config.eos_ids)
    assert small.config.bos_id is not None
    assert kept[small.config.bos_id] == whole.config.bos_id
    assert new.eos_id is not None
    assert kept[new.eos_id] == old.eos_id
    before, after = (
        next(iter(logits(source, np.array([numbers])))) for source, numbers in ((whole, ids), (small, renamed))
    )
    np.testing.assert_allclose(after, before[:, kept], rtol=0, atol=5e-5)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_any_text_is_still_spelled(make_model: MakeModel, tmp_path: Path, corpus: Path, family: str) -> None:
    model = make_model(family)
    trim_vocabulary(ModelSource.open(model), str(corpus), tmp_path / "small")
    old, new = Tokenizer.open(model), Tokenizer.open(tmp_path / "small")
    everything = UNSEEN + "".join(map(chr, range(0x20, 0x250)))
    assert new.decode(new.encode(everything, add_special=False)) == old.decode(
        old.encode(everything, add_special=False)
    )
    assert new.decode(new.encode(UNSEEN, add_special=False)) == UNSEEN
    assert len(new.encode("over over", add_special=False)) > len(old.encode("over over", add_special=False))
    messages = [{"role": "user", "content": "fox"}]
    kept = kept_of(tmp_path / "small")
    renamed = new.encode(new.render_chat(messages), add_special=False)
    assert [kept[number] for number in renamed] == old.encode(old.render_chat(messages), add_special=False)


def test_ancestors_are_the_merges_really_taken() -> None:
    # «abcd» is reached over «ab» and «cd», never over «bc» (of a later rank) or «abc».
    ranks = {("a", "b"): 0, ("c", "d"): 1, ("b", "c"): 2, ("ab", "c"): 3, ("ab", "cd"): 4}
    assert ancestors("abcd", ranks) == {"a", "b", "c", "d", "ab", "cd", "abcd"}
    assert ancestors("dc", ranks) == {"d", "c"}
    assert len(byte_alphabet()) == 256
    assert {"Ġ", "Ċ", "!", "ÿ"} <= byte_alphabet()


def test_long_texts_lose_no_word_where_pieces_meet(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "long.txt").write_text("the quick brown fox thinks again.\n\n" * 40)
    monkeypatch.setattr(trim, "_PIECE", 100)
    monkeypatch.setattr(trim, "_OVERLAP", 40)
    model = make_model()
    trim_vocabulary(ModelSource.open(model), str(tmp_path / "long.txt"), tmp_path / "small")
    kept, text = kept_of(tmp_path / "small"), (tmp_path / "long.txt").read_text()
    renamed = Tokenizer.open(tmp_path / "small").encode(text, add_special=True)
    assert [kept[number] for number in renamed] == Tokenizer.open(model).encode(text, add_special=True)


def test_a_killed_run_goes_on_and_another_job_is_refused(make_model: MakeModel, tmp_path: Path, corpus: Path) -> None:
    source, small = ModelSource.open(make_model(shards=2)), tmp_path / "small"
    assert not trim_vocabulary(source, str(corpus), small).already
    whole = {path.name: path.read_bytes() for path in small.iterdir()}
    for name in ("config.json", "model-00002-of-00002.safetensors"):
        (small / name).unlink()
    assert not trim_vocabulary(source, str(corpus), small).already
    assert {path.name: path.read_bytes() for path in small.iterdir()} == whole
    assert trim_vocabulary(source, str(corpus), small).already
    with pytest.raises(UsageError, match="something else"):
        trim_vocabulary(source, "builtin", small)


def test_other_tokenizers_are_refused_with_the_reason(make_model: MakeModel, tmp_path: Path, corpus: Path) -> None:
    model = make_model()
    file = model / "tokenizer.json"
    data = json.loads(file.read_text())
    file.write_text(json.dumps({**data, "model": {**data["model"], "byte_fallback": True}}))
    with pytest.raises(InputError, match="not byte-level"):
        trim_vocabulary(ModelSource.open(model), str(corpus), tmp_path / "small")
    assert not (tmp_path / "small").exists()


@pytest.mark.runtime
def test_the_embedded_model_trims_into_a_gguf_that_llama_cpp_cuts_alike(tmp_path: Path, corpus: Path) -> None:
    pytest.importorskip("llama_cpp")
    run = CliRunner()
    small, out = tmp_path / "small", tmp_path / "out"
    done = run.invoke(main, ["trim", "--keep-tokens-from", str(EMBEDDED / "evaluation.txt"), "-o", str(small)])
    assert done.exit_code == 0, done.output
    assert "512 tokens to 465" in done.output
    done = run.invoke(main, ["quantize", str(small), "--bits", "4", "-o", str(out), "-q"])
    assert done.exit_code == 0, done.output
    artifacts = json.loads((out / "artifacts.json").read_text())
    assert "tokenizer: proven" in artifacts["gguf"]["notes"][0]
