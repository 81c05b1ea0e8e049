"""Parcels: they run on a fresh shell, say what they are and what their licence asks, and their manifests are Kubernetes' own."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from r1q.cli import main
from r1q.core.errors import InputError, UsageError
from r1q.plan.job import Job, open_job, plan_job, run_job
from r1q.ship.cluster import kubernetes_yaml, object_name
from r1q.ship.facts import ModelFacts, Origin, find_origin, read_card
from r1q.ship.licences import licences_of
from r1q.ship.parcel import pack
from r1q.ship.seal import check_parcel

ROOT = Path(__file__).resolve().parents[2]
NAME = "Tiny-R1-4.9M-Q4_K_M"
RESULTS = ROOT / "benchmarks/results/smollm2_135m.jsonl"


@pytest.fixture
def shell(tmp_path: Path) -> dict[str, str]:
    """Return an environment with the usual tools and r1q of this tree, and nothing else that runs models."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in ("sh", "dirname", "sha256sum", "env"):
        (tools / tool).symlink_to(str(shutil.which(tool)))
    (tools / "r1q").write_text(f'#!/bin/sh\nPYTHONPATH="{ROOT}" exec "{sys.executable}" -m r1q "$@"\n')
    (tools / "r1q").chmod(0o755)
    return {"PATH": str(tools), "HOME": str(tmp_path)}


def run(script: Path, *arguments: str, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(script), *arguments], env=env, cwd="/", capture_output=True, text=True, timeout=120, check=False
    )


@pytest.mark.runtime
def test_run_sh_answers_a_question_on_a_fresh_shell(parcel: Path, shell: dict[str, str]) -> None:
    pytest.importorskip("llama_cpp")
    done = run(parcel / "run.sh", "What is 17 + 25?", env=shell)
    assert (done.returncode, done.stdout) == (0, "42\n"), done.stderr
    assert "17 + 25" in done.stderr


@pytest.mark.runtime
def test_a_parcel_of_an_onnx_folder_runs_and_is_checked_too(
    tmp_path: Path, shell: dict[str, str], flip: Callable[[Path, int], None]
) -> None:
    """It has a folder in it, and llama.cpp, though it is there, cannot read that."""
    pytest.importorskip("onnxruntime")
    opened = open_job(Job(bits=4, formats=("onnx",), output=tmp_path / "out"))
    list(run_job(opened, plan_job(opened)))
    packed = pack(tmp_path / "out", "phone", tmp_path / "p")
    for tool in ("llama-cli", "llama-server"):
        (Path(shell["PATH"]) / tool).symlink_to("/bin/false")
    done = run(packed.path / "run.sh", "What is 17 + 25?", env=shell)
    assert (done.returncode, done.stdout) == (0, "42\n"), done.stderr
    assert "llama" not in (packed.path / "README.md").read_text()
    assert any("/" in name for name in packed.files)
    for name, size in packed.files.items():
        flip(packed.path / name, 4 * size)
        assert {defect.where.partition(": ")[0] for defect in check_parcel(packed.path)} == {name}
        flip(packed.path / name, 4 * size)


def test_run_sh_checks_first_and_says_what_is_missing(
    parcel: Path, shell: dict[str, str], flip: Callable[[Path, int], None]
) -> None:
    assert run(parcel / "run.sh", env=shell).returncode == 2
    odd = run(parcel / "run.sh", "x", env={**shell, "R1Q_RUN": "other"})
    assert (odd.returncode, odd.stderr) == (2, "R1Q_RUN is 'other': it is one of ollama, llama, r1q\n")
    (Path(shell["PATH"]) / "r1q").unlink()
    bare = run(parcel / "run.sh", "x", env=shell)
    assert bare.returncode == 4
    assert "none of ollama, llama.cpp" in bare.stderr
    flip(parcel / "Modelfile", 9)
    broken = run(parcel / "run.sh", "x", env=shell)
    assert broken.returncode == 6
    assert "damaged" in broken.stderr


@pytest.mark.parametrize(("tool", "expected"), [("ollama", "run|tiny-r1-4-9m-q4-k-m|a b"), ("llama-cli", "-st|-p|a b")])
def test_run_sh_hands_the_question_to_what_is_there(
    tool: str, expected: str, parcel: Path, shell: dict[str, str]
) -> None:
    for name in (tool, "llama-server"):
        path = Path(shell["PATH"]) / name
        path.write_text('#!/bin/sh\nIFS="|"; echo "$*"\n')
        path.chmod(0o755)
    done = run(parcel / "run.sh", "a b", env=shell)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith(expected)


