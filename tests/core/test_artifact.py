"""Output folders: whose they are, what is in them, and where their source was."""

import json
from pathlib import Path

import pytest

from r1q.core.artifact import OutputFolder, find_reference, newest_output
from r1q.core.errors import InputError, UsageError


def folder_with_checkpoint(path: Path) -> OutputFolder:
    (path / "checkpoint").mkdir(parents=True)
    (path / "checkpoint" / "job.json").write_text("{}")
    (path / "checkpoint" / "manifest.json").write_text("{}")
    return OutputFolder(path)


def test_a_folder_of_somebody_else_is_refused(tmp_path: Path) -> None:
    OutputFolder(tmp_path / "new").refuse_foreign()
    OutputFolder(tmp_path).refuse_foreign()
    (tmp_path / "checkpoint").mkdir()
    OutputFolder(tmp_path).refuse_foreign()
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="was not made by r1q"):
        OutputFolder(tmp_path).refuse_foreign()
    with pytest.raises(UsageError, match="is a file"):
        OutputFolder(tmp_path / "notes.txt").refuse_foreign()


def test_an_artifact_counts_only_while_its_file_and_checkpoint_are_what_they_were(tmp_path: Path) -> None:
    output = folder_with_checkpoint(tmp_path / "out")
    (output.path / "m.gguf").write_bytes(b"GGUF")
    artifact = output.record("gguf", output.path / "m.gguf", ("a note",))
    assert output.current("gguf") == artifact
    assert (artifact.bytes, artifact.notes) == (4, ("a note",))
    (output.checkpoint / "manifest.json").write_text('{"other": 1}')
    assert output.current("gguf") is None
    (output.checkpoint / "manifest.json").write_text("{}")
    (output.path / "m.gguf").write_bytes(b"GGU")
    assert output.current("gguf") is None
    (output.path / "m.gguf").unlink()
    assert output.artifacts() == {}


def test_a_folder_artifact_lists_every_file(tmp_path: Path) -> None:
    output = folder_with_checkpoint(tmp_path / "out")
    (output.path / "gptq").mkdir()
    for name in ("config.json", "model.safetensors"):
        (output.path / "gptq" / name).write_bytes(b"12")
    artifact = output.record("gptq", output.path / "gptq", ())
    assert (set(artifact.files), artifact.bytes) == ({"config.json", "model.safetensors"}, 4)
    (output.path / "gptq" / "config.json").unlink()
    assert output.current("gptq") is None


@pytest.mark.parametrize("text", ["[", "3", '{"gguf": 3}', '{"gguf": {"name": "../x", "bytes": 1}}'])
def test_a_damaged_list_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "artifacts.json").write_text(text)
    with pytest.raises(InputError, match=r"damaged|outside"):
        OutputFolder(tmp_path).artifacts()


def test_an_artifact_never_leads_outside_its_folder(tmp_path: Path) -> None:
    output = folder_with_checkpoint(tmp_path / "out")
    (output.path / "m.gguf").write_bytes(b"GGUF")
    output.record("gguf", output.path / "m.gguf", ())
    listed = json.loads((output.path / "artifacts.json").read_text())
    listed["gguf"]["name"] = "../../secret"
    (output.path / "artifacts.json").write_text(json.dumps(listed))
    with pytest.raises(InputError, match="outside its folder"):
        output.artifacts()


def test_the_source_is_found_from_file_and_folder_and_may_be_gone(tmp_path: Path) -> None:
    output = folder_with_checkpoint(tmp_path / "out")
    source = tmp_path / "model"
    source.mkdir()
    output.remember_source(source)
    assert find_reference(output.path) == find_reference(output.path / "m.gguf") == source
    source.rmdir()
    assert find_reference(output.path) is None
    (output.path / "where.json").write_text("broken")
    assert find_reference(output.path) is None


def test_the_newest_output_is_the_one_written_last(tmp_path: Path) -> None:
    import os

    assert newest_output(tmp_path / "none") is None
    for age, name in enumerate(["old", "older"]):
        output = folder_with_checkpoint(tmp_path / name)
        (output.path / "artifacts.json").write_text("{}")
        os.utime(output.path / "artifacts.json", (1000 - age, 1000 - age))
    found = newest_output(tmp_path)
    assert found is not None
    assert found.name == "old"
