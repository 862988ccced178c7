"""What goes wrong between a run and the Hub is told in a sentence and leaves nothing that is half done.

The client and the recipes are the real ones, the Hub is the tests' own. What a client imports takes seconds: one
process has done so and forks another for each command, in which waits are short.
"""
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml
from helpers import RECIPES
from helpers.hub_server import HubServer
from helpers.images import write_two_colours
from safetensors.torch import load_file, save_file

from timm_selfdistill.config import TrainConfig
from timm_selfdistill.training.trainer import train

TOKEN, READER = 'hf_SECRETWRITER', 'hf_SECRETREADER'
pytestmark = pytest.mark.faults

REPO = 'org/test_resnet_sd'

# Reads a command in a line: what to start, answered with the process' number, or which one to ask after, answered with
# its exit status, null while it runs.
SERVER = """
import json, os, runpy, sys, tempfile, time, traceback
import accelerate, timm, torch, tyro
from huggingface_hub import constants
import timm_selfdistill.training.trainer

def begin(code, arguments, env, out, cache, offline, patient):
    for fd, name in ((1, 'stdout'), (2, 'stderr')):
        os.dup2(os.open(f'{out}/{name}', os.O_WRONLY | os.O_CREAT), fd)
    os.environ.update(env)
    tempfile.tempdir = None  # asked for anew
    constants.HF_HUB_CACHE, constants.HF_HUB_OFFLINE = cache, offline
    sys.argv = [code, *arguments]
    waits, pause = open(f'{out}/waits', 'w', 1), time.sleep
    if not patient:
        time.sleep = lambda seconds: (waits.write(f'{seconds}\\n'), pause(min(seconds, 0.01)))
    if code.endswith('.py'):
        sys.path[0] = os.path.dirname(code)
        runpy.run_path(code, run_name='__main__')
    else:
        exec(code, dict(__name__='__main__'))

for line in sys.stdin:
    what = json.loads(line)
    if isinstance(what, int):
        ended, status = os.waitpid(what, os.WNOHANG)
        print(os.waitstatus_to_exitcode(status) if ended else 'null', flush=True)
        continue
    child = os.fork()
    if child:
        print(child, flush=True)
        continue
    status = 1
    try:
        begin(**what)
        status = 0
    except SystemExit as e:
        status = e.code or 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
"""
# Loads a network and tells which weights it has got.
LOAD = """
import hashlib, sys, timm, torch
from timm_selfdistill.hub.networks import load_network
way, name = sys.argv[1:]
model = load_network(name)[0] if way == 'load_network' else timm.create_model(name, pretrained=True)
state = sorted(model.state_dict().items())
print(hashlib.sha256(b''.join(tensor.numpy().tobytes() for _, tensor in state)).hexdigest())
"""
WAYS = {
    'timm': ('timm', f'hf-hub:{REPO}'),
    'organisation': ('timm', 'test_resnet_sd'),
    'load_network': ('load_network', f'hf-hub:{REPO}'),
}
# Requests of a push, in their order.
ROUTES = {
    'validate': ('POST', '/api/validate-yaml'),
    'create': ('POST', '/api/repos/create'),
    'info': ('GET', f'/api/models/{REPO}(/revision/main)?$'),
    'preupload': ('POST', '/preupload/main'),
    'batch': ('POST', '/objects/batch'),
    'put': ('PUT', '/lfs/'),
    'verify': ('POST', '/objects/verify'),
    'commit': ('POST', '/commit/main'),
}


class Done(NamedTuple):
    status: int
    out: str
    err: str
    waits: list

    @property
    def error(self) -> str:
        """What a recipe says to its user in the end, and all that it says."""
        assert self.status == 2, self.err
        *before, last = self.err.replace('\r', '\n').splitlines()
        assert last.startswith('error: ') and 'Traceback' not in self.err, self.err
        assert not [line for line in before if line.startswith('error: ')]
        return last


