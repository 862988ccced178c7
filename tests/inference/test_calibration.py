"""Choosing when images leave early: laws of the curve and of the costs, and the recipe."""
import csv
import dataclasses
import json
import math
import runpy
import shutil
import sys
from itertools import product

import numpy as np
import pytest
import timm
import torch
import yaml
from helpers import RECIPES
from helpers.images import write_two_colours
from PIL import Image

from timm_selfdistill.costs import MS, RunCosts, compute_costs, exit_costs, measure_costs
from timm_selfdistill.evaluation.plots import plot_first_and_last
from timm_selfdistill.hub.networks import save_model
from timm_selfdistill.inference.batches import check_targets
from timm_selfdistill.inference.calibration import (
    choose_point,
    exit_curve,
    fit_temperature,
    fit_temperatures,
    measure_thresholds,
    pareto,
)
from timm_selfdistill.inference.early_exit import EarlyExit
from timm_selfdistill.models.exit_rule import CRITERIA, ExitRule, follow_rule, single_exits

COSTS = RunCosts((0.4, 0.2, 0.1, 0.3), (0.05, 0.03, 0.02, 0.))
EVERY_RULE = list(product(CRITERIA, (False, True)))


def make_logits(count=400, classes=10, exits=4):
    """Return logits of exits that know more the deeper they are, and labels."""
    target = torch.randint(classes, (count,))
    logits = [torch.randn(count, classes) for _ in range(exits)]
    for number, of_exit in enumerate(logits):
        of_exit[torch.arange(count), target] += (1 + number) * 2 * torch.rand(count)
    return logits, target


# -- temperatures -----------------------------------------------------------------------------------------------------


def test_the_temperature_is_that_by_which_logits_were_multiplied():
    logits = 2 * torch.randn(20000, 5)
    target = torch.distributions.Categorical(logits=logits).sample()
    for factor in (0.3, 1, 4):
        assert fit_temperature(factor * logits, target) == pytest.approx(factor, rel=0.05)


@pytest.mark.parametrize('count', [1, 1000])
def test_the_temperature_stays_finite_where_all_is_right_or_all_is_wrong(count):
    target = torch.arange(count) % 5
    logits = 10 * torch.eye(5)[target]
    assert 0.05 < fit_temperature(logits, target) < 1
    assert 1 < fit_temperature(logits, (target + 1) % 5) < 1e4
    assert fit_temperature(torch.zeros(count, 5), target) == pytest.approx(1)


def test_each_exit_has_its_temperature_and_with_others_that_of_their_mean():
    (a, b), target = make_logits(exits=2)
    assert fit_temperatures([a, 3 * a], target)[1] == pytest.approx(3 * fit_temperature(a, target), rel=0.05)
    alone, together = fit_temperatures([a, b], target, ensemble=True)
    assert alone == fit_temperature(a, target)
    assert together == pytest.approx(fit_temperature((a + b) / 2, target))
    assert together != pytest.approx(fit_temperature(b, target), rel=0.01)


# -- costs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('name, settings', [
    ('test_resnet_sd', dict(exits=(1, 2, 3))),
    ('test_resnet_sd', dict(exits=(1, 2, 3), exit_head='cascade')),
    ('test_resnet_sd', dict(exits=())),
    ('test_vit_sd', {}),
    ('test_efficientnet_sd', {}),
])
def test_parts_add_up_to_the_plain_network_and_to_those_cut_off(name, settings):
    model = timm.create_model(name, num_classes=5, **settings)
    costs = compute_costs(model)
    assert len(costs.sections) == len(costs.heads) == model.num_exits and costs.heads[-1] == 0
    assert sum(costs.sections) == pytest.approx(1, rel=1e-12)
    alone = list(exit_costs(model).values())[:model.num_exits - 1]
    rule = ExitRule(model.num_exits, 5)
    for number, (cut, (_, thresholds)) in enumerate(zip(alone, single_exits(model.num_exits))):
        of_rule = costs.of(dataclasses.replace(rule, thresholds=thresholds))
        assert of_rule[number] == pytest.approx(cut.share, rel=1e-9)


def test_heads_that_are_not_asked_cost_nothing_unless_a_later_one_takes_their_logits():
    rule = ExitRule(4, 10, (None, 0.5, None))
    assert COSTS.of(rule) == pytest.approx([0.4, 0.63, 0.73, 1.03])
    assert COSTS.of(dataclasses.replace(rule, ensemble=True)) == pytest.approx([0.45, 0.68, 0.8, 1.1])
    chained = dataclasses.replace(COSTS, chained=True)
    assert chained.of(rule) == pytest.approx([0.45, 0.68, 0.78, 1.08])  # the last head's logits nobody takes
    assert compute_costs(timm.create_model('test_resnet_sd', exits=(1, 2, 3), exit_head='cascade')).chained


