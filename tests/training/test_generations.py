"""Generations of tolerant teachers: whole runs, small enough for seconds."""
import csv
import json
import shutil
import subprocess
import sys

import pytest
import torch
import yaml
from helpers import RECIPES
from helpers.images import write_two_colours
from helpers.processes import launch

from timm_selfdistill.config import TrainConfig
from timm_selfdistill.data.augment import eval_transform
from timm_selfdistill.data.image_data import load_image_data
from timm_selfdistill.data.source import DataSource
from timm_selfdistill.data.workers import create_eval_loader
from timm_selfdistill.errors import ConfigError, Preempted
from timm_selfdistill.hub.networks import load_checkpoint
from timm_selfdistill.training import generations
from timm_selfdistill.training.build import distillation_config
from timm_selfdistill.training.generations import generation_config, train_generations
from timm_selfdistill.training.loop import Loop
from timm_selfdistill.training.trainer import train

# Networks run in batches of another size, so that sums in another order may decide on one of the 80 test images.
ONE_IMAGE = 100 / 80 + 1e-3


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return str(write_two_colours(tmp_path_factory.mktemp('data')))


def settings(data, output, **more):
    defaults = dict(
        model='test_resnet', exits=(2,), epochs=1, batch_size=16, generations=2, patriarch='tsd', tsd_k=3,
        data_dir=data, label_column='fine', superclass_column='coarse', output=str(output), experiment='run', hflip=0.,
        workers=0,
    )
    return TrainConfig(**{**defaults, **more})


@pytest.fixture(scope='module')
def finished(data, tmp_path_factory):
    config = settings(data, tmp_path_factory.mktemp('runs'))
    return config, train_generations(config)


def weights(folder):
    return (folder / 'model.safetensors').read_bytes()


def rows_of(root):
    with (root / 'generations.csv').open(newline='') as f:
        return list(csv.DictReader(f))


def test_every_generation_is_a_run_with_a_seed_and_weights_of_its_own(finished):
    config, root = finished
    folders = [root / f'generation{m}' for m in range(3)]
    assert sorted(p.name for p in root.iterdir()) == [
        'args.yaml', 'generation0', 'generation1', 'generation2', 'generations.csv', 'generations.png']
    assert len({weights(f) for f in folders}) == 3
    args = [yaml.safe_load((f / 'args.yaml').read_text()) for f in folders]
    assert [a['seed'] for a in args] == [42, 43, 44]
    assert [a['patriarch'] for a in args] == ['tsd', 'plain', 'plain']
    assert [a['teacher'] for a in args] == [None, *(str(f) for f in folders[:2])]
    headers = [(f / 'summary.csv').read_text().splitlines()[0] for f in folders]
    assert ['train_tsd1' in h for h in headers] == [True, False, False]
    assert ['train_teacher1' in h for h in headers] == [False, True, True]
    assert all('train_kl0' in h for h in headers)  # self-distillation goes on in every generation


def test_the_table_repeats_what_the_runs_measured(finished):
    _, root = finished
    rows = rows_of(root)
    assert [r['generation'] for r in rows] == ['0', '1', '2']
    for m, row in enumerate(rows):
        results = json.loads((root / f'generation{m}' / 'results.json').read_text())['test']
        for result in results:
            assert float(row[result['exit']]) == pytest.approx(result['top1'], abs=ONE_IMAGE)
    assert rows[0]['generations_ensemble'] == rows[0]['exit1']
    assert rows[0]['teacher_agreement'] == ''
    for row in rows[1:]:
        assert 0 <= float(row['teacher_agreement']) <= 100
    for part in ('train', 'test'):
        for name in ('top_score', 'runner_up_score', 'entropy', 'sibling_mass', 'sibling_share'):
            assert all(float(r[f'{part}_{name}']) >= 0 for r in rows)


