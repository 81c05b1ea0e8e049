"""Children that finish, raise, crash, are killed, run out of memory or are left behind: real processes every time."""

import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from r1q.benchmarks import isolate
from r1q.core.errors import InputError, MissingError, R1qError, ResourceError

ROOT = Path(__file__).resolve().parents[2]
Task = Callable[[str], str]


@pytest.fixture
def task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Task:
    """Return a function that puts the body of `def task(job)` where children can import it, and returns its target."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def write(body: str) -> str:
        (tmp_path / "tasks.py").write_text("def task(job):\n" + textwrap.indent(textwrap.dedent(body), "    "))
        return "tasks:task"

    return write


def collect(messages: Iterator[isolate.Message]) -> tuple[list[isolate.Message], R1qError]:
    """Return what arrived before the error, and the error."""
    arrived = []
    try:
        for message in messages:
            arrived.append(message)
    except R1qError as error:
        return arrived, error
    pytest.fail("the child ended well")


def test_messages_come_in_order_and_from_another_process(task: Task) -> None:
    target = task("import os\nfor i in range(job['count']): yield {'i': i, 'pid': os.getpid()}")
    messages = list(isolate.run(target, {"count": 3}, what="counting"))
    assert [message["i"] for message in messages] == [0, 1, 2]
    assert {message["pid"] for message in messages}.isdisjoint({os.getpid()})


def test_messages_come_while_the_child_still_runs(task: Task) -> None:
    target = task("import time\nyield {'first': 1}\ntime.sleep(600)\nyield {'second': 2}")
    messages = isolate.run(target, {}, what="waiting")
    assert next(messages) == {"first": 1}
    messages.close()


def test_an_error_of_ours_arrives_as_itself(task: Task) -> None:
    target = task("from r1q.core.errors import InputError\nyield {'a': 1}\nraise InputError('model.gguf: bad magic')")
    arrived, error = collect(isolate.run(target, {}, what="reading"))
    assert arrived == [{"a": 1}]
    assert (type(error), str(error)) == (InputError, "model.gguf: bad magic")


def test_any_other_exception_is_a_crash_in_one_line_with_the_trace_as_a_note(task: Task) -> None:
    arrived, error = collect(
        isolate.run(task("yield {'a': 1}\nraise KeyError('no such\\nthing')"), {}, what="llama-cpp")
    )
    assert arrived == [{"a": 1}]
    assert isinstance(error, MissingError)
    assert str(error).startswith("llama-cpp crashed: KeyError")
    assert "\n" not in str(error)
    assert "Traceback" in error.__notes__[0]


@pytest.mark.parametrize(
    ("name", "kind", "sentence"),
    [
        ("SIGKILL", ResourceError, r"decoding was killed \(SIGKILL\), most often by the kernel because memory ran out"),
        ("SIGSEGV", MissingError, r"decoding crashed \(SIGSEGV\); it last said: deep in native code"),
        ("SIGABRT", MissingError, r"decoding crashed \(SIGABRT\)"),
    ],
)
def test_a_signal_keeps_what_arrived(task: Task, name: str, kind: type[R1qError], sentence: str) -> None:
    # Without a core file: a test run must not leave one behind.
    target = task(
        f"""
        import os, resource, signal, sys
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        yield {{'half': True}}
        print('deep in native code', file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.{name})
        """
    )
    arrived, error = collect(isolate.run(target, {}, what="decoding"))
    assert arrived == [{"half": True}]
    assert isinstance(error, kind)
    assert re.match(sentence, str(error)), str(error)


def test_an_abort_over_memory_is_a_matter_of_memory(task: Task) -> None:
    target = task(
        """
        import os, resource, sys
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        yield {}
        print("terminate called after throwing 'std::bad_alloc'", file=sys.stderr, flush=True)
        os.abort()
        """
    )
    _, error = collect(isolate.run(target, {}, what="loading"))
    assert isinstance(error, ResourceError)
    assert "bad_alloc" in str(error)


def test_a_child_over_its_limit_is_out_of_memory(task: Task) -> None:
    target = task("yield {'started': True}\nx = bytearray(8 << 30)\nyield {'got': len(x)}")
    arrived, error = collect(isolate.run(target, {}, what="loading", memory_limit=4 << 30))
    assert arrived == [{"started": True}]
    assert isinstance(error, ResourceError)
    assert "not enough memory" in str(error)


def test_exit_code_without_a_word(task: Task) -> None:
    _, error = collect(isolate.run(task("import os\nyield {}\nos._exit(7)"), {}, what="measuring"))
    assert isinstance(error, MissingError)
    assert str(error) == "measuring ended with exit code 7"


def test_a_line_cut_off_by_death_is_not_a_message(task: Task) -> None:
    # Whatever its number, the pipe to the parent is the only one the child can write to besides 0, 1 and 2.
    body = """
    import os
    yield {'whole': 1}
    for descriptor in range(3, 64):
        try:
            os.write(descriptor, b'{"half": ')
        except OSError:
            pass
    os._exit(9)
    """
    target = task(body)
    arrived, _ = collect(isolate.run(target, {}, what="measuring"))
    assert arrived == [{"whole": 1}]


def test_what_native_code_prints_is_no_message(task: Task) -> None:
    messages = list(isolate.run(task("import os\nos.write(1, b'loading...\\n')\nyield {'a': 1}"), {}, what="x"))
    assert messages == [{"a": 1}]


def test_not_a_number_is_a_crash_and_not_broken_json(task: Task) -> None:
    _, error = collect(isolate.run(task("yield {'speed': float('nan')}"), {}, what="measuring"))
    assert "not JSON compliant" in str(error)


def test_modules_in_the_current_folder_are_not_imported(
    task: Task, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path_factory.mktemp("downloads")
    (here / "psutil.py").write_text("raise RuntimeError('a stranger')")
    monkeypatch.chdir(here)
    target = task("import psutil\nyield {'file': psutil.__file__}")
    (message,) = isolate.run(target, {}, what="x")
    assert str(here) not in message["file"]


def test_a_listener_that_stops_leaves_no_child(task: Task) -> None:
    messages = isolate.run(task("import os, time\nyield {'pid': os.getpid()}\ntime.sleep(600)"), {}, what="x")
    pid = next(messages)["pid"]
    messages.close()
    assert not psutil.pid_exists(pid)


def test_a_killed_parent_leaves_no_child(task: Task, tmp_path: Path) -> None:
    task("import os, time\nyield {'pid': os.getpid()}\ntime.sleep(600)")
    code = (
        "import os, sys; sys.path.insert(0, sys.argv[1])\n"
        "from r1q.benchmarks import isolate\n"
        "for message in isolate.run('tasks:task', {}, what='x'): print(message['pid'], flush=True)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code, str(ROOT)], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = psutil.Process(int(parent.stdout.readline()))
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 60
    while child.is_running() and child.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.02)