@pytest.mark.parametrize('head', ['bottleneck', 'cascade'])
def test_measured_costs_are_times_of_the_parts(head):
    model = timm.create_model('test_resnet_sd', num_classes=5, exits=(1, 2, 3), exit_head=head).train()
    costs = measure_costs(model, torch.randn(4, 3, 64, 64), rounds=3)
    assert costs.unit == MS and model.training
    assert len(costs.sections) == len(costs.heads) == 4
    assert min(costs.sections) >= 0 and costs.sections[0] > 0 and min(costs.heads[:3]) > 0 == costs.heads[3]
    plain = measure_costs(timm.create_model('test_resnet_sd', exits=()), torch.randn(4, 3, 64, 64), rounds=3)
    assert len(plain.sections) == 1 and plain.heads == (0.,)
    for images, rounds in ((torch.randn(0, 3, 64, 64), 3), (torch.randn(1, 3, 64, 64), 0)):
        with pytest.raises(ValueError, match='expected 1 or more of both'):
            measure_costs(model, images, rounds)


# -- the curve --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('criterion, ensemble', EVERY_RULE)
def test_every_row_is_what_its_rule_gives_even_read_from_json(criterion, ensemble):
    logits, target = make_logits()
    rule = ExitRule(4, 10, None, criterion, (0.7, 1.3, 1., 2.), ensemble)
    rows = exit_curve(rule, logits, target, COSTS, points=20)
    assert all(sum(row['leaving']) == pytest.approx(1) for row in rows)
    for row in rows:
        settings = json.loads(json.dumps(dataclasses.replace(rule, thresholds=row['thresholds']).settings()))
        read = ExitRule.from_settings(settings, 4)
        decided, exits = follow_rule(read, logits)
        assert row['top1'] == pytest.approx(100 * (decided.argmax(1) == target).double().mean().item())
        assert row['leaving'] == pytest.approx((exits.bincount(minlength=4) / len(exits)).tolist())
        assert row['cost'] == pytest.approx(torch.tensor(COSTS.of(read))[exits].mean().item())


@pytest.mark.parametrize('criterion, ensemble', EVERY_RULE)
def test_the_curve_goes_from_the_cheapest_to_the_whole_network(criterion, ensemble):
    logits, target = make_logits()
    rows = exit_curve(ExitRule(4, 10, None, criterion, None, ensemble), logits, target, COSTS, points=20)
    families = {}
    for row in rows:
        families.setdefault(row['family'], []).append(row)
    assert [row['leaving'] for row in families['deepest']] == [[0, 0, 0, 1]]
    if criterion == 'patience':
        assert set(families) == {'deepest', 'shared'}
        assert [row['thresholds'] for row in families['shared']] == [(1.,) * 3, (2.,) * 3, (3.,) * 3]
        return
    assert [row['leaving'] for row in families['anytime']] == torch.eye(4)[:3].tolist()
    assert len(families['shared']) == len(families['budgeted']) == 20
    assert all(len(set(row['thresholds'])) == 1 for row in families['shared'])
    assert {row['leaving'][0] for row in families['shared']} >= {1}


def test_budgeted_shares_grow_by_the_same_ratio_from_exit_to_exit():
    logits, target = make_logits(count=5000)
    rows = exit_curve(ExitRule(4, 10), logits, target, COSTS, points=9)
    ratios = []
    for row in rows:
        if row['family'] == 'budgeted':
            a, b, c, d = (5000 * share for share in row['leaving'])
            assert b * b == pytest.approx(a * c, abs=2 * (a + b + c))
            assert c * c == pytest.approx(b * d, abs=2 * (b + c + d))
            ratios.append((b + c + d) / (a + b + c))
    assert ratios == sorted(ratios) and ratios[0] < 0.05 and ratios[-1] > 20 and ratios[4] == pytest.approx(1, rel=0.01)


def test_an_exit_that_nothing_is_to_leave_at_is_not_even_asked():
    logits, target = make_logits(count=30)
    rows = [row for row in exit_curve(ExitRule(4, 10), logits, target, COSTS) if row['family'] == 'budgeted']
    assert any(row['leaving'][0] == 0 and row['leaving'][3] < 1 for row in rows)
    assert all((threshold is None) == (share == 0) for row in rows
               for threshold, share in zip(row['thresholds'], row['leaving']) if row['leaving'][3] > 0)


