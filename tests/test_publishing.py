"""What of settings is published: a path in any of them stays at home, wherever it may turn up."""
import dataclasses
import json

import pytest
import timm
import yaml
from helpers.images import write_two_colours
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from timm_selfdistill.config import INCIDENTAL, PLACES, TrainConfig
from timm_selfdistill.errors import ConfigError
from timm_selfdistill.hub import push
from timm_selfdistill.hub.networks import save_model
from timm_selfdistill.hub.push import stage
from timm_selfdistill.publishing import place_name, public_settings, public_text
from timm_selfdistill.training import trainer
from timm_selfdistill.training.records import make_record

SECRET = ('annasfolder', 'hiddenproject')
PATHS = (
    '/home/annasfolder/hiddenproject/thing.pth', 'C:\\Users\\annasfolder\\hidden files\\hiddenproject\\thing',
    '~/annasfolder/hiddenproject/thing', '../annasfolder/hiddenproject/thing',
    'local-dir:/annasfolder/hiddenproject/it', 'file:///srv/annasfolder/hiddenproject/thing',
    '\\\\annasfolder\\hiddenproject\\thing', '$SCRATCH/hiddenproject/it',
)


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    """What a complete run leaves, without the training."""
    folder = tmp_path_factory.mktemp('runs') / 'run'
    model = timm.create_model('test_resnet_sd', num_classes=10, exits=(2, 3))
    save_model(model, folder, dict(input_size=(3, 32, 32)), [str(i) for i in range(10)])
    figures = dict(stage='s', params=1, macs=1, share=1., top1=50., top5=90., loss=1., ece=2., count=10)
    rows = [dict(exit=name, **figures) for name in ('exit0', 'exit1', 'exit2', 'ensemble')]
    (folder / 'results.json').write_text(json.dumps(dict(test=rows)))
    ms = {row['exit']: 1. for row in rows}
    (folder / 'latency.json').write_text(
        json.dumps(dict(ms=ms, device='CPU', threads=1, dtype='float32', torch='2', batch_size=1)))
    return folder, rows


def leaks(folder):
    """Return the files that say something of the places in `PATHS`."""
    return [path.name for path in folder.rglob('*') if path.is_file()
            and any(word.encode() in path.read_bytes() for word in SECRET)]


@pytest.mark.parametrize('field', [field.name for field in dataclasses.fields(TrainConfig)])
def test_a_path_in_any_setting_is_in_no_file_that_is_pushed(finished, tmp_path, monkeypatch, field):
    folder, rows = finished
    monkeypatch.setattr(push, 'load_checkpoint', lambda folder: (None, folder))  # takes a second, and only looks
    for number, path in enumerate(PATHS):
        given = path if not isinstance(getattr(TrainConfig(), field), tuple) else (path, f'key={path}')
        config = dataclasses.replace(TrainConfig(model='test_resnet'), **{field: given})
        (folder / 'args.yaml').write_text(yaml.safe_dump(config.settings()))
        record = make_record(config, 'run', 'resnet18', config.dataset or 'digits', 'test', rows, [], 0)
        assert not any(word in json.dumps(record) for word in SECRET)
        raw = dict(record, settings=config.settings(), recipe=config.recipe or 'run', network=config.model)
        (folder / 'record.json').write_text(json.dumps(raw))  # as one of an older version may be
        staged = tmp_path / str(number)
        staged.mkdir()
        stage(folder, staged, 'hf-hub:org/name')
        assert {'README.md', 'args.yaml', 'config.json', 'record.json'} <= {p.name for p in staged.iterdir()}
        assert leaks(staged) == [] and field in TrainConfig().settings()


