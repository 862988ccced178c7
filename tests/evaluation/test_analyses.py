"""The papers' analyses: what the functions promise, and the recipes on small networks."""
import dataclasses
import json
import runpy
import sys

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from helpers import RECIPES
from helpers.runs import untrained_run

from timm_selfdistill.data.image_data import load_image_data
from timm_selfdistill.data.source import DataSource
from timm_selfdistill.errors import ConfigError
from timm_selfdistill.evaluation.analyses import (
    all_exits_loss,
    deepest_loss,
    gradient_sizes,
    linear_probe,
    scatter_ratios,
    weight_noise,
)
from timm_selfdistill.evaluation.plots import plot_generations
from timm_selfdistill.evaluation.secondary import secondary_information
from timm_selfdistill.evaluation.tables import short_names
from timm_selfdistill.evaluation.trained_network import list_checkpoints, subset
from timm_selfdistill.metrics import collect_features, evaluate_exits


@pytest.fixture
def batches():
    images, labels = torch.randn(24, 3, 64, 64), torch.arange(24) % 5
    return [(images[i:i + 10], labels[i:i + 10]) for i in range(0, 24, 10)]


def snapshot(model):
    """Return what an analysis must leave as it was."""
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return tensors, [m.training for m in model.modules()], [p.grad for p in model.parameters()]


def assert_untouched(model, before):
    tensors, modes, gradients = before
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in model.state_dict().items())
    assert [m.training for m in model.modules()] == modes
    assert all(p.grad is g for p, g in zip(model.parameters(), gradients))


# -- noise on the weights ---------------------------------------------------------------------------------------------


def test_no_noise_measures_the_network_as_it_is_and_noise_costs(tiny, batches):
    with torch.no_grad():  # labels that the network knows
        batches = [(images, tiny.eval()(images).argmax(1)) for images, _ in batches]
    rows = weight_noise(tiny, batches, (0., 0.3), repeats=2)
    assert [(row['sigma'], row['exit']) for row in rows] == [
        (sigma, name) for sigma in (0., 0.3) for name in ('exit0', 'exit1', 'exit2', 'ensemble')]
    for row, clean in zip(rows, evaluate_exits(tiny, batches).values()):
        assert (row['loss'], row['top1']) == (clean['loss'], clean['top1'])
        assert row['loss_std'] == row['top1_std'] == 0
    assert rows[2]['top1'] == 100
    assert rows[6]['loss'] > rows[2]['loss'] and rows[6]['top1'] < 100


def test_noise_has_the_asked_for_strength_on_every_parameter(tiny, batches, monkeypatch):
    weights = torch.cat([p.detach().flatten() for p in tiny.parameters()])
    seen = []

    def evaluate(model, *args):
        seen.append(torch.cat([p.detach().flatten() for p in model.parameters()]) - weights)
        return evaluate_exits(model, *args)

    monkeypatch.setattr('timm_selfdistill.evaluation.analyses.evaluate_exits', evaluate)
    weight_noise(tiny, batches, (0.01, 0.1), repeats=2)
    assert [noise.std().item() for noise in seen] == pytest.approx([0.01, 0.1, 0.01, 0.1], rel=0.02)
    assert all((noise != 0).float().mean() > 0.999 for noise in seen)
    assert torch.allclose(10 * seen[0], seen[1], atol=1e-5)  # one draw, scaled
    assert not torch.allclose(seen[0], seen[2], atol=1e-3)  # the next repeat is another


def test_noise_is_averaged_over_repeats_and_a_function_of_the_seed(tiny, batches):
    together = weight_noise(tiny, batches, (0.2,), seed=3, repeats=2)
    apart = [weight_noise(tiny, batches, (0.2,), seed=seed, repeats=1) for seed in (3, 4)]
    for row, one, two in zip(together, *apart):
        assert row['loss'] == pytest.approx((one['loss'] + two['loss']) / 2)
        assert row['loss_std'] == pytest.approx(abs(one['loss'] - two['loss']) / 2)
    assert together == weight_noise(tiny, batches, (0.2,), seed=3, repeats=2)
    assert apart[0] != apart[1]


def test_noise_leaves_the_network_bit_exact_even_when_something_goes_wrong(tiny, batches):
    tiny.train()
    before = snapshot(tiny)
    weight_noise(tiny, batches, (0.1,), repeats=1)
    assert_untouched(tiny, before)
    with pytest.raises(AttributeError):
        weight_noise(tiny, [*batches, (None, None)], (0.1,), repeats=1)
    assert_untouched(tiny, before)


