"""The Hugging Face Hub's read API over a folder, for huggingface_hub, datasets and transformers.

    python tests/hub.py ROOT PORT            and HF_ENDPOINT=http://127.0.0.1:PORT where the clients run

ROOT/models/OWNER/NAME/main/ holds the files of a model, ROOT/datasets/OWNER/NAME/main/ those of a data set, and
refs/convert/parquet/ beside main/ another revision's. A commit is named after its files: to change one is to commit.
"""

import contextlib
import hashlib
import json
import re
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

# A repository's calls are revision, tree and paths-info; no call stands for revision/main.
API = re.compile(r"/api/(?P<kind>models|datasets)/(?P<repo>[^/]+/[^/]+)(?:/(?P<call>[a-z-]+)/(?P<rest>.+))?")
FILE = re.compile(r"/(?:(?P<kind>datasets)/)?(?P<repo>[^/]+/[^/]+)/resolve/(?P<rest>.+)")


class Missing(Exception):
    """RepoNotFound, RevisionNotFound or EntryNotFound, the names by which clients tell them apart."""


def sha(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


def entry(path: Path, folder: Path) -> dict:
    """A file or folder of a revision as the Hub lists it."""
    kind, content = ("file", path.read_bytes()) if path.is_file() else ("directory", b"")
    return {"type": kind, "path": path.relative_to(folder).as_posix(), "oid": sha(content), "size": len(content)}


def entries(folder: Path, start: str = "", recursive: bool = True) -> list[dict]:
    found = (folder / start).rglob("*") if recursive else (folder / start).iterdir()
    return [entry(path, folder) for path in sorted(found)]


def locate(repo: Path, rest: str) -> tuple[Path, str, str]:
    """Folder and commit of the revision, and the path in it, of a request's REVISION/PATH; commits are revisions."""
    if not repo.is_dir():
        raise Missing("RepoNotFound")
    revision, _, path = map(unquote, rest.partition("/"))
    for folder in filter(Path.is_dir, (repo / "main", *repo.glob("refs/*/*"))):
        commit = sha(json.dumps(entries(folder)).encode())
        if revision in (folder.relative_to(repo).as_posix(), commit):
            return folder, commit, path
    raise Missing("RevisionNotFound")


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        try:
            status, headers, content = self.answer()
        except Missing as error:  # as the Hub does, which does not tell a missing repository from a private one
            status, content = 401 if str(error) == "RepoNotFound" else 404, b""
            headers = {"X-Error-Code": str(error), "X-Error-Message": "not found"}
        self.send_response(status)
        for header in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(*header)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_HEAD = do_POST = do_GET

    def answer(self) -> tuple[int, dict, bytes]:
        """Status, headers and content."""
        url, body = urlsplit(self.path), self.rfile.read(int(self.headers.get("Content-Length", 0)))
        match = API.fullmatch(url.path) or FILE.fullmatch(url.path)
        if not match:
            raise Missing("EntryNotFound")
        repo = self.server.root / (match["kind"] or "models") / match["repo"]
        folder, commit, path = locate(repo, match["rest"] or "main")
        if match.re is FILE:
            return self.file(folder / path, {"X-Repo-Commit": commit, "Accept-Ranges": "bytes"})
        listed = entries(folder)
        result = {"id": match["repo"], "sha": commit, "siblings": [{"rfilename": e["path"]} for e in listed]}
        if match["call"] == "paths-info":
            result = [e for e in listed if e["path"] in json.loads(body)["paths"]]
        elif match["call"] == "tree":
            if not (folder / path).is_dir():
                raise Missing("EntryNotFound")
            result = entries(folder, path, "recursive=true" in url.query.lower())
        return 200, {}, json.dumps(result).encode()

    def file(self, path: Path, headers: dict) -> tuple[int, dict, bytes]:
        if not path.is_file():
            raise Missing("EntryNotFound")
        content = path.read_bytes()
        size, headers["ETag"] = len(content), f'"{sha(content)}"'
        part = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not part:
            return 200, headers, content
        first, last = int(part[1]), min(int(part[2] or size), size - 1)
        return 206, headers | {"Content-Range": f"bytes {first}-{last}/{size}"}, content[first : last + 1]

    def log_message(self, *_) -> None:
        pass


@contextlib.contextmanager
def serving(root: Path, port: int = 0):
    """Serve a folder meanwhile, at a free port unless given; yields the HF_ENDPOINT."""
    with ThreadingHTTPServer(("127.0.0.1", port), Handler) as server:
        server.root = root
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


if __name__ == "__main__":
    with serving(Path(sys.argv[1]), int(sys.argv[2])):
        threading.Event().wait()
