"""Whole runs, small enough for seconds."""
import csv
import json
import runpy
import sys

import datasets
import numpy as np
import pytest
import timm
import torch
import yaml
from helpers import RECIPES
from helpers.images import noise_images
from huggingface_hub import ModelCard

from timm_selfdistill.cli.options import parse_train_config
from timm_selfdistill.config import TrainConfig
from timm_selfdistill.errors import ConfigError, DataError, NonFiniteLossError
from timm_selfdistill.hub.networks import save_model
from timm_selfdistill.training import trainer
from timm_selfdistill.training.loop import Loop
from timm_selfdistill.training.trainer import train

TINY = dict(model='test_resnet', exits=(2, 3), epochs=1)


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """A run on digits with augmentation, mixup and a moving average, and the network it trained."""
    kept = []
    original = trainer._finish

    def finish(run, *args):
        kept.append(run)
        original(run, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, '_finish', finish)
        folder = train(TrainConfig(
            model='test_resnet', exits=(2, 3), epochs=2, mixup=0.2, cutmix=0.2, model_ema=True, model_ema_decay=0.9,
            reprob=0.1, clip_grad=1.0, output=str(tmp_path_factory.mktemp('runs')),
        ))
    return folder, kept[0]


def test_a_run_leaves_everything_behind(run):
    folder, _ = run
    assert sorted(p.name for p in folder.iterdir()) == [
        'README.md', 'accuracy_vs_compute.png', 'args.yaml', 'best', 'checkpoints', 'config.json', 'latency.json',
        'model.safetensors', 'record.json', 'results.json', 'summary.csv']
    assert folder.name.endswith('-test_resnet_sd')
    assert (folder / 'accuracy_vs_compute.png').read_bytes().startswith(b'\x89PNG')
    assert yaml.safe_load((folder / 'args.yaml').read_text())['exits'] == [2, 3]
    assert parse_train_config(['-c', str(folder / 'args.yaml')]).mixup == 0.2


def test_the_summary_has_every_exit_and_the_ensemble(run):
    folder, _ = run
    with (folder / 'summary.csv').open() as f:
        rows = list(csv.DictReader(f))
    assert [r['epoch'] for r in rows] == ['0', '1']
    columns = ['train_loss', 'eval_loss', 'eval_top1', 'eval_top5', 'lr', 'train_ce0', 'train_kl0', 'train_hint0']
    exits, metrics = ('exit0', 'exit1', 'exit2', 'ensemble'), ('top1', 'top5', 'loss', 'ece')
    columns += [f'eval_{name}_{metric}' for name in exits for metric in metrics]
    assert set(columns) <= set(rows[0])
    assert all(np.isfinite(float(r[c])) for r in rows for c in columns)
    assert rows[1]['eval_top1'] == rows[1]['eval_exit2_top1']


def test_reloaded_logits_are_the_trained_networks(run):
    folder, finished = run
    model = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    trained = finished.setup.model.eval()
    assert trained is not finished.setup.task.get_eval_model()  # the moving average
    assert all(torch.equal(v, trained.state_dict()[k]) for k, v in model.state_dict().items())
    model = model.to(memory_format=torch.channels_last)  # as it was trained; otherwise convolutions round differently
    x = torch.randn(4, 3, 32, 32)
    assert all(torch.equal(a, b) for a, b in zip(model.forward_exits(x), trained.forward_exits(x)))
    assert torch.equal(model(x), trained(x))
    config = timm.data.resolve_data_config(model=model)
    assert (config['input_size'], config['crop_pct']) == ((3, 32, 32), 1.0)
    assert json.loads((folder / 'config.json').read_text())['label_names'] == [str(i) for i in range(10)]


def test_the_card_tells_every_exits_result_and_its_snippet_runs(run, monkeypatch):
    folder, _ = run
    card = ModelCard.load(folder / 'README.md')
    rows = json.loads((folder / 'results.json').read_text())['test']
    assert card.data.library_name == 'timm'
    assert [r.metric_value for r in card.data.eval_results] == [round(r['top1'] / 100, 6) for r in rows]
    assert [r.dataset_split for r in card.data.eval_results] == ['test'] * 4
    for row in rows:
        assert f'| {row["exit"]} | {row["stage"]} |' in card.text
    snippet = card.text.split('```python\n')[1].split('```')[0]
    monkeypatch.chdir(folder.parent)
    names = {}
    exec(snippet, names)
    assert [z.shape for z in names['every']] == [(1, 10)] * 3
    assert torch.equal(names['small'](names['images']), names['first'])