def test_what_attention_keeps_of_its_weights_is_never_stale():
    model = timm.create_model('levit_128s_sd', num_classes=5, exits=(0,)).eval()
    batches = [(torch.randn(2, 3, 224, 224), torch.arange(2))]
    assert gradient_sizes(model, batches * 2) == pytest.approx(gradient_sizes(model, batches), rel=1e-5)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.requires_grad_('attention_biases' in name)
            if 'attention_biases' in name:  # as large as after training, so that they matter
                p.normal_(std=3.)
        model(batches[0][0])
        clean = model(batches[0][0])
    rows = weight_noise(model, batches, (0., 0.02), repeats=1)
    again = weight_noise(model, batches, (0.02,), repeats=1)  # with nothing kept from an earlier sigma
    assert [row['loss'] for row in rows[3:]] == [row['loss'] for row in again]
    with torch.no_grad():
        assert torch.equal(model(batches[0][0]), clean)


@pytest.mark.parametrize('arguments, message', [
    (dict(sigmas=(0.1, -1.)), 'sigmas: -1.0 among them, expected numbers of 0 or more'),
    (dict(sigmas=(0.1,), repeats=0), 'repeats=0: expected 1 or more'),
    (dict(sigmas=(0.1,), batches=iter([])), 'used up after one pass'),
])
def test_noise_refuses_what_it_cannot_do(tiny, arguments, message):
    with pytest.raises(ValueError, match=message):
        weight_noise(tiny, **dict(dict(batches=[]), **arguments))


# -- gradients --------------------------------------------------------------------------------------------------------


def test_gradient_sizes_are_those_of_backward(tiny, batches):
    sizes = gradient_sizes(tiny, batches, all_exits_loss)
    names = [n for n, m in tiny.backbone.named_modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear))]
    assert list(sizes) == names and names[0].startswith('conv1') and names[-1] == 'fc'
    expected = dict.fromkeys(names, 0.)
    tiny.eval()
    for images, target in batches:
        tiny.zero_grad()
        sum(F.cross_entropy(z, target) for z in tiny.forward_exits(images)).backward()
        for name in names:
            expected[name] += tiny.backbone.get_submodule(name).weight.grad.abs().mean().item() / len(batches)
    assert dict(sizes) == pytest.approx(expected, rel=1e-4)


def test_gradients_leave_the_network_as_it_was(tiny, batches):
    tiny.train()
    deepest_loss(tiny, *batches[0]).backward()
    expected = gradient_sizes(tiny, batches)
    for p in tiny.backbone.layer1.parameters():
        p.requires_grad_(False)
    before = snapshot(tiny)
    with torch.no_grad():
        assert gradient_sizes(tiny, batches) == expected  # the frozen layers', too
    assert_untouched(tiny, before)
    assert not any(p.requires_grad for p in tiny.backbone.layer1.parameters())


def test_a_loss_on_a_shallow_exit_gives_deeper_layers_no_gradient(tiny, batches):
    sizes = gradient_sizes(tiny, batches, lambda model, x, y: F.cross_entropy(model.forward_exits(x, upto=0)[0], y))
    deeper = [name.startswith(('layer3', 'layer4', 'fc')) for name in sizes]
    assert any(deeper) and not any(size for size, is_deeper in zip(sizes.values(), deeper) if is_deeper)
    assert sizes['conv1.0'] > 0


def test_gradients_of_no_images_are_refused(tiny):
    with pytest.raises(ValueError, match='batches: there are none'):
        gradient_sizes(tiny, [])


# -- scatter ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('offset', [0., 1e4])
def test_scatter_ratios_equal_a_two_pass_calculation(tiny, batches, offset):
    for head in tiny.exit_heads:  # features far from 0 must not cost digits
        head.pool.register_forward_hook(lambda module, args, out: out.double() + offset)
    tiny.double()
    batches = [(images.double(), labels) for images, labels in batches]
    ratios = scatter_ratios(tiny.eval(), batches)
    images, labels = (torch.cat(t) for t in zip(*batches))
    with torch.no_grad():
        _, features = tiny.forward_exits(images, return_features=True)
    for ratio, f in zip(ratios, features):
        f, y = f.numpy(), labels.numpy()
        means = np.stack([f[y == c].mean(0) for c in range(5)])
        within = ((f - means[y]) ** 2).sum()
        between = ((means[y] - f.mean(0)) ** 2).sum()
        assert ratio == pytest.approx(within / between, rel=1e-6)


