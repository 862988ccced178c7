"""The Hub of the tests, as the real client sees it; each client is a process, for it reads its endpoint at import."""
import json
import subprocess
import sys

import pytest
from helpers.hub_server import HubServer

SETUP = """
import inspect, json
from pathlib import Path
from huggingface_hub import HfApi, ModelCard, constants, hf_hub_download
from huggingface_hub.errors import *
constants.DOWNLOAD_CHUNK_SIZE = 1000  # what a broken download keeps
api, home = HfApi(), Path(constants.HF_HOME)
out = {}

def error(function, *args, **kwargs):
    try:
        function(*args, **kwargs)
    except Exception as e:
        return [c.__name__ for c in type(e).__mro__] + [str(e)]

def download(repo, file, **kwargs):
    return Path(hf_hub_download(repo, file, **kwargs)).read_bytes().decode('latin-1')
"""
CARD = """---
license: mit
tags: [timm]
datasets: [uoft-cs/cifar100]
base_model: timm/resnet50.a1_in1k
model-index:
- name: x
  results:
  - task: {type: image-classification}
    dataset: {type: cifar, name: CIFAR-100}
    metrics: [{type: accuracy, value: 0.5}]
---
# x
"""
WEIGHTS = bytes(range(256)) * 20


@pytest.fixture
def hub():
    with HubServer(tokens=dict(hf_writer='writer', hf_reader='reader')) as hub:
        yield hub


@pytest.fixture
def client(hub, tmp_path):
    """Run code as a client, return what it puts into `out`."""

    def run(code, token='hf_writer', home='home'):
        code = f'{SETUP}\n{code}\nprint(json.dumps(out))'
        env = hub.env(tmp_path / home, token)
        done = subprocess.run([sys.executable, '-c', code], env=env, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    return run


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / 'folder'
    (folder / 'sub').mkdir(parents=True)
    (folder / 'README.md').write_text(CARD)
    (folder / 'model.safetensors').write_bytes(WEIGHTS)
    (folder / 'sub' / 'config.json').write_text('{"é": 1}')
    (folder / 'empty.txt').write_text('')
    return folder


def asked(hub, method, part):
    """Return the statuses that requests of this method with this in their path were answered with."""
    return [status for sent, path, status in hub.requests if sent == method and part in path]


def test_what_is_uploaded_is_downloaded_and_an_identical_upload_makes_no_commit(hub, client, folder):
    out = client(f"""
url = api.create_repo('org/net', private=False)
out['url'] = [url.repo_id, api.create_repo('org/net', exist_ok=True).repo_id]
out['again'] = error(api.create_repo, 'org/net')
first = api.upload_folder(repo_id='org/net', folder_path={str(folder)!r})
second = api.upload_folder(repo_id='org/net', folder_path={str(folder)!r})
out['oids'] = [first.oid, second.oid]
out['files'] = {{f: download('org/net', f) for f in api.list_repo_files('org/net')}}
info = api.model_info('org/net', files_metadata=True)
out['lfs'] = [s.rfilename for s in info.siblings if s.lfs]
out['info'] = [info.sha, info.private, info.last_modified.year > 2000]
out['tree'] = sorted(e.path for e in api.list_repo_tree('org/net'))
out['under'] = [e.path for e in api.list_repo_tree('org/net', 'sub')]
out['exists'] = [api.file_exists('org/net', f) for f in ('README.md', 'nothing')]
out['who'] = api.whoami()['name']
api.create_branch('org/net', branch='copy')
same = {str(folder / 'model.safetensors')!r}
api.upload_file(path_or_fileobj=same, path_in_repo='a.safetensors', repo_id='org/net', revision='copy')
""")
    assert out['url'] == ['org/net'] * 2 and '409' in out['again'][-1]
    assert {name: data.encode('latin-1') for name, data in out['files'].items()} == hub.files('org/net')
    local = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob('*') if p.is_file()}
    assert hub.files('org/net').items() > local.items() and set(hub.files('org/net')) - set(local) == {'.gitattributes'}
    assert out['lfs'] == ['model.safetensors'] and hub.files('org/net', 'copy')['a.safetensors'] == WEIGHTS
    assert asked(hub, 'PUT', '/lfs/') == [200], 'an object that is there already is not sent again'
    assert out['oids'] == [hub.commits('org/net')[1]] * 2 and len(hub.commits('org/net')) == 2
    assert out['info'] == [out['oids'][0], False, True]
    assert out['tree'] == ['.gitattributes', 'README.md', 'empty.txt', 'model.safetensors', 'sub']
    assert out['under'] == ['sub/config.json'] and out['exists'] == [True, False] and out['who'] == 'writer'


