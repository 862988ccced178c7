"""The table of the CIFAR-100 runs: what is averaged, what a gain is measured against, what is told."""
import json
import runpy
import subprocess
import sys

import pytest
from helpers import PAPER
from rows import ROWS

from timm_selfdistill.cli.options import parse_train_config
from timm_selfdistill.config import INCIDENTAL
from timm_selfdistill.errors import ConfigError

TABLE = PAPER / 'table.py'


@pytest.fixture(scope='module')
def table():
    return runpy.run_path(str(TABLE))


def row(recipe, seed, top1, ensemble=None, **changed):
    """Make the line of a run that was trained as its row says, but for what is changed."""
    name, _, generation = recipe.partition('/generation')
    settings = parse_train_config(ROWS[name].arguments).settings()
    if generation:
        settings.update(generations=None)
        if int(generation):
            settings.update(patriarch='plain', teacher=f'generation{int(generation) - 1}')
    settings = {k: v for k, v in settings.items() if k not in INCIDENTAL}
    settings.update(changed, seed=seed)
    return dict(
        recipe=recipe, network=settings['model'], dataset='cifar100', part='test', method=settings['method'], seed=seed,
        epochs=settings['epochs'], top1=top1, ensemble_top1=ensemble, ece=[5.] * len(top1), ensemble_ece=4., hours=1.5,
        images_per_second=1000., hardware='1 × T', precision='bf16', torch='2', timm='1', commit='c', settings=settings)


def write(path, *rows):
    path.write_text(''.join(json.dumps(r) + '\n' for r in rows))
    return path


def cells(table, text, start):
    """Return a line of the printed table by its first cell."""
    lines = [[c.strip() for c in line.strip('|').split('|')] for line in text.splitlines() if line.startswith('|')]
    found, = (dict(zip(table['COLUMNS'], line)) for line in lines if line[0] == start)
    return found


def test_mean_and_spread_over_seeds_and_gains_over_plain_training_alike(table, tmp_path):
    runs = table['read_runs'](write(
        tmp_path / 'r',
        *(row('resnet18_plain', seed, [top1]) for seed, top1 in enumerate((70., 72., 74.))),
        row('resnet18_byot', 0, [60., 65., 70., 75.], 76.), row('resnet18_byot', 1, [62., 67., 72., 77.], 78.),
        row('resnet18_byot_later', 0, [61., 66., 71., 80.], 81.),
        row('resnet18_plain_best', 0, [90.]),
    ))
    text = table['render'](runs)
    plain, byot, later = (cells(table, text, f'resnet18_{name}') for name in ('plain', 'byot', 'byot_later'))
    assert (plain['runs'], plain['deepest'], plain['ensemble'], plain['deepest, gain']) == (
        '3', '72.00 ± 2.00', '-', '-')
    assert (byot['exit 0'], byot['exit 2'], byot['deepest'], byot['ensemble']) == (
        '61.00 ± 1.41', '71.00 ± 1.41', '76.00 ± 1.41', '77.00 ± 1.41')
    assert (byot['deepest, gain'], byot['ensemble, gain']) == ('+4.00', '+5.00')
    assert (later['deepest'], later['deepest, gain']) == ('80.00', '-')  # its own plain training has not been done
    assert set(list(cells(table, text, 'resnet18_deep_supervision').values())[1:]) == {'-'}
    paper = cells(table, text, '*the paper, BYOT*')
    assert (paper['exit 0'], paper['deepest'], paper['ensemble, gain']) == ('67.85', '78.64', '+2.58')
    assert 'No figures yet: vgg19_bn, resnet50' in text and 'not as its row says' not in text


def test_generations_stand_beside_the_plain_patriarch(table, tmp_path):
    runs = table['read_runs'](write(
        tmp_path / 'r', row('resnet110_generations_tsd/generation1', 1, [73.]),
        row('resnet110_generations_tsd/generation0', 0, [71.]), row('resnet110_generations/generation1', 1, [74.]),
        row('resnet110_generations/generation0', 0, [70.])))
    text = table['render'](runs)
    gains = [
        cells(table, text, f'resnet110_generations{name}')['deepest, gain']
        for name in ('/generation0', '/generation1', '_tsd/generation0', '_tsd/generation1')]
    assert gains == ['-', '+4.00', '+1.00', '+3.00']
    assert 'not as its row says' not in text
    assert cells(table, text, 'resnet110_generations/generation5')['deepest'] == '-'


def test_runs_not_trained_as_their_file_says_are_told_apart(table, tmp_path):
    runs = table['read_runs'](write(
        tmp_path / 'r', row('resnet18_plain', 0, [20.], epochs=1), row('resnet18_byot', 0, [1., 2., 3., 50.], 60.)))
    text = table['render'](runs)
    assert '(1) not as its row says: epochs 1 instead of 200.' in text
    assert cells(table, text, 'resnet18_plain (1)')['deepest'] == '20.00'
    assert cells(table, text, 'resnet18_byot')['deepest, gain'] == '-'


def test_a_line_from_before_a_setting_existed_has_its_default(table, tmp_path):
    old, new = row('resnet20_packaged', 0, [1., 2.], 3.), row('resnet20_packaged', 1, [1., 2.], 3.)
    for name in ('hint_form', 'decay_norms_and_biases'):
        del old['settings'][name]
    assert 'not as its row says' not in table['render'](table['read_runs'](write(tmp_path / 'r', old, new)))


@pytest.mark.parametrize('rows, message', [
    ([('resnet18_plain', 0, {}), ('resnet18_plain', 1, dict(epochs=3))], 'not of one recipe: epochs 3 instead of 200'),
    ([('resnet18_plain', 0, {}), ('resnet18_plain', 0, {})], 'resnet18_plain has several lines with seed 0'),
])
def test_what_must_not_be_averaged_is_refused(table, tmp_path, rows, message):
    path = write(tmp_path / 'r', *(row(recipe, seed, [1.], **changed) for recipe, seed, changed in rows))
    with pytest.raises(ConfigError, match=message):
        table['read_runs'](path)


def test_half_a_line_is_named(table, tmp_path):
    (tmp_path / 'r').write_text('{"recipe": ')
    with pytest.raises(ConfigError, match='line 1 is no line of a run'):
        table['read_runs'](tmp_path / 'r')


@pytest.mark.slow
def test_the_command_prints_and_draws(tmp_path):
    path = write(
        tmp_path / 'r', row('resnet18_plain', 0, [70.]), row('resnet18_byot', 0, [60., 65., 70., 75.], 76.),
        row('resnet110_generations/generation0', 0, [70.]), row('resnet110_generations/generation1', 1, [71.]))
    out = subprocess.run(
        [sys.executable, TABLE, '--results', path, '--picture', tmp_path / 'p.png'], capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    assert '| resnet18_byot ' in out.stdout
    assert (tmp_path / 'p.png').read_bytes().startswith(b'\x89PNG')
    out = subprocess.run(
        [sys.executable, TABLE, '--results', tmp_path / 'nothing', '--picture', tmp_path / 'no.png'],
        capture_output=True, text=True)
    assert out.returncode == 0 and out.stdout.startswith('No figures yet: vgg19_bn, ')
    assert not (tmp_path / 'no.png').exists()