def test_scatter_does_not_depend_on_the_order_of_the_images_or_on_the_batches(tiny, batches):
    before = snapshot(tiny.train())
    images, labels = (torch.cat(t) for t in zip(*batches))
    order = torch.randperm(len(labels))
    shuffled = [(images[order][i:i + 7], labels[order][i:i + 7]) for i in range(0, len(labels), 7)]
    assert scatter_ratios(tiny, batches) == pytest.approx(scatter_ratios(tiny, shuffled), rel=1e-4)
    assert_untouched(tiny, before)


@pytest.mark.parametrize('labels, scale, message', [
    ([2, 2, 2, 2], 1., 'The batches hold 1 classes'),
    ([0, 1, 2, 3], 1., 'exit 0: the scatter within classes is 0'),
    ([0, 0, 1, 1], 0., 'between classes 0'),
])
def test_scatter_that_cannot_be_is_refused(tiny, labels, scale, message):
    for module in (*tiny.exit_heads[0].modules(),):
        if isinstance(module, torch.nn.BatchNorm2d):
            module.weight.data.mul_(scale)
            module.bias.data.fill_(0.1)
    with pytest.raises(ValueError, match=message):
        scatter_ratios(tiny, [(torch.randn(4, 3, 64, 64), torch.tensor(labels))])


# -- linear probe -----------------------------------------------------------------------------------------------------


def test_a_linear_probe_solves_what_is_linear_and_guesses_at_noise():
    rng = np.random.default_rng(0)
    y = rng.integers(0, 3, 900)
    x = np.eye(3)[y] @ rng.normal(size=(3, 8)) + rng.normal(size=(900, 8))

    def parts(x, y):
        return [(x[a:b], y[a:b]) for a, b in ((0, 300), (300, 600), (600, 900))]

    out = linear_probe(*parts(x, y))
    assert 80 < out['test_top1'] < 100
    assert linear_probe(*parts(x * 10. ** rng.integers(-4, 3, 8) + 100., y)) == out  # scale and offset do not matter
    noise = linear_probe(*parts(x, rng.permutation(y)))
    assert 20 < noise['test_top1'] < 47


def test_the_probes_strength_is_chosen_without_the_test_part():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(90, 40)), rng.integers(0, 2, 90)
    parts = [(x[a:b], y[a:b]) for a, b in ((0, 30), (30, 60), (60, 90))]
    out = linear_probe(*parts)
    upside_down = linear_probe(*parts[:2], (x[60:], 1 - y[60:]))
    assert (out['c'], out['validation_top1']) == (upside_down['c'], upside_down['validation_top1'])
    assert out['test_top1'] == pytest.approx(100 - upside_down['test_top1'])


# -- secondary information --------------------------------------------------------------------------------------------


def test_secondary_information_of_scores_written_down():
    scores = torch.tensor([[0.5, 0.2, 0.15, 0.1, 0.05], [0.1, 0.15, 0.2, 0.05, 0.5]])
    superclasses = torch.tensor([0, 0, 1, 0, 1])  # siblings of 0: 1, 3; of 2: 4
    out = secondary_information(scores.log(), torch.tensor([0, 2]), k=3, superclasses=superclasses)
    assert out['top_score'].tolist() == pytest.approx([0.5, 0.5])
    assert out['runner_up_score'].tolist() == pytest.approx([0.175, 0.175])
    assert out['entropy'].tolist() == pytest.approx([-(scores[0] * scores[0].log()).sum().item()] * 2)
    assert out['sibling_mass'].tolist() == pytest.approx([0.3, 0.5])
    assert out['sibling_share'].tolist() == [0.5, 0.5]  # of 1 and 2; of 4 and 1
    assert not any('teacher' in key for key in out)


def test_certainty_and_ignorance_are_the_ends_of_the_scale():
    sure = secondary_information(torch.eye(7) * 1e4, torch.arange(7))
    unsure = secondary_information(torch.zeros(7, 7), torch.arange(7))
    for key, ends in dict(top_score=(1, 1 / 7), runner_up_score=(0, 1 / 7), entropy=(0, np.log(7))).items():
        assert sure[key].tolist() == pytest.approx([ends[0]] * 7)
        assert unsure[key].tolist() == pytest.approx([ends[1]] * 7)


def test_the_label_never_counts_as_its_own_sibling():
    logits = torch.randn(50, 6)
    out = secondary_information(logits, torch.arange(50) % 6, k=6, superclasses=torch.arange(6))
    assert out['sibling_mass'].tolist() == out['sibling_share'].tolist() == [0.] * 50
    out = secondary_information(logits, torch.arange(50) % 6, k=6, superclasses=torch.zeros(6, dtype=torch.long))
    others = 1 - logits.softmax(-1)[torch.arange(50), torch.arange(50) % 6]
    assert torch.allclose(out['sibling_mass'], others, atol=1e-6)
    assert out['sibling_share'].tolist() == [1.] * 50