def test_kubernetes_accepts_the_manifest(packed: Path) -> None:
    import kubernetes_validate

    objects = list(yaml.safe_load_all((packed / "kubernetes.yaml").read_text()))
    assert [item["kind"] for item in objects] == ["Deployment", "Service"]
    for item in objects:
        kubernetes_validate.validate(item, "1.30", strict=True)
    deployment, service = objects
    pod = deployment["spec"]["template"]["spec"]
    assert pod["initContainers"][0]["command"] == ["sha256sum", "-c", "SHA256SUMS"]
    (server,) = pod["containers"]
    assert {"startupProbe", "readinessProbe", "livenessProbe"} <= set(server)
    assert server["args"][:2] == ["-m", f"/parcel/{NAME}.gguf"]
    assert service["spec"]["selector"].items() <= deployment["spec"]["template"]["metadata"]["labels"].items()
    broken = json.loads(json.dumps(deployment))
    broken["spec"]["template"]["spec"]["containers"][0]["ports"][0]["containerPort"] = "http"
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(broken, "1.30", strict=True)


def test_memory_is_limited_to_file_cache_and_buffers() -> None:
    facts = ModelFacts(
        temperature=0.6, top_p=0.95, bos="", eos="", adds_bos=True, template=None, context=131072, cache_bytes=28672
    )
    text = kubernetes_yaml(facts, "m.gguf", name="m", bytes=1 << 30, context=8192, parallel=4, gpu=True)
    server = next(iter(yaml.safe_load_all(text)))["spec"]["template"]["spec"]["containers"][0]
    # 1 GiB of weights, 28 KiB a token for 4 × 8192 tokens, 768 MiB: 1024 + 896 + 768.
    assert server["resources"]["limits"] == {"memory": "2688Mi", "nvidia.com/gpu": "1"}
    assert server["args"][server["args"].index("-c") + 1] == "32768"


def test_prometheus_reads_its_configuration(packed: Path) -> None:
    (job,) = yaml.safe_load((packed / "prometheus.yml").read_text())["scrape_configs"]
    assert job["metrics_path"] == "/metrics"
    assert job["static_configs"][0]["targets"] == ["127.0.0.1:8080"]


def test_the_card_says_where_from_and_how(packed: Path) -> None:
    card = read_card(packed / "README.md")
    assert card["base_model"] == "tiny-r1"
    assert (card["base_model_relation"], card["license"]) == ("quantized", "apache-2.0")
    text = (packed / "README.md").read_text()
    assert "r1q quantize --scheme q4_k_m --to gguf" in text
    assert "What it costs" not in text
    lock = json.loads((packed / "r1q.lock.json").read_bytes())
    assert lock["checkpoint"]["recipe"]["name"] == "q4_k_m"
    assert set(lock["checkpoint"]["source"]) >= {"model.safetensors", "tokenizer.json"}


def test_results_become_a_table_and_others_results_are_refused(output: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"has no result of {NAME}"):
        pack(output, "laptop", tmp_path / "none", results=RESULTS)
    lines = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    own = {**lines[-1], "name": NAME}
    (tmp_path / "own.jsonl").write_text(json.dumps(own) + "\n")
    packed = pack(output, "laptop", tmp_path / "p", results=tmp_path / "own.jsonl")
    row = next(
        line for line in (packed.path / "README.md").read_text().splitlines() if line.startswith(f"| `{NAME}` |")
    )
    assert "| 169.8 ± 4.5 |" in row
    assert not (packed.path / "kubernetes.yaml").exists()
    (tmp_path / "bad.jsonl").write_text("{}\n")
    with pytest.raises(InputError, match="not a line of r1q bench"):
        pack(output, "laptop", tmp_path / "none", results=tmp_path / "bad.jsonl")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("origin", "ids"),
    [
        (Origin(base="deepseek-ai/DeepSeek-R1-Distill-Llama-8B", license="mit"), ["mit", "llama3.1"]),
        (Origin(base="deepseek-ai/DeepSeek-R1-Distill-Llama-70B", license=""), ["mit", "llama3.3"]),
        (
            Origin(base="x/mine", license="mit", bases=("deepseek-ai/DeepSeek-R1-Distill-Qwen-7B",)),
            ["mit", "apache-2.0"],
        ),
        (Origin(base="x/y", license="other", license_name="Own", license_link="https://example.org/l"), ["other"]),
        (Origin(base="x/y", license=""), []),
    ],
)
def test_a_distillate_stands_under_two_licences(origin: Origin, ids: list[str]) -> None:
    found = licences_of(origin)
    assert [licence.id for licence in found] == ids
    assert any("Built with Llama" in duty for licence in found for duty in licence.duties) == ("llama" in str(ids))


def test_licence_files_of_the_source_and_notices_come_with_it(output: Path, tmp_path: Path) -> None:
    copy, source = tmp_path / "out", tmp_path / "DeepSeek-R1-Distill-Llama-8B"
    shutil.copytree(output, copy)
    source.mkdir()
    (source / "README.md").write_text(
        "---\nlicense: mit\nbase_model: deepseek-ai/DeepSeek-R1-Distill-Llama-8B\n---\n# x\n"
    )
    (source / "LICENSE").write_text("MIT, the words of it\n")
    (copy / "where.json").write_text(json.dumps({"source": str(source)}))
    packed = pack(copy, "phone", tmp_path / "p")
    assert (packed.path / "LICENSE").read_text() == "MIT, the words of it\n"
    assert "Llama 3.1 is licensed under" in (packed.path / "NOTICE").read_text()
    card = (packed.path / "README.md").read_text()
    assert "Built with Llama" in card
    assert not any("base_model" in note for note in packed.notes), "the embedded model has no other name"
    assert read_card(packed.path / "README.md")["license"] == "llama3.1"


