"""A small Hugging Face Hub on loopback, in memory, that the real `huggingface_hub` client talks to from subprocesses.

It serves model repositories: creation, commits, LFS (basic transfer), downloads with ranges, private repositories,
branches and tags, and the errors by which the client tells what is missing. Faults can be asked for, see
`Fault`. The client reads its endpoint at import, so it must run in a process started with
`HubServer.env`.
"""
import base64
import codecs
import hashlib
import json
import os
import re
import socket
import struct
import threading
import time
import traceback
from dataclasses import dataclass, field
from functools import cached_property
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Dict, Iterable, Iterator, List, NamedTuple, Optional, Tuple
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

LARGEST_REGULAR = 10 * 2**20  # bytes; the Hub takes larger files through LFS only
ATTRIBUTES = b''.join(b'*.%s filter=lfs diff=lfs merge=lfs -text\n' % kind for kind in (b'safetensors', b'png'))


def git_oid(data: bytes) -> str:
    """Return git's SHA-1 of a blob, by which regular files are named."""
    return hashlib.sha1(b'blob %d\0' % len(data) + data).hexdigest()


def flipped(data: bytes) -> bytes:
    """Return the data with the byte in the middle changed."""
    at = len(data) // 2
    return data[:at] + bytes([data[at] ^ 0xff]) + data[at + 1:] if data else data


def is_lfs(path: str, size: int, sample: bytes) -> bool:
    """Tell if the Hub would keep this file as an LFS object, by its name, bytes, and first bytes."""
    if size == 0:  # the client commits empty files as regular ones, whatever it is told
        return False
    try:  # a character may be cut at the end of the sample
        text = codecs.getincrementaldecoder('utf-8')().decode(sample)
    except UnicodeDecodeError:
        return True
    return path.endswith(('.safetensors', '.png')) or size > LARGEST_REGULAR or '\0' in text


@dataclass(frozen=True)
class Blob:
    """A file of a commit."""
    data: bytes
    lfs: bool

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @cached_property
    def pointer(self) -> bytes:
        """What git itself holds of an LFS file."""
        return f'version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.data)}\n'.encode()

    @cached_property
    def git_oid(self) -> str:
        return git_oid(self.pointer if self.lfs else self.data)

    def lfs_info(self, name: str) -> Dict[str, Any]:
        sizes = dict(size=len(self.data), pointerSize=len(self.pointer))
        return dict(lfs={name: self.sha256, **sizes}) if self.lfs else {}


class Commit(NamedTuple):
    oid: str
    parent: Optional[str]
    title: str
    seconds: float
    files: Dict[str, Blob]

    @property
    def date(self) -> str:
        return time.strftime('%Y-%m-%dT%H:%M:%S.000Z', time.gmtime(self.seconds))


@dataclass
class Repository:
    private: bool
    branches: Dict[str, str] = field(default_factory=dict)
    tags: Dict[str, str] = field(default_factory=dict)
    commits: Dict[str, Commit] = field(default_factory=dict)

    def at(self, revision: str) -> Commit:
        """Return the commit that a branch, a tag, or a full commit id names."""
        oid = self.branches.get(revision) or self.tags.get(revision) or revision
        if oid not in self.commits:
            raise HubError(404, f'Invalid rev id: {revision}', code='RevisionNotFound')
        return self.commits[oid]

    def commit(self, branch: str, title: str, files: Dict[str, Blob]) -> str:
        parent = self.branches.get(branch)
        tree = sorted((path, blob.git_oid) for path, blob in files.items())
        oid = hashlib.sha1(json.dumps([parent, title, time.time_ns(), tree]).encode()).hexdigest()
        self.commits[oid] = Commit(oid, parent, title, time.time(), files)
        self.branches[branch] = oid
        return oid


class Answer(NamedTuple):
    status: int
    body: bytes
    headers: Dict[str, str]


def as_json(content: Any, status: int = 200, **headers: str) -> Answer:
    return Answer(status, json.dumps(content).encode(), {'Content-Type': 'application/json', **headers})


