"""A small hub on loopback: repositories of models, each with its commits, as huggingface_hub asks for them and sends them."""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

ABOUT = re.compile(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?")
FILE = re.compile(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)")
SENT = re.compile(r"/api/models/([^/]+/[^/]+)/(preupload|commit)/main")


def commit(name, number):
    return hashlib.sha1(f"{name} {number}".encode()).hexdigest()


class Hub(ThreadingHTTPServer):
    """repositories: name -> folders, one for each commit; `main` is the last. root: of the folders of what it is sent. asked: the path of
    every request. private: those that were made so."""

    def __init__(self, repositories, root):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories, self.root, self.asked, self.private = repositories, root, [], set()

    @property
    def address(self):
        return f"http://127.0.0.1:{self.server_port}"

    def find(self, name, revision):
        """(commit, folder), or None."""
        commits = {commit(name, number): folder for number, folder in enumerate(self.repositories[name])}
        revision = [None, *commits][-1] if revision in (None, "main") else revision
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
        if found is None and revision is None:
            return self.say({"id": name, "private": name in self.server.private, "siblings": []})
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
            said = {"id": name, "sha": own, "private": name in self.server.private, "siblings": [{"rfilename": name} for name in files]}
        return self.say(said)

    do_HEAD = do_GET

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"])) if "Content-Length" in self.headers else b"".join(self.chunks())
        hub, sent = self.server, SENT.fullmatch(self.path.partition("?")[0])
        if self.path == "/api/repos/create":
            told = json.loads(body)
            name = f"{told['organization']}/{told['name']}"
            hub.repositories[name] = []
            hub.private |= {name} if told.get("visibility") == "private" or told.get("private") else set()  # as versions of it say it
            return self.say({"url": f"{hub.address}/{name}"})
        if self.path == "/api/validate-yaml":
            return self.say({"errors": [], "warnings": []})
        if not sent:
            return self.answer(b"", 404)
        name, what = sent.groups()
        if what == "preupload":
            kept = {"uploadMode": "regular", "shouldIgnore": False}
            return self.say({"files": [{"path": file["path"], **kept} for file in json.loads(body)["files"]]})
        own = commit(name, len(hub.repositories[name]))
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                path = hub.root / own / line["value"]["path"]
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(base64.b64decode(line["value"]["content"]))
        hub.repositories[name].append(hub.root / own)
        return self.say({"success": True, "commitOid": own, "commitUrl": f"{hub.address}/{name}/commit/{own}"})

    def chunks(self):
        while size := int(self.rfile.readline(), 16):
            yield self.rfile.read(size)
            self.rfile.readline()

    def say(self, value):
        self.answer(json.dumps(value).encode(), Content_Type="application/json")


def digest(path):
    return hashlib.sha1(path.read_bytes()).hexdigest()


@contextmanager
def serving(repositories, root):
    with Hub(repositories, root) as hub:
        threading.Thread(target=hub.serve_forever, daemon=True).start()
        yield hub
        hub.shutdown()