def test_evaluate_repeats_the_runs_figures(run, monkeypatch, capsys):
    folder, _ = run
    capsys.readouterr()
    for arguments in ([], ['--split', 'validation']):
        monkeypatch.setattr(sys, 'argv', ['evaluate.py', '--checkpoint', str(folder), '--json', *arguments])
        runpy.run_path(str(RECIPES / 'evaluate.py'), run_name='__main__')
        out = json.loads(capsys.readouterr().out)
        expected = json.loads((folder / 'results.json').read_text())[out['split']]
        for row, before in zip(out['exits'], expected):
            assert row['exit'] == before['exit']
            assert {k: row[k] for k in ('params', 'macs', 'count')} == {
                k: before[k] for k in ('params', 'macs', 'count')}
            for key in ('top1_count', 'top5_count'):
                # batches of another size are summed in another order, which on some machine may decide between two
                # scores of an image that are all but equal
                assert row[key] == pytest.approx(before[key], abs=1)
            assert row['loss'] == pytest.approx(before['loss'], rel=1e-4)


@pytest.mark.parametrize('arguments, message', [
    (['--checkpoint', 'nowhere/run'], 'there is no config.json in nowhere/run'),
    (['--checkpoint', 'RUN', '--data-dir', 'nowhere'], '--data-dir nowhere: no such folder'),
])
def test_evaluate_refuses_what_it_cannot_do(run, monkeypatch, capsys, arguments, message):
    arguments = [str(run[0]) if a == 'RUN' else a for a in arguments]
    monkeypatch.setattr(sys, 'argv', ['evaluate.py', *arguments])
    with pytest.raises(SystemExit) as e:
        runpy.run_path(str(RECIPES / 'evaluate.py'), run_name='__main__')
    assert e.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize('method, exits', [('plain', 1), ('deep-supervision', 3)])
def test_other_methods(tmp_path, method, exits):
    folder = train(TrainConfig(**TINY, method=method, output=str(tmp_path)))
    rows = json.loads((folder / 'results.json').read_text())['test']
    assert [row['exit'] for row in rows] == [f'exit{i}' for i in range(exits)] + ['ensemble'] * (exits > 1)
    header = (folder / 'summary.csv').read_text().splitlines()[0]
    assert 'kl0' not in header
    assert 'hint0' not in header


@pytest.mark.slow
def test_the_same_seed_gives_the_same_network(tmp_path):
    folders = [
        train(TrainConfig(**TINY, seed=seed, output=str(tmp_path), experiment=name))
        for name, seed in (('a', 1), ('b', 1), ('c', 2))
    ]
    a, b, c = ((folder / 'model.safetensors').read_bytes() for folder in folders)
    assert a == b != c


def test_an_existing_folder_is_never_overwritten(tmp_path):
    (tmp_path / 'mine').mkdir()
    (tmp_path / 'mine' / 'thesis.txt').write_text('precious')
    with pytest.raises(ConfigError, match='mine exists, and runs are never overwritten'):
        train(TrainConfig(**TINY, output=str(tmp_path), experiment='mine'))
    assert [p.name for p in (tmp_path / 'mine').iterdir()] == ['thesis.txt']


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_good_weights(tmp_path):
    with pytest.raises(NonFiniteLossError) as e:
        train(TrainConfig(**TINY, lr=1e12, warmup_lr=1e12, output=str(tmp_path), experiment='run'))
    assert 'in epoch 0, step ' in str(e.value)
    assert 'keeps the weights from before training' in str(e.value)
    assert any(f' {term}' in str(e.value) for term in ('ce', 'kl', 'hint'))
    model = timm.create_model(f'local-dir:{tmp_path / "run"}', pretrained=True)
    assert all(t.isfinite().all() for t in model.state_dict().values())
    assert not (tmp_path / 'run' / 'results.json').exists()


