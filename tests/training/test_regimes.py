"""Frozen, mixed and joint training, and training without labels, by the trainer."""
import csv
import json
import subprocess
import sys

import pytest
import timm
import torch
import yaml
from helpers import HELPERS, RECIPES
from helpers.images import noise_images
from helpers.processes import launch
from helpers.runs import die, interrupted, resumable
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

from timm_selfdistill.config import TrainConfig
from timm_selfdistill.errors import ConfigError, Preempted
from timm_selfdistill.hub.networks import save_model
from timm_selfdistill.training.folders import recipe_problem
from timm_selfdistill.training.loop import Loop
from timm_selfdistill.training.run import Run
from timm_selfdistill.training.trainer import create_accelerator, train

TRAIN = RECIPES / 'train.py'
CLOTHING = RECIPES.parents[1] / 'shared/data/clothing'
LITE0 = CLOTHING.parent / 'tf_efficientnet_lite0_in1k.safetensors'


@pytest.fixture(scope='module')
def plain(tmp_path_factory):
    """A plain network, trained a little."""
    return train(TrainConfig(
        model='test_resnet', method='plain', epochs=2, output=str(tmp_path_factory.mktemp('plain')),
        experiment='plain'))


def weights(folder):
    return load_file(folder / 'model.safetensors')


def differing(folder, before):
    """Names of the tensors of the deepest exit of a run that are not those of a plain network."""
    after = weights(folder)
    deepest = {n.removeprefix('backbone.'): t for n, t in after.items() if n.startswith('backbone.')}
    assert {*deepest} == {*before}
    return [n for n, t in deepest.items() if not torch.equal(t, before[n])]


@pytest.mark.slow
def test_disjoint_leaves_the_network_bit_for_bit_and_says_so(plain, tmp_path, capsys):
    folder = train(TrainConfig(
        model=str(plain), regime='disjoint', epochs=3, output=str(tmp_path), experiment='run', model_ema=True,
        model_ema_decay=0.5))
    assert not differing(folder, weights(plain))
    out = capsys.readouterr().out
    assert 'the deepest exit is bit for bit the one that the run started from' in out and 'warning' not in out
    results = json.loads((folder / 'results.json').read_text())['test']
    deepest = json.loads((plain / 'results.json').read_text())['test'][0]
    assert results[-2]['top1'] == deepest['top1'] and min(row['top1'] for row in results) > 50
    rows = list(csv.DictReader((folder / 'summary.csv').open()))
    assert len({row['eval_top1'] for row in rows}) == 1
    # the best epoch is that of the exits that learn
    merit = [(float(row['eval_exit0_top1']) + float(row['eval_exit1_top1'])) / 2 for row in rows]
    best = weights(folder / 'best')
    assert merit.index(max(merit)) == 2 and all(torch.equal(t, best[n]) for n, t in weights(folder).items())
    state = torch.load(next((folder / 'checkpoints').glob('*/state.pt')), weights_only=True)
    for part in (state['model'], state['average'], *state['buffers'][0]):
        assert part and not any('backbone' in name for name in part)
    assert len(state['optimizer']['state']) == sum(
        'exit_heads' in n or 'projections' in n for n in state['model'] if 'running' not in n and 'num_b' not in n)
    card = ModelCard.load(folder / 'README.md').text
    assert 'with the network itself frozen' in card and 'Training began with the weights of `plain`' in card
    record = json.loads((folder / 'record.json').read_text())
    assert record['network'] == 'test_resnet' and record['settings']['model'] == 'plain'


@pytest.mark.slow
@pytest.mark.parametrize('at', [5, 14])
def test_disjoint_goes_on_to_the_bit(plain, tmp_path, monkeypatch, at):
    config = dict(model=str(plain), exits=None, regime='disjoint')
    whole = train(resumable(tmp_path / 'whole', **config))
    folder = interrupted(resumable(tmp_path / 'killed', **config), monkeypatch, at, die)
    assert (folder / 'model.safetensors').read_bytes() == (whole / 'model.safetensors').read_bytes()
    assert not differing(folder, weights(plain))


