"""A small hub on this machine: what huggingface_hub asks for files of datasets, and no more."""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import json
import re
import threading
from collections.abc import Iterator

COMMIT, OLD = "0123456789abcdef" * 2 + "01234567", "f" * 40
REPO = "laion/tiny"


class Hub(http.server.BaseHTTPRequestHandler):
    """What huggingface_hub asks for a file of a dataset, and no more. One repository is gated, one is private."""

    protocol_version = "HTTP/1.1"
    files: dict[tuple[str, str, str], bytes]
    asked: list[tuple[str, str, str | None]]

    def log_message(self, *_: object) -> None:
        pass

    def answer(self, code: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(code)
        headers = {"Content_Length": str(len(body))} | headers
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_HEAD(self) -> None:  # noqa: N802
        self.do_GET()

    def do_GET(self) -> None:  # noqa: N802
        if self.path == "/api/agent-harnesses":  # the library's own affair
            return self.answer(404)
        token = self.headers.get("Authorization")
        self.asked.append((self.command, self.path, token))
        found = re.fullmatch(r"(?:/api)?/datasets/([^/]+/[^/]+)/(resolve|revision)/([^/]+)/?(.*)", self.path)
        assert found, self.path
        repo, kind, revision, file = found.groups()
        revision = COMMIT if revision == "main" else revision
        if repo == "laion/gated" and token != "Bearer hf_good":
            return self.answer(403 if token else 401, X_Error_Code="GatedRepo", X_Error_Message="ask first")
        if repo == "laion/private" and token != "Bearer hf_good":
            return self.answer(401, X_Error_Code="RepoNotFound")
        if repo == "laion/broken":
            return self.answer(418)
        if repo == "laion/cut":
            self.close_connection = True
            body = b"" if self.command == "HEAD" else b"half"
            return self.answer(200, body, Content_Length="8", X_Repo_Commit=revision, ETag='"cut"')
        if repo not in {known for known, _, _ in self.files}:
            return self.answer(404, X_Error_Code="RepoNotFound")
        if revision not in {at for known, at, _ in self.files if known == repo}:
            return self.answer(404, X_Error_Code="RevisionNotFound")
        if kind == "revision":
            return self.answer(200, json.dumps({"id": repo, "sha": revision}).encode(), Content_Type="application/json")
        body = self.files.get((repo, revision, file))
        if body is None:
            return self.answer(404, X_Error_Code="EntryNotFound")
        etag = f'"{hashlib.sha256(body).hexdigest()}"'
        return self.answer(200, body, X_Repo_Commit=revision, ETag=etag)


@contextlib.contextmanager
def serving(files: dict[tuple[str, str, str], bytes], kind: type[Hub] = Hub) -> Iterator[tuple[type[Hub], str]]:
    """A running hub of (repository, commit, file) -> bytes: its handler, which notes what was asked, and its URL."""
    handler = type("Handler", (kind,), {"files": files, "asked": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield handler, f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
