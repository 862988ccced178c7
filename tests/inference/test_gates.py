"""The criterion `gate`: what it learns, and that it goes wherever the weights go."""
import copy
import dataclasses
import json
import pickle
import runpy
import sys

import pytest
import timm
import torch
import yaml
from helpers import RECIPES
from helpers.images import write_two_colours
from safetensors.torch import load_file

import timm_selfdistill
from timm_selfdistill import EarlyExit
from timm_selfdistill.costs import RunCosts
from timm_selfdistill.hub.networks import save_model, write_exit_rule
from timm_selfdistill.inference.export import export_network
from timm_selfdistill.inference.gates import with_gates
from timm_selfdistill.inference.risk_control import choose_safely
from timm_selfdistill.inference.staged_session import StagedSession
from timm_selfdistill.models.exit_gate import ExitGate, gate_scores
from timm_selfdistill.models.exit_rule import ExitRule, follow_rule
from timm_selfdistill.models.probe import count_macs


@pytest.fixture
def model():
    torch.manual_seed(0)
    overlay = dict(input_size=(3, 64, 64))
    return timm.create_model('test_resnet_sd', num_classes=8, exits=(2, 3), pretrained_cfg_overlay=overlay).eval()


@pytest.fixture
def images():
    return torch.randn(48, 3, 64, 64, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def predictor(model, images):
    predictor = EarlyExit(model, criterion='gate')
    predictor.calibrate([(images, torch.arange(48) % 8)], budget=0.95)
    return predictor


def test_a_gate_learns_where_nothing_is_lost():
    """Of two classes that the exit confuses one is mended at the end, the other is not."""
    generator = torch.Generator().manual_seed(0)
    target = torch.randint(3, (3000,), generator=generator)
    deep = 9. * torch.eye(3)[target]
    deep[target == 2] = torch.tensor([0., 9., 0.])  # the end is wrong about class 2 throughout
    shallow = torch.where(target[:, None] == 0, torch.tensor([4., 0., 0.]), torch.tensor([0., 1.2, 1.]))
    shallow[target == 1] = torch.tensor([1.1, 1.0, 0.])  # wrong, and the end is right
    rule = with_gates(ExitRule(2, 3, criterion='gate'), [shallow, deep], target)
    sure = rule.gates[0](shallow)
    assert sure[target == 0].min() > 0.9 and sure[target == 2].min() > 0.9 and sure[target == 1].max() < 0.1


def test_gates_are_the_same_each_time_and_leave_torchs_random_numbers_alone():
    logits, target = [torch.randn(200, 6) for _ in range(3)], torch.randint(6, (200,))
    rule = ExitRule(3, 6, criterion='gate')
    torch.manual_seed(5)
    a = with_gates(rule, logits, target)
    drawn = torch.rand(3)
    b = with_gates(rule, logits, target)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(3))
    for one, other in zip(a.gates.state_dict().values(), b.gates.state_dict().values()):
        assert torch.equal(one, other)
    assert with_gates(replaced := ExitRule(3, 6), logits, target) is replaced


@pytest.mark.parametrize('num_classes', [1, 2, 3, 100])
def test_a_gate_is_small_and_takes_any_number_of_classes(num_classes):
    gate = ExitGate(num_classes)
    logits = torch.randn(4, num_classes) * 50
    assert gate_scores(logits).isfinite().all()
    macs, probability = count_macs(gate, logits)
    assert macs <= 4 * 128 and probability.shape == (4,) and ((probability >= 0) & (probability <= 1)).all()
    assert not any(p.requires_grad for p in gate.parameters())


def test_run_is_simulate(predictor, model, images):
    out, expected = predictor(images), predictor.simulate(model.forward_exits(images))
    assert torch.equal(out.exit_index, expected.exit_index)
    torch.testing.assert_close(out.logits, expected.logits, rtol=1e-4, atol=1e-5)
    assert 'gate >= ' in repr(predictor)