@pytest.mark.slow
def test_a_network_that_has_changed_meanwhile_is_noticed(plain, tmp_path, monkeypatch):
    changed = tmp_path / 'changed.safetensors'
    save_file(weights(plain), changed)
    config = resumable(
        tmp_path, model='test_resnet', initial_checkpoint=str(changed), regime='disjoint', img_size=32, exits=None)

    def train_batch(run, *batch):
        if run.keeper.progress.steps == 7:
            die()
        return original(run, *batch)

    original = Loop.train_batch
    with monkeypatch.context() as context:
        context.setattr(Loop, 'train_batch', train_batch)
        with pytest.raises(Preempted):
            train(config)
    save_file({n: t + 1 if n == 'fc.bias' else t for n, t in weights(plain).items()}, changed)
    with pytest.raises(ConfigError, match='these are not the weights that the run in .* has begun with'):
        train(config)


@pytest.mark.slow
@pytest.mark.parametrize('regime', ['disjoint', 'mixed'])
def test_two_processes(plain, tmp_path, regime):
    """Whose processes exchange gradients of what learns alone."""
    arguments = ('--model', plain, '--regime', regime, '--epochs', 2, '--output', tmp_path, '--experiment', 'run')
    done = launch(2, TRAIN, *arguments)
    folder = tmp_path / 'run'
    assert (folder / 'results.json').exists(), done.stderr[-3000:]
    assert bool(differing(folder, weights(plain))) == (regime == 'mixed')
    rows = list(csv.DictReader((folder / 'summary.csv').open()))
    assert float(rows[-1]['eval_exit0_top1']) > 50
    if regime == 'mixed':
        one = train(TrainConfig(
            model=str(plain), regime='mixed', epochs=2, output=str(tmp_path), experiment='one'))
        other = list(csv.DictReader((one / 'summary.csv').open()))
        # batch norm sees other slices, so the figures are near, not equal
        assert float(rows[0]['train_loss']) == pytest.approx(float(other[0]['train_loss']), rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize('regime', ['disjoint', 'mixed'])
def test_sharded_parameters(plain, tmp_path, regime):
    arguments = ('--model', plain, '--regime', regime, '--epochs', 2, '--output', tmp_path, '--experiment', 'run')
    done = launch(2, HELPERS / 'sharded.py', *arguments)
    assert (tmp_path / 'run' / 'results.json').exists(), done.stderr[-3000:]
    assert bool(differing(tmp_path / 'run', weights(plain))) == (regime == 'mixed')


@pytest.mark.slow
def test_mixed_trains_the_network_alone_first(plain, tmp_path, monkeypatch):
    seen = []
    original = Loop.train_batch

    def train_batch(run, *batch):
        model = run.setup.task.get_eval_model()
        before = {n: t.clone() for n, t in model.state_dict().items()}
        done = original(run, *batch)
        changed = {n.partition('.')[0] for n, t in model.state_dict().items() if not torch.equal(t, before[n])}
        seen.append((run.keeper.progress.steps, changed, set(run.keeper.meter.names)))
        return done

    monkeypatch.setattr(Loop, 'train_batch', train_batch)
    folder = train(TrainConfig(
        model='test_resnet', exits=(2, 3), regime='mixed', backbone_epochs=1, epochs=2, batch_size=250,
        output=str(tmp_path), experiment='run'))
    alone, together = seen[:5], seen[5:]
    assert [changed for _, changed, _ in alone] == [{'backbone'}] * 5
    assert all(names == {'loss', 'ce0'} for _, _, names in alone)
    assert [changed for _, changed, _ in together] == [{'backbone', 'exit_heads'}] * 5
    assert all({'kl0', 'ce2'} < names for _, _, names in together)
    best = json.loads((folder / 'results.json').read_text())
    assert best and (folder / 'best' / 'config.json').exists()
    assert 'after the network itself had been trained alone' in ModelCard.load(folder / 'README.md').text


@pytest.mark.slow
@pytest.mark.parametrize('at', [3, 12, 13, 20])
def test_mixed_goes_on_to_the_bit(tmp_path, monkeypatch, at, mixed_whole):
    folder = interrupted(resumable(tmp_path, regime='mixed', backbone_epochs=1), monkeypatch, at, die)
    assert (folder / 'model.safetensors').read_bytes() == (mixed_whole / 'model.safetensors').read_bytes()


@pytest.fixture(scope='module')
def mixed_whole(tmp_path_factory):
    return train(resumable(tmp_path_factory.mktemp('mixed'), regime='mixed', backbone_epochs=1))


def test_the_network_alone_learns_as_a_plain_one(tmp_path):
    """In the first epochs of a mixed run the loss and its gradients are those of plain training."""
    grads = []
    for name, more in (('mixed', dict(regime='mixed')), ('plain', dict(method='plain'))):
        config = TrainConfig(model='test_resnet', epochs=2, output=str(tmp_path), experiment=name, **more)
        run = Run(config, create_accelerator(config), tmp_path / name)
        run.setup.wrap_for(alone=name == 'mixed')
        run.setup.task.train()
        backbone = run.setup.task.get_eval_model().backbone
        for i, p in enumerate(backbone.parameters()):
            torch.nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(i))
        images, target = next(iter(run.setup.loader))
        run.setup.task(images, target)['loss'].backward()
        grads.append([p.grad for p in backbone.parameters()])
        assert all(p.grad is None for p in run.setup.task.get_eval_model().exit_heads.parameters())
    assert all(torch.equal(a, b) for a, b in zip(*grads))