def test_generations_measure_agreement_and_ensemble_over_all_images(finished, data):
    """By hand, from the weights that were saved."""
    config, root = finished
    table = load_image_data(DataSource(data_dir=data, label_column='fine'))
    loader = create_eval_loader(
        table.test, eval_transform(generations.resolve_data_config(
            model=load_checkpoint(str(root / 'generation0'))[0])), 64)
    images, target = (torch.cat(t) for t in zip(*loader))
    with torch.no_grad():
        outputs = [load_checkpoint(str(root / f'generation{m}'))[0](images) for m in range(3)]
    row = rows_of(root)[2]
    agreement = (outputs[1].argmax(1) == outputs[2].argmax(1)).float().mean()
    mean = sum(z.softmax(1) for z in outputs)
    assert float(row['teacher_agreement']) == pytest.approx(100 * agreement.item(), abs=ONE_IMAGE)
    assert float(row['generations_ensemble']) == pytest.approx(
        100 * (mean.argmax(1) == target).float().mean().item(), abs=ONE_IMAGE)


@pytest.mark.slow
def test_a_killed_run_goes_on_in_the_generation_where_it_stopped(finished, data, tmp_path, monkeypatch):
    config, whole = finished
    original = Loop.train_batch
    steps = []

    def die(run, *batch):
        if run.setup.config.experiment == 'generation1':
            steps.append(run.keeper.progress.steps)
            if run.keeper.progress.steps == 3:
                raise KeyboardInterrupt
        return original(run, *batch)

    with monkeypatch.context() as patch:
        patch.setattr(Loop, 'train_batch', die)
        for _ in range(2):
            with pytest.raises(Preempted, match='Stopped by a second SIGINT, amid a step'):
                train_generations(settings(data, tmp_path, resume='auto', checkpoint_every='2'))
    assert steps == [0, 1, 2, 3, 2, 3]
    root = tmp_path / 'run'
    assert (root / 'generation1' / 'model.safetensors').exists()
    assert not (root / 'generation1' / 'results.json').exists()
    kept = (root / 'generation0' / 'model.safetensors').stat().st_mtime_ns
    train_generations(settings(data, tmp_path, resume='auto'))
    assert (root / 'generation0' / 'model.safetensors').stat().st_mtime_ns == kept
    for m in range(3):
        assert weights(root / f'generation{m}') == weights(whole / f'generation{m}')
    assert rows_of(root) == rows_of(whole)


@pytest.mark.slow
def test_more_generations_can_follow(finished, tmp_path):
    config, whole = finished
    shutil.copytree(whole, tmp_path / 'run')
    train_generations(settings(config.data_dir, tmp_path, resume='auto', generations=3))
    assert len(rows_of(tmp_path / 'run')) == 4
    assert weights(tmp_path / 'run' / 'generation2') == weights(whole / 'generation2')


@pytest.mark.parametrize('more, message', [
    (dict(), 'exists, and runs are never overwritten; choose another name, or pass `resume=auto`'),
    (dict(resume='auto', lr=0.3), r'generation0 of another recipe: `lr` was 0.05 and is 0.3'),
    (dict(resume='auto', label_weight=0.3), r'generation1 of another recipe: `label_weight` was None and is 0.3'),
    (dict(resume='auto', patriarch='plain'), r'another recipe: `patriarch` was tsd and is plain'),
])
def test_generations_of_another_recipe_are_refused_and_left_alone(finished, more, message):
    config, root = finished
    before = {p: p.read_bytes() for p in root.rglob('*') if p.is_file()}
    with pytest.raises(ConfigError, match=message):
        train_generations(settings(config.data_dir, root.parent, **more))
    assert {p: p.read_bytes() for p in root.rglob('*') if p.is_file()} == before


def test_a_folder_of_something_else_is_refused_and_left_alone(data, tmp_path):
    (tmp_path / 'run').mkdir()
    (tmp_path / 'run' / 'thesis.txt').write_text('precious')
    with pytest.raises(ConfigError, match='run holds no generations'):
        train_generations(settings(data, tmp_path, resume='auto'))
    (tmp_path / 'run' / 'generation1').mkdir()
    (tmp_path / 'run' / 'generation1' / 'thesis.txt').write_text('precious')
    with pytest.raises(ConfigError, match='holds generation1, which has no args.yaml'):
        train_generations(settings(data, tmp_path, resume='auto'))
    assert sorted(p.name for p in tmp_path.rglob('*') if p.is_file()) == ['thesis.txt', 'thesis.txt']


