"""A Hub of the tests' own, on loopback: what huggingface_hub asks to make, list and fetch repositories."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_" + "x" * 34


class Hub:
    """Repositories of one commit after another, in memory.

    Attributes:
        private: of every repository, whether it is private.
        commits: of every repository its commits, each the files by path.
        served: paths of the files that were fetched.
        refuses: the status that a commit is answered with; fails: that of every file fetched from then on.
    """

    def __init__(self) -> None:
        self.private: dict[str, bool] = {}
        self.commits: dict[str, list[dict[str, bytes]]] = {}
        self.served: list[str] = []
        self.refuses: int | None = None
        self.fails: int | None = None
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                self.reply(*(hub.post(self.path, body) if self.is_known() else _UNKNOWN))

            def do_GET(self) -> None:
                self.reply(*(hub.get(self.path, self.command) if self.is_known() else _UNKNOWN))

            do_HEAD = do_GET

            def is_known(self) -> bool:
                return bool(self.headers.get("authorization") == f"Bearer {TOKEN}")

            def reply(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
                text = content if isinstance(content, bytes) else json.dumps(content).encode()
                self.send_response(status)
                for name, value in {"content-length": str(len(text)), **(headers or {})}.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(text)

            def log_message(self, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def post(self, path: str, body: bytes) -> tuple[int, Any]:
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = "/".join(filter(None, (asked.get("organization"), asked["name"])))
            self.private.setdefault(name, bool(asked.get("private") or asked.get("visibility") == "private"))
            kind = "datasets/" if asked.get("type") == "dataset" else ""
            return 200, {"url": f"{self.url}/{kind}{name}"}
        if "/preupload/" in path:
            files = [file["path"] for file in json.loads(body)["files"]]
            return 200, {"files": [{"path": p, "uploadMode": "regular", "shouldIgnore": False} for p in files]}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if found := re.fullmatch(r"/api/(?:models|datasets)/([^/]+/[^/]+)/commit/main", path):
            if self.refuses is not None:
                return self.refuses, {"error": "You don't have the rights to create this repository"}
            commits = self.commits.setdefault(found[1], [])
            files = dict(commits[-1]) if commits else {}
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                elif line["key"] == "deletedFile":
                    del files[line["value"]["path"]]
            commits.append(files)
            commit = _commit(len(commits))
            return 200, {"commitUrl": f"{self.url}/{found[1]}/commit/{commit}", "commitOid": commit}
        return 404, {"error": path}

    def get(self, path: str, command: str) -> tuple[int, Any] | tuple[int, Any, dict[str, str]]:
        path = unquote(urlsplit(path).path)
        if found := re.fullmatch(r"/api/datasets/([^/]+/[^/]+)(?:/revision/(\w+))?", path):
            number = self._number(found[1], found[2] or "main")
            return _MISSING if number is None else (200, {"id": found[1], "sha": _commit(number)})
        if found := re.fullmatch(r"/api/datasets/([^/]+/[^/]+)/tree/(\w+)", path):
            number = self._number(found[1], found[2])
            files = {} if number is None else self.commits[found[1]][number - 1]
            tree = [{"type": "file", "path": p, "size": len(c), "oid": _oid(c)} for p, c in files.items()]
            return 200, tree
        if found := re.fullmatch(r"/datasets/([^/]+/[^/]+)/resolve/(\w+)/(.+)", path):
            number = self._number(found[1], found[2])
            if number is None or found[3] not in self.commits[found[1]][number - 1]:
                return 404, {}, {"X-Error-Code": "EntryNotFound"}
            if self.fails is not None:
                return self.fails, {"error": "out of order"}
            content = self.commits[found[1]][number - 1][found[3]]
            if command == "GET":
                self.served.append(found[3])
            return 200, content, {"ETag": f'"{_oid(content)}"', "X-Repo-Commit": _commit(number)}
        return 404, {"error": path}

    def revision(self, name: str, number: int) -> str:
        """The hash of a repository's commit, the first of which has number 1."""
        assert number <= len(self.commits[name])
        return _commit(number)

    def _number(self, name: str, revision: str) -> int | None:
        """The number of a commit, from 1."""
        names = {_commit(n): n for n in range(1, len(self.commits.get(name, ())) + 1)}
        if revision == "main" and names:
            return max(names.values())
        return next((number for commit, number in names.items() if commit.startswith(revision)), None)


_UNKNOWN: tuple[int, Any] = (401, {"error": "Invalid username or password."})
_MISSING: tuple[int, Any, dict[str, str]] = (404, {"error": "not found"}, {"X-Error-Code": "RepoNotFound"})


def _commit(number: int) -> str:
    return hashlib.sha1(str(number).encode()).hexdigest()


def _oid(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()