def test_a_private_repository_is_only_there_for_who_may_read_it(hub, client):
    hub.put('writer/hidden', {'a.txt': b'secret'}, private=True)
    hub.put('writer/open', {'a.txt': b'open'})
    code = """
out['hidden'] = error(download, 'writer/hidden', 'a.txt')
out['info'] = error(api.model_info, 'writer/hidden')
out['missing'] = error(api.model_info, 'writer/nothing')
out['open'] = download('writer/open', 'a.txt')
out['write'] = error(api.upload_file, path_or_fileobj=b'x', path_in_repo='b.txt', repo_id='writer/open')
out['create'] = error(api.create_repo, 'writer/new')
"""
    for token, write in ((None, '401'), ('hf_reader', '403')):
        out = client(code, token, home=f'home of {token}')
        assert all('RepositoryNotFoundError' in out[key] for key in ('hidden', 'info', 'missing')), out
        assert out['open'] == 'open' and write in out['write'][-1] and write in out['create'][-1]
    out = client("""
out['hidden'] = download('writer/hidden', 'a.txt')
api.create_repo('own', private=True)
out['private'] = api.model_info('writer/own').private
out['invalid'] = error(HfApi(token='hf_wrong').model_info, 'writer/open')
""")
    assert out['hidden'] == 'secret' and out['private'] and hub.repositories['writer/own'].private
    assert 'RepositoryNotFoundError' not in out['invalid'] and 'Invalid credentials' in out['invalid'][-1]
    assert hub.files('writer/open') == {'a.txt': b'open'}


def test_a_revision_is_a_branch_a_tag_or_a_commit(hub, client):
    old = hub.put('org/net', {'a.txt': b'old'})
    new = hub.put('org/net', {'a.txt': b'new'})
    out = client(f"""
api.create_branch('org/net', branch='side/way', revision={old!r})
api.create_branch('org/net', branch='side/way', exist_ok=True)
api.create_tag('org/net', tag='v1', revision={old!r})
api.upload_file(path_or_fileobj=b'side', path_in_repo='b.txt', repo_id='org/net', revision='side/way')
out['a'] = [download('org/net', 'a.txt', revision=r) for r in ('main', 'v1', 'side/way', {old!r}, {new!r})]
out['b'] = download('org/net', 'b.txt', revision='side/way')
out['entry'] = error(download, 'org/net', 'b.txt')
out['revision'] = error(download, 'org/net', 'a.txt', revision='v2')
""")
    assert out['a'] == ['new', 'old', 'old', 'old', 'new'] and out['b'] == 'side'
    assert 'EntryNotFoundError' in out['entry'] and 'RevisionNotFoundError' in out['revision']
    assert hub.commits('org/net') == [old, new] and hub.commits('org/net', 'side/way')[0] == old
    assert hub.files('org/net', 'side/way') == {'a.txt': b'old', 'b.txt': b'side'}


def test_a_card_is_refused_for_what_its_metadata_lack(hub, client):
    broken = [
        ('license: mit', 'license: 3', 'license'),
        ('license: mit\n', '', 'license'),
        ('[timm]', 'timm', 'tags'),
        ('resnet50.a1_in1k', 'a/b/c', 'base_model'),
        ('- name: x', '- title: x', 'model-index[0].name'),
        ('task: {type: image-classification}', 'task: {}', 'task.type'),
        (', value: 0.5', '', 'metrics[0].value'),
        ('tags: [', 'tags: [[', 'YAML'),
    ]
    cards = [CARD.replace(old, new) for old, new, _ in broken]
    out = client(f"""
api.create_repo('org/net')
def push(card):
    api.upload_file(path_or_fileobj=card.encode(), path_in_repo='README.md', repo_id='org/net')
for i, text in enumerate({cards!r}):
    out[i] = error(push, text)
push({CARD!r})
if 'constants.ENDPOINT' in inspect.getsource(ModelCard.validate):  # 1.0 asks huggingface.co, whatever the endpoint
    ModelCard({CARD!r}).validate()
    out['validate'] = error(ModelCard({cards[0]!r}).validate)
""")
    for i, (_, _, name) in enumerate(broken):
        assert 'ValueError' in out[str(i)] and name in out[str(i)][-1], out[str(i)]
    assert 'validate' not in out or ('ValueError' in out['validate'] and 'license' in out['validate'][-1])
    assert len(hub.commits('org/net')) == 2 and hub.files('org/net')['README.md'] == CARD.encode()