def test_a_folders_name_is_no_id_on_the_hub(output: Path, tmp_path: Path) -> None:
    copy = tmp_path / "out"
    shutil.copytree(output, copy)
    manifest = json.loads((copy / "checkpoint" / "manifest.json").read_bytes())
    text = json.dumps({**manifest, "model": "my-folder"}, sort_keys=True)
    (copy / "checkpoint" / "manifest.json").write_text(text)
    listed = json.loads((copy / "artifacts.json").read_bytes())
    for entry in listed.values():
        entry["manifest_sha256"] = hashlib.sha256(text.encode()).hexdigest()
    (copy / "artifacts.json").write_text(json.dumps(listed))
    packed = pack(copy, "phone", tmp_path / "p")
    assert "base_model in README.md is my-folder, a folder's name" in packed.notes[-1]
    assert "r1q quantize my-folder --scheme q4_k_m" in (packed.path / "README.md").read_text()


def test_an_unknown_licence_is_said(output: Path, tmp_path: Path) -> None:
    copy = tmp_path / "out"
    shutil.copytree(output, copy)
    (copy / "where.json").unlink()
    packed = pack(copy, "phone", tmp_path / "p")
    assert "**Unknown.**" in (packed.path / "README.md").read_text()
    assert "licence of tiny-r1 is not known" in packed.notes[0]


@pytest.mark.parametrize(
    "text", ["", "# no front matter", "---\n[1, 2\n---\n", "---\n- a\n---\n", "---\na: !!python/name:os\n---\n"]
)
def test_a_card_that_cannot_be_read_says_nothing(text: str, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(text)
    assert read_card(tmp_path / "README.md") == {}


def test_what_cannot_be_packed_is_refused_and_leaves_nothing(output: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("mine")
    with pytest.raises(UsageError, match="not empty"):
        pack(output, "laptop", tmp_path / "full")
    with pytest.raises(UsageError, match="no target named 'desktop'"):
        pack(output, "desktop", tmp_path / "p")
    with pytest.raises(InputError, match="not a folder that r1q quantize made"):
        pack(tmp_path, "laptop", tmp_path / "p")
    copy = tmp_path / "out"
    shutil.copytree(output, copy)
    with open(copy / f"{NAME}.gguf", "r+b") as file:
        file.seek(5000)
        file.write(b"!")
    with pytest.raises(InputError, match="its sha256 differs"):
        pack(copy, "laptop", tmp_path / "p")
    (copy / f"{NAME}.gguf").unlink()
    with pytest.raises(UsageError, match=r"r1q export .* --to gguf"):
        pack(copy, "laptop", tmp_path / "p")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "out"]


def test_the_command_packs_a_checkpoint_and_says_what_is_next(output: Path, tmp_path: Path) -> None:
    target = tmp_path / "p"
    done = CliRunner().invoke(main, ["ship", str(output / "checkpoint"), "--for", "laptop", "-o", str(target)])
    assert done.exit_code == 0, done.output
    assert done.stdout.endswith(f"next: r1q ship --check {target}\n")
    assert os.access(target / "run.sh", os.X_OK)
    for arguments in (["ship", str(output)], ["ship", "--check", "--for", "laptop", str(target)]):
        assert CliRunner().invoke(main, arguments).exit_code == 2


@pytest.mark.parametrize(("name", "made"), [("Tiny-R1_4.9M", "tiny-r1-4-9m"), ("---", "model"), ("A" * 80, "a" * 52)])
def test_names_that_kubernetes_takes(name: str, made: str) -> None:
    assert object_name(name) == made


def test_where_a_model_is_from(output: Path) -> None:
    from r1q.core.checkpoint import QuantizedCheckpoint

    origin: Any = find_origin(output, QuantizedCheckpoint.open(output / "checkpoint"))
    assert (origin.base, origin.license, origin.texts) == ("tiny-r1", "apache-2.0", ())


def test_run_ps1_is_powershell(packed: Path) -> None:
    """Without a PowerShell to run it: the script is at least what the grammar allows, and ASCII, as old ones read it."""
    tree_sitter = pytest.importorskip("tree_sitter")
    powershell = pytest.importorskip("tree_sitter_powershell")
    parser = tree_sitter.Parser(tree_sitter.Language(powershell.language()))
    text = (packed / "run.ps1").read_bytes()
    assert text.isascii()
    assert not parser.parse(text).root_node.has_error
    assert parser.parse(text.replace(b"}\nexit", b"\nexit")).root_node.has_error
