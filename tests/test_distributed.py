"""Two processes do what one does, launched as a user launches them."""
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch

from timm_selfdistill.hub import save_model

HERE = Path(__file__).parent
COUNTS = ('count', 'top1_count', 'top5_count')


def launch(processes, script, *arguments):
    command = [
        sys.executable, '-m', 'accelerate.commands.launch', '--cpu', '--num_processes', str(processes),
        str(script), *map(str, arguments),
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope='module')
def teacher(tmp_path_factory):
    """Folder of an untrained network for ten classes."""
    folder = tmp_path_factory.mktemp('teacher')
    save_model(timm.create_model('test_resnet', num_classes=10), folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize('settings', [
    ['--hint-weight', 0.5],
    ['--hint-on', 'maps', '--hint-weight', 0.5, '--exit-teacher', 'all', '--exit-weights', 'equilibrium',
     '--exit-head', 'cascade', '--teacher', 'TEACHER', '--alpha', 0.1, '--alpha-end', 0.9],
    ['--patriarch', 'tsd', '--exit-teacher', 'ensemble', '--exit-weights', 'ramp', '--exit-head', 'separable'],
], ids=['default', 'student', 'patriarch'])
def test_two_processes_give_the_loss_gradients_and_counts_of_one(tmp_path, teacher, settings):
    dumps = []
    settings = [teacher if s == 'TEACHER' else s for s in settings]
    for processes in (1, 2):
        path = tmp_path / f'{processes}.pt'
        out = launch(
            processes, HERE / 'one_step.py', path, '--model', 'test_resnet', '--exits', 1, 2, 3, '--batch-size', 48,
            '--output', tmp_path, '--experiment', f'run{processes}', *settings)
        assert path.exists(), out.stderr[-3000:]
        dumps.append(torch.load(path))
    one, two = dumps
    assert (one['processes'], two['processes']) == (1, 2)
    assert (one['local_batch'], two['local_batch']) == (48, 24)
    assert one['terms'].keys() == two['terms'].keys()
    for name, value in one['terms'].items():
        assert torch.allclose(value, two['terms'][name], rtol=1e-5), name
    assert one['grads'].keys() == two['grads'].keys()
    for name, grad in one['grads'].items():
        if grad is not None:  # batch norm's weights have gradients in eval mode too, so none is missing
            scale = grad.abs().max()
            assert torch.allclose(grad, two['grads'][name], atol=1e-5 * scale.item(), rtol=1e-4), name
    assert any(g is not None and g.abs().max() > 0 for g in one['grads'].values())
    for part, count in (('validation', 183), ('test', 364)):  # 183 = 3 × 48 + 39 = 7 × 24 + 15: ragged in both
        for name, metrics in one['metrics'][part].items():
            assert metrics['count'] == count
            assert [metrics[k] for k in COUNTS] == [two['metrics'][part][name][k] for k in COUNTS], name
            assert metrics['loss'] == pytest.approx(two['metrics'][part][name]['loss'], rel=1e-5)
            assert metrics['ece'] == pytest.approx(two['metrics'][part][name]['ece'], rel=1e-3, abs=1e-3)


@pytest.mark.slow
def test_two_processes_train_one_run(tmp_path):
    out = launch(
        2, HERE.parent / 'recipes' / 'train.py', '--model', 'test_resnet', '--exits', 2, 3, '--epochs', 1,
        '--output', tmp_path, '--experiment', 'run', '--model-ema', '--workers', 1)
    assert out.returncode == 0, out.stderr[-3000:]
    assert out.stdout.count('epoch 1/1') == 1
    assert '2 × cpu' in out.stdout
    assert (tmp_path / 'run' / 'model.safetensors').exists()


@pytest.mark.slow
def test_a_mistake_is_told_once(tmp_path):
    out = launch(2, HERE.parent / 'recipes' / 'train.py', '--model', 'resnet81', '--output', tmp_path)
    assert out.returncode != 0
    assert out.stderr.count('error: --model resnet81: timm has no such model') == 1
    assert list(tmp_path.iterdir()) == []
