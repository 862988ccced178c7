"""The benchmark of early exit, on a network that is small and knows nothing."""
import csv
import json
import subprocess
import sys

import pytest
import timm
import torch
import yaml
from helpers import RECIPES
from helpers.images import write_two_colours

from timm_selfdistill.cli.benchmark import _main as main
from timm_selfdistill.costs import exit_costs
from timm_selfdistill.errors import ConfigError, DataError
from timm_selfdistill.hub.networks import save_model

SETTINGS = dict(num_classes=8, exits=(2, 3), exit_head='linear')


@pytest.fixture
def benchmark(run, monkeypatch):
    """Runs the recipe and returns its table."""
    table = run / 'latency.csv'

    def call(*arguments):
        monkeypatch.setattr(sys, 'argv', [
            'benchmark.py', 'latency', '--checkpoint', str(run), '--output', str(table), '--images', '20',
            '--rounds', '2', '--device', 'cpu', *map(str, arguments)])
        main()
        with table.open(newline='') as f:
            return list(csv.DictReader(f))

    return call


@pytest.fixture
def run(tmp_path):
    """A folder of a run that held out a part of its training data."""
    write_two_colours(tmp_path, train=40, test=24)
    model = timm.create_model('test_resnet_sd', **SETTINGS)
    with torch.no_grad():
        for head in model.exit_heads:
            head.fc.weight.mul_(20)  # not all images equally unsure
    save_model(model, tmp_path / 'run')
    settings = dict(data_dir=str(tmp_path), label_column='fine', val_fraction=0.4)
    (tmp_path / 'run' / 'args.yaml').write_text(yaml.safe_dump(settings))
    return tmp_path / 'run'


@pytest.mark.slow
def test_the_figures_of_a_contender_fit_together(run, benchmark):
    save_model(timm.create_model('test_resnet', num_classes=8), run.parent / 'static')
    rows = benchmark(
        '--batch-sizes', '1', '8', '--budgets', '0.9', '--static', run.parent / 'static')
    names = ['plain', 'all exits', 'only exit0', 'only exit1', 'early exit, none', 'early exit, never',
             'early exit, budget 0.9', 'early exit, drop 0', 'static']
    assert [(row['batch_size'], row['contender']) for row in rows] == [(size, name) for size in '18' for name in names]
    by_name = {row['contender']: row for row in rows if row['batch_size'] == '8'}
    costs = exit_costs(timm.create_model('test_resnet_sd', **SETTINGS))
    for row in rows:
        assert row['images'] == ('20' if row['batch_size'] == '1' else '16')
        assert (row['model'], row['device'], row['dtype']) == ('test_resnet_sd', 'cpu', 'float32')
        assert row['rounds'] == '2' and row['torch'] == torch.__version__ and int(row['threads']) > 0
        left = [row[f'left_at_exit{i}'] for i in range(3)]
        if row['contender'] == 'static':
            assert left == [''] * 3 and row['differing'] == row['achieved_by_time'] == ''
            continue
        assert sum(map(int, left)) == int(row['images'])
        assert int(row['differing']) <= 1
        assert 0 <= float(row['top1']) <= 100
        assert 0 < float(row['p50_ms']) <= float(row['p95_ms'])
        figures = {name: float(row[name]) for name in ('time_ratio', 'speed_up', 'cost', 'predicted_speed_up')}
        assert figures['time_ratio'] * figures['speed_up'] == pytest.approx(1)
        assert figures['cost'] * figures['predicted_speed_up'] == pytest.approx(1)
        assert float(row['achieved']) == pytest.approx(figures['speed_up'] / figures['predicted_speed_up'])
        assert float(row['achieved_by_time']) * float(row['predicted_by_time']) == pytest.approx(figures['speed_up'])
    cost = {name: float(row['cost']) for name, row in by_name.items()}
    assert [cost[name] for name in ('plain', 'static', 'early exit, none')] == pytest.approx([1, 1, 1])
    assert cost['all exits'] == pytest.approx(cost['early exit, never']) == pytest.approx(costs['ensemble'].share)
    for i in range(2):
        assert cost[f'only exit{i}'] == pytest.approx(costs[f'exit{i}'].share)
        assert by_name[f'only exit{i}'][f'left_at_exit{i}'] == '16'
    for name in ('plain', 'all exits', 'early exit, none', 'early exit, never'):
        assert by_name[name]['left_at_exit2'] == '16'
        assert by_name[name]['top1'] == by_name['plain']['top1']
    assert by_name['early exit, never']['thresholds'] == '1.0 1.0'
    # some images leave early, or this would prove nothing of what EarlyExit is said to take
    early = by_name['early exit, budget 0.9']
    assert int(early['left_at_exit2']) < 16 and cost['early exit, budget 0.9'] < cost['early exit, never']
    assert run.joinpath('latency.png').read_bytes().startswith(b'\x89PNG')


