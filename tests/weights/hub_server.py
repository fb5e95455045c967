"""A hub on 127.0.0.1: the few routes by which huggingface_hub downloads a repository, from a dictionary of files."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

REPO = "org/name"
COMMIT = "c0ffee" + "0" * 34


@dataclass
class Hub:
    endpoint: str
    downloads: list[str] = field(default_factory=list)
    """Files that were fetched, by GET."""
    num_requests: int = 0


@contextmanager
def hub_server(files: Mapping[str, bytes]) -> Iterator[Hub]:
    """Serves `files` as the repository `REPO`, whose branch main and tag v1 are both at `COMMIT`."""
    hub = Hub("")

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer(with_body=True)

        def do_HEAD(self) -> None:
            self._answer(with_body=False)

        def log_message(self, *_: object) -> None:
            pass

        def _answer(self, *, with_body: bool) -> None:
            hub.num_requests += 1
            status, body, headers = _route(self.path.partition("?")[0], files)
            if with_body and "/resolve/" in self.path and status == 200:
                hub.downloads.append(self.path.rpartition("/")[2])
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if with_body:
                self.wfile.write(body)

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        hub.endpoint = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()


def _route(path: str, files: Mapping[str, bytes]) -> tuple[int, bytes, dict[str, str]]:
    api = f"/api/models/{REPO}"
    if path in (f"{api}/revision/main", f"{api}/revision/v1", f"{api}/revision/{COMMIT}"):
        siblings = [{"rfilename": name} for name in files]
        return 200, json.dumps({"id": REPO, "sha": COMMIT, "siblings": siblings}).encode(), {}
    if path.startswith(f"{api}/revision/"):
        return 404, b"{}", {"X-Error-Code": "RevisionNotFound"}
    if path == f"{api}/tree/{COMMIT}":
        tree = [
            {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
            for name, data in files.items()
        ]
        return 200, json.dumps(tree).encode(), {}
    prefix = f"/{REPO}/resolve/{COMMIT}/"
    if path.startswith(prefix) and path.removeprefix(prefix) in files:
        data = files[path.removeprefix(prefix)]
        return 200, data, {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": COMMIT}
    return 404, b"{}", {"X-Error-Code": "RepoNotFound"}