@pytest.mark.parametrize('criterion, ensemble', EVERY_RULE)
def test_equally_sure_images_and_certainty_make_no_threshold_out_of_range(criterion, ensemble):
    target = torch.arange(20) % 10
    rule, costs = ExitRule(3, 10, None, criterion, None, ensemble), RunCosts((1, 1, 1), (1, 1, 0))
    sure = torch.eye(10)[target]
    for logits in (0 * sure, 1e4 * sure, sure + 1e-7 * torch.randn(20, 10)):
        rows = exit_curve(rule, [logits] * 3, target, costs)
        json.dumps(rows, allow_nan=False)
        assert rows


def test_a_network_of_one_exit_has_a_curve_of_one_point():
    logits, target = make_logits(exits=1)
    row, = exit_curve(ExitRule(1, 10), logits, target, RunCosts((1.,), (0.,)))
    assert (row['thresholds'], row['cost'], row['leaving']) == ((), 1, [1])
    assert choose_point([row], accuracy_drop=0) is row is choose_point([row], budget=1)


def test_logits_and_labels_that_fit_nothing_are_refused():
    logits, target = make_logits()
    rule = ExitRule(4, 10)
    broken = [logits[0], logits[1].clone(), *logits[2:]]
    broken[1][3, 3] = math.nan
    for wrong, labels, message in (
        (logits, target + 1, 'Label 10 is unknown to the network, which has the classes 0 to 9'),
        (logits[:3], target, 'Logits of 3 exits: expected 4'),
        (broken, target, 'Exit 1 has logits that are not finite'),
        ([x[:0] for x in logits], target[:0], 'no images'),
    ):
        with pytest.raises(ValueError, match=message):
            exit_curve(rule, wrong, labels, COSTS)
    with pytest.raises(ValueError, match=r'Label -1 .* \(2 such'):
        check_targets(torch.tensor([0, -1, 3, -1]), 4)
    with pytest.raises(ValueError, match='out of range for confidence'):
        measure_thresholds(rule, [('mine', (2., None, None))], logits, target, COSTS)


# -- choosing ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def curve():
    torch.manual_seed(0)
    return exit_curve(ExitRule(4, 10), *make_logits(), COSTS, points=30)


def test_no_row_beats_one_of_the_front_and_every_row_is_matched_by_it(curve):
    def matches(a, b):
        return a['cost'] <= b['cost'] and a['top1'] >= b['top1']

    front = pareto(curve)
    assert 1 < len(front) < len(curve)
    assert [row['cost'] for row in front] == sorted(row['cost'] for row in front)
    assert not any(matches(row, f) and not matches(f, row) for row in curve for f in front)
    assert all(any(matches(f, row) for f in front) for row in curve)


def test_of_rows_that_cost_the_same_the_most_accurate_counts():
    rows = [dict(cost=cost, top1=top1) for cost, top1 in ((1, 50), (1, 60), (2, 60), (2, 70), (1, 55))]
    assert pareto(rows) == [dict(cost=1, top1=60), dict(cost=2, top1=70)]


def test_a_budget_buys_the_most_accuracy_and_a_drop_the_least_cost(curve):
    whole = next(row for row in curve if row['family'] == 'deepest')
    for budget in (0.46, 0.6, 0.8, 1., 5):
        point = choose_point(curve, budget=budget)
        within = [row for row in curve if row['cost'] <= budget]
        assert point in within and point['top1'] == max(row['top1'] for row in within)
        assert point['cost'] == min(row['cost'] for row in within if row['top1'] == point['top1'])
    for drop in (0, 0.5, 10, 100):
        point = choose_point(curve, accuracy_drop=drop)
        enough = [row for row in curve if row['top1'] >= whole['top1'] - drop]
        assert point in enough and point['cost'] == min(row['cost'] for row in enough)
    cheapest = min(row['cost'] for row in curve)
    assert choose_point(curve, budget=cheapest)['cost'] == cheapest


@pytest.mark.parametrize('aims, message', [
    ({}, 'budget=None, accuracy_drop=None, latency=None, risk=None: expected exactly one of them'),
    (dict(budget=0.5, accuracy_drop=0.), 'expected exactly one of them'),
    (dict(budget=-1), 'budget=-1: expected a number'),
    (dict(budget=math.nan), 'budget=nan'),
    (dict(budget='half'), "budget='half'"),
    (dict(budget=True), 'budget=True'),
    (dict(accuracy_drop=-0.5), 'accuracy_drop=-0.5'),
    (dict(accuracy_drop=math.inf), 'accuracy_drop=inf'),
    (dict(budget=0.1), r'budget=0.1: too low, the cheapest way to run this network costs 0.45'),
])
def test_aims_that_cannot_be_had_are_refused(curve, aims, message):
    with pytest.raises(ValueError, match=message):
        choose_point(curve, **aims)