def test_a_commit_is_refused_whole(hub, client):
    old = hub.put('org/net', {'a.txt': b'a', 'folder/b.txt': b'b'})
    head = hub.put('org/net', {'a.txt': b'b'})
    out = client(f"""
from huggingface_hub import CommitOperationAdd as Add, CommitOperationDelete as Delete
def commit(*operations, **kwargs):
    return api.create_commit('org/net', operations, commit_message='m', **kwargs)
out['stale'] = error(commit, Add('c.txt', b'c'), parent_commit={old!r})
out['missing'] = error(commit, Add('c.txt', b'c'), Delete('d.txt'))
lost = Add('c.png', b'c')
lost._upload_mode, lost._is_uploaded, lost._should_ignore = 'lfs', True, False
out['lost'] = error(commit, Add('c.txt', b'c'), lost)
out['same'] = error(commit, Delete('a.txt'), Add('a.txt', b'b'))  # what it does not leave out itself
out['oid'] = commit(Add('c.txt', b'c'), Delete('folder/'), Delete('a.txt'), parent_commit={head!r}).oid
""")
    assert '412' in out['stale'][-1] and 'EntryNotFoundError' in out['missing']
    assert 'does not exist' in out['lost'][-1] and 'change nothing' in out['same'][-1]
    assert hub.commits('org/net') == [old, head, out['oid']] and hub.files('org/net') == {'c.txt': b'c'}


def test_a_broken_download_is_taken_up_where_it_ended(hub, client):
    hub.put('org/net', {'model.safetensors': WEIGHTS})
    hub.fault('GET', '/resolve/.*safetensors', cut=2500)
    out = client("""
out['broken'] = error(download, 'org/net', 'model.safetensors')  # 1.0 leaves it to the next call, 2.x goes on
out['data'] = download('org/net', 'model.safetensors')
""")
    assert out['data'].encode('latin-1') == WEIGHTS
    assert asked(hub, 'GET', 'model.safetensors') == [200, 206]


def test_the_client_does_not_notice_a_changed_byte(hub, client):
    hub.put('org/net', {'model.safetensors': WEIGHTS})
    hub.fault('GET', '/resolve/', corrupt=True)
    data = client("out['data'] = download('org/net', 'model.safetensors')")['data'].encode('latin-1')
    assert len(data) == len(WEIGHTS) and sum(a != b for a, b in zip(data, WEIGHTS)) == 1


@pytest.mark.slow
def test_an_upload_outlives_what_passes_and_a_wrong_object_is_not_committed(hub, client, folder):
    hub.put('org/net', {'a.txt': b'a'})
    hub.fault('PUT', '/lfs/', times=2, status=503)
    out = client(f"out['oid'] = api.upload_folder(repo_id='org/net', folder_path={str(folder)!r}).oid")
    assert asked(hub, 'PUT', '/lfs/') == [503, 503, 200]
    assert hub.commits('org/net')[-1] == out['oid'] and hub.files('org/net')['model.safetensors'] == WEIGHTS

    (folder / 'model.safetensors').write_bytes(WEIGHTS[::-1])
    hub.fault('PUT', '/lfs/', cut=1000)
    hub.fault('PUT', '/lfs/', corrupt=True)
    out = client(f"""
out['wrong'] = error(api.upload_folder, repo_id='org/net', folder_path={str(folder)!r})
api.upload_folder(repo_id='org/net', folder_path={str(folder)!r})
""")
    assert 'RuntimeError' in out['wrong'] and asked(hub, 'POST', '/verify') == [200, 422, 200]
    assert asked(hub, 'PUT', '/lfs/')[3:] == [0, 200, 200]
    assert len(hub.commits('org/net')) == 3 and hub.files('org/net')['model.safetensors'] == WEIGHTS[::-1]


def test_a_fault_is_answered_with_its_status_code_and_headers_as_often_as_asked(hub, client):
    hub.put('org/net', {'a.txt': b'a'})
    hub.fault('HEAD', 'a.txt', status=404, code='EntryNotFound')
    hub.fault('GET', '/api/models/', times=None, status=429, headers={'Retry-After': '7'})
    out = client("""
out['file'] = error(download, 'org/net', 'a.txt')
out['data'] = download('org/net', 'a.txt')
for i in range(3):
    try:
        api.model_info('org/net')
    except HfHubHTTPError as e:
        out[i] = [e.response.status_code, e.response.headers['Retry-After']]
""")
    assert 'EntryNotFoundError' in out['file'] and out['data'] == 'a'
    assert [out[str(i)] for i in range(3)] == [[429, '7']] * 3