def test_gates_travel_with_the_weights(predictor, model, images, tmp_path):
    exits = predictor(images).exit_index
    save_model(model, tmp_path / 'run')
    stored = load_file(tmp_path / 'run' / 'model.safetensors')
    assert sum(name.startswith('exit_gates.') for name in stored) == 2 * 6
    again = timm.create_model(f'local-dir:{tmp_path}/run', pretrained=True).eval()
    for network in (again, copy.deepcopy(again), pickle.loads(pickle.dumps(again))):
        assert torch.equal(EarlyExit(network)(images).exit_index, exits)
        assert network.exit_rule.gates is network.exit_gates
    EarlyExit(again.bfloat16())(images.bfloat16())
    again.reset_classifier(3)
    assert again.exit_rule is None and len(again.exit_gates) == 0
    fresh = timm.create_model(f'local-dir:{tmp_path}/run', pretrained=True, num_classes=3)
    assert len(fresh.exit_gates) == 0


def test_another_rule_takes_the_gates_out_of_the_weights(predictor, model, images, tmp_path):
    save_model(model, tmp_path)
    before = load_file(tmp_path / 'model.safetensors')
    write_exit_rule(tmp_path, ExitRule(3, 8, 0.5))
    after = load_file(tmp_path / 'model.safetensors')
    assert set(before) - set(after) == {name for name in before if name.startswith('exit_gates.')}
    assert all(torch.equal(before[name], tensor) for name, tensor in after.items())
    write_exit_rule(tmp_path, predictor.rule)
    assert {n: t.tolist() for n, t in load_file(tmp_path / 'model.safetensors').items()} == {
        n: t.tolist() for n, t in before.items()}


def test_gates_are_exported(predictor, model, images, tmp_path):
    levels = []
    for gate, logits, temperature in zip(model.exit_gates, model.forward_exits(images), predictor.rule.temperatures):
        ordered = gate(logits / temperature).sort().values
        levels.append(ordered[23:25].mean().item())  # between two images, where rounding does not decide
    model.exit_rule = predictor.rule = dataclasses.replace(predictor.rule, thresholds=levels)
    export_network(model, tmp_path / 'staged', staged=True)
    out = predictor(images)
    logits, exits = StagedSession(tmp_path / 'staged').run(images.numpy())
    assert (torch.from_numpy(exits) == out.exit_index).all()
    torch.testing.assert_close(torch.from_numpy(logits), out.logits, rtol=1e-4, atol=1e-5)


def test_a_promise_with_gates_is_tested_on_images_that_they_were_not_trained_on():
    generator = torch.Generator().manual_seed(3)
    target = torch.randint(5, (4000,), generator=generator)
    hard = torch.rand(4000, 1, generator=generator)
    logits = [
        gain * (1 - hard) * torch.eye(5)[target] + torch.randn(4000, 5, generator=generator) for gain in (4., 6., 9.)]
    costs = RunCosts((0.3, 0.3, 0.4), (0.01, 0.01, 0.))
    rule, point, _ = choose_safely(ExitRule(3, 5, criterion='gate'), logits, target, costs, 0.03)
    assert rule.promise is not None and rule.gates is not None and point['cost'] < 1
    assert follow_rule(rule, logits)[1].float().mean() < 2


def test_thresholds_without_gates_are_refused(model):
    with pytest.raises(ValueError, match='gates have to be trained first, which calibrate'):
        EarlyExit(model, thresholds=0.5, criterion='gate')


@pytest.mark.slow
def test_the_recipe_trains_gates_and_a_new_run_begins_without(tmp_path, monkeypatch, model):
    (tmp_path / 'data').mkdir()
    write_two_colours(tmp_path / 'data', 160)
    save_model(model, tmp_path / 'run')
    settings = dict(data_dir=str(tmp_path / 'data'), label_column='fine', val_fraction=0.4)
    (tmp_path / 'run' / 'args.yaml').write_text(yaml.safe_dump(settings))
    options = ['--checkpoint', str(tmp_path / 'run'), '--budget', '0.95', '--criterion', 'gate']
    monkeypatch.setattr(sys, 'argv', ['calibrate.py', *options])
    runpy.run_path(str(RECIPES / 'calibrate.py'), run_name='__main__')
    config = json.loads((tmp_path / 'run' / 'config.json').read_text())
    assert config['model_args']['early_exit']['criterion'] == 'gate'
    assert EarlyExit(timm.create_model(f'local-dir:{tmp_path}/run', pretrained=True)).rule.gates is not None
    folder = timm_selfdistill.train(timm_selfdistill.TrainConfig(
        model=str(tmp_path / 'run'), data_dir=str(tmp_path / 'data'), label_column='fine', epochs=1, max_steps=2,
        output=str(tmp_path / 'out')))
    assert not any(name.startswith('exit_gates') for name in load_file(folder / 'model.safetensors'))