def test_a_teacher_is_compared_in_its_direction():
    student, teacher = torch.randn(20, 6), torch.randn(20, 6)
    p, q = teacher.softmax(-1), student.softmax(-1)
    out = secondary_information(student, torch.zeros(20, dtype=torch.long), teacher_logits=teacher)
    assert torch.allclose(out['teacher_kl'], (p * (p / q).log()).sum(-1), atol=1e-5)
    assert out['teacher_agreement'].tolist() == (p.argmax(1) == q.argmax(1)).float().tolist()
    same = secondary_information(student, torch.zeros(20, dtype=torch.long), teacher_logits=student + 3.)
    assert same['teacher_kl'].abs().max() < 1e-6 and same['teacher_agreement'].min() == 1


@pytest.mark.parametrize('arguments, message', [
    (dict(k=1), 'k=1: expected 2 to 6'),
    (dict(k=7), 'k=7: expected 2 to 6'),
    (dict(superclasses=torch.zeros(5, dtype=torch.long)), r'superclasses of shape \(5,\): expected \(6,\)'),
    (dict(teacher_logits=torch.zeros(4, 7)), r'teacher_logits of shape \(4, 7\): expected \(4, 6\)'),
])
def test_secondary_information_that_cannot_be_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        secondary_information(torch.zeros(4, 6), torch.zeros(4, dtype=torch.long), **arguments)


# -- the recipe -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    """Two runs on digits, with and without auxiliary exits."""
    folder = tmp_path_factory.mktemp('runs')
    return [untrained_run(folder / 'byot'), untrained_run(folder / 'plain', exits=())]


def call(recipe, monkeypatch, *arguments):
    monkeypatch.setattr(sys, 'argv', [recipe, *map(str, arguments)])
    runpy.run_path(str(RECIPES / recipe), run_name='__main__')


def test_analyze_compares_runs_and_draws_them(runs, tmp_path, monkeypatch, capsys):
    call('analyze.py', monkeypatch, '--checkpoint', *runs, '--images', 60, '--sigmas', 0, 0.1, '--repeats', 1,
         '--output', tmp_path)
    out = json.loads((tmp_path / 'analysis.json').read_text())
    assert (out['dataset'], out['split'], out['images']) == ('digits', 'test', 60)
    assert {p.name for p in tmp_path.iterdir()} == {
        'analysis.json', 'weight_noise.png', 'gradient_sizes.png', 'scatter_ratios.png', 'secondary_information.png'}
    assert all(p.read_bytes().startswith(b'\x89PNG') for p in tmp_path.glob('*.png'))
    byot, plain = out['networks']['byot'], out['networks']['plain']
    assert (list(byot['scatter']), list(plain['scatter'])) == (['exit0', 'exit1', 'exit2'], ['exit0'])
    assert (len(byot['noise']), len(plain['noise'])) == (8, 2)
    assert byot['gradients']['sum of all exits']['conv1.0'] > 0
    assert plain['gradients']['deepest exit'] == pytest.approx(plain['gradients']['sum of all exits'], rel=1e-5)
    assert [(r['part'], r['exit']) for r in plain['secondary']] == [
        (part, 'exit0') for part in ('train', 'test')]
    assert 'SSE/SSB' in capsys.readouterr().out


def test_analyze_runs_only_what_is_asked_for_and_on_the_part_asked_for(runs, tmp_path, monkeypatch):
    call('analyze.py', monkeypatch, '--checkpoint', runs[0], '--analysis', 'scatter', '--split', 'validation',
         '--output', tmp_path / 'new')
    out = json.loads((tmp_path / 'new' / 'analysis.json').read_text())
    assert (out['split'], out['images'], list(out['networks']['byot'])) == ('validation', 183, ['scatter'])
    assert sorted(p.name for p in (tmp_path / 'new').iterdir()) == ['analysis.json', 'scatter_ratios.png']