def test_paths_of_a_real_run_are_in_none_of_its_published_files(tmp_path, monkeypatch):
    home = tmp_path / 'annasfolder' / 'hiddenproject'
    (home / 'colours').mkdir(parents=True)
    write_two_colours(home / 'colours')
    save_file(timm.create_model('test_resnet', num_classes=8).state_dict(), home / 'mine.safetensors')
    titles, tracked = [], []
    monkeypatch.setattr(trainer, 'plot_accuracy_against_compute', lambda rows, title, path: titles.append(title))
    monkeypatch.setattr(trainer, 'start_trackers', lambda *args: tracked.append(args[3]))
    folder = trainer.train(TrainConfig(
        model='test_resnet', exits=(2, 3), epochs=1, batch_size=80, dataset=str(home / 'colours'), label_column='fine',
        model_kwargs=(
            f'checkpoint_path={home}/mine.safetensors',
            f"pretrained_cfg_overlay={{'file': '{home}/mine.safetensors', 'crop_pct': 0.9}}"),
        output=str(tmp_path), experiment='run', results=str(tmp_path / 'rows.jsonl'), report_to=('tensorboard',)))
    assert titles == ['test_resnet_sd on colours, test split'] and len(tracked) == 1
    assert not any(word in json.dumps(tracked) for word in SECRET)
    assert 'annasfolder' in (folder / 'args.yaml').read_text(), 'what the run is gone on with by'
    staged = tmp_path / 'staged'
    staged.mkdir()
    stage(folder, staged, 'hf-hub:org/name')
    assert leaks(staged) == [] and not any(word in (tmp_path / 'rows.jsonl').read_text() for word in SECRET)
    assert leaks(folder / 'best') == [] and leaks(folder) == ['args.yaml']
    row = json.loads((tmp_path / 'rows.jsonl').read_text())
    assert row['dataset'] == row['settings']['dataset'] == 'colours'
    assert row['settings']['model_kwargs'] == [
        'checkpoint_path=mine.safetensors', "pretrained_cfg_overlay={'file': 'mine.safetensors', 'crop_pct': 0.9}"]


@pytest.mark.parametrize('text', [
    'resnet50.a1_in1k', 'org/name', 'hf-hub:org/name@main', 'https://host.org/a/b/c.pth', 's3://bucket/a/b',
    'rand-m9-mstd0.5', 'drop_rate=0.1', 'img_size=(64, 128)', "act_layer='gelu'", 'a word / another', 'n/a', '.', '1/2',
])
def test_words_ids_and_addresses_stay(text):
    assert public_text(text) == text


@pytest.mark.parametrize('text, public', [
    ('checkpoint_path=runs', 'checkpoint_path=runs'),
    ('checkpoint_path=mine/runs', 'checkpoint_path=runs'),
    ('weights=mine/last.safetensors', 'weights=last.safetensors'),
    ("x={'a': [('/home/b', 2)], '/home/c': None}", "x={'a': [('b', 2)], 'c': None}"),
    ("x=dict(file='/home/me/my files/y.pth', n=3)", "x=dict(file='y.pth', n=3)"),
    ('x=dict(file=/home/me/y.pth)', 'x=dict(file=y.pth)'),
    ("x={'file': 'C:\\temp\\new\\y.pth'}", "x={'file': 'y.pth'}"),
    ('x=https://me:word@host.org/y.pth?signature=1', 'x=https://host.org/y.pth'),
    ('see /opt/data/x and D:\\data\\y', 'see x and y'),
    ('/home/me/with spaces/x y', 'x y'),
])
def test_places_are_reduced_to_their_names(text, public):
    assert public_text(text) == public == public_text(public)


def test_a_folder_that_looks_like_an_id_is_told_by_what_is_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert place_name('data/pets', hub_id=True) == 'data/pets'
    (tmp_path / 'data' / 'pets').mkdir(parents=True)
    assert place_name('data/pets', hub_id=True) == 'pets' == place_name('data/pets')


names = st.text('abcdefghij_-', min_size=1, max_size=8).map('zz{}'.format)


@given(
    st.lists(names, min_size=2, max_size=5),
    st.sampled_from(('/', '~/', './', '../../', 'local-dir:/', 'file://', 'C:\\', 'c:/', '\\\\', '$HOME/', '%TEMP%\\')),
    st.sampled_from(('{}', 'key={}', "key={{'a': ['{}']}}", 'key=dict(a={}, b=1)', 'see {}, please', "'{}'")),
)
def test_of_any_place_anywhere_in_a_text_the_last_name_alone_is_left(parts, root, form):
    path = root + ('\\' if '\\' in root else '/').join(parts)
    public = public_text(form.format(path))
    *folders, last = parts
    assert last in public and '/' not in public and '\\' not in public
    assert all(public.count(name) <= last.count(name) for name in folders)


def test_every_kind_is_in_a_fields_metadata():
    assert {f.metadata.get('kind') for f in dataclasses.fields(TrainConfig)} == {None, 'path', 'cosmetic'}
    assert PLACES == {'data_dir', 'dataset', 'initial_checkpoint', 'model', 'teacher'}
    assert {'output', 'experiment', 'results'} <= INCIDENTAL
    public = public_settings(dict(TrainConfig(data_dir='/a/b').settings(), token='hf_x'))
    assert public['data_dir'] == 'b' and not set(public) & {*INCIDENTAL, 'token'}


def test_the_data_set_of_a_card_has_to_be_an_id(finished, tmp_path):
    with pytest.raises(ConfigError, match='`dataset=/home/me/pets`: expected the id of a data set on the Hub'):
        stage(finished[0], tmp_path, 'hf-hub:org/name', dataset_id='/home/me/pets')