class HubError(Exception):
    """An error as the Hub answers it: the client reads the code and the message from headers."""

    def __init__(self, status: int, message: str, code: Optional[str] = None, **headers: str):
        super().__init__(message)
        coded = {'X-Error-Code': code} if code else {}
        line = ' '.join(message.split()).encode('ascii', 'replace').decode()
        self.answer = as_json(dict(error=message), status, **{'X-Error-Message': line}, **coded, **headers)


class Request(NamedTuple):
    headers: Dict[str, str]
    query: Dict[str, List[str]]
    body: bytes
    user: Optional[str]
    corrupt: bool

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Fault:
    """What happens to the requests of a method whose path with query has the pattern.

    Args:
        times: Number of requests, None for all to come.
        status: Answer with this status, `code` as X-Error-Code, and `headers`.
        cut: Close the connection after this many bytes: of the body of a download, which had promised the whole; of
            the request's body with POST and PUT, by a reset.
        corrupt: Change a byte: of the body of a download; of what is stored with PUT, so that verifying fails.
        lost: Do what is asked, then close the connection by a reset, without an answer.
    """
    method: str
    pattern: str
    times: Optional[int] = 1
    status: Optional[int] = None
    code: Optional[str] = None
    headers: Optional[Dict[str, str]] = None
    cut: Optional[int] = None
    corrupt: Optional[bool] = None
    lost: Optional[bool] = None


# What the metadata of a card must hold, '?' before what may be absent; patterns are for ids, one or a list.
REPO_ID = re.compile(r'[\w.-]+(/[\w.-]+)?')
RESULT = dict(task=dict(type=str), dataset=dict(type=str, name=str), metrics=[dict(type=str, value=(int, float, str))])
CARD = {
    'license': str, '?tags': [str], '?library_name': str, '?pipeline_tag': str, '?datasets': REPO_ID,
    '?base_model': REPO_ID, '?model-index': [dict(name=str, results=[RESULT])],
}


def errors_in(value: Any, wanted: Any, where: str) -> Iterator[str]:
    """Yield how a part of the metadata differs from what is wanted."""
    if isinstance(wanted, dict):
        if not isinstance(value, dict):
            yield f'"{where or "metadata"}" must be an object'
            return
        for key, part in wanted.items():
            name = f'{where}.{key.lstrip("?")}'.lstrip('.')
            if key.lstrip('?') in value:
                yield from errors_in(value[key.lstrip('?')], part, name)
            elif not key.startswith('?'):
                yield f'"{name}" is required'
    elif isinstance(wanted, list):
        if not isinstance(value, list):
            yield f'"{where}" must be an array'
            return
        for i, entry in enumerate(value):
            yield from errors_in(entry, wanted[0], f'{where}[{i}]')
    elif isinstance(wanted, re.Pattern):
        for entry in value if isinstance(value, list) else [value]:
            if not isinstance(entry, str) or not wanted.fullmatch(entry):
                yield f'"{where}" with value "{entry}" is not valid'
    elif not isinstance(value, wanted):
        yield f'"{where}" must be a {"string" if wanted is str else "value"}'


def check_card(text: str) -> Tuple[List[str], List[str]]:
    """Return errors and warnings about the metadata of a model card."""
    found = re.match(r'\s*---[\r\n]+(.*?)[\r\n]+---\s*?(\n|$)', text, re.DOTALL)
    if not found:
        return [], ['empty or missing yaml metadata in repo card']
    try:
        return list(errors_in(yaml.safe_load(found[1]), CARD, '')), []
    except yaml.YAMLError as error:
        return [f'The YAML metadata cannot be read: {error}'], []