# -- the recipe -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """What a training run on two colours leaves, without the training."""
    folder = tmp_path_factory.mktemp('calibrate')
    data = folder / 'data'
    data.mkdir()
    write_two_colours(data)
    torch.manual_seed(0)
    model = timm.create_model('test_resnet_sd', num_classes=8, exits=(2, 3), exit_head='linear')
    data_config = dict(input_size=(3, 32, 32), crop_pct=1., mean=(0.5,) * 3, std=(0.5,) * 3)
    names = [f'{shade} {colour}' for colour in 'rgby' for shade in ('dark', 'light')]
    save_model(model, folder / 'run', data_config, label_names=names)
    settings = dict(data_dir=str(data), label_column='fine', val_fraction=0.25)
    (folder / 'run' / 'args.yaml').write_text(yaml.safe_dump(settings))
    return folder


@pytest.fixture
def run(trained, tmp_path):
    return shutil.copytree(trained / 'run', tmp_path / 'run')


def calibrate(monkeypatch, *arguments):
    monkeypatch.setattr(sys, 'argv', ['calibrate.py', *map(str, arguments)])
    runpy.run_path(str(RECIPES / 'calibrate.py'), run_name='__main__')


@pytest.mark.slow
def test_the_recipe_leaves_a_run_with_its_rule_and_all_else_as_it_was(run, tmp_path, monkeypatch, capsys):
    before = json.loads((run / 'config.json').read_text())
    weights = (run / 'model.safetensors').stat()
    calibrate(monkeypatch, '--checkpoint', run, '--budget', 0.95, '--criterion', 'entropy', '--ensemble')
    after = json.loads((run / 'config.json').read_text())
    settings = after['model_args'].pop('early_exit')
    assert after == before
    unchanged = (run / 'model.safetensors').stat()
    assert (unchanged.st_mtime_ns, unchanged.st_ino) == (weights.st_mtime_ns, weights.st_ino)
    rule = EarlyExit(timm.create_model(f'local-dir:{run}', pretrained=True)).rule
    assert rule.settings() == settings and (rule.criterion, rule.ensemble) == ('entropy', True)
    assert any(threshold is not None for threshold in rule.thresholds)
    out = capsys.readouterr().out
    assert all(words in out for words in ('validation', 'test', 'early exit', 'exit2 alone'))
    with (run / 'early_exit.csv').open() as f:
        rows = list(csv.DictReader(f))
    assert list(rows[0]) == ['family', 'thresholds', 'validation_cost', 'validation_top1', 'test_cost', 'test_top1']
    written = ' '.join('none' if t is None else repr(t) for t in rule.thresholds)
    chosen = next(row for row in rows if row['thresholds'] == written)
    assert float(chosen['validation_cost']) <= 0.95
    assert {row['family'] for row in rows} == {'deepest', 'anytime', 'shared', 'budgeted'}
    for name in ('early_exit.png', 'first_and_last.png'):
        assert (run / name).read_bytes().startswith(b'\x89PNG')

    # the rule that a run already has does not count
    calibrate(monkeypatch, '--checkpoint', run, '--accuracy-drop', 1, '--output', tmp_path / 'out')
    settings = json.loads((run / 'config.json').read_text())['model_args']['early_exit']
    assert (settings['criterion'], settings['ensemble']) == ('confidence', False)
    assert {p.name for p in (tmp_path / 'out').iterdir()} == {'early_exit.csv', 'early_exit.png', 'first_and_last.png'}


def test_the_recipe_takes_a_latency_and_patience(run, monkeypatch, capsys):
    calibrate(monkeypatch, '--checkpoint', run, '--latency', 1000, '--latency-batch-size', 4,
              '--criterion', 'patience')
    assert 'cost is ms for one image' in capsys.readouterr().out
    assert json.loads((run / 'config.json').read_text())['model_args']['early_exit']['criterion'] == 'patience'