def test_a_later_epoch_that_fails_keeps_the_last_good_one(tmp_path, monkeypatch):
    saved = []
    original = save_model

    def save(model, *args):
        saved.append({k: v.clone() for k, v in model.state_dict().items()})
        original(model, *args)

    train_epoch = Loop.train_epoch

    def spoil(run):
        if run.keeper.progress.epoch == 1:
            for group in run.setup.optimizer.param_groups:
                group['lr'] = 1e30
            run.setup.scheduler = None
        return train_epoch(run)

    monkeypatch.setattr('timm_selfdistill.training.keeper.save_model', save)
    monkeypatch.setattr(Loop, 'train_epoch', spoil)
    with pytest.raises(NonFiniteLossError, match=r'in epoch 1, step 1: .*keeps the weights from the end of epoch 0'):
        train(TrainConfig(**dict(TINY, epochs=3), output=str(tmp_path), experiment='run'))
    kept = timm.create_model(f'local-dir:{tmp_path / "run"}', pretrained=True).state_dict()
    assert len(saved) == 3  # before training, the first epoch, the same as the best
    assert all(torch.equal(kept[k], v) for k, v in saved[-1].items())
    assert len((tmp_path / 'run' / 'summary.csv').read_text().splitlines()) == 2


@pytest.mark.parametrize('settings, error, message', [
    (dict(model='resnet51'), ConfigError, 'timm has no such model; the nearest names are .*resnet50'),
    (dict(exits=(2, 9)), ConfigError, r'exits=\(2, 9\): out of range for test_resnet'),
    (dict(exits=(3, 2)), ConfigError, 'indices must increase'),
    (dict(exit_head='none'), ConfigError, "exit_head='none': unknown, expected one of bottleneck"),
    (dict(num_classes=7), ConfigError, '`num_classes=7`: digits has 10 classes'),
    (dict(model_kwargs=('depth=3',)), ConfigError, "unexpected keyword argument 'depth'"),
    (dict(model='inception_v3', img_size=32, exits=None), ConfigError, '`model=inception_v3`: .*input.* of 32×32'),
    (dict(opt='sdg'), ConfigError, '`opt=sdg`: timm has no such optimizer; the nearest names are .*sgd'),
    (dict(mixup=0.5, batch_size=63), ConfigError, '`batch_size=63`: mixup and cutmix pair images'),
    (dict(batch_size=2000), DataError, '`batch_size=2000` is more than the 1250 training images'),
    (dict(label_column='digit'), DataError, '`label_column=digit`: digits has no label column of that name'),
    (dict(data_dir='nowhere'), DataError, 'nowhere`: no such folder'),
    (dict(dataset='nobody/nothing'), DataError, "`dataset=nobody/nothing`: Couldn't reach 'nobody/nothing' on the Hub"),
])
def test_bad_input_is_refused_before_anything_is_written(tmp_path, settings, error, message):
    with pytest.raises(error, match=message):
        train(TrainConfig(**{**TINY, **settings}, output=str(tmp_path)))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_grey_images_and_a_fixed_size_model(tmp_path):
    folder = train(TrainConfig(
        model='test_vit', epochs=1, in_chans=1, img_size=64, exits=(1, 3), output=str(tmp_path), batch_size=256))
    model = timm.create_model(f'local-dir:{folder}', pretrained=True)
    assert timm.data.resolve_data_config(model=model)['input_size'] == (1, 64, 64)
    assert model.eval()(torch.randn(1, 1, 64, 64)).shape == (1, 10)


def test_an_unreadable_image_stops_the_run_by_its_row(tmp_path):
    features = datasets.Features(image=datasets.Image(decode=False), label=datasets.ClassLabel(names=['a', 'b']))
    good = datasets.Dataset.from_dict(
        dict(image=noise_images(40), label=[0, 1] * 20),
        features=datasets.Features(image=datasets.Image(), label=features['label']))
    rows = good.cast_column('image', datasets.Image(decode=False))[:]
    rows['image'][17]['bytes'] = b'broken'
    table = datasets.Dataset.from_dict(rows, features=features).cast_column('image', datasets.Image())
    (tmp_path / 'set').mkdir()
    table.to_parquet(tmp_path / 'set' / 'train.parquet')
    with pytest.raises(DataError, match='Cannot read the image in row 17 of the train split'):
        train(TrainConfig(
            **TINY, data_dir=str(tmp_path / 'set'), val_fraction=0.2, batch_size=8, output=str(tmp_path / 'runs')))