class HubServer:
    """Serves while the context lasts.

    Args:
        tokens: User of each token.
        orgs: Organisations that the first user may write to; everybody may write to what is under their own name.

    Attributes:
        url: Where it listens.
        requests: Method, path with query, and status of each request; status 0 where no answer was sent.
        repositories: By id.
        lfs: Objects by SHA-256, as uploaded and verified.
    """

    def __init__(self, tokens: Optional[Dict[str, str]] = None, orgs: Iterable[str] = ('org',)):
        self.tokens = {'hf_writer': 'writer'} if tokens is None else dict(tokens)
        self.orgs = {next(iter(self.tokens.values()), None): set(orgs)}
        self.repositories: Dict[str, Repository] = {}
        self.lfs: Dict[str, bytes] = {}
        self.uploads: Dict[str, Optional[bytes]] = {}  # promised, then not yet verified
        self.requests: List[Tuple[str, str, int]] = []
        self.faults: List[Fault] = []
        self.lock = threading.RLock()
        self.http = ThreadingHTTPServer(('127.0.0.1', 0), _Handler)
        self.http.hub = self
        self.url = f'http://127.0.0.1:{self.http.server_port}'

    def __enter__(self) -> 'HubServer':
        threading.Thread(target=self.http.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *error: Any) -> None:
        self.http.shutdown()
        self.http.server_close()

    def env(self, home: Any, token: Optional[str] = 'hf_writer') -> Dict[str, str]:
        """Return the environment of a client whose cache is in `home`; no token where it is None."""
        ours = {name: value for name, value in os.environ.items() if not name.startswith(('HF_', 'HUGGING'))}
        ours.update(HF_ENDPOINT=self.url, HF_HOME=str(home), HF_HUB_DISABLE_XET='1', HF_HUB_DISABLE_TELEMETRY='1')
        ours.update(NO_PROXY='127.0.0.1', no_proxy='127.0.0.1', **({} if token is None else dict(HF_TOKEN=token)))
        return ours

    def files(self, repo_id: str, revision: str = 'main') -> Dict[str, bytes]:
        """Return the content of each file of a revision."""
        return {path: blob.data for path, blob in self.repositories[repo_id].at(revision).files.items()}

    def commits(self, repo_id: str, revision: str = 'main') -> List[str]:
        """Return the ids of the commits up to a revision, oldest first."""
        repository = self.repositories[repo_id]
        commit, found = repository.at(revision), []
        while commit:
            found.append(commit.oid)
            commit = repository.commits.get(commit.parent)
        return found[::-1]

    def put(self, repo_id: str, files: Dict[str, bytes], private: bool = False) -> str:
        """Add files to `main` of a repository, made where it is missing, unchecked; return the commit's id."""
        with self.lock:
            repository = self.repositories.setdefault(repo_id, Repository(private))
            head = repository.commits.get(repository.branches.get('main'))
            blobs = {path: Blob(data, is_lfs(path, len(data), data[:512])) for path, data in files.items()}
            self.lfs.update({blob.sha256: blob.data for blob in blobs.values() if blob.lfs})
            return repository.commit('main', 'put', {**(head.files if head else {}), **blobs})

    def fault(self, method: str, pattern: str, times: Optional[int] = 1, **what: Any) -> None:
        """Let the next requests that match fail, see `Fault`; of several faults the oldest with times left is used."""
        self.faults.append(Fault(method, pattern, times, **what))

    def take_fault(self, method: str, path: str) -> Fault:
        with self.lock:
            for fault in self.faults:
                if fault.method == method and fault.times != 0 and re.search(fault.pattern, path):
                    fault.times = fault.times and fault.times - 1
                    return fault
        return Fault(method, path)

    def answer(self, method: str, path: str, headers: Dict[str, str], body: bytes, corrupt: bool = False) -> Answer:
        """Answer a request."""
        url = urlsplit(path)
        token = headers.get('Authorization', '').partition(' ')[2]
        request = Request(headers, parse_qs(url.query), body, self.tokens.get(token), corrupt)
        try:
            if token and not request.user:
                raise HubError(401, 'Invalid credentials in Authorization header')
            for verb, pattern, handle in self.ROUTES:
                found = re.fullmatch(pattern, url.path)
                if verb == method and found:
                    with self.lock:
                        return handle(self, request, **{k: unquote(v or '') for k, v in found.groupdict().items()})
            raise HubError(404, f'No route for {method} {path}')
        except HubError as error:
            return error.answer
        except Exception:  # 400, which no client retries, rather than a 500
            return as_json(dict(error=traceback.format_exc()), 400)

    def may_write(self, user: Optional[str], repo_id: str) -> bool:
        return user is not None and repo_id.split('/')[0] in {user} | self.orgs.get(user, set())

    def readable(self, request: Request, repo: str) -> Repository:
        repository = self.repositories.get(repo)
        if repository is None or (repository.private and not self.may_write(request.user, repo)):
            raise HubError(404 if request.user else 401, 'Repository not found', code='RepoNotFound')
        return repository

    def writable(self, request: Request, repo: str) -> Repository:
        repository = self.readable(request, repo)
        self.check_writer(request, repo)
        return repository

    def check_writer(self, request: Request, repo: str) -> None:
        if not request.user:
            raise HubError(401, 'Invalid username or password.')
        if not self.may_write(request.user, repo):
            raise HubError(403, f'Forbidden: you do not have write access to {repo}')

    # Handlers of the routes

    def whoami(self, request: Request) -> Answer:
        if not request.user:
            raise HubError(401, 'Invalid username or password.')
        orgs = [dict(type='org', name=org) for org in sorted(self.orgs.get(request.user, ()))]
        token = dict(type='access_token', accessToken=dict(displayName='test', role='write'))
        return as_json(dict(type='user', name=request.user, fullname=request.user, orgs=orgs, auth=token))

    def create(self, request: Request) -> Answer:
        wanted = request.json
        repo = f'{wanted.get("organization") or request.user}/{wanted["name"]}'
        self.check_writer(request, repo)
        if wanted.get('type', 'model') != 'model':
            raise HubError(400, f'Only models are kept here, not a {wanted["type"]}')
        answer = dict(url=f'{self.url}/{repo}', name=repo)
        if repo in self.repositories:
            return as_json(dict(answer, error='You already created this model repo'), 409)
        private = bool(wanted.get('private')) or wanted.get('visibility') == 'private'
        self.put(repo, {'.gitattributes': ATTRIBUTES}, private)
        return as_json(answer)

    def validate_yaml(self, request: Request) -> Answer:
        errors, warnings = check_card(request.json['content'])
        found = dict(errors=[dict(message=m) for m in errors], warnings=[dict(message=m) for m in warnings])
        return as_json(found, 400 if errors else 200)

    def preupload(self, request: Request, repo: str, rev: str) -> Answer:
        held = self.writable(request, repo).at(rev).files
        files = []
        for file in request.json['files']:
            blob = held.get(file['path'])
            held_as = dict(oid=blob.sha256 if blob.lfs else blob.git_oid) if blob else {}
            mode = 'lfs' if is_lfs(file['path'], file['size'], base64.b64decode(file['sample'])) else 'regular'
            files.append(dict(path=file['path'], uploadMode=mode, shouldIgnore=False, **held_as))
        return as_json(dict(files=files))

    def lfs_batch(self, request: Request, repo: str) -> Answer:
        self.writable(request, repo)
        objects = [dict(oid=wanted['oid'], size=wanted['size']) for wanted in request.json['objects']]
        for wanted in objects:
            if wanted['oid'] not in self.lfs:
                self.uploads.setdefault(wanted['oid'])
                upload = dict(href=f'{self.url}/lfs/{wanted["oid"]}?size={wanted["size"]}')
                verify = dict(href=f'{self.url}/{repo}.git/info/lfs/objects/verify')
                wanted['actions'] = dict(upload=upload, verify=verify)
        return as_json(dict(transfer='basic', objects=objects))

    def lfs_put(self, request: Request, oid: str) -> Answer:
        if oid not in self.uploads:  # the client sends no token here
            raise HubError(403, 'No upload was agreed on for this object')
        if len(request.body) != int(request.query['size'][0]) or hashlib.sha256(request.body).hexdigest() != oid:
            raise HubError(400, 'The object is not what was announced')
        self.uploads[oid] = flipped(request.body) if request.corrupt else request.body
        return Answer(200, b'', {})

    def lfs_verify(self, request: Request, repo: str) -> Answer:
        self.writable(request, repo)
        oid, size = request.json['oid'], request.json['size']
        data = self.uploads.pop(oid, None)
        if data is None or len(data) != size or hashlib.sha256(data).hexdigest() != oid:
            raise HubError(422, f'The object {oid} does not match what was uploaded')
        self.lfs[oid] = data
        return as_json({})

    def commit(self, request: Request, repo: str, rev: str) -> Answer:
        repository = self.writable(request, repo)
        if rev not in repository.branches:
            raise HubError(404, f'Invalid rev id: {rev}', code='RevisionNotFound')
        if 'create_pr' in request.query:
            raise HubError(400, 'Pull requests are not kept here')
        header, *operations = [json.loads(line) for line in request.body.splitlines() if line.strip()]
        head = repository.at(rev)
        if not head.oid.startswith(header['value'].get('parentCommit') or ''):
            raise HubError(412, 'A commit has happened since. Please refresh and try again.')
        files = dict(head.files)
        for operation in operations:
            self.apply(files, operation['key'], operation['value'])
        if files == head.files:
            raise HubError(400, 'The commit would change nothing')
        oid = repository.commit(rev, header['value']['summary'], files)
        return as_json(dict(success=True, commitOid=oid, commitUrl=f'{self.url}/{repo}/commit/{oid}'))

    def apply(self, files: Dict[str, Blob], key: str, value: Dict[str, Any]) -> None:
        path = value['path']
        if not path or set(path.rstrip('/').split('/')) & {'', '.', '..', '.git'}:
            raise HubError(400, f'Invalid path: {path!r}')
        if key == 'file':
            data = base64.b64decode(value['content'])
            if len(data) > LARGEST_REGULAR:
                raise HubError(400, f'{path} is larger than 10 MiB and no LFS file')
            errors = check_card(data.decode())[0] if path == 'README.md' else []
            if errors:
                raise HubError(400, f'Invalid metadata in README.md: {errors}')
            files[path] = Blob(data, lfs=False)
        elif key == 'lfsFile':
            if value['oid'] not in self.lfs:
                raise HubError(400, f'The LFS object {value["oid"]} of {path} does not exist')
            files[path] = Blob(self.lfs[value['oid']], lfs=True)
        else:
            folder = path.rstrip('/') + '/'
            gone = [name for name in files if (name == path if key == 'deletedFile' else name.startswith(folder))]
            if not gone:
                raise HubError(404, f"A file with this name doesn't exist: {path}", code='EntryNotFound')
            for name in gone:
                del files[name]

    def model_info(self, request: Request, repo: str, rev: str) -> Answer:
        repository = self.readable(request, repo)
        commit = repository.at(rev or 'main')
        created = next(iter(repository.commits.values())).date
        siblings = [dict(rfilename=path) for path in sorted(commit.files)]
        for sibling in siblings if 'blobs' in request.query else []:
            blob = commit.files[sibling['rfilename']]
            sibling.update(size=len(blob.data), blobId=blob.git_oid, **blob.lfs_info('sha256'))
        return as_json(dict(
            id=repo, author=repo.split('/')[0], sha=commit.oid, private=repository.private, gated=False,
            createdAt=created, lastModified=commit.date, siblings=siblings,
        ))

    def make_ref(self, request: Request, repo: str, kind: str, name: str) -> Answer:
        repository = self.writable(request, repo)
        refs, revision = repository.branches, request.json.get('startingPoint') or 'main'
        if kind == 'tag':  # what the route names is then what to tag
            refs, revision, name = repository.tags, name, request.json['tag']
        if name in refs:
            raise HubError(409, f'Reference already exists: {name}')
        refs[name] = repository.at(revision).oid
        return as_json({})

    def tree(self, request: Request, repo: str, rev: str, path: str) -> Answer:
        files = self.readable(request, repo).at(rev).files
        under = f'{path}/' if path else ''
        recursive = request.query.get('recursive', [''])[0].lower() in ('1', 'true')
        entries = {}
        for name, blob in sorted(files.items()):
            entries[name] = dict(type='file', path=name, size=len(blob.data), oid=blob.git_oid, **blob.lfs_info('oid'))
            while '/' in name:
                name = name.rpartition('/')[0]
                entries[name] = dict(type='directory', path=name, size=0, oid=git_oid(name.encode()))
        found = {name: entry for name, entry in entries.items() if name.startswith(under)}
        if under and not found:
            raise HubError(404, f'{path} does not exist on "{rev}"', code='EntryNotFound')
        return as_json([entry for name, entry in found.items() if recursive or '/' not in name[len(under):]])

    def resolve(self, request: Request, repo: str, rev: str, path: str) -> Answer:
        commit = self.readable(request, repo).at(rev)
        headers = {'X-Repo-Commit': commit.oid}
        blob = commit.files.get(path)
        if blob is None:
            raise HubError(404, 'Entry not found', code='EntryNotFound', **headers)
        size = len(blob.data)
        headers.update({'ETag': f'"{blob.git_oid}"', 'Accept-Ranges': 'bytes', 'Content-Type': 'binary/octet-stream'})
        if blob.lfs:
            headers.update({'X-Linked-Etag': f'"{blob.sha256}"', 'X-Linked-Size': str(size)})
        wanted = re.fullmatch(r'bytes=(\d*)-(\d*)', request.headers.get('Range', ''))
        if not wanted or not any(wanted.groups()):
            return Answer(200, blob.data, headers)
        first, last = wanted.groups()
        start = int(first) if first else max(size - int(last), 0)
        stop = min(int(last) + 1, size) if first and last else size
        if start >= stop:
            raise HubError(416, 'Range not satisfiable', **{'Content-Range': f'bytes */{size}'})
        return Answer(206, blob.data[start:stop], {**headers, 'Content-Range': f'bytes {start}-{stop - 1}/{size}'})

    _REPO, _REV, _FILE = '(?P<repo>[^/]+/[^/]+)', '(?P<rev>[^/]+)', '(?P<path>.+)'
    _ANY_REPO = '(?P<repo>(?:datasets/)?[^/]+/[^/]+)'  # a data set is kept as datasets/<id>, and only read
    _MODEL = f'/api/models/{_REPO}'
    ROUTES = (
        ('GET', '/api/whoami-v2', whoami),
        ('POST', '/api/repos/create', create),
        ('POST', '/api/validate-yaml', validate_yaml),
        ('POST', f'{_MODEL}/preupload/{_REV}', preupload),
        ('POST', f'/{_REPO}[.]git/info/lfs/objects/batch', lfs_batch),
        ('PUT', '/lfs/(?P<oid>[0-9a-f]{64})', lfs_put),
        ('POST', f'/{_REPO}[.]git/info/lfs/objects/verify', lfs_verify),
        ('POST', f'{_MODEL}/commit/{_REV}', commit),
        ('GET', f'{_MODEL}(?:/revision/{_REV})?', model_info),
        ('POST', f'{_MODEL}/(?P<kind>branch|tag)/(?P<name>[^/]+)', make_ref),
        ('GET', f'{_MODEL}/tree/{_REV}(?:/{_FILE})?', tree),
        ('HEAD', f'/{_ANY_REPO}/resolve/{_REV}/{_FILE}', resolve),
        ('GET', f'/{_ANY_REPO}/resolve/{_REV}/{_FILE}', resolve),
    )