# -- without labels --


@pytest.fixture
def photos(tmp_path):
    for i, image in enumerate(noise_images(60)):
        folder = tmp_path / 'photos' / f'{i % 3}' / 'inner'
        folder.mkdir(parents=True, exist_ok=True)
        image.save(folder / f'{i}.png')
    return tmp_path / 'photos'


UNLABELLED = dict(regime='disjoint', unlabelled=True, alpha=1., epochs=1, batch_size=20)


@pytest.mark.slow
def test_images_without_labels_do(plain, photos, tmp_path, capsys):
    config = TrainConfig(
        model=str(plain), data_dir=str(photos), output=str(tmp_path), experiment='run', mixup=0.2, **UNLABELLED)
    folder = train(config)
    out = capsys.readouterr().out
    assert '54 train, 6 validation images' in out and 'validation agreement: exit0' in out and 'agree' in out
    assert not differing(folder, weights(plain))
    rows = json.loads((folder / 'results.json').read_text())['validation']
    assert all(row['agreement'] for row in rows) and rows[2]['top1'] == 100
    saved = json.loads((folder / 'config.json').read_text())
    assert saved['num_classes'] == 10 and saved['label_names'] == [str(i) for i in range(10)]
    card = ModelCard.load(folder / 'README.md')
    assert card.data.eval_results is None and '| agreement |' in card.text and 'There were no labels' in card.text
    for recipe, options in (('evaluate.py', []), ('calibrate.py', ['--budget', '0.9'])):
        done = subprocess.run(
            [sys.executable, RECIPES / recipe, '--checkpoint', folder, *options], capture_output=True, text=True)
        if recipe == 'evaluate.py':
            assert 'agree' in done.stdout, done.stderr
        else:
            assert done.returncode == 2 and 'trained on images without labels' in done.stderr


def test_labels_in_the_names_of_folders_are_not_read(plain, photos, tmp_path):
    config = TrainConfig(model=str(plain), data_dir=str(photos), output=str(tmp_path), experiment='x', **UNLABELLED)
    run = Run(config, create_accelerator(config), tmp_path / 'x')
    assert {*run.setup.data.train.labels} == {0} and run.setup.data.num_classes == 10


@pytest.mark.parametrize('settings, problem', [
    (dict(method='plain'), '`regime=disjoint`: `method=plain` trains no auxiliary exits'),
    (dict(method='kd', teacher='x'), '`method=kd` trains no auxiliary exits'),
    (dict(regime='mixed', method='plain'), '`regime=mixed`: `method=plain`'),
    (dict(regime='mixed', epochs=5, backbone_epochs=6), '`backbone_epochs=6`: expected a number from 1 to 5'),
    (dict(regime='mixed', epochs=5, backbone_epochs=5), '`backbone_epochs=5`.*expected a number from 1 to 4'),
    (dict(regime='mixed', epochs=1), 'expected `epochs` of 2 or more'),
    (dict(regime='mixed', backbone_epochs=0), '`backbone_epochs=0`'),
    (dict(regime='joint', backbone_epochs=3), '`backbone_epochs=3`: goes with `regime=mixed` only'),
    (dict(generations=2), '`generations=2`: with `regime=disjoint` the network itself learns nothing'),
    (dict(last_phase_epochs=1), '`last_phase_epochs=1`'),
    (dict(patriarch='tsd'), '`patriarch=tsd`'),
    (dict(exit_weights='equilibrium'), '`exit_weights=equilibrium`'),
    (dict(UNLABELLED, method='deep-supervision'), '`unlabelled`: `method=deep-supervision` with `regime=disjoint`'),
    (dict(UNLABELLED, regime='joint'), '`unlabelled`: `method=byot` with `regime=joint`'),
    (dict(UNLABELLED, alpha=0.5), '`alpha=0.5` leaves a share to the labels'),
    (dict(UNLABELLED, alpha_end=0.5), '`alpha_end=0.5` leaves a share to the labels'),
    (dict(UNLABELLED, label_column='label'), '`label_column=label`: cannot be had together with `unlabelled`'),
    (dict(UNLABELLED, dataset='digits'), '`dataset=digits`: cannot be had'),
    (dict(UNLABELLED), '`unlabelled`: pass `data_dir`'),
    (dict(max_steps=0), '`max_steps=0`: expected a number of 1 or more'),
])
def test_settings_that_exclude_each_other(settings, problem):
    with pytest.raises(ConfigError, match=problem):
        TrainConfig(**{'regime': 'disjoint', **settings}).check()


