"""The files of settings under recipes: they hold, and stay what they are called."""
import subprocess
import sys

import numpy as np
import pytest
import timm
import torch
from helpers import RECIPES
from PIL import Image
from rows import ROWS, find_rows

from timm_selfdistill.cli.options import parse_train_config

PAPERS = (
    'vgg19_bn', 'resnet18', 'resnet50', 'resnet101', 'resnet152', 'resnext29_8x64d', 'wide_resnet20_8',
    'wide_resnet44_8', 'wide_resnet28_12', 'pyramidnet101_a240')
METHODS = dict(plain='plain', deep_supervision='deep-supervision', byot='byot')


def row(network, method, recipe=''):
    return parse_train_config(ROWS[f'{network}_{method}{recipe}'].arguments)


@pytest.mark.parametrize('network', PAPERS)
def test_a_network_of_the_paper_has_its_rows_and_four_exits(network):
    for name, method in METHODS.items():
        config = row(network, name)
        assert (config.model, config.method) == (f'{network}_cifar', method)
    for config in (row(network, 'byot'), row(network, 'byot', '_later')):
        with torch.device('meta'):
            model = timm.create_model(f'{config.model}_sd', exits=config.exits, exit_head=config.exit_head)
        assert model.num_exits == 4


@pytest.mark.parametrize('network', PAPERS)
@pytest.mark.parametrize('recipe, preset', [('', 'byot-scan'), ('_later', 'byot-tpami')])
def test_rows_are_the_authors_settings(network, recipe, preset):
    config, expected = row(network, 'byot', recipe), parse_train_config(['--preset', preset])
    own = dict(model=f'{network}_cifar', label_column='fine_label', val_fraction=0.0)
    assert config.settings() == {**expected.settings(), **own}


@pytest.mark.parametrize('network', ['resnet18', 'resnet50'])
@pytest.mark.parametrize('recipe', ['', '_later', '_best'])
def test_baselines_are_trained_like_what_they_stand_beside(network, recipe):
    byot = row(network, 'byot', recipe).settings()
    for name, method in METHODS.items():
        assert {**row(network, name, recipe).settings(), 'method': 'byot'} == byot
        assert row(network, name, recipe).method == method


def test_the_packaged_network_has_a_baseline_trained_like_it():
    packaged, plain = (row('resnet20', f'packaged{kind}').settings() for kind in ('', '_plain'))
    assert packaged['method'] == 'byot' and {**packaged, 'method': 'plain'} == plain


@pytest.mark.parametrize('network', ['resnet110', 'densenet100_12'])
def test_lines_of_generations_differ_in_their_patriarch(network):
    plain, tolerant = (row(network, f'generations{kind}') for kind in ('', '_tsd'))
    assert (plain.model, plain.patriarch, tolerant.patriarch) == (f'{network}_cifar', 'plain', 'tsd')
    assert plain.generations >= 3 and plain.method == 'plain' and plain.superclass_column == 'coarse_label'
    assert {**tolerant.settings(), 'patriarch': 'plain'} == plain.settings()
    assert timm.is_model(plain.model)


def test_the_driver_takes_every_row_once():
    taken = [row.name for block in find_rows(()) for row in block]
    assert len(taken) == len(set(taken))
    others = {'resnet20_packaged', 'resnet20_packaged_plain', *(name for name in ROWS if name.startswith('lite0_'))}
    assert set(taken) == set(ROWS) - others
    assert taken[:6] == [f'resnet18_{method}{recipe}' for recipe in ('', '_later') for method in METHODS]
    assert max(map(taken.index, ('resnet50_plain', 'resnet50_byot_later'))) < taken.index('resnet110_generations')


def test_fine_tuned_networks_differ_in_how_their_exits_come():
    rows = {name: parse_train_config(ROWS[f'lite0_{name}'].arguments) for name in (
        'plain', 'byot', 'disjoint_inverted', 'disjoint_separable', 'mixed')}
    plain = rows['plain'].settings()
    differing = {name: {k for k, v in row.settings().items() if v != plain[k]} for name, row in rows.items()}
    assert differing['byot'] == {'method', 'exit_head'}
    for name in ('disjoint_inverted', 'disjoint_separable'):
        assert differing[name] == {'method', 'exit_head', 'regime', 'lr', 'backbone_pretrained'}
        assert ROWS[f'lite0_{name}'].start == 'lite0_plain'
    assert differing['mixed'] == {'method', 'epochs', 'lr', 'warmup_epochs', 'backbone_pretrained'}
    assert rows['mixed'].lr == rows['plain'].lr / 10 and ROWS['lite0_mixed'].start == 'lite0_disjoint_inverted'


@pytest.mark.slow
@pytest.mark.parametrize('protocol, model', [
    ('sgd', 'resnet18'), ('sgd', 'resnet50'), ('vgg', 'vgg19_bn'), ('vit', 'vit_small_patch16_224')])
def test_imagenet_recipes_train_on_a_folder_of_images(protocol, model, tmp_path):
    path = RECIPES / 'imagenet' / f'{protocol}.yaml'
    rng = np.random.default_rng(0)
    for part, count in (('train', 6), ('val', 2)):
        for name in ('ant', 'bee', 'cat'):
            (tmp_path / 'images' / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / 'images' / part / name / f'{i}.jpg')
    out = subprocess.run(
        [sys.executable, RECIPES / 'train.py', '-c', path, '--model', model,
         '--data-dir', tmp_path / 'images', '--epochs', '1', '--img-size', '32',
         '--batch-size', '8', '--workers', '1', '--warmup-epochs', '0',
         '--output', tmp_path / 'runs', '--experiment', 'run'],
        capture_output=True, text=True, timeout=300)
    assert out.returncode == 0, out.stderr[-3000:]
    assert '18 train, 6 validation images; 3 classes: ant, bee, cat' in out.stdout
    assert 'images of 3×32×32' in out.stdout
    assert (tmp_path / 'runs' / 'run' / 'results.json').exists()
