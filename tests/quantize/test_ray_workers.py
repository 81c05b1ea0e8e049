"""Ray: two machines of it on this one; one is lost in the middle, and a worker besides; the bytes are those of one process."""

from __future__ import annotations

import importlib.util
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from r1q.core.errors import MissingError, ResourceError
from r1q.quantize.engine import Engine
from r1q.quantize.ray_workers import RayCrew
from r1q.quantize.tasks import Site

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="Ray is not installed: pip install r1q[ray]"
)
# A process of its own: Ray keeps threads and signal handlers. Tasks are named by their tensors.
A_WORKER = """
import psutil

def a_worker():
    names = {one: one.cmdline()[0] for one in psutil.Process().children(recursive=True)}
    workers = [one for one, name in names.items() if name.startswith(("ray::IDLE", "ray::model."))]
    return max(workers, key=lambda one: "IDLE" not in names[one])
"""
SCRIPT = """
import os, runpy, signal, sys
from pathlib import Path
from ray.cluster_utils import Cluster
from r1q.core.errors import MissingError
from r1q.quantize.crews import crew_of

ROOM = {"num_cpus": 1, "object_store_memory": 100 << 20}

def main():
    test = runpy.run_path(sys.argv[1])
    model, folder = Path(sys.argv[2]), Path(sys.argv[3])
    try:
        next(test["start"](model, folder, "ray:auto"))
    except MissingError as error:
        print(error)
    cluster = Cluster(initialize_head=True, head_node_args=ROOM | {"include_dashboard": False})
    other = cluster.add_node(**ROOM)
    os.environ["RAY_ADDRESS"] = cluster.address
    lost = []
    with crew_of("ray:auto", test["ENGINE"], folder) as crew:
        site = test["Site"].of(test["ModelSource"].open(model), test["ENGINE"], folder)
        (done,) = crew.do(site, [(test["Once"](folder.parent / "once"), crew.lend({}))])
        print(done.name, (folder.parent / "once").exists(), (folder.parent / "once.done").exists())
    for event in test["start"](model, folder, "ray:auto"):
        if event.name == "blk.1.ffn_up_exps.0":
            victim = a_worker()
            victim.send_signal(signal.SIGKILL)
            lost.append(victim)
        if event.name == "blk.1.ffn_up_exps.1":
            cluster.remove_node(other, allow_graceful=False)
            lost.append(other)
    cluster.shutdown()
    print(len(lost), "lost;", os.environ["RAY_USAGE_STATS_ENABLED"])

if __name__ == "__main__":
    main()
"""


# Through the server for clients that `ray start --head` has.
CLIENT = """
import runpy, socket, sys
from pathlib import Path
from ray.cluster_utils import Cluster

def main():
    test = runpy.run_path(sys.argv[1])
    with socket.create_server(("127.0.0.1", 0)) as free:  # none of Ray's own, which are below 20000 and from 23000 on
        port = free.getsockname()[1]
    room = {"num_cpus": 2, "object_store_memory": 100 << 20, "include_dashboard": False, "ray_client_server_port": port}
    cluster = Cluster(initialize_head=True, head_node_args=room)
    lost = []
    for event in test["start"](Path(sys.argv[2]), Path(sys.argv[3]), f"ray://127.0.0.1:{port}"):
        if event.name == "blk.1.ffn_up_exps.0":
            victim = a_worker()
            victim.kill()
            lost.append(victim)
    cluster.shutdown()
    print(len(lost), "lost")

if __name__ == "__main__":
    main()
"""


@pytest.fixture
def model(moe_models: SimpleNamespace, tmp_path: Path) -> Path:
    found: Path = moe_models.write_moe_model(
        tmp_path / "Tiny",
        "deepseek_v3",
        **{"num_hidden_layers": 2, "moe_intermediate_size": 64, "q_lora_rank": 32},
        **{"qk_nope_head_dim": 32, "v_head_dim": 32},
    )
    return found


def run(script: str, model: Path, folder: Path) -> str:
    """Run a script on a model in a process of its own, and return what it printed."""
    path = folder.with_name("script.py")
    path.write_text(A_WORKER + script)
    command = [sys.executable, str(path), str(Path(__file__).with_name("test_workers.py")), str(model), str(folder)]
    # Ray's own folder is not that of another Ray here, and short: paths of sockets have at most 107 letters.
    # The server for clients forks, which its gRPC does not always survive.
    with tempfile.TemporaryDirectory(prefix="r", ignore_cleanup_errors=True) as own:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "RAY_TMPDIR": own, "GRPC_ENABLE_FORK_SUPPORT": "0"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def equal_to_one_process(model: Path, folder: Path) -> bool:
    workers = runpy.run_path(str(Path(__file__).with_name("test_workers.py")))
    list(workers["start"](model, folder.with_name("one")))
    return bool(workers["contents"](folder) == workers["contents"](folder.with_name("one")))


def test_a_worker_and_a_machine_are_lost_and_the_bytes_are_those_of_one_process(model: Path, tmp_path: Path) -> None:
    said = run(SCRIPT, model, tmp_path / "ray")
    assert "no Ray answers at auto" in said
    assert "once.weight True True" in said
    assert "2 lost; 0" in said
    assert equal_to_one_process(model, tmp_path / "ray")


def test_through_another_machines_server_for_clients(model: Path, tmp_path: Path) -> None:
    assert "1 lost" in run(CLIENT, model, tmp_path / "ray")
    assert equal_to_one_process(model, tmp_path / "ray")


def test_a_session_that_dies_as_it_starts_is_begun_again(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def init(address: str, **_: object) -> None:
        calls.append(address)
        if len(calls) in (1, 2, 4, 5, 6):
            raise ConnectionAbortedError("Initialization failure from server:\nTraceback …")

    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.init", init)
    monkeypatch.setattr("ray.nodes", lambda: [{"Alive": True, "Resources": {"CPU": 2.0}}])
    engine = Engine(effort="fast", threads=1, isa="here", compute="float32")
    RayCrew("ray://there:1", engine)
    assert calls == 3 * ["ray://there:1"]
    with pytest.raises(MissingError, match="no Ray answers at ray://there:1: Initialization failure"):
        RayCrew("ray://there:1", engine)
    assert len(calls) == 6


def test_rays_client_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray alone has no gRPC, which its client needs."""
    monkeypatch.setitem(sys.modules, "grpc", None)
    with pytest.raises(MissingError, match=r"grpc.*: pip install 'r1q\[ray\]'"):
        RayCrew("ray://there:1", Engine(effort="fast", threads=1, isa="here", compute="float32"))


def test_a_cluster_that_is_gone_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone() -> None:
        raise ConnectionError("Request can't be sent because the Ray client has already been disconnected\nand so on")

    monkeypatch.setattr("ray.is_initialized", lambda: True)
    monkeypatch.setattr("ray.nodes", lambda: [{"Alive": True, "Resources": {"CPU": 2.0}}])
    crew = RayCrew("auto", Engine(effort="fast", threads=1, isa="here", compute="float32"))
    monkeypatch.setattr("ray.put", lambda _: gone())
    with pytest.raises(ResourceError, match=r"the Ray at auto is gone: Request .* disconnected; start it"):
        list(crew.do(cast(Site, None), []))
    with pytest.raises(ResourceError, match="the Ray at auto is gone"):
        crew.lend({})
