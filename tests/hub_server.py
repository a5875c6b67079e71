"""As much of the Hub as publishing and loading a model needs, in a thread, kept in memory.

Repositories with branches, commits and pull requests; uploads by preupload, LFS and ndjson commits; downloads by
`resolve`, where large files are redirected to another origin, as the Hub does with its CDN: `localhost` instead of
`127.0.0.1`. Tokens decide who may see and write what. Every request is recorded.
"""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

import yaml


OWNER, STRANGER = "hf_owner_token", "hf_stranger_token"
USERS = {OWNER: "someone", STRANGER: "stranger"}
LFS_SUFFIXES = (".safetensors", ".png")
LICENSES = {"apache-2.0", "mit", "cc-by-4.0", "cc-by-nc-4.0", "other"}


class Request(NamedTuple):
    method: str
    path: str
    host: str
    token: str | None


class Repository:
    def __init__(self, repo_id: str, private: bool):
        self.repo_id, self.private = repo_id, private
        self.commits: dict[str, dict[str, bytes]] = {}
        self.branches: dict[str, str] = {}
        self.commit("main", {}, "initial commit")

    def commit(self, branch: str, files: dict[str, bytes], message: str) -> str:
        content = "".join(f"{name} {hashlib.sha1(data).hexdigest()}\n" for name, data in sorted(files.items()))
        sha = hashlib.sha1(f"{branch} {len(self.commits)} {message}\n{content}".encode()).hexdigest()
        self.commits[sha], self.branches[branch] = files, sha
        return sha

    def sha(self, revision: str) -> str | None:
        return revision if revision in self.commits else self.branches.get(revision)


class Problem(Exception):
    def __init__(self, status: int, message: str, code: str | None = None, body: dict | None = None):
        self.status, self.message, self.code, self.body = status, message, code, body


