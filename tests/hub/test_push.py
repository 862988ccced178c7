"""From training over the Hub to a fresh process: what is pushed, what is pulled, and what the cards say."""
import ast
import copy
import json
import re
import runpy
import shutil
import subprocess
import sys
import warnings

import pytest
import timm
import torch
import yaml
from helpers import RECIPES
from helpers.hub_server import HubServer
from helpers.images import write_two_colours
from huggingface_hub import ModelCard
from timm.models import register_model

from timm_selfdistill import add_exits, register_pretrained, registry
from timm_selfdistill.cli.options import parse_train_config
from timm_selfdistill.config import TrainConfig
from timm_selfdistill.errors import ConfigError
from timm_selfdistill.hub.card import write_card
from timm_selfdistill.hub.networks import load_checkpoint, load_network, save_model
from timm_selfdistill.hub.push import stage
from timm_selfdistill.models.names import exit_names
from timm_selfdistill.publishing import public_settings
from timm_selfdistill.training.trainer import train

TINY = dict(model='test_resnet', exits=(2, 3), epochs=1)
CALIBRATE = [str(RECIPES / 'calibrate.py'), '--budget', '0.97']


def python(environment, *arguments, folder=None):
    """Run Python in a process of its own; return what it prints, and what it complains of where it fails."""
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], env=environment, cwd=folder, capture_output=True, text=True,
        timeout=300)
    return done.stdout if done.returncode == 0 else done.stderr


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """A complete run on digits, calibrated."""
    folder = train(TrainConfig(output=str(tmp_path_factory.mktemp('runs')), experiment='digits', **TINY))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, 'argv', [*CALIBRATE, '--checkpoint', str(folder)])
        runpy.run_path(CALIBRATE[0], run_name='__main__')
    return folder


@pytest.fixture(scope='module')
def hub():
    with HubServer(tokens=dict(hf_writer='writer'), orgs=('org',)) as hub:
        hub.put('datasets/someone/digits', {'eval.yaml': b'name: Digits\ntasks:\n- id: digits\n'})
        yield hub


@pytest.fixture(scope='module')
def published(run, hub, tmp_path_factory):
    """The run on the Hub: whole, cut off at exit 0, and under a name found by the program; each pushed twice."""
    environment = hub.env(tmp_path_factory.mktemp('home'), 'hf_writer')
    script = (
        'import runpy, sys\n'
        'for words in sys.argv[1].split(";") * 2:\n'
        f'    sys.argv = ["publish.py", "--checkpoint", {str(run)!r}, *words.split()]\n'
        f'    runpy.run_path({str(RECIPES / "publish.py")!r}, run_name="__main__")\n'
    )
    # of the two data sets the Hub knows one as a benchmark
    cases = (
        '--repo org/test_resnet_sd --dataset someone/else;--repo org/small --exit 0 --dataset someone/digits --public;'
        '--revision v2')
    out = python(environment, '-c', script, cases)
    assert out.count('/tree/') == 6, out
    return out


LOAD = """
import json, sys
import timm, timm_selfdistill, torch
from timm_selfdistill.hub.networks import load_network
local, names = sys.argv[1], sys.argv[2:]
images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
expected = timm.create_model('local-dir:' + local, pretrained=True).eval()
found = {}
for name in names:
    model = timm.create_model(name, pretrained=True).eval()
    outputs = model.forward_exits(images) if hasattr(model, 'forward_exits') else [model(images)]
    same = all(torch.equal(a, b) for a, b in zip(outputs, expected.forward_exits(images)))
    rule = repr(timm_selfdistill.EarlyExit(model).rule) if len(outputs) > 1 else None
    found[name] = [same, len(outputs), rule, model.pretrained_cfg['hf_hub_id'], model.pretrained_cfg.get('tag')]
other = timm.create_model(names[0], pretrained=True, num_classes=7).eval()
body = [torch.equal(a, b) for (n, a), (m, b) in zip(other.state_dict().items(), expected.state_dict().items())
        if a.shape == b.shape]
found['other'] = [[list(z.shape) for z in other.forward_exits(images)], all(body), len(body)]
found['rule'] = repr(timm_selfdistill.EarlyExit(expected).rule)
found['listed'] = timm.list_pretrained('*_sd*')
print(json.dumps(found))
"""