class Processes:
    def __init__(self, env):
        self.server = subprocess.Popen(
            [sys.executable, '-c', SERVER], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.lock = threading.Lock()

    def ask(self, what):
        with self.lock:
            self.server.stdin.write(json.dumps(what) + '\n')
            self.server.stdin.flush()
            return json.loads(self.server.stdout.readline())

    def wait(self, number, seconds=120):
        deadline = time.monotonic() + seconds
        while (status := self.ask(number)) is None:
            if time.monotonic() > deadline:
                os.kill(number, signal.SIGKILL)
            time.sleep(0.02)
        return status

    def close(self):
        self.server.stdin.close()
        self.server.wait(60)


@pytest.fixture(scope='module')
def clients(tmp_path_factory):
    with HubServer(tokens={TOKEN: 'writer', READER: 'reader'}, orgs=('org',)) as hub:
        processes = Processes(hub.env(tmp_path_factory.mktemp('home'), None))
        yield hub, processes
        processes.close()


@pytest.fixture
def hub(clients):
    hub, _ = clients
    for kept in (hub.repositories, hub.lfs, hub.uploads, hub.requests, hub.faults):
        kept.clear()
    return hub


@pytest.fixture
def start(clients, tmp_path):
    """Start a command; return its number, and a function that waits for it and looks at what it has left behind."""
    hub, processes = clients
    count = iter(range(1000))

    def start(code, *arguments, token=TOKEN, cache='cache', offline=False, patient=False, **env):
        out = tmp_path / f'out{next(count)}'
        temporary = out / 'tmp'
        temporary.mkdir(parents=True)
        env.update(TMPDIR=str(temporary), **({} if token is None else dict(HF_TOKEN=token)))
        number = processes.ask(dict(
            code=str(code), arguments=list(map(str, arguments)), env=env, out=str(out), cache=str(tmp_path / cache),
            offline=offline, patient=patient))

        def wait():
            status = processes.wait(number)
            done = Done(status, *((out / name).read_text() for name in ('stdout', 'stderr')),
                        list(map(float, (out / 'waits').read_text().split())))
            assert status < 0 or not list(temporary.iterdir()), 'temporary files are left'
            assert 'hf_SECRET' not in done.out + done.err
            for repository in hub.repositories.values():
                for commit in repository.commits.values():
                    assert not any(b'hf_SECRET' in blob.data for blob in commit.files.values())
            return done

        return number, wait

    return start


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in Path(folder).rglob('*') if p.is_file()}


@pytest.fixture
def push(start):
    """Push a run; it must remain what it was."""
    def push(folder, *options, repo=REPO, token=TOKEN):
        before = contents(folder)
        arguments = ['--checkpoint', folder, '--repo', repo, *options]
        done = start(RECIPES / 'publish.py', *arguments, token=token)[1]()
        assert contents(folder) == before
        return done

    return push


@pytest.fixture
def load(start):
    def load(way, cache='cache', **other):
        organisation = dict(TIMM_SELFDISTILL_ORG='org') if way == 'organisation' else {}
        return start(LOAD, *WAYS[way], cache=cache, **organisation, **other)[1]()

    return load


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return write_two_colours(tmp_path_factory.mktemp('data'), train=80, test=16)


@pytest.fixture(scope='module')
def run(data, tmp_path_factory):
    """A run; its checkpoints, of which nothing is published, are left out."""
    folder = train(TrainConfig(
        model='test_resnet', exits=(2, 3), epochs=1, batch_size=40, data_dir=str(data), label_column='fine',
        loader='workers', workers=0, experiment='run', output=str(tmp_path_factory.mktemp('runs')),
    ))
    for name in ('checkpoints', 'best'):
        shutil.rmtree(folder / name)
    return folder


@pytest.fixture(scope='module')
def other_run(run, tmp_path_factory):
    """Another run of the same network: other weights and results, and one file more."""
    folder = tmp_path_factory.mktemp('other') / 'run'
    shutil.copytree(run, folder)
    weights = load_file(folder / 'model.safetensors')
    save_file({name: t + 1 for name, t in weights.items()}, folder / 'model.safetensors')
    results = json.loads((folder / 'results.json').read_text())
    for rows in results.values():
        for row in rows:
            row['top1'] = 12.5
    (folder / 'results.json').write_text(json.dumps(results))
    (folder / 'early_exit.csv').write_text('of the other run')
    return folder


