"""A Hugging Face Hub on localhost, as far as `huggingface_hub` asks for one to create, commit, list and fetch."""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKEN = "hf_standInToken123456"
LARGE = (".safetensors", ".arrow", ".pkl")  # as a repository's .gitattributes say


class HubStandIn:
    """Repositories in memory.

    Attributes:
        url: Its address.
        repos: By id: ``private``, and ``commits``, each a hash and its files by name.
        requests: Method and path of every request so far.
    """

    def __init__(self):
        self.repos, self.large, self.requests = {}, {}, []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self):
        self._server.shutdown()
        self._server.server_close()

    def add(self, repo, files, *, private=False):
        """Put files there as if somebody else had pushed them; the commit's hash."""
        entry = self.repos.setdefault(repo, {"private": private, "commits": []})
        before = entry["commits"][-1][1] if entry["commits"] else {}
        sha = hashlib.sha1(f"{repo}{len(entry['commits'])}".encode()).hexdigest()
        entry["commits"].append((sha, {**before, **files}))
        return sha

    def files(self, repo, revision="main"):
        """Files by name; None if there is no such revision."""
        commits = self.repos[repo]["commits"]
        return next((files for sha, files in reversed(commits) if revision in ("main", sha)), None)

    def sha(self, repo, revision):
        return next(sha for sha, _ in reversed(self.repos[repo]["commits"]) if revision in ("main", sha))


@contextmanager
def hub_stand_in():
    hub = HubStandIn()
    try:
        yield hub
    finally:
        hub.close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: HubStandIn

    def log_message(self, *arguments):
        pass

    def do_HEAD(self):
        self.read()

    def do_GET(self):
        self.read()

    def read(self):
        path = self.heard()
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?", path):
            repo, what, revision = match[1], match[2] or "revision", match[3] or "main"
            if (files := self.readable_files(repo, revision)) is not None:
                sha = self.hub.sha(repo, revision)
                listed = [listed_file(name, content) for name, content in files.items()]
                about = {"id": repo, "sha": sha, "private": self.hub.repos[repo]["private"]}
                self.tell(200, listed if what == "tree" else about)
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            repo, revision, name = match.groups()
            if (files := self.readable_files(repo, revision)) is not None:
                headers = {"X-Repo-Commit": self.hub.sha(repo, revision)}
                if name in files:
                    headers["ETag"] = f'"{listed_file(name, files[name])["oid"]}"'
                    self.send(200, files[name], headers)
                else:
                    self.refuse(404, "EntryNotFound", headers)
        else:
            self.refuse(404, "NotFound")

    def readable_files(self, repo, revision):
        """The files of a revision, or None after telling why there are none."""
        entry = self.hub.repos.get(repo)
        if entry is None or (entry["private"] and not self.is_known()):
            self.refuse(404 if self.is_known() else 401, "RepoNotFound")
            return None
        files = self.hub.files(repo, revision)
        if files is None:
            self.refuse(404, "RevisionNotFound")
        return files

    def do_POST(self):
        path, body = self.heard(), self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if not self.is_known():
            self.refuse(401, "Unauthorized")
        elif path == "/api/repos/create":
            asked = json.loads(body)
            repo = f"{asked['organization']}/{asked['name']}"
            if asked["organization"] != "ann":
                self.refuse(403, "Forbidden")
            elif repo in self.hub.repos:
                self.tell(409, {"url": f"{self.hub.url}/{repo}", "error": "You already created this model repo"})
            else:
                self.hub.repos[repo] = {"private": asked.get("visibility") == "private", "commits": []}
                self.tell(200, {"url": f"{self.hub.url}/{repo}"})
        elif path == "/api/validate-yaml":
            self.tell(200, {"errors": [], "warnings": []})
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/main", path):
            files = [each["path"] for each in json.loads(body)["files"]]
            modes = [
                {"path": each, "uploadMode": "lfs" if each.endswith(LARGE) else "regular", "shouldIgnore": False}
                for each in files
            ]
            self.tell(200, {"files": modes})
        elif re.fullmatch(r"/[^/]+/[^/]+\.git/info/lfs/objects/batch", path):
            objects = json.loads(body)["objects"]
            for each in objects:
                if each["oid"] not in self.hub.large:
                    each["actions"] = {"upload": {"href": f"{self.hub.url}/large/{each['oid']}"}}
            self.tell(200, {"transfer": "basic", "objects": objects})
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", path):
            sha = self.hub.add(match[1], dict(self.committed(body)))
            self.tell(200, {"commitUrl": f"{self.hub.url}/{match[1]}/commit/{sha}", "commitOid": sha})
        else:
            self.refuse(404, "NotFound")

    def committed(self, body):
        """Names and contents of a commit."""
        for line in body.splitlines():
            told = json.loads(line)
            if told["key"] == "file":
                yield told["value"]["path"], base64.b64decode(told["value"]["content"])
            elif told["key"] == "lfsFile":
                yield told["value"]["path"], self.hub.large[told["value"]["oid"]]

    def do_PUT(self):
        oid, body = self.heard().removeprefix("/large/"), self.rfile.read(int(self.headers["Content-Length"]))
        assert hashlib.sha256(body).hexdigest() == oid
        self.hub.large[oid] = body
        self.send(200, b"", {})

    def is_known(self):
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def heard(self):
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path))
        return path

    def tell(self, status, value):
        self.send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def refuse(self, status, code, headers=None):
        self.send(status, b"{}", {"X-Error-Code": code, "X-Error-Message": code, **(headers or {})})

    def send(self, status, content, headers):
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def listed_file(name, content):
    """An entry of a repository's tree; the id is git's, or of a large file the SHA-256."""
    sha256 = hashlib.sha256(content).hexdigest()
    about = {"type": "file", "path": name, "size": len(content)}
    if name.endswith(LARGE):
        return about | {"oid": sha256, "lfs": {"oid": sha256, "size": len(content), "pointerSize": 130}}
    return about | {"oid": hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()}