@pytest.mark.slow
def test_what_is_pushed_is_pulled_by_a_fresh_process(run, hub, published, tmp_path):
    environment = dict(hub.env(tmp_path / 'home', 'hf_writer'), TIMM_SELFDISTILL_ORG='org')
    commit = hub.commits('org/test_resnet_sd')[-1]
    names = ['test_resnet_sd', 'hf-hub:org/test_resnet_sd', f'hf-hub:org/test_resnet_sd@{commit}', 'hf-hub:org/small',
             'hf-hub:writer/test_resnet_sd.byot_digits@v2']
    online = json.loads(python(environment, '-c', LOAD, run, *names).splitlines()[-1])
    for name in names:
        same, exits, rule, where, _ = online[name]
        assert same and exits == (1 if name.endswith('small') else 3)
        assert rule == (None if exits == 1 else online['rule']) and 'thresholds=(None, None)' not in online['rule']
        repository = name.partition(':')[2].partition('@')[0] or 'org/test_resnet_sd'
        assert re.fullmatch(re.escape(repository) + '@[0-9a-f]{40}', where), 'weights of the very commit of the config'
    shapes, same, compared = online['other']
    assert shapes == [[2, 7]] * 3 and same and compared > 50
    # what is found by its name alone is not claimed to exist
    assert online['listed'] == ['resnet20_cifar_sd.byot_cifar100']
    requests = len(hub.requests)
    offline = python(dict(environment, HF_HUB_OFFLINE='1'), '-c', LOAD, run, *names)
    assert json.loads(offline.splitlines()[-1]) == online and len(hub.requests) == requests


def test_a_second_push_changes_nothing(hub, published):
    assert len(hub.commits('org/test_resnet_sd')) == 2, 'that of the creation, and one more'
    assert len(hub.commits('writer/test_resnet_sd.byot_digits', 'v2')) == 2
    trees = re.findall(r'/tree/(\w+)', published)
    assert trees[:3] == trees[3:]


def test_only_what_is_asked_for_is_public(hub, published):
    private = {n: repository.private for n, repository in hub.repositories.items() if not n.startswith('datasets/')}
    assert private == {
        'org/test_resnet_sd': True, 'org/small': False, 'writer/test_resnet_sd.byot_digits': True}


def test_all_that_describes_the_run_is_pushed_and_nothing_of_the_machine(run, hub, published):
    files = hub.files('org/test_resnet_sd')
    assert set(files) == {
        '.gitattributes', 'README.md', 'accuracy_vs_compute.png', 'args.yaml', 'config.json', 'early_exit.csv',
        'early_exit.json', 'early_exit.png', 'latency.json', 'model.safetensors', 'record.json', 'results.json',
        'summary.csv'}
    for name in set(files) - {'.gitattributes', 'README.md', 'args.yaml'}:
        assert files[name] == (run / name).read_bytes(), name
    settings = yaml.safe_load(files['args.yaml'])
    assert settings['exits'] == [2, 3] and 'output' not in settings
    for name, data in files.items():
        assert str(run.parent).encode() not in data and b'hf_writer' not in data, name


def test_a_network_cut_off_at_an_exit_is_pushed_alone(run, hub, published):
    files = hub.files('org/small')
    assert '.eval_results/someone-digits.yaml' in files and 'early_exit.json' not in files
    assert len(files['model.safetensors']) < 0.8 * (run / 'model.safetensors').stat().st_size
    assert json.loads(files['config.json'])['model_args']['truncate'] == 0
    card = ModelCard(files['README.md'].decode())
    result, = card.data.eval_results
    exit0 = json.loads((run / 'results.json').read_text())['test'][0]
    assert result.metric_name == 'top-1 of exit0' and result.metric_value == round(exit0['top1'] / 100, 6)
    assert card.data.datasets == ['someone/digits'] and '| exit1 |' not in card.text
    entry, = yaml.safe_load(files['.eval_results/someone-digits.yaml'])
    assert entry == dict(dataset=dict(id='someone/digits', task_id='digits'), value=result.metric_value)


def test_the_newer_form_of_results_is_what_the_client_reads(hub, published):
    huggingface_hub = pytest.importorskip('huggingface_hub')
    if not hasattr(huggingface_hub, 'parse_eval_result_entries'):
        pytest.skip('huggingface_hub is older than that form')
    data = yaml.safe_load(hub.files('org/small')['.eval_results/someone-digits.yaml'])
    entry, = huggingface_hub.parse_eval_result_entries(data)
    assert huggingface_hub.eval_result_entries_to_yaml([entry]) == data


