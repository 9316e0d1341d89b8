"""A Hub of one dataset on this machine, as far as the loader asks it: repository, file tree, files and byte ranges."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

REPO, REVISION = "owner/corpus", "0123456789abcdef0123456789abcdef01234567"


class FakeHub:
    """Files of the dataset `REPO` at `REVISION`, and the requests that came.

    Args:
        files: contents by path in the repository.
    """

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = files
        self.requests: list[str] = []
        self.endpoint = ""

    def tree(self, folder: str) -> list[dict]:
        return [
            {
                "type": "file",
                "path": path,
                "size": len(content),
                "oid": hashlib.sha1(content).hexdigest(),
                "lfs": {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130},
            }
            for path, content in self.files.items()
            if path.startswith(f"{folder}/")
        ]


@contextmanager
def serve(hub: FakeHub) -> Iterator[FakeHub]:
    """Answer requests on a free port of this machine, whose address is then `hub.endpoint`."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.answer(with_body=False)

        def do_GET(self) -> None:
            self.answer(with_body=True)

        def do_POST(self) -> None:  # paths-info
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.answer(with_body=True)

        def answer(self, *, with_body: bool) -> None:
            path = self.path.partition("?")[0]
            hub.requests.append(f"{self.command} {path} {self.headers.get('Range', '')}".strip())
            api, resolved = f"/api/datasets/{REPO}", f"/datasets/{REPO}/resolve/{REVISION}/"
            if path in (f"{api}/revision/{REVISION}", api):
                self.send(200, json.dumps({"id": REPO, "sha": REVISION, "siblings": []}).encode(), with_body)
            elif path.startswith(f"{api}/tree/{REVISION}"):
                folder = path.removeprefix(f"{api}/tree/{REVISION}").strip("/").replace("%2F", "/")
                self.send(200, json.dumps(hub.tree(folder)).encode(), with_body)
            elif path.startswith(f"{api}/paths-info/"):
                self.send(200, json.dumps(hub.tree("sample/10BT")).encode(), with_body)
            elif path.startswith(resolved) and path.removeprefix(resolved) in hub.files:
                self.send_file(hub.files[path.removeprefix(resolved)], with_body)
            else:
                self.send(404, b"{}", with_body, {"X-Error-Code": "RevisionNotFound"})

        def send_file(self, content: bytes, with_body: bool) -> None:
            headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": REVISION}
            asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            if asked:
                first, last = int(asked[1]), min(int(asked[2]), len(content) - 1)
                headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
                self.send(206, content[first : last + 1], with_body, headers)
            else:
                self.send(200, content, with_body, headers)

        def send(self, status: int, content: bytes, with_body: bool, headers: dict[str, str] | None = None) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
                self.send_header(name, value)
            self.end_headers()
            if with_body:
                self.wfile.write(content)

        def log_message(self, format: str, *values: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