def test_settings_that_cannot_be_read_are_named(finished, data, tmp_path):
    shutil.copytree(finished[1], tmp_path / 'run')
    (tmp_path / 'run' / 'generation1' / 'args.yaml').write_text('lr: [')
    with pytest.raises(ConfigError, match='holds generation1 whose args.yaml cannot be read'):
        train_generations(settings(data, tmp_path, resume='auto'))


@pytest.mark.parametrize('more, message', [
    (dict(tsd_k=9), '`tsd_k=9`: expected a number from 2 to 8, the number of classes'),
    (dict(model='resnet81'), '`model=resnet81`'),
])
def test_bad_settings_are_refused_before_anything_is_written(data, tmp_path, more, message):
    with pytest.raises(ConfigError, match=message):
        train_generations(settings(data, tmp_path, **more))
    assert list(tmp_path.iterdir()) == []


def test_generation_settings_stand_for_themselves(data, tmp_path):
    """Each generation's args.yaml can be given to train.py."""
    config = settings(data, tmp_path, label_weight=0.4, teacher_temperature=2.0, eta=0.5)
    for number in range(3):
        own = generation_config(config, tmp_path / 'run', number)
        own.check()
        assert distillation_config(own).label_weight == (0.4 if number else 0.6)
    assert distillation_config(generation_config(config, tmp_path / 'run', 0)).eta == 0.5


# -- classic distillation ---------------------------------------------------------------------------------------------


def test_a_run_teaches_a_plain_student(finished, data, tmp_path):
    _, root = finished
    teacher = str(root / 'generation2')
    folder = train(settings(data, tmp_path, generations=None, patriarch='plain', method='kd', teacher=teacher))
    assert json.loads((folder / 'config.json').read_text())['architecture'] == 'test_resnet'
    assert load_checkpoint(str(folder))[0].num_exits == 1
    header = (folder / 'summary.csv').read_text().splitlines()[0]
    assert 'train_teacher0' in header
    assert 'taught by generation2' in (folder / 'README.md').read_text()


@pytest.mark.parametrize('teacher, message', [
    ('nowhere/run', '`teacher=nowhere/run`: there is no config.json in nowhere/run'),
    ('resnet81', r'`teacher=resnet81`: Unknown model \(resnet81\)'),
    ('OTHER', '`teacher=.*`: The network does not know the classes dark r, light r, .*It knows: 0, 1, 2'),
])
def test_a_teacher_that_cannot_teach_is_refused(data, tmp_path, teacher, message):
    if teacher == 'OTHER':
        teacher = str(train(TrainConfig(
            model='test_resnet', method='plain', epochs=1, output=str(tmp_path / 'other'), batch_size=1250)))
    with pytest.raises(ConfigError, match=message):
        train(settings(data, tmp_path / 'runs', generations=None, patriarch='plain', method='kd', teacher=teacher))
    assert not (tmp_path / 'runs').exists()


@pytest.mark.slow
def test_two_processes_train_generations(data, tmp_path):
    out = launch(
        2, RECIPES / 'train.py', '--model', 'test_resnet', '--exits', 2, '--epochs', 1, '--batch-size', 16,
        '--generations', 1, '--patriarch', 'confidence-penalty', '--data-dir', data, '--label-column', 'fine',
        '--superclass-column', 'coarse', '--output', tmp_path, '--experiment', 'run')
    assert out.returncode == 0, out.stderr[-3000:]
    rows = rows_of(tmp_path / 'run')
    assert len(rows) == 2
    # what the two processes measured together, one measures alone
    out = subprocess.run(
        [sys.executable, RECIPES / 'evaluate.py', '--checkpoint', tmp_path / 'run' / 'generation1', '--json'],
        capture_output=True, text=True, check=True)
    for result in json.loads(out.stdout)['exits']:
        assert float(rows[1][result['exit']]) == pytest.approx(result['top1'], abs=ONE_IMAGE)