@pytest.mark.slow
@pytest.mark.parametrize('repository', ['org/test_resnet_sd', 'org/small'])
def test_the_snippet_of_a_card_runs_as_pasted(hub, published, repository, tmp_path):
    text = hub.files(repository)['README.md'].decode()
    snippet, in_transformers = re.findall(r'```python\n(.*?)```', text, re.DOTALL)
    environment = hub.env(tmp_path / 'home', 'hf_writer')
    answers = ast.literal_eval(python(environment, '-c', in_transformers).splitlines()[-1])
    out = python(environment, '-c', snippet)
    *left, label = out.splitlines()
    assert answers[0]['label'] == label, 'both see the same grey image'
    assert label in set('0123456789'), out
    assert bool(left) == (repository == 'org/test_resnet_sd'), out


def test_a_card_says_what_was_measured(run):
    write_card(run)
    card = ModelCard.load(run / 'README.md')
    network, _ = load_checkpoint(str(run))
    results = json.loads((run / 'results.json').read_text())['test']
    latency = json.loads((run / 'latency.json').read_text())
    assert list(latency['ms']) == exit_names(network) and all(ms > 0 for ms in latency['ms'].values())
    for row in results:
        line, = [line for line in card.text.splitlines() if line.startswith(f'| {row["exit"]} |')]
        cells = [cell.strip() for cell in line.strip('|').split('|')]
        assert cells[2] == f'{row["params"] / 1e6:.2f} M' and cells[5] == f'{latency["ms"][row["exit"]]:.2f} ms'
        assert cells[6] == f'{row["top1"]:.2f} %' and cells[9] == f'{row["ece"]:.2f} %'
    results = [(r.metric_name, r.metric_value) for r in card.data.eval_results]
    rows = json.loads((run / 'results.json').read_text())['test']
    assert results == [(f'top-1 of {row["exit"]}', round(row['top1'] / 100, 6)) for row in rows]
    metadata = card.data.to_dict()
    assert metadata['library_name'] == 'timm' and metadata['license'] == 'apache-2.0' and 'base_model' not in metadata
    assert 'seed 42' in card.text and '1905.08094' in card.text and '1805.05551' in card.text
    assert 'chosen on 183 images of digits' in card.text and 'early_exit.png' in card.text
    thresholds = json.loads((run / 'config.json').read_text())['model_args']['early_exit']['thresholds']
    assert all('never' if t is None else f'{t:.4g}' in card.text for t in thresholds)


def test_a_card_names_the_weights_that_training_began_with(run, tmp_path):
    folder = tmp_path / 'digits'
    shutil.copytree(run, folder)
    settings = yaml.safe_load((folder / 'args.yaml').read_text())
    settings.update(
        model='vit_tiny_patch16_224.augreg_in21k', backbone_pretrained=True, data_dir='/secret/place/pets',
        teacher='/secret/runs/generation0')
    (folder / 'args.yaml').write_text(yaml.safe_dump(settings))
    write_card(folder)
    card = ModelCard.load(folder / 'README.md')
    assert card.data.base_model == 'timm/vit_tiny_patch16_224.augreg_in21k'
    assert 'on pets' in card.text and 'taught by generation0' in card.text and 'secret' not in card.content
    shown = public_settings(dict(settings, teacher='hf-hub:org/big', dataset='org/data'))
    assert (shown['teacher'], shown['dataset']) == ('hf-hub:org/big', 'org/data')
    for place in ('/secret/place/pets', './pets', '~/pets', str(tmp_path / 'pets')):
        assert public_settings(dict(settings, dataset=place))['dataset'] == 'pets'


def test_the_card_of_the_family_has_metadata_that_the_client_reads():
    card = ModelCard.load(RECIPES.parent / 'MODEL_CARD.md')
    metadata = card.data.to_dict()
    assert (metadata['library_name'], metadata['license']) == ('timm', 'apache-2.0') and 'timm' in metadata['tags']


