"""Models of the Hub: a small server stands in for it."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest

from qjax.converters.hub import looks_like_hub_id
from qjax.io.safetensors import write_safetensors

SHA = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """A server with three models, counting what is fetched."""

    def __init__(self, weights: bytes):
        text = {"config.json": b"{}", "tokenizer.json": b"{}", "evil.py": b"raise"}
        pickled = {"pytorch_model.bin": b"PK", "training_args.bin": b"x"}
        other = {"onnx/model.safetensors": b"", "README.md": b"", "tf_model.h5": b""}
        self.repos = {
            "me/safe": text | pickled | other | {"model.safetensors": weights},
            "me/pickled": text | pickled,
            "me/m-GGUF": {
                "m-Q8_0.gguf": b"GGUF",
                "m-q4_k_m.gguf": b"GGUF",
                "README.md": b"",
                "big/m-Q2_K-00001-of-00002.gguf": b"GGUF",
                "big/m-Q2_K-00002-of-00002.gguf": b"GGUF",
                "big/other-Q3_K.gguf": b"GGUF",
                "m-Q3_K.gguf": b"GGUF",
            },
        }
        self.fetched: list[str] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: object) -> None:
                """Say nothing."""

            def do_HEAD(self) -> None:
                self.answer(body=False)

            def do_GET(self) -> None:
                self.answer(body=True)

            def answer(self, body: bool) -> None:
                status, headers, data = hub.route(urlsplit(self.path).path, body)
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                for key, value in headers.items():
                    self.send_header(key, value)
                self.end_headers()
                if body:
                    self.wfile.write(data)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def route(self, path: str, body: bool) -> tuple[int, dict[str, str], bytes]:
        parts = path.strip("/").split("/")
        listing = parts[:2] == ["api", "models"]
        repo = "/".join(parts[2:4] if listing else parts[:2])
        rest = parts[4:] if listing else parts[2:]
        if repo not in self.repos:
            return 404, {"X-Error-Code": "RepoNotFound"}, b"{}"
        files = self.repos[repo]
        if listing and rest[0] == "revision":
            if rest[1] not in ("main", "v1", SHA):
                return 404, {"X-Error-Code": "RevisionNotFound"}, b"{}"
            named = [{"rfilename": name} for name in files]
            info = {"id": repo, "sha": SHA, "siblings": named, "tags": []}
            return 200, {"Content-Type": "application/json"}, json.dumps(info).encode()
        if listing:
            tree = [
                {"type": "file", "path": n, "size": len(d), "oid": f"{i:040x}"}
                for i, (n, d) in enumerate(files.items())
            ]
            return 200, {"Content-Type": "application/json"}, json.dumps(tree).encode()
        name = "/".join(rest[2:])
        if body:
            self.fetched.append(name)
        tag = f'"{list(files).index(name):040x}"'
        return 200, {"X-Repo-Commit": SHA, "ETag": tag}, files[name]


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    write_safetensors(tmp_path / "w", {"a": np.arange(3, dtype=np.float32)})
    hub = Hub((tmp_path / "w").read_bytes())
    thread = threading.Thread(target=hub.server.serve_forever)
    thread.start()
    yield hub
    hub.server.shutdown()
    thread.join()
    hub.server.server_close()


_OPEN = """
import json, sys
from qjax.converters.huggingface import open_checkpoint
from qjax.errors import QjaxError
for asked in json.loads(sys.argv[1]):
    try:
        with open_checkpoint(*asked) as c:
            print(json.dumps([str(c.directory), c.read("a").tolist()]))
    except QjaxError as error:
        print(json.dumps([type(error).__name__, str(error)]))
"""


def _open(hub: Hub, home: Path, asked: list[list[str]], **env: str) -> list[list]:
    """Open models in a process of its own, whose Hub is the server."""
    kept = {k: v for k, v in os.environ.items() if "proxy" not in k.lower()}
    done = subprocess.run(
        [sys.executable, "-c", _OPEN, json.dumps(asked)],
        env=kept | {"HF_ENDPOINT": hub.url, "HF_HOME": str(home)} | env,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_download_cache_and_errors(hub: Hub, tmp_path: Path) -> None:
    home = tmp_path / "home"
    asked = [["me/safe"], ["me/safe", "v1"], ["me/nobody"], ["me/safe", "v9"]]
    first, tagged, missing, revision = _open(hub, home, asked)
    assert first[1] == [0, 1, 2] and first[0].endswith(f"snapshots/{SHA}")
    assert tagged == first
    assert sorted(hub.fetched) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert missing[0] == "SpecError"
    assert missing[1].startswith("'me/nobody': neither a directory here nor a model on")
    assert revision == ["SpecError", revision[1]]
    assert "'me/safe' at revision 'v9': the model has no such revision" in revision[1]

    hub.fetched.clear()
    asked = [["me/safe"], ["me/safe", SHA], ["me/pickled"]]
    cached, pinned, absent = _open(hub, home, asked, HF_HUB_OFFLINE="1")
    assert cached == pinned == first
    assert absent[0] == "SpecError" and "not in the Hub's cache" in absent[1]
    assert hub.fetched == []


def test_pickled_weights_only_without_safetensors(hub: Hub, tmp_path: Path) -> None:
    (outcome,) = _open(hub, tmp_path / "home", [["me/pickled"]])
    assert sorted(hub.fetched) == ["config.json", "pytorch_model.bin", "tokenizer.json"]
    assert outcome[0] == "FormatError" and "pytorch_model.bin" in outcome[1]


def test_one_gguf_file_of_several(hub: Hub, tmp_path: Path) -> None:
    names = ("Q4_K_M", "Q2_K", "Q3_K", "Q5_K")
    asked = [[f"me/m-GGUF:{name}"] for name in names]
    one, split, two, none = _open(hub, tmp_path / "home", asked)
    assert one[0] == "FormatError" and "m-q4_k_m.gguf: " in one[1]  # it is no model
    assert split[0] == "FormatError" and "m-Q2_K-00001-of-00002.gguf: " in split[1]
    assert two[0] == "SpecError" and "'big/other-Q3_K.gguf', 'm-Q3_K.gguf'" in two[1]
    assert none[0] == "SpecError" and "Q5_K: no GGUF file named so on the" in none[1]
    assert "m-Q8_0.gguf" not in hub.fetched and "README.md" not in hub.fetched


@pytest.mark.parametrize("name", ["gpt2", "EleutherAI/pythia-410m", "a/b.c-d_e"])
def test_hub_ids(name: str) -> None:
    assert looks_like_hub_id(name)


@pytest.mark.parametrize(
    "name", ["", "/a/b", "./a", "../a", "a/b/c", "a\\b", "a b", "~/a"]
)
def test_not_hub_ids(name: str) -> None:
    assert not looks_like_hub_id(name)
