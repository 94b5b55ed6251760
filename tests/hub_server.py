"""A Hugging Face Hub on this machine that holds what a test uploads."""

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0" * 40


class Handler(BaseHTTPRequestHandler):
    """The part of the Hub's protocol that uploads and downloads of small files need."""

    files: dict[str, dict[str, bytes]]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        parts = self.path.strip("/").split("/")
        if parts[:2] == ["api", "repos"]:
            name = json.loads(body)["name"]
            owner = json.loads(body).get("organization") or "me"
            self.files.setdefault(f"{owner}/{name}", {})
            self.answer({"url": f"{self.base}/{owner}/{name}"})
        elif "preupload" in parts:
            names = [file["path"] for file in json.loads(body)["files"]]
            modes = [
                {"path": n, "uploadMode": "regular", "shouldIgnore": False, "oid": None}
                for n in names
            ]
            self.answer({"files": modes})
        elif "commit" in parts:
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    content = base64.b64decode(entry["value"]["content"])
                    self.files[f"{parts[2]}/{parts[3]}"][entry["value"]["path"]] = content
            url = f"{self.base}/{parts[2]}/{parts[3]}/commit/{COMMIT}"
            self.answer({"success": True, "commitOid": COMMIT, "commitUrl": url})
        else:  # the check of the card's header
            self.answer({"errors": [], "warnings": []})

    def do_GET(self) -> None:
        parts = self.path.split("?")[0].strip("/").split("/")
        if parts[:2] == ["api", "whoami-v2"]:
            self.answer({"name": "me", "type": "user", "orgs": []})
        elif parts[:2] == ["api", "models"]:
            name = "/".join(parts[2:4])
            revision = parts[5] if len(parts) > 5 else "main"
            if name not in self.files:
                self.answer({"error": "not found"}, 404, {"X-Error-Code": "RepoNotFound"})
            elif revision not in ("main", COMMIT):
                self.answer({"error": "not found"}, 404, {"X-Error-Code": "RevisionNotFound"})
            elif "tree" in parts:
                tree = [
                    {"type": "file", "path": path, "size": len(content), "oid": COMMIT}
                    for path, content in self.files[name].items()
                ]
                self.answer(tree)
            else:
                siblings = [{"rfilename": path} for path in self.files[name]]
                self.answer({"id": name, "sha": COMMIT, "siblings": siblings})
        elif parts[0] == "gated":
            self.answer({"error": "gated"}, 403, {"X-Error-Code": "GatedRepo"})
        else:
            content = self.files["/".join(parts[:2])]["/".join(parts[4:])]
            headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{hash(content):x}"'}
            self.answer(content, headers=headers)

    do_HEAD = do_GET

    @property
    def base(self) -> str:
        return f"http://{self.headers['Host']}"

    def answer(self, content, status: int = 200, headers: dict[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *arguments) -> None:
        """Prints nothing."""


@contextmanager
def local_hub() -> Iterator[tuple[str, dict[str, dict[str, bytes]]]]:
    """Yields the Hub's address, and the files of each repository."""
    handler = type("Handler", (Handler,), {"files": {}})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", handler.files
    finally:
        server.shutdown()
        server.server_close()