def test_only_complete_runs_are_staged(run, tmp_path):
    destination = tmp_path / 'staged'
    destination.mkdir()
    folder = tmp_path / 'digits'
    shutil.copytree(run, folder)
    (folder / 'results.json').unlink()
    with pytest.raises(ConfigError, match='has come to its end'):
        stage(folder, destination, 'hf-hub:org/name')
    with pytest.raises(ConfigError, match=r'`exit=3`: .* exits 0 to 2'):
        stage(run, destination, 'hf-hub:org/name', exit=3)
    assert not any(destination.iterdir())


def test_push_to_hub_takes_a_name_or_none():
    assert parse_train_config([]).push_to_hub is None
    assert parse_train_config(['--push-to-hub']).push_to_hub == 'auto'
    assert parse_train_config(['--push-to-hub', '--epochs', '3']).push_to_hub == 'auto'
    assert parse_train_config(['--push-to-hub', 'org/name', '--epochs', '3']).push_to_hub == 'org/name'


@pytest.mark.slow
def test_training_pushes_at_its_end(hub, tmp_path):
    environment = hub.env(tmp_path / 'home', 'hf_writer')
    (tmp_path / 'data').mkdir()
    write_two_colours(tmp_path / 'data')
    train_py = [
        RECIPES / 'train.py', '--model', 'test_resnet', '--epochs', '1', '--data-dir', tmp_path / 'data',
        '--label-column', 'fine', '--output', tmp_path, '--push-to-hub']
    for generations in ([], ['--generations', '1', '--experiment', 'family']):
        python(environment, *train_py, 'org/trained', *generations)
        pushed = hub.files('org/trained')
        folder = tmp_path / 'family' / 'generation1' if generations else next(tmp_path.glob('*-test_resnet_sd'))
        assert pushed['model.safetensors'] == (folder / 'model.safetensors').read_bytes()
        assert b'"hf-hub:org/trained"' in pushed['README.md']


# -- registered weights -----------------------------------------------------------------------------------------------


@pytest.fixture
def forgetful():
    """Forget what a test registers."""
    kept = copy.deepcopy(registry.default_cfgs['test_resnet_sd'])
    yield
    registry.default_cfgs['test_resnet_sd'] = kept
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        register_model(registry.test_resnet_sd)
    assert timm.list_pretrained('test_resnet_sd*') == []


def test_registered_weights_are_found_by_name_and_listed(run, tmp_path, forgetful):
    images = torch.rand(2, 3, 32, 32)
    expected = load_network(str(run))[0](images)
    register_pretrained('test_resnet_sd.byot_digits', f'local-dir:{run}')
    assert timm.list_pretrained('test_resnet_sd*') == ['test_resnet_sd.byot_digits']
    for name in ('test_resnet_sd', 'test_resnet_sd.byot_digits'):
        model = timm.create_model(name, pretrained=True).eval()
        torch.testing.assert_close(model(images), expected, rtol=0, atol=0)
        assert model.num_classes == 10 and model.exits == (2, 3)
    assert timm.create_model('test_resnet_sd').num_classes == 1000, 'without weights all is as before'

    save_model(add_exits(timm.create_model('test_resnet', num_classes=4), exits=(3,)), tmp_path)
    register_pretrained('test_resnet_sd.other', f'local-dir:{tmp_path}')
    assert timm.create_model('test_resnet_sd.other', pretrained=True).num_classes == 4
    assert timm.create_model('test_resnet_sd', pretrained=True).num_classes == 10, 'the first ones stay the default'
    assert timm.list_pretrained('test_resnet_sd*') == ['test_resnet_sd.byot_digits', 'test_resnet_sd.other']


@pytest.mark.parametrize('name, source, message', [
    ('resnet50', None, "name='resnet50': expected <name>_sd"),
    ('nothing_sd.tag', None, "name='nothing_sd.tag': expected <name>_sd"),
    ('resnet50_sd.tag', 'url:x', "source='url:x': expected hf-hub:<org>/<name> or local-dir:<folder>"),
    ('resnet50_sd.tag', 'hf-hub:', "source='hf-hub:': expected"),
])
def test_what_cannot_be_registered_is_refused(name, source, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        register_pretrained(name, source)


def test_a_tag_that_nobody_has_published_is_looked_for_under_one_name():
    with pytest.raises(RuntimeError, match='timm-selfdistill/test_resnet_sd.nobody is not in the cache'):
        timm.create_model('test_resnet_sd.nobody', pretrained=True)
