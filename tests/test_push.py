"""`redpen push`, to a Hub of the test's own on loopback."""

from __future__ import annotations

import base64
import contextlib
import json
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard, constants

from helpers.caches import small_recipe
from pipeline.cli import main
from pipeline.train import stage

TOKEN = "hf_" + "x" * 34


class Hub:
    """What huggingface_hub asks for one commit of a model.

    Attributes:
        repositories: names, and whether they are private. commits: of each its files.
        refuses: how it answers a commit.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, bool] = {}
        self.commits: list[dict[str, bytes]] = []
        self.refuses: int | None = None
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                if self.headers.get("authorization") != f"Bearer {TOKEN}":
                    return self.reply(401, {"error": "Invalid username or password."})
                self.reply(*hub.answer(self.path, body))

            def reply(self, status: int, value: Any) -> None:
                text = json.dumps(value).encode()
                self.send_response(status)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            def log_message(self, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def answer(self, path: str, body: bytes) -> tuple[int, Any]:
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = "/".join(filter(None, (asked.get("organization"), asked["name"])))
            self.repositories.setdefault(name, asked.get("private") or asked.get("visibility") == "private")
            return 200, {"url": f"{self.url}/{name}"}
        if "/preupload/" in path:
            files = [file["path"] for file in json.loads(body)["files"]]
            return 200, {"files": [{"path": p, "uploadMode": "regular", "shouldIgnore": False} for p in files]}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if "/commit/" in path:
            if self.refuses is not None:
                return self.refuses, {"error": "You don't have the rights to create a model"}
            lines = [json.loads(line)["value"] for line in body.splitlines() if json.loads(line)["key"] == "file"]
            self.commits.append({line["path"]: base64.b64decode(line["content"]) for line in lines})
            return 200, {"commitUrl": f"{self.url}/me/mine/commit/0123456789abcdef", "commitOid": "0123456789abcdef"}
        return 404, {"error": path}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with contextlib.closing(Hub()) as served:
        monkeypatch.setattr(constants, "ENDPOINT", served.url)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield served


@pytest.fixture(scope="module")
def trained(toy_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("push") / "run"
    assert stage.run(small_recipe(), str(toy_cache), run) == 0
    return run


def test_a_run_is_one_commit_that_can_be_loaded_from_the_hub(
    trained: Path, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["push", str(trained), "me/mine", "--base", "me/toy-student"]) == 0
    out, err = capsys.readouterr()
    assert hub.repositories == {"me/mine": True} and f"{hub.url}/me/mine" in out and "0123456" in out
    assert "vllm serve me/toy-student" in err and "trained=me/mine" in err
    (files,) = hub.commits
    weights = "adapter_model.safetensors"
    assert files[weights] == (trained / "adapter" / weights).read_bytes()
    assert {"recipe.toml", "metrics.jsonl", "README.md", "adapter_config.json"} <= files.keys()
    card = ModelCard(files["README.md"].decode())
    assert card.data.base_model == "me/toy-student" and 'from_pretrained(base, "me/mine")' in card.text
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "me/toy-student"
    assert not any(b"toy/assets" in files[name] for name in ("README.md", "adapter_config.json"))


def test_a_merged_model_is_published_as_it_is(trained: Path, hub: Hub, tmp_path: Path) -> None:
    assert main(["merge", str(trained), "-o", str(tmp_path / "merged")]) == 0
    assert main(["push", str(tmp_path / "merged"), "me/mine", "--base", "me/toy", "--public"]) == 0
    assert hub.repositories == {"me/mine": False}
    kept = {path.name: path.read_bytes() for path in (tmp_path / "merged").iterdir() if path.name != "README.md"}
    assert {name: content for name, content in hub.commits[0].items() if name != "README.md"} == kept


def test_what_is_wrong_is_one_line_and_nothing_is_published(
    trained: Path, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*arguments: str) -> str:
        assert main(["push", *arguments]) == 1
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("redpen: ")]
        assert len(lines) == 1 and TOKEN not in lines[0]
        return lines[0]

    named = (str(trained), "me/mine", "--base", "me/toy")
    assert "expected OWNER/NAME" in refused(str(trained), "not a name", "--base", "me/toy")
    assert "give --base" in refused(str(trained), "me/mine")
    assert "expected a run" in refused(str(tmp_path), "me/mine")
    damaged = Path(shutil.copytree(trained, tmp_path / "run"))
    (damaged / "adapter/adapter_model.safetensors").write_bytes(b"other")
    assert "digest" in refused(str(damaged), *named[1:])
    assert not hub.repositories
    hub.refuses = 403
    assert "may write there" in refused(*named)
    monkeypatch.setenv("HF_TOKEN", "hf_" + "y" * 34)
    assert "401" in refused(*named)
    hub.close()
    assert "HUB_ID" in refused(*named)
    assert not hub.commits
