"""A small Hugging Face hub on loopback: one dataset repository, as far as huggingface_hub asks for it."""

import hashlib
import json
import os
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

REPO = "someone/shards"
COMMIT = "c0ffee" + "0" * 34


class Hub:
    """Serves `files` ({name: bytes}) while used as a context. `requests` are the (method, path, Range) that came; `cut`
    are names whose next download ends half way.
    """

    def __init__(self, files: dict[str, bytes]):
        self.files, self.requests, self.cut = files, [], set()
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    def environment(self, home) -> dict[str, str]:
        """The variables of a process that takes this for the hub, and keeps nothing outside `home`."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and not k.lower().endswith("_proxy")}
        address = f"http://127.0.0.1:{self.server.server_address[1]}"
        return kept | {"HF_ENDPOINT": address, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}

    def downloads(self) -> list[str]:
        return [path.rsplit("/", 1)[1] for method, path, _ in self.requests if method == "GET" and "/resolve/" in path]


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        self.answer()

    def answer(self):
        self.hub.requests.append((self.command, self.path, self.headers.get("Range")))
        if re.match(f"/api/datasets/{REPO}/tree/main", self.path):
            tree = [
                {"type": "file", "path": name, "size": len(data), "oid": _oid(data)}
                for name, data in self.hub.files.items()
            ]
            self.send(200, json.dumps(tree).encode(), {"Content-Type": "application/json"})
        elif found := re.match(f"/datasets/{REPO}/resolve/(?:main|{COMMIT})/([^?]+)", self.path):
            self.send_file(found[1])
        else:
            self.send(404, b"", {"X-Error-Code": "RepoNotFound"})

    def send_file(self, name: str):
        data = self.hub.files[name]
        headers = {"ETag": f'"{_oid(data)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        first = int(re.match(r"bytes=(\d+)-", self.headers.get("Range") or "bytes=0-")[1])
        if first:
            headers["Content-Range"] = f"bytes {first}-{len(data) - 1}/{len(data)}"
        self.send(206 if first else 200, data[first:], headers, cut=name in self.hub.cut and self.command == "GET")
        if self.command == "GET":
            self.hub.cut.discard(name)

    def send(self, status: int, body: bytes, headers: dict[str, str], cut: bool = False):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[: len(body) // 2] if cut else body)


def _oid(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