@pytest.mark.slow
def test_earlyon_leaves_where_we_do_one_by_one_and_all_together_in_a_batch(run, benchmark):
    pytest.importorskip('earlyon')
    rows = benchmark('--batch-sizes', '1', '4', '--budgets', '0.9', '--drops', '100', '--earlyon')
    by_name = {(row['contender'], row['batch_size']): row for row in rows}
    for setting in ('budget 0.9', 'drop 100'):
        ours, theirs = (by_name[f'{name}, {setting}', '1'] for name in ('early exit', 'earlyon'))
        keys = ['top1', 'cost', *(f'left_at_exit{i}' for i in range(3))]
        assert [ours[key] for key in keys] == [theirs[key] for key in keys]
        together = by_name[f'earlyon, {setting}', '4']
        assert all(int(together[f'left_at_exit{i}']) % 4 == 0 for i in range(3))
        assert float(together['cost']) >= float(by_name[f'early exit, {setting}', '4']['cost'])


@pytest.mark.slow
@pytest.mark.parametrize('arguments, word', [
    (['--batch-sizes', '64'], '--batch-sizes 64: expected 20 at most'),
    (['--rounds', '1'], '--rounds 1: expected 2 or more'),
    (['--budgets', '0.001', '--batch-sizes', '4'], '--budgets 0.001: budget=0.001: too low'),
    (['--static', '/nowhere/at/all', '--batch-sizes', '4'], '--static /nowhere/at/all: there is no config.json'),
])
def test_settings_that_cannot_be_used_are_named(benchmark, arguments, word):
    with pytest.raises(ConfigError, match=word):
        benchmark(*arguments)


@pytest.mark.slow
def test_a_run_that_held_nothing_out_is_refused(run, benchmark):
    args = run / 'args.yaml'
    args.write_text(args.read_text().replace('val_fraction: 0.4', 'val_fraction: 0.0'))
    with pytest.raises(DataError, match='no validation split'):
        benchmark()


@pytest.mark.slow
def test_a_static_network_fed_otherwise_is_refused(run, benchmark):
    save_model(timm.create_model('test_vit', num_classes=5), run.parent / 'other')
    with pytest.raises(ConfigError, match=r'num_classes 5 \(not 8\)'):
        benchmark('--batch-sizes', '4', '--static', run.parent / 'other')


@pytest.mark.slow
def test_the_training_benchmark_compares_methods_and_regimes(tmp_path):
    output = tmp_path / 'figures.json'
    command = [
        sys.executable, str(RECIPES / 'benchmark.py'), 'train', '--model', 'test_resnet', '--batch-size', '16',
        '--rounds', '2', '--methods', 'byot', 'plain', 'disjoint', 'mixed', '--output', str(output)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads(output.read_text())['rows']
    assert [row['name'] for row in rows if row['what'] == 'step'] == ['byot', 'plain', 'disjoint', 'mixed']
    assert {row['what'] for row in rows} == {'step', 'loop', 'loader'}
    assert all(row['seconds'] > 0 for row in rows) and 'disjoint' in done.stdout