def test_without_labels_the_network_has_to_be_trained(photos, tmp_path):
    config = TrainConfig(model='test_resnet', data_dir=str(photos), output=str(tmp_path), **UNLABELLED)
    with pytest.raises(ConfigError, match='`unlabelled`: the deepest exit teaches, so the network has to be trained'):
        Run(config, create_accelerator(config), tmp_path / 'x')


# -- from weights to a run --


def test_an_untrained_teacher_is_warned_of(tmp_path):
    config = TrainConfig(model='test_resnet', regime='disjoint', output=str(tmp_path))
    notes = Run(config, create_accelerator(config), tmp_path / 'x').setup.notes
    assert any(n.startswith('warning: `regime=disjoint` keeps the deepest exit as it is') for n in notes)


def test_classes_keep_the_numbers_that_the_network_knows_them_by(tmp_path):
    """A network that knows more classes, in another order, than the data have."""
    names = [str(i) for i in reversed(range(10))] + ['more']
    save_model(timm.create_model('test_resnet', num_classes=11), tmp_path / 'net', label_names=names)
    config = TrainConfig(model=str(tmp_path / 'net'), img_size=32, output=str(tmp_path), experiment='x')
    setup = Run(config, create_accelerator(config), tmp_path / 'x').setup
    assert setup.data.label_names == names and setup.model.num_classes == 11
    assert 'fresh: classifier' not in setup.notes[0]
    save_model(timm.create_model('test_resnet', num_classes=10), tmp_path / 'other', label_names=list('abcdefghij'))
    config = TrainConfig(model=str(tmp_path / 'other'), img_size=32, output=str(tmp_path), experiment='y')
    setup = Run(config, create_accelerator(config), tmp_path / 'y').setup
    assert 'fresh: classifier (10 other classes)' in setup.notes[0]


@pytest.mark.slow
def test_a_trial_ends_after_its_steps_as_a_complete_run(tmp_path):
    folder = train(TrainConfig(
        model='test_resnet', epochs=50, max_steps=22, output=str(tmp_path), experiment='run'))
    assert len(list(csv.DictReader((folder / 'summary.csv').open()))) == 2
    assert (folder / 'results.json').exists()
    assert json.loads((folder / 'record.json').read_text())['settings']['max_steps'] == 22


def test_a_run_made_before_a_setting_had_another_default_goes_on(tmp_path):
    config = TrainConfig(model='test_resnet')
    before = dict(config.settings(), exit_head='bottleneck')
    (tmp_path / 'args.yaml').write_text(yaml.safe_dump(before))
    assert recipe_problem(tmp_path / 'args.yaml', config) is None
    (tmp_path / 'args.yaml').write_text(yaml.safe_dump(dict(before, exit_head='linear')))
    assert '`exit_head` was linear' in recipe_problem(tmp_path / 'args.yaml', config)


@pytest.mark.slow
@pytest.mark.skipif(not (CLOTHING.is_dir() and LITE0.is_file()), reason='the photos are not at hand')
def test_imagenet_weights_on_photos(tmp_path):
    folder = train(TrainConfig(
        model='tf_efficientnet_lite0', initial_checkpoint=str(LITE0), regime='disjoint', data_dir=str(CLOTHING),
        img_size=64, max_steps=3, batch_size=16, epochs=1, output=str(tmp_path), experiment='run'))
    before = load_file(LITE0)
    after = weights(folder)
    names = [n for n in before if not n.startswith('classifier.')]
    assert len(names) > 100 and all(torch.equal(after[f'backbone.{n}'], before[n]) for n in names)