@pytest.fixture
def whole(hub, push, run):
    """All files of a repository after a push that nothing disturbed; the Hub is empty again."""
    return push_undisturbed(hub, push, run)


def push_undisturbed(hub, push, run):
    done = push(run)
    assert done.status == 0, done.err
    files = hub.files(REPO)
    for kept in (hub.repositories, hub.lfs, hub.requests):
        kept.clear()
    return files


@pytest.fixture
def instead(hub, monkeypatch):
    """Do something before the Hub answers the next request of a kind, once."""
    def instead(method, pattern, act):
        answer, done = hub.answer, []

        def later(verb, path, *args, **kwargs):
            if verb == method and re.search(pattern, path) and not done:
                done.append(True)
                act()
            return answer(verb, path, *args, **kwargs)

        monkeypatch.setattr(hub, 'answer', later)

    return instead


def asked(hub, method, pattern):
    return [status for verb, path, status in hub.requests if verb == method and re.search(pattern, path)]


def assert_nothing_new(hub, before=None):
    """A repository has no commit but those before; one that was not there may be there now, without weights."""
    if before is not None:
        assert hub.commits(REPO) == before
    elif REPO in hub.repositories:
        assert set(hub.files(REPO)) == {'.gitattributes'}


# -- pushing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('route', ROUTES)
def test_a_push_outlives_what_passes_wherever_it_happens(hub, push, run, whole, route):
    faults = [408, 429, 500, 502, 503]
    for status in faults[::-1]:
        hub.fault(*ROUTES[route], status=status)
    done = push(run)
    assert done.status == 0, done.err
    # several files are uploaded at a time, so others may be through before
    assert sorted(s for s in asked(hub, *ROUTES[route]) if s in faults) == faults and len(done.waits) >= 3
    assert hub.files(REPO) == whole and len(hub.commits(REPO)) == 2
    assert f'{hub.url}/{REPO}/tree/{hub.commits(REPO)[-1]}' in done.out


@pytest.mark.parametrize('route', ROUTES)
def test_a_push_gives_up_where_it_never_passes(hub, push, run, route):
    before = None
    if route in ('create', 'commit'):  # also one that is there already
        hub.put(REPO, {'model.safetensors': b'old', 'README.md': b'old'})
        before = hub.commits(REPO)
    status = 429 if route == 'commit' else 503
    hub.fault(*ROUTES[route], times=None, status=status)
    error = push(run).error
    assert f'was not pushed to {REPO}' in error and 'try again later' in error
    assert set(asked(hub, *ROUTES[route])) == {status} and len(asked(hub, *ROUTES[route])) >= 6
    assert_nothing_new(hub, before)


@pytest.mark.parametrize('route, status', [
    ('create', 401), ('info', 403), ('preupload', 404), ('batch', 401), ('put', 403), ('verify', 404), ('commit', 401),
    ('commit', 403), ('commit', 404), ('commit', 400),
])
def test_a_push_does_not_insist_where_it_is_refused(hub, push, run, route, status):
    hub.fault(*ROUTES[route], times=None, status=status)
    done = push(run)
    says = {401: 'hf auth login', 403: 'may not do that', 404: 'no such repository', 400: 'refuses'}[status]
    assert says in done.error and not done.waits
    assert set(asked(hub, *ROUTES[route])) == {status} and len(asked(hub, *ROUTES[route])) <= 2  # of two files at once
    assert_nothing_new(hub)


