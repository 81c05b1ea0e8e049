"""Downloads by the real huggingface_hub client from a small hub on 127.0.0.1, in processes of their own.

The client reads its settings once, when it is imported, and so each case runs in a fresh Python with its own environment: that
HF_ENDPOINT, HF_HUB_OFFLINE and HF_HOME are honoured is what is tested, not that we pass arguments on.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from r1q.core.errors import InputError
from r1q.models.config import ModelConfig
from r1q.models.hub import find_model
from r1q.models.source import ModelSource

MakeModel = Callable[..., Path]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
REVISIONS = ("main", "v1", COMMIT)
ERRORS = {"/nobody/": (404, "RepoNotFound"), "/gated/": (403, "GatedRepo"), "/broken/": (500, "")}


class Hub(ThreadingHTTPServer):
    """Serves the files of one folder as the repository org/tiny; notes every request; can cut a download short."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files = {path.name: path.read_bytes() for path in folder.iterdir()}
        self.files |= {"pytorch_model.bin": b"pickle", "modeling_tiny.py": b"import os", "onnx/config.json": b"{}"}
        self.requests: list[tuple[str, str, str | None]] = []
        self.cuts: dict[str, int] = {}  # how many times more a file's download is broken off half way
        self.gone: set[str] = set()  # files whose download breaks off at the first byte, every time

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def asked(self, method: str, name: str) -> list[str | None]:
        """Return the Range headers of the requests for a file."""
        return [given for verb, path, given in self.requests if verb == method and path.endswith(f"/{name}")]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, format: str, *args: object) -> None:
        del format, args

    def do_HEAD(self) -> None:
        self._serve()

    def do_GET(self) -> None:
        self._serve()

    def _serve(self) -> None:
        path = self.path.split("?")[0]
        self.server.requests.append((self.command, path, self.headers.get("Range")))
        for prefix, (status, code) in ERRORS.items():
            if prefix in path:
                return self._answer(status, b"", {"X-Error-Code": code, "X-Error-Message": "no"})
        _, _, rest = path.partition("/org/tiny/")
        kind, _, rest = rest.partition("/")
        revision, _, name = rest.partition("/")
        if revision not in REVISIONS:
            return self._answer(404, b"", {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "no"})
        if kind == "resolve" and name in self.server.files:
            return self._file(name)
        listing = {"revision": self._info, "tree": self._tree}.get(kind)
        if listing is None:
            return self._answer(404, b"", {"X-Error-Code": "EntryNotFound"})
        return self._answer(200, json.dumps(listing()).encode(), {"Content-Type": "application/json"})

    def _info(self) -> dict[str, Any]:
        return {"id": "org/tiny", "sha": COMMIT, "siblings": [{"rfilename": name} for name in self.server.files]}

    def _tree(self) -> list[dict[str, Any]]:
        return [
            {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
            for name, data in self.server.files.items()
        ]

    def _file(self, name: str) -> None:
        data = self.server.files[name]
        headers = {
            "ETag": f'"{hashlib.sha256(data).hexdigest()}"',
            "X-Repo-Commit": COMMIT,
            "X-Linked-Size": str(len(data)),
            "X-Linked-ETag": f'"{hashlib.sha256(data).hexdigest()}"',
            "Accept-Ranges": "bytes",
        }
        start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").split("-")[0])
        if self.headers.get("Range"):
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        body, cut = data[start:], self.server.cuts.get(name, 0)
        if name in self.server.gone and self.command == "GET":
            self._answer(200, body, headers, send=0)
            self.close_connection = True
            return
        if cut and self.command == "GET":
            self.server.cuts[name] = cut - 1
            self._answer(206 if start else 200, body, headers, send=len(body) // 2)
            self.close_connection = True
            return
        self._answer(206 if self.headers.get("Range") else 200, body, headers)

    def _answer(self, status: int, body: bytes, headers: dict[str, str], send: int | None = None) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[:send])


@pytest.fixture
def hub(make_model: MakeModel) -> Iterator[Hub]:
    """Return a running hub with one tiny model of two shards."""
    with Hub(make_model("qwen2", shards=2)) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


Fetch = Callable[..., dict[str, Any]]
SCRIPT = """
import json, sys
from r1q.core.errors import R1qError
from r1q.models.hub import find_model
try:
    found = find_model(sys.argv[1])
    print(json.dumps({"path": str(found.path), "repository": found.repository, "commit": found.commit}))
except R1qError as error:
    print(json.dumps({"error": type(error).__name__, "message": str(error)}))
"""


def settings(folder: Path, endpoint: str) -> dict[str, str]:
    """Return an environment in which the client knows one hub and keeps its cache in `folder`."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    wanted = {"HF_HOME": str(folder / "hf"), "HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "*"}
    return {**kept, **wanted}


@pytest.fixture
def fetch(tmp_path: Path) -> Fetch:
    """Return `fetch(model, endpoint, **environment)`: what find_model gives in a fresh Python with its cache in tmp_path."""

    def run(model: str, endpoint: str, **environment: str) -> dict[str, Any]:
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, model],
            env={**settings(tmp_path, endpoint), **environment},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert "Traceback" not in done.stderr, done.stderr
        assert "it/s" not in done.stderr  # no progress bars unless asked for
        answer: dict[str, Any] = json.loads(done.stdout)
        return answer

    return run


@pytest.mark.parametrize(("suffix"), ["", "@v1", f"@{COMMIT}"])
def test_a_model_is_fetched_pinned_and_opens(hub: Hub, fetch: Fetch, suffix: str) -> None:
    found = fetch(f"org/tiny{suffix}", hub.url)
    assert found["repository"] == "org/tiny"
    assert found["commit"] == COMMIT
    source = ModelSource.open(Path(found["path"]))
    assert source.config.name == "tiny"
    assert source.config == ModelConfig.read(source.path)
    for spec in source.tensors:
        source.read_rows(spec.name, 0, spec.rows)
    assert {path.name for path in source.path.iterdir()} == {
        name for name in hub.files if "/" not in name and not name.endswith((".bin", ".py"))
    }
    assert not any(path.endswith((".bin", ".py", "onnx/config.json")) for _, path, _ in hub.requests)


def test_quantize_takes_an_id_and_pins_its_commit_in_the_manifest(hub: Hub, tmp_path: Path) -> None:
    output = tmp_path / "out"
    command = ["quantize", "org/tiny@v1", "--scheme", "q8_0", "--to", "checkpoint", "-q", "-o", str(output)]
    subprocess.run([sys.executable, "-m", "r1q", *command], env=settings(tmp_path, hub.url), check=True, timeout=120)
    manifest = json.loads((output / "checkpoint" / "manifest.json").read_bytes())
    assert manifest["origin"] == {"repository": "org/tiny", "commit": COMMIT}
    assert manifest["model"] == "tiny"


def test_a_cut_connection_is_resumed_where_it_broke(hub: Hub, fetch: Fetch) -> None:
    """The client writes in pieces of 10 MiB: of 26 MiB cut at 13, one piece was kept, and the rest is asked for."""
    name, piece = "large.safetensors", 10 << 20
    hub.files[name] = bytes(range(256)) * (26 << 12)
    hub.cuts[name] = 1
    found = fetch("org/tiny", hub.url)
    assert (Path(found["path"]) / name).read_bytes() == hub.files[name]
    assert hub.asked("GET", name) == [None, f"bytes={piece}-"]


def test_after_a_failed_run_the_same_command_fetches_only_what_is_missing(hub: Hub, fetch: Fetch) -> None:
    name = "model-00002-of-00002.safetensors"
    hub.gone.add(name)
    failed = fetch("org/tiny", hub.url)
    assert failed["error"] == "MissingError"
    assert "run the same command again, finished files are kept" in failed["message"]
    hub.gone.clear()
    hub.requests.clear()
    found = fetch("org/tiny", hub.url)
    assert ModelSource.open(Path(found["path"])).config.family == "qwen2"
    assert len(hub.asked("GET", name)) == 1
    assert hub.asked("GET", "model-00001-of-00002.safetensors") == []


def test_offline_mode_takes_the_cache_and_asks_nobody(hub: Hub, fetch: Fetch) -> None:
    online = fetch("org/tiny", hub.url)
    hub.requests.clear()
    assert fetch("org/tiny", hub.url, HF_HUB_OFFLINE="1") == online
    assert hub.requests == []


def test_offline_mode_without_the_model_says_how_to_mend(hub: Hub, fetch: Fetch) -> None:
    answer = fetch("org/tiny", hub.url, HF_HUB_OFFLINE="1")
    assert answer["error"] == "MissingError"
    assert "HF_HUB_OFFLINE is set; unset it, or give a folder" in answer["message"]
    assert hub.requests == []


def test_without_a_connection_the_cache_serves_or_the_message_says_so(hub: Hub, fetch: Fetch) -> None:
    nobody = "http://127.0.0.1:9"  # the discard port: refused
    answer = fetch("org/tiny", nobody)
    assert answer["error"] == "MissingError"
    assert "the hub cannot be reached" in answer["message"]
    online = fetch("org/tiny", hub.url)
    assert fetch("org/tiny", nobody) == online


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        ("nobody/tiny", "InputError", "is not on the hub, or is private"),
        ("gated/tiny", "InputError", "accept its licence on its page, then log in"),
        ("org/tiny@v9", "InputError", "org/tiny@v9: the hub knows no such revision"),
        ("broken/tiny", "MissingError", "broken/tiny"),
    ],
)
def test_what_the_hub_refuses_is_said_in_one_line(hub: Hub, fetch: Fetch, model: str, error: str, message: str) -> None:
    answer = fetch(model, hub.url)
    assert answer["error"] == error
    assert message in answer["message"]
    assert "\n" not in answer["message"]


def test_a_repository_of_pickles_is_refused(hub: Hub, fetch: Fetch) -> None:
    hub.files = {name: data for name, data in hub.files.items() if not name.endswith(".safetensors")}
    answer = fetch("org/tiny", hub.url)
    assert answer["error"] == "InputError"
    assert "pickled weights are never loaded" in answer["message"]


def test_a_folder_needs_no_hub(make_model: MakeModel) -> None:
    folder = make_model()
    found = find_model(str(folder))
    assert (found.path, found.repository, found.commit) == (folder, None, None)


@pytest.mark.parametrize(
    "text", ["", "tiny", "../x", "a/b/c", "org/tiny@", "http://x/y", "org/ti ny", "-x/y", "org/tiny@-x"]
)
def test_what_is_neither_a_folder_nor_an_id_is_refused_without_a_request(
    text: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    if text:
        with pytest.raises(InputError, match="neither a folder nor a hub id; give a folder, or org/name"):
            find_model(text)


def test_a_double_dash_is_not_an_id(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a hub id"):
        find_model("org/a--b", cache=tmp_path, endpoint="http://127.0.0.1:9")