def test_the_recipe_promises_agreement_on_images_without_labels(run, tmp_path, monkeypatch, capsys):
    (tmp_path / 'photos' / 'more').mkdir(parents=True)
    for number in range(60):
        pixels = np.random.default_rng(number).integers(256, size=(32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / 'photos' / ('more' if number % 2 else '.') / f'{number}.png')
    calibrate(monkeypatch, '--checkpoint', run, '--risk', 0.4, '--confidence', 0.9, '--risk-of', 'agreement',
              '--unlabelled', tmp_path / 'photos')
    told = ' '.join(capsys.readouterr().out.split())
    promise = json.loads((run / 'config.json').read_text())['model_args']['early_exit']['promise']
    assert (promise['risk'], promise['confidence'], promise['risk_of']) == (0.4, 0.9, 'agreement')
    assert (promise['chosen_on'], promise['tested_on']) == (15, 45)
    sentence = 'with a probability of 0.9 at most 40 % of the images are classified otherwise than at the end'
    assert f'guarantee: {sentence}' in told
    predictor = EarlyExit(timm.create_model(f'local-dir:{run}', pretrained=True))
    assert str(predictor.rule.promise).startswith(sentence)


@pytest.mark.parametrize('arguments, message', [
    ([], 'pass exactly one of them'),
    (['--budget', 0.5, '--latency', 1], 'pass exactly one of them'),
    (['--budget', 0.5, '--latency-batch-size', 1], '--latency-batch-size 1: is for --latency only'),
    (['--risk', 0.1, '--budget', 0.5], 'pass exactly one of them'),
    (['--risk', 1.5], '--risk: risk=1.5: expected a number above 0 and below 1'),
    (['--risk', 0.01, '--confidence', 95], '--risk: confidence=95.0: expected a number above 0'),
    (['--budget', 0.5, '--confidence', 0.9], '--confidence 0.9: is for --risk only'),
    (['--risk', 0.0001], 'images cannot promise that, even if early exit never errs on them;'),
    (['--risk', 0.1, '--unlabelled', 'data'], 'goes with --risk and --risk-of agreement'),
    (['--risk', 0.1, '--risk-of', 'agreement', '--unlabelled', 'none'], '--unlabelled none: expected a folder'),
    (['--budget', 0.01], '--budget: budget=0.01: too low'),
    (['--budget', 'nan'], '--budget: budget=nan'),
    (['--budget', 0.5, '--data-dir', 'data', '--label-column', 'fine'], 'has no validation split of its own'),
    (['--budget', 0.5, '--checkpoint', 'hf-hub:some/one'], 'expected the folder of a run'),
])
def test_the_recipe_says_what_is_missing_and_changes_nothing(
        trained, run, tmp_path, monkeypatch, capsys, arguments, message):
    before = (run / 'config.json').read_bytes()
    shutil.copytree(trained / 'data', tmp_path / 'elsewhere')  # other data, for all that is known
    arguments = [tmp_path / 'elsewhere' if value == 'data' else value for value in arguments]
    with pytest.raises(SystemExit) as stopped:
        calibrate(monkeypatch, '--checkpoint', run, *arguments)
    assert stopped.value.code == 2 and message in capsys.readouterr().err
    assert (run / 'config.json').read_bytes() == before and not (run / 'early_exit.csv').exists()


def test_the_recipe_needs_images_that_nothing_was_learned_from(trained, run, monkeypatch, capsys):
    settings = dict(data_dir=str(trained / 'data'), label_column='fine', val_fraction=0.)
    (run / 'args.yaml').write_text(yaml.safe_dump(settings))
    with pytest.raises(SystemExit):
        calibrate(monkeypatch, '--checkpoint', run, '--budget', 0.6)
    assert 'has no validation split of its own to choose on' in capsys.readouterr().err


def test_without_a_test_part_nothing_is_measured_and_that_is_said(trained, run, tmp_path, monkeypatch, capsys):
    data = shutil.copytree(trained / 'data', tmp_path / 'data')
    (data / 'test.parquet').unlink()
    settings = dict(data_dir=str(data), label_column='fine', val_fraction=0.25)
    (run / 'args.yaml').write_text(yaml.safe_dump(settings))
    calibrate(monkeypatch, '--checkpoint', run, '--budget', 0.95)
    assert 'has no test split, so nothing was measured' in ' '.join(capsys.readouterr().out.split())
    assert list(json.loads((run / 'early_exit.json').read_text())['images']) == ['validation']


def test_a_sheet_may_be_empty_and_names_long(tmp_path):
    colour, grey = torch.rand(8, 8, 3).numpy(), torch.rand(8, 8).numpy()
    last = [(colour, 'a', 'a name that is far too long'), (grey, 'b', 'b')]
    plot_first_and_last([], last, 'one', tmp_path / 'a.png')
    assert (tmp_path / 'a.png').read_bytes().startswith(b'\x89PNG')