@pytest.mark.parametrize('token, says', [
    (None, 'hf auth login'), ('hf_SECRETWRONG', 'hf auth login'), (READER, 'may not do that'),
    ('hf_SECRET\x01CONTROL', 'hf auth login'), ('hf_SECRETß€', 'hf auth login'),
], ids=['none', 'wrong', 'reader', 'control', 'letters'])
@pytest.mark.parametrize('exists', [False, True], ids=['new', 'there'])
def test_who_may_not_write_writes_nothing(hub, push, run, token, says, exists):
    before = None
    if exists:
        hub.put(REPO, {'README.md': b'old'})
        before = hub.commits(REPO)
    assert says in push(run, token=token).error
    assert (REPO in hub.repositories) == exists
    assert_nothing_new(hub, before)
    if token != READER:  # who may write to what is their own
        assert says in push(run, repo='auto', token=token).error
        assert (REPO in hub.repositories) == exists == bool(hub.repositories)


def test_an_organisation_that_is_not_there_is_named(hub, push, run):
    error = push(run, repo='nowhere/net').error
    assert 'nowhere/net' in error and not hub.repositories
    assert 'expected <organisation or user>/<name>' in push(run, repo='net').error


def test_a_repository_that_vanishes_amid_a_push_is_told_of(hub, push, run, instead):
    instead(*ROUTES['preupload'], hub.repositories.clear)
    assert 'no such repository' in push(run).error and not hub.repositories


def test_a_push_waits_as_long_as_the_hub_asks(hub, push, run, whole):
    hub.fault(*ROUTES['commit'], status=429, headers={'Retry-After': '7'})
    done = push(run)
    assert done.status == 0 and done.waits == [7] and hub.files(REPO) == whole


@pytest.mark.parametrize('status', [409, 412])
def test_a_conflict_is_answered_on_the_new_head(hub, push, run, whole, status):
    hub.fault(*ROUTES['commit'], status=status)
    assert push(run).status == 0
    assert asked(hub, *ROUTES['commit']) == [status, 200] and len(asked(hub, *ROUTES['info'])) >= 2
    assert hub.files(REPO) == whole


def test_what_others_commit_meanwhile_stays(hub, push, run, whole, instead):
    instead(*ROUTES['commit'], lambda: hub.put(REPO, {'README.md': b'theirs', 'notes.txt': b'theirs'}))
    assert push(run).status == 0
    assert asked(hub, *ROUTES['commit']) == [412, 200] and len(hub.commits(REPO)) == 3
    assert hub.files(REPO) == {**whole, 'notes.txt': b'theirs'}


@pytest.mark.parametrize('cuts', [
    dict(validate=100, create=10, preupload=100, batch=100), dict(put=1000, verify=10, commit=1000),
], ids=['before', 'amid'])
def test_a_line_that_is_cut_costs_nothing(hub, push, run, whole, cuts):
    for route, cut in cuts.items():
        hub.fault(*ROUTES[route], cut=cut)
    done = push(run)
    assert done.status == 0, done.err
    assert all(0 in asked(hub, *ROUTES[route]) for route in cuts)
    assert hub.files(REPO) == whole and len(hub.commits(REPO)) == 2


@pytest.mark.parametrize('route', ['put', 'commit'])
def test_a_line_that_is_always_cut_leaves_what_was_there(hub, push, run, route):
    hub.put(REPO, {'model.safetensors': b'old', 'README.md': b'old'})
    before = hub.commits(REPO)
    hub.fault(*ROUTES[route], times=None, cut=1000)
    assert f'was not pushed to {REPO}' in push(run).error
    assert_nothing_new(hub, before)


def test_a_lost_answer_is_asked_for_again(hub, push, run, whole):
    for route in ('create', 'put', 'verify', 'commit'):
        hub.fault(*ROUTES[route], lost=True)
    done = push(run)
    assert done.status == 0, done.err
    for route in ('create', 'put', 'verify', 'commit'):
        statuses = asked(hub, *ROUTES[route])
        # several files are uploaded at a time, so others may be through before
        assert statuses.count(0) == 1 and (route in ('put', 'verify') or statuses[0] == 0), route
    assert hub.files(REPO) == whole and len(hub.commits(REPO)) == 2, 'it was committed once'
    assert hub.commits(REPO)[-1] in done.out