class HubServer(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}  # large files, by sha256
        self.requests: list[Request] = []
        self.uploads = 0  # of large files
        self.breaks_at: int | None = None  # the number of the upload that breaks
        self.lock = threading.RLock()
        self.endpoint = f"http://127.0.0.1:{self.server_port}"
        self.cdn = f"http://localhost:{self.server_port}"

    def __enter__(self):
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def log_message(self, *_):
        pass

    def do_GET(self):
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def _answer(self) -> None:
        parts = urlsplit(self.path)
        self.query = parse_qs(parts.query)
        self.token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        self.body = self._read_body()
        path = [unquote(part) for part in parts.path.strip("/").split("/")]
        with self.server.lock:
            self.server.requests.append(Request(self.command, parts.path, self.headers["Host"], self.token))
            try:
                self._route(path)
            except Problem as problem:
                headers = {"X-Error-Message": problem.message}
                if problem.code:
                    headers["X-Error-Code"] = problem.code
                self._send(problem.status, problem.body or {"error": problem.message}, headers)

    def _route(self, path: list[str]) -> None:
        if self.token is not None and self.token not in USERS:
            raise Problem(401, "Invalid credentials in Authorization header")
        match path:
            case ["api", "repos", "create"]:
                self._create()
            case ["api", "validate-yaml"]:
                self._validate(json.loads(self.body))
            case ["api", "models", owner, name, *rest]:
                self._api(self._repository(f"{owner}/{name}"), rest)
            case [owner, name, "info", "lfs", "objects", "batch"] if name.endswith(".git"):
                repository = self._repository(f"{owner}/{name.removesuffix('.git')}")
                self._lfs_batch(repository, json.loads(self.body))
            case ["lfs", oid]:
                self._lfs_object(oid)
            case ["lfs", oid, "verify"]:
                asked = json.loads(self.body)
                if len(self.server.objects.get(asked["oid"], b"")) != asked["size"] or asked["oid"] != oid:
                    raise Problem(422, "The object is not there in this size")
                self._send(200, {})
            case [owner, name, "resolve", revision, *file]:
                self._resolve(self._repository(f"{owner}/{name}"), revision, "/".join(file))
            case _:
                raise Problem(404, f"Nothing at {self.path}")

    def _repository(self, repo_id: str) -> Repository:
        repository = self.server.repositories.get(repo_id)
        if repository is None or (repository.private and USERS.get(self.token) != repo_id.split("/")[0]):
            raise Problem(404 if self.token else 401, "Repository not found", "RepoNotFound")
        return repository

    def _may_write(self, repo_id: str) -> None:
        if self.token is None:
            raise Problem(401, "Log in to write")
        if USERS[self.token] != repo_id.split("/")[0]:
            raise Problem(403, f"You don't have the rights to write to {repo_id}")

    def _sha(self, repository: Repository, revision: str) -> str:
        sha = repository.sha(revision)
        if sha is None:
            raise Problem(404, f"No revision {revision}", "RevisionNotFound")
        return sha

    def _create(self) -> None:
        asked = json.loads(self.body)
        if self.token is None:
            raise Problem(401, "Log in to create a repository")
        repo_id = f"{asked['organization'] or USERS[self.token]}/{asked['name']}"
        self._may_write(repo_id)
        answer = {"url": f"{self.server.endpoint}/{repo_id}", "name": repo_id, "id": repo_id}
        if repo_id in self.server.repositories:
            raise Problem(409, "You already created this model repo", body=answer)
        private = asked.get("visibility") == "private" or asked.get("private", False)
        self.server.repositories[repo_id] = Repository(repo_id, private)
        self._send(200, answer)

    def _validate(self, asked: dict[str, Any]) -> None:
        errors = card_errors(asked["content"])
        body = {"errors": [{"message": error} for error in errors], "warnings": []}
        if errors:
            raise Problem(400, "Invalid metadata", body=body)
        self._send(200, body)

    def _api(self, repository: Repository, rest: list[str]) -> None:
        match rest:
            case [] | ["revision", _]:
                sha = self._sha(repository, rest[1] if rest else "main")
                siblings = [{"rfilename": name} for name in sorted(repository.commits[sha])]
                about = {"id": repository.repo_id, "sha": sha, "private": repository.private, "siblings": siblings}
                self._send(200, about, {"X-Repo-Commit": sha})
            case ["tree", revision, *folder]:
                files = repository.commits[self._sha(repository, revision)]
                prefix = "".join(f"{part}/" for part in folder)
                self._send(200, [describe(name, data) for name, data in files.items() if name.startswith(prefix)])
            case ["preupload", revision]:
                if "create_pr" not in self.query:
                    self._may_write(repository.repo_id)
                present = repository.commits[self._sha(repository, revision)]
                self._send(200, {"files": [plan(file, present) for file in json.loads(self.body)["files"]]})
            case ["branch", branch]:
                self._may_write(repository.repo_id)
                if branch in repository.branches:
                    raise Problem(409, "The branch is there already")
                repository.branches[branch] = repository.branches["main"]
                self._send(200, {})
            case ["commit", revision]:
                self._commit(repository, revision)
            case _:
                raise Problem(404, f"Nothing at {self.path}")

    def _commit(self, repository: Repository, revision: str) -> None:
        files = dict(repository.commits[self._sha(repository, revision)])
        branch, pull_request = revision, None
        if "create_pr" in self.query:
            if self.token is None:
                raise Problem(401, "Log in to open a pull request")
            number = 1 + sum(name.startswith("refs/pr/") for name in repository.branches)
            branch = f"refs/pr/{number}"
            pull_request = f"{self.server.endpoint}/{repository.repo_id}/discussions/{number}"
        else:
            self._may_write(repository.repo_id)
        message = ""
        for line in self.body.splitlines():
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "header":
                message = value["summary"]
            elif operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                if value["oid"] not in self.server.objects:
                    raise Problem(400, f"{value['path']} was not uploaded")
                files[value["path"]] = self.server.objects[value["oid"]]
            elif operation["key"] == "deletedFile":
                del files[value["path"]]
            else:
                raise Problem(400, f"Unknown operation {operation['key']}")
        sha = repository.commit(branch, files, message)
        url = f"{self.server.endpoint}/{repository.repo_id}/commit/{sha}"
        self._send(200, {"commitUrl": url, "commitOid": sha, "pullRequestUrl": pull_request})

    def _lfs_batch(self, repository: Repository, asked: dict[str, Any]) -> None:
        if self.token is None:
            raise Problem(401, "Log in to upload")
        objects = []
        for wanted in asked["objects"]:
            address = f"{self.server.endpoint}/lfs/{wanted['oid']}"
            actions = {"upload": {"href": address}, "verify": {"href": f"{address}/verify"}}
            there = {} if wanted["oid"] in self.server.objects else {"actions": actions}
            objects.append({"oid": wanted["oid"], "size": wanted["size"], **there})
        self._send(200, {"transfer": "basic", "objects": objects})

    def _lfs_object(self, oid: str) -> None:
        if self.command == "PUT":
            self.server.uploads += 1
            if self.server.uploads == self.server.breaks_at:
                raise Problem(400, "The connection to the storage broke")
            if hashlib.sha256(self.body).hexdigest() != oid:
                raise Problem(400, "The content has another sha256")
            self.server.objects[oid] = self.body
            self._send(200, {})
        elif oid in self.server.objects:
            self._send(200, self.server.objects[oid])
        else:
            raise Problem(404, "No such object")

    def _resolve(self, repository: Repository, revision: str, name: str) -> None:
        sha = self._sha(repository, revision)
        data = repository.commits[sha].get(name)
        if data is None:
            raise Problem(404, f"No {name}", "EntryNotFound")
        headers = {"X-Repo-Commit": sha, "ETag": f'"{etag(name, data)}"'}
        if name.endswith(LFS_SUFFIXES):
            location = f"{self.server.cdn}/lfs/{hashlib.sha256(data).hexdigest()}"
            linked = {"X-Linked-Etag": headers["ETag"], "X-Linked-Size": str(len(data)), "Location": location}
            self._send(302, b"", headers | linked)
        else:
            self._send(200, data, headers)

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            chunks = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _send(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


def git_sha(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def etag(name: str, data: bytes) -> str:
    return hashlib.sha256(data).hexdigest() if name.endswith(LFS_SUFFIXES) else git_sha(data)


def describe(name: str, data: bytes) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": name, "size": len(data), "oid": git_sha(data)}
    if name.endswith(LFS_SUFFIXES):
        entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
    return entry


def plan(file: dict[str, Any], present: dict[str, bytes]) -> dict[str, Any]:
    """How a file is to be uploaded, and what is there under its name."""
    name = file["path"]
    mode = "lfs" if name.endswith(LFS_SUFFIXES) else "regular"
    there = {"oid": etag(name, present[name])} if name in present else {}
    return {"path": name, "uploadMode": mode, "shouldIgnore": False, **there}


def card_errors(content: str) -> list[str]:
    """What is wrong with a card's metadata, by the documented form of model-index and its neighbours."""
    if not content.startswith("---\n"):
        return ["the card has no metadata"]
    try:
        values = yaml.safe_load(content.split("\n---\n")[0].removeprefix("---\n"))
    except yaml.YAMLError as error:
        return [f"the metadata is no YAML: {error}"]
    if not isinstance(values, dict):
        return ["the metadata is no mapping"]
    errors = [
        f'"{name}" must be a string' for name in ("license", "library_name", "pipeline_tag", "language")
        if not isinstance(values.get(name, ""), (str, list))
    ]  # fmt: skip
    if "license" in values and values["license"] not in LICENSES:
        errors.append(f'"license" must be one of {sorted(LICENSES)}')
    for name in ("tags", "metrics", "datasets"):
        entries = values.get(name, [])
        if not isinstance(entries, (list, str)) or not all(isinstance(entry, str) for entry in entries):
            errors.append(f'"{name}" must be a list of strings')
    for model in [values["base_model"]] if isinstance(values.get("base_model"), str) else values.get("base_model", []):
        if not isinstance(model, str) or model.count("/") > 1 or " " in model:
            errors.append(f'"base_model" {model!r} is no repository')
    for entry in values.get("model-index", []):
        if not isinstance(entry, dict) or not entry.get("name"):
            errors.append('"model-index[0].name" is required')
            continue
        for result in entry.get("results", []):
            for field, inner in (("task", "type"), ("dataset", "type"), ("dataset", "name")):
                if not isinstance(result.get(field, {}).get(inner), str):
                    errors.append(f'"model-index[0].results[0].{field}.{inner}" is required')
            if not result.get("metrics"):
                errors.append('"model-index[0].results[0].metrics" is required')
            for metric in result.get("metrics", []):
                if not isinstance(metric.get("type"), str) or "value" not in metric:
                    errors.append('"model-index[0].results[0].metrics[0]" needs type and value')
    return errors
