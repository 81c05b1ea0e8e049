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

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="Ray is not installed: pip install r1q[ray]"
)
# A process of its own: Ray keeps threads and signal handlers.
SCRIPT = """
import os, runpy, signal, sys
from pathlib import Path
import psutil
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
            family = psutil.Process().children(recursive=True)
            victim = max((one for one in family if "ray::" in one.cmdline()[0]), key=lambda one: "_perform" in one.cmdline()[0])
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


def test_a_worker_and_a_machine_are_lost_and_the_bytes_are_those_of_one_process(
    moe_models: SimpleNamespace, tmp_path: Path
) -> None:
    workers = runpy.run_path(str(Path(__file__).with_name("test_workers.py")))
    model = moe_models.write_moe_model(
        tmp_path / "Tiny",
        "deepseek_v3",
        **{"num_hidden_layers": 2, "moe_intermediate_size": 64, "q_lora_rank": 32},
        **{"qk_nope_head_dim": 32, "v_head_dim": 32},
    )
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, str(script), str(Path(__file__).with_name("test_workers.py")), str(model)]
    # Ray's own folder is not that of another Ray here, and short: paths of sockets have at most 107 letters.
    with tempfile.TemporaryDirectory(prefix="r", ignore_cleanup_errors=True) as own:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "RAY_TMPDIR": own}
        done = subprocess.run(
            [*command, str(tmp_path / "ray")], capture_output=True, text=True, env=environment, check=False, timeout=300
        )
    assert done.returncode == 0, done.stderr
    assert "no Ray answers at auto" in done.stdout
    assert "once.weight True True" in done.stdout
    assert "2 lost; 0" in done.stdout
    list(workers["start"](model, tmp_path / "one"))
    assert workers["contents"](tmp_path / "ray") == workers["contents"](tmp_path / "one")