def test_an_object_that_arrives_changed_is_sent_again(hub, push, run, whole):
    hub.fault(*ROUTES['put'], times=2, corrupt=True)
    assert push(run).status == 0
    assert 422 in asked(hub, *ROUTES['verify']) and hub.files(REPO) == whole


def test_an_object_that_always_arrives_changed_is_not_committed(hub, push, run):
    hub.fault(*ROUTES['put'], times=None, corrupt=True)
    assert f'was not pushed to {REPO}' in push(run).error
    assert not hub.lfs and not asked(hub, *ROUTES['commit'])
    assert_nothing_new(hub)


def test_a_card_that_the_hub_does_not_take_is_not_sent(hub, push, run):
    error = push(run, '--dataset', 'no/data/set').error  # found out here
    assert '--dataset no/data/set: expected the id of a data set on the Hub' in error
    assert not hub.requests
    error = push(run, '--dataset', 'no:set').error
    assert 'README.md' in error and 'datasets' in error and 'no:set' in error
    assert hub.requests == [('POST', '/api/validate-yaml', 400)] and not hub.repositories


def cut_short(path):
    path.write_bytes(path.read_bytes()[:-len(path.read_bytes()) // 3])


def other_network(path):
    config = json.loads(path.read_text())
    config['model_args']['exits'] = [1, 2, 3]
    path.write_text(json.dumps(config))


@pytest.mark.parametrize('name, spoil', [
    ('results.json', Path.unlink), ('results.json', cut_short), ('results.json', lambda p: p.write_text('{}')),
    ('results.json', lambda p: p.write_text('{"test": 3}')),
    ('model.safetensors', Path.unlink), ('model.safetensors', cut_short), ('model.safetensors', Path.touch),
    ('model.safetensors', lambda p: p.write_bytes(b'\x80\x04pickle')),
    ('config.json', Path.unlink), ('config.json', cut_short), ('config.json', other_network),
    ('args.yaml', Path.unlink), ('args.yaml', cut_short), ('args.yaml', lambda p: p.write_text('a: [')),
    ('args.yaml', lambda p: p.write_text('')), ('args.yaml', lambda p: p.write_bytes(b'\xff\xfe\xff')),
    ('latency.json', cut_short), ('latency.json', lambda p: p.write_text('{}')),
    ('early_exit.json', lambda p: p.write_text('{"aim"')), ('early_exit.json', lambda p: p.write_text('{}')),
])
def test_a_run_that_cannot_be_used_is_refused_before_anything_is_sent(hub, push, run, tmp_path, name, spoil):
    folder = tmp_path / 'run'
    shutil.copytree(run, folder)
    spoil(folder / name)
    if name == 'model.safetensors' and spoil is Path.touch:
        (folder / name).write_bytes(b'')
    for repo in (REPO, 'auto'):
        error = push(folder, repo=repo).error
        assert str(folder) in error, error
        assert not asked(hub, 'POST', '') and not asked(hub, 'PUT', '') and not hub.repositories


@pytest.mark.parametrize('route', ['put', 'commit'])
def test_a_push_that_was_killed_is_made_up_for_by_the_next(hub, start, push, run, whole, other_run, route):
    assert push(other_run).status == 0
    before, files = hub.commits(REPO), contents(run)
    hub.requests.clear()
    hub.fault(*ROUTES[route], times=None, status=503)
    number, wait = start(RECIPES / 'publish.py', '--checkpoint', run, '--repo', REPO, patient=True)
    deadline = time.monotonic() + 60
    while not asked(hub, *ROUTES[route]) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(number, signal.SIGKILL)
    assert wait().status == -signal.SIGKILL
    assert_nothing_new(hub, before)
    assert contents(run) == files
    hub.faults.clear()
    assert push(run).status == 0
    assert hub.files(REPO) == whole


def test_of_two_pushes_into_one_repository_one_is_there_whole(hub, start, push, run, other_run, whole, instead):
    other = push_undisturbed(hub, push, other_run)
    assert other.keys() > whole.keys()

    instead(*ROUTES['commit'], lambda: push(other_run))  # of all moments the worst
    assert push(run).status == 0
    assert asked(hub, *ROUTES['commit']) == [200, 412, 200]
    assert hub.files(REPO) == whole, 'of what the other run has published nothing stays'

    waits = [start(RECIPES / 'publish.py', '--checkpoint', f, '--repo', REPO)[1] for f in (other_run, run, other_run)]
    for wait in waits:
        done = wait()
        assert done.status == 0, done.err
    assert hub.files(REPO) in (whole, other)
    for commit in hub.commits(REPO)[1:]:
        assert hub.files(REPO, commit) in (whole, other)


# -- pulling ----------------------------------------------------------------------------------------------------------


def put_run(hub, run, repo=REPO, **changes):
    files = {name: (run / name).read_bytes() for name in ('config.json', 'model.safetensors')}
    return hub.put(repo, {**files, **changes})


@pytest.fixture
def expected(start, run):
    return start(LOAD, 'load_network', run)[1]().out


@pytest.fixture
def fails(load):
    def fails(way, **other):
        done = load(way, **other)
        assert done.status == 1 and not done.out, 'a network without its weights is none'
        return [line for line in done.err.splitlines() if re.match(r'[\w.]+(Error|Exception)\b', line)][-1]

    return fails


@pytest.mark.parametrize('file', ['config.json', 'model.safetensors'])
@pytest.mark.parametrize('way, statuses', [
    ('timm', [500]), ('organisation', [401, 403, 404, 429, 500]), ('load_network', [404, 503]),
])
def test_a_load_that_is_refused_costs_the_next_one_nothing(hub, load, fails, run, expected, way, statuses, file):
    put_run(hub, run)
    for method in ('HEAD', 'GET'):
        for status in statuses:
            hub.fault(method, f'/resolve/.*{file}', times=None, status=status)
            fails(way)
            hub.faults.clear()
    assert load(way).out == expected


@pytest.mark.parametrize('file, cut', [('config.json', 20), ('model.safetensors', 10_000)])
@pytest.mark.parametrize('way', WAYS)
def test_half_a_download_is_never_taken_for_the_whole(hub, load, fails, run, expected, way, file, cut):
    put_run(hub, run)
    hub.fault('GET', f'/resolve/.*{file}', times=None, cut=cut)
    fails(way)
    hub.faults.clear()
    assert load(way).out == expected


@pytest.mark.parametrize('way', WAYS)
def test_weights_that_arrive_changed_are_not_used_and_not_kept(hub, load, fails, run, expected, way):
    put_run(hub, run)
    hub.fault('GET', '/resolve/.*safetensors', corrupt=True)
    error = fails(way)
    assert 'WeightsError' in error and 'damaged' in error
    assert load(way).out == expected and asked(hub, 'GET', 'safetensors') == [200, 200]


@pytest.mark.parametrize('way', ['organisation', 'load_network'])
def test_a_config_that_arrives_changed_is_not_used_and_not_kept(hub, load, fails, run, expected, way):
    put_run(hub, run)
    hub.fault('GET', '/resolve/.*config.json', corrupt=True)
    error = fails(way)
    assert 'WeightsError' in error and 'damaged' in error
    assert load(way).out == expected


@pytest.mark.parametrize('way', WAYS)
def test_a_config_that_was_changed_in_the_cache_is_fetched_again(hub, load, fails, run, expected, tmp_path, way):
    put_run(hub, run)
    assert load(way).out == expected
    config, = tmp_path.glob('cache/*/snapshots/*/config.json')
    config.write_text(config.read_text().replace('"mean"', '"std"'))
    assert 'damaged' in fails(way)
    assert load(way).out == expected


@pytest.mark.parametrize('way', WAYS)
def test_a_repository_without_usable_weights_is_told_of(hub, load, fails, run, way):
    put_run(hub, run)
    data = (run / 'model.safetensors').read_bytes()
    hub.put(REPO, {'model.safetensors': data[:len(data) // 2]})
    error = fails(way)
    assert 'WeightsError' in error and 'no complete safetensors file' in error

    hub.repositories.clear()
    hub.put(REPO, {'config.json': (run / 'config.json').read_bytes(), 'pytorch_model.bin': b'\x80\x04code'})
    error = fails(way, cache='other cache')
    assert 'WeightsError' in error and 'there is no model.safetensors' in error
    assert not asked(hub, 'GET', 'pytorch_model.bin')


@pytest.mark.parametrize('way', WAYS)
def test_weights_are_of_the_commit_that_the_config_is_of(hub, load, run, other_run, expected, instead, way):
    put_run(hub, run)
    def move():
        put_run(hub, other_run, **{'config.json': (run / 'config.json').read_bytes() + b' '})

    instead('HEAD', 'safetensors', move)
    first, second = load(way), load(way)
    assert first.status == second.status == 0 and len(hub.commits(REPO)) == 2 and second.out != expected
    # load_network reads the config twice, and in between the branch has moved: then both are new
    assert first.out == (second.out if way == 'load_network' else expected)


@pytest.mark.parametrize('way', WAYS)
def test_half_a_cache_is_not_enough_without_the_hub(hub, load, fails, run, expected, way):
    put_run(hub, run)
    hub.fault('GET', '/resolve/.*safetensors', times=None, cut=10_000)
    fails(way)
    hub.requests.clear()
    hub.faults.clear()
    fails(way, offline=True)
    assert not hub.requests
    assert load(way).out == expected
    hub.requests.clear()
    assert load(way, offline=True).out == expected and not hub.requests


# -- training ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def train_command(data, tmp_path):
    return [
        RECIPES / 'train.py', '--model', 'test_resnet', '--exits', 2, 3, '--epochs', 1, '--batch-size', 40,
        '--data-dir', data, '--label-column', 'fine', '--loader', 'workers', '--workers', 0,
        '--output', tmp_path / 'runs', '--experiment', 'run', '--push-to-hub', REPO,
    ]


def test_before_training_it_is_found_out_who_may_not_push(hub, start, train_command, tmp_path):
    for token in (None, 'hf_SECRETWRONG'):
        done = start(*train_command, token=token)[1]()
        assert 'hf auth login' in done.error and not (tmp_path / 'runs').exists()


@pytest.mark.slow
def test_a_run_outlives_a_push_that_fails(hub, start, push, train_command, tmp_path):
    hub.fault(*ROUTES['commit'], times=None, status=500)
    error = start(*train_command)[1]().error
    folder = tmp_path / 'runs' / 'run'
    assert f'recipes/publish.py --checkpoint {folder} --repo {REPO}' in error
    assert_nothing_new(hub)
    before = contents(folder)
    assert {'results.json', 'README.md', 'model.safetensors'} <= set(before)
    assert not any(b'hf_SECRET' in data for data in before.values())
    assert yaml.safe_load(before['args.yaml'])['epochs'] == 1

    assert str(folder) in start(*train_command, '--resume', 'auto')[1]().error, 'the Hub has not recovered'
    hub.faults.clear()
    done = start(*train_command, '--resume', 'auto')[1]()
    assert done.status == 0, done.err
    assert contents(folder) == before, 'nothing was trained'
    files = hub.files(REPO)
    assert hashlib.sha256(files['model.safetensors']).digest() == hashlib.sha256(before['model.safetensors']).digest()
    assert push(folder).status == 0 and hub.files(REPO) == files and len(hub.commits(REPO)) == 2


@pytest.mark.slow
def test_of_several_processes_all_end_where_the_push_fails(hub, train_command, tmp_path):
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', *train_command]
    env = dict(hub.env(tmp_path / 'home', READER), ACCELERATE_USE_CPU='true')
    done = subprocess.run(list(map(str, command)), env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode != 0 and done.stderr.count('error: ') == 1, done.stderr
    assert 'recipes/publish.py' in done.stderr and 'SECRET' not in done.stdout + done.stderr
    assert (tmp_path / 'runs' / 'run' / 'results.json').is_file() and not hub.repositories
