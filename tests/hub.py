"""A small hub on loopback: repositories of models, each with its commits, as huggingface_hub asks for them."""

import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

ABOUT = re.compile(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?")
FILE = re.compile(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)")


def commit(name, number):
    return hashlib.sha1(f"{name} {number}".encode()).hexdigest()


class Hub(ThreadingHTTPServer):
    """repositories: name -> folders, one for each commit; `main` is the last. asked: the path of every request."""

    def __init__(self, repositories):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories, self.asked = repositories, []

    def find(self, name, revision):
        """(commit, folder), or None."""
        commits = {commit(name, number): folder for number, folder in enumerate(self.repositories[name])}
        revision = list(commits)[-1] if revision in (None, "main") else revision
        return (revision, commits[revision]) if revision in commits else None


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *said):
        pass

    def answer(self, body, status=200, **headers):
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        self.server.asked.append(path)
        about, file = ABOUT.fullmatch(path), FILE.fullmatch(path)
        if not (about or file):
            return self.answer(b"", 404)
        name, what, revision = about.groups() if about else (file[1], file[3], file[2])
        if name not in self.server.repositories:
            return self.answer(b"", 404, X_Error_Code="RepoNotFound")
        found = self.server.find(name, revision)
        if found is None:
            return self.answer(b"", 404, X_Error_Code="RevisionNotFound")
        own, folder = found
        if file and not (folder / what).is_file():
            return self.answer(b"", 404, X_Error_Code="EntryNotFound", X_Repo_Commit=own)
        if file:
            return self.answer((folder / what).read_bytes(), ETag=f'"{digest(folder / what)}"', X_Repo_Commit=own)
        files = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}
        if what == "tree":
            said = [{"type": "file", "path": name, "size": path.stat().st_size, "oid": digest(path)} for name, path in files.items()]
        else:
            said = {"id": name, "sha": own, "private": False, "siblings": [{"rfilename": name} for name in files]}
        return self.answer(json.dumps(said).encode(), Content_Type="application/json")

    do_HEAD = do_GET


def digest(path):
    return hashlib.sha1(path.read_bytes()).hexdigest()


@contextmanager
def serving(repositories):
    with Hub(repositories) as hub:
        threading.Thread(target=hub.serve_forever, daemon=True).start()
        yield hub
        hub.shutdown()