class _Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'
    disable_nagle_algorithm = True

    def handle_request(self) -> None:
        hub, sends = self.server.hub, self.command in ('POST', 'PUT')
        fault = hub.take_fault(self.command, self.path)
        length = int(self.headers.get('Content-Length', 0))
        if sends and fault.cut is not None:
            self.rfile.read(min(fault.cut, length))
            hub.requests.append((self.command, self.path, 0))
            return self.reset()
        body = self.rfile.read(length)
        if fault.status is not None:
            error = HubError(fault.status, HTTPStatus(fault.status).phrase, fault.code, **(fault.headers or {}))
            answer = error.answer
        else:
            answer = hub.answer(self.command, self.path, self.headers, body, bool(fault.corrupt))
        hub.requests.append((self.command, self.path, 0 if fault.lost else answer.status))  # before the client can ask
        if fault.lost:
            return self.reset()
        self.send_response_only(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.send_header('Content-Length', str(len(answer.body)))
        self.end_headers()
        if self.command == 'HEAD':
            return
        content = flipped(answer.body) if fault.corrupt and not sends else answer.body
        self.wfile.write(content if fault.cut is None else content[:fault.cut])
        self.close_connection = self.close_connection or fault.cut is not None

    def reset(self) -> None:
        # at once and always: left to the system, the client would see a reset or an end, as it happens
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))
        self.close_connection = True
        self.rfile.close()
        self.connection.close()

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_request