@pytest.mark.parametrize('arguments, message', [
    (['--superclass-column', 'coarse'], '--superclass-column coarse: digits has no such column'),
    (['--top-k', '11'], '--top-k 11: expected 2 to 10'),
    (['--images', '0'], '--images 0: expected 1 or more'),
    (['--images', '1'], '--images 1: The batches hold 1 classes'),
    (['--sigmas', '-1'], '--sigmas -1.0: expected numbers of 0 or more'),
    (['--repeats', '0'], '--repeats 0: expected 1 or more'),
])
def test_analyze_refuses_what_it_cannot_do(runs, tmp_path, monkeypatch, capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        call('analyze.py', monkeypatch, '--checkpoint', runs[0], '--analysis', 'scatter', 'secondary', '--output',
             tmp_path, *arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_analyze_refuses_checkpoints_of_different_classes_or_data(runs, tmp_path, monkeypatch, capsys):
    def load(source, **kwargs):  # as if there were another data set
        data = load_image_data(dataclasses.replace(source, dataset=None), **kwargs)
        return dataclasses.replace(data, name=source.dataset or 'digits')

    monkeypatch.setattr('timm_selfdistill.evaluation.trained_network.load_image_data', load)
    for name, change, message in (
        ('wide', dict(num_classes=12), 'byot has 10 classes, wide has 12'),
        ('elsewhere', dict(dataset='letters'), 'byot was trained on digits'),
    ):
        other = untrained_run(tmp_path / name, **change)
        with pytest.raises(SystemExit):
            call('analyze.py', monkeypatch, '--checkpoint', runs[0], other, '--output', tmp_path / 'out')
        assert message in capsys.readouterr().err


def test_evaluate_learns_the_ensemble_on_the_validation_part_alone(runs, monkeypatch, capsys):
    rows = {}
    for ensemble in ('logits', 'probabilities', 'learned'):
        capsys.readouterr()
        call('evaluate.py', monkeypatch, '--checkpoint', runs[0], '--ensemble', ensemble, '--json')
        out = json.loads(capsys.readouterr().out)
        rows[ensemble] = out['exits']
        assert out['ensemble'] == ensemble
    assert out['split'] == 'test' and sum(out['ensemble_weights']) == pytest.approx(1)
    assert rows['logits'][:-1] == rows['probabilities'][:-1] == rows['learned'][:-1]
    assert len({r[-1]['loss'] for r in rows.values()}) == 3
    with pytest.raises(SystemExit):
        call('evaluate.py', monkeypatch, '--checkpoint', runs[0], '--ensemble', 'learned', '--split', 'validation')
    assert 'the weights are learned on the validation split' in capsys.readouterr().err


# -- what the recipes share -------------------------------------------------------------------------------------------


def test_a_subset_has_of_every_class_its_share():
    part = load_image_data(DataSource('digits')).train
    drawn = subset(part, 100)
    assert len(drawn) == 100 and len(np.unique(drawn.index)) == 100 and np.isin(drawn.index, part.index).all()
    share = np.bincount(drawn.labels) / 100
    assert np.abs(share - np.bincount(part.labels) / len(part)).max() <= 0.01
    assert np.array_equal(drawn.index, subset(part, 100).index)
    assert not np.array_equal(drawn.index, subset(part, 100, seed=1).index)
    assert len(np.unique(subset(part, 10).labels)) == 10
    assert subset(part, None) is part is subset(part, len(part))
    with pytest.raises(ConfigError, match='`images=0`'):
        subset(part, 0)


def test_a_folder_of_generations_stands_for_all_of_them_in_order(tmp_path):
    for name in ('generation0', 'generation10', 'generation2', 'generation-old', 'plots'):
        (tmp_path / name).mkdir()
    found = list_checkpoints(['hf-hub:org/name', str(tmp_path), str(tmp_path / 'plots')])
    assert short_names(found) == ['name', 'generation0', 'generation2', 'generation10', 'plots']


def test_names_are_in_full_where_the_last_part_is_not_enough():
    assert short_names(['a/run', 'b/run']) == ['a/run', 'b/run']
    with pytest.raises(ConfigError, match='a/run`: given twice'):
        short_names(['a/run', 'b/run', 'a/run'])


def test_generations_are_drawn_with_and_without_a_teacher(tmp_path):
    rows = [
        dict(generation=i, exit0=60. + i, exit1=65. + i, ensemble=67. + i, generations_ensemble=67. + 2 * i,
             teacher_agreement=80. if i else None) for i in range(3)
    ]
    for name, some in (('all', rows), ('one', rows[:1])):
        plot_generations(some, 'generations', tmp_path / f'{name}.png')
        assert (tmp_path / f'{name}.png').read_bytes().startswith(b'\x89PNG')


def test_features_of_a_network_without_auxiliary_exits_are_those_of_its_classifier(batches):
    model = timm.create_model('test_resnet_sd', num_classes=5, exits=()).eval()
    (features,), _ = collect_features(model, batches)
    with torch.no_grad():
        assert torch.allclose(model.get_classifier()(features[:10]), model(batches[0][0]), atol=1e-5)
