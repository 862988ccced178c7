"""Two processes do what one does, launched as a user launches them."""
import csv
import json
import shutil
import socket
import subprocess

import pytest
import timm
import torch
from helpers import HELPERS, RECIPES
from helpers.processes import command, launch

from timm_selfdistill.cli.options import parse_train_config
from timm_selfdistill.hub.networks import save_model
from timm_selfdistill.training.trainer import train

TRAIN = RECIPES / 'train.py'
COUNTS = ('count', 'top1_count', 'top5_count')


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
    ['--hint-form', 'sum', '--hint-weight', 1e-3, '--hint-exits', 'all-but-last', '--hint-linear',
     '--exit-head', 'bottleneck-attention'],
], ids=['default', 'student', 'patriarch', 'authors'])
def test_two_processes_give_the_loss_gradients_and_counts_of_one(tmp_path, teacher, settings):
    dumps = []
    settings = [teacher if s == 'TEACHER' else s for s in settings]
    for processes in (1, 2):
        path = tmp_path / f'{processes}.pt'
        out = launch(
            processes, HELPERS / 'one_step.py', path, '--model', 'test_resnet', '--exits', 1, 2, 3, '--batch-size', 48,
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
            other = two['metrics'][part][name]
            assert metrics['count'] == other['count'] == count
            # smaller batches are summed in another order, which may decide on an image whose best scores, or whose
            # confidence and the border of a bin, are all but equal
            assert [metrics[k] for k in COUNTS] == pytest.approx([other[k] for k in COUNTS], abs=1), name
            assert metrics['loss'] == pytest.approx(other['loss'], rel=1e-5)
            assert metrics['ece'] == pytest.approx(other['ece'], abs=200 / count)
            assert metrics['aurc'] == pytest.approx(other['aurc'], abs=200 / count)


TINY = ('--model', 'test_resnet', '--exits', 2, 3, '--epochs', 2, '--batch-size', 100)


def rates(folder):
    with (folder / 'summary.csv').open() as f:
        return [row['lr'] for row in csv.DictReader(f)]


@pytest.fixture(scope='module')
def two(tmp_path_factory):
    """Folder of a run of two processes."""
    folder = tmp_path_factory.mktemp('two')
    out = launch(2, TRAIN, *TINY, '--output', folder, '--experiment', 'run', '--model-ema')
    assert out.returncode == 0, out.stderr[-3000:]
    assert out.stdout.count('epoch 1/2') == 1
    assert '2 × cpu' in out.stdout
    return folder / 'run'


@pytest.mark.slow
def test_the_number_of_processes_changes_neither_steps_nor_learning_rate(two, tmp_path):
    config = parse_train_config([*map(str, TINY), '--output', str(tmp_path), '--experiment', 'run'])
    assert rates(train(config)) == rates(two)
    assert [p.name for p in (tmp_path / 'run' / 'checkpoints').iterdir()] == ['step24']
    assert [p.name for p in (two / 'checkpoints').iterdir()] == ['step24']


@pytest.mark.slow
def test_two_machines_train_the_run_of_two_processes(two, tmp_path):
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    machines = [
        subprocess.Popen(
            command(
                1, TRAIN, *TINY, '--output', tmp_path, '--experiment', 'run', '--model-ema', options=(
                    '--nnodes', 2, '--node_rank', rank, '--master_addr', '127.0.0.1', '--master_port', port)),
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        ) for rank in range(2)
    ]
    outs = [machine.communicate(timeout=300)[0] for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], outs[0][-3000:]
    assert 'epoch 2/2' in outs[0]
    assert 'epoch 2/2' not in outs[1]
    assert (tmp_path / 'run' / 'model.safetensors').read_bytes() == (two / 'model.safetensors').read_bytes()


@pytest.mark.slow
def test_two_processes_accumulate_gradients(two, tmp_path):
    out = launch(2, TRAIN, *TINY, '--output', tmp_path, '--experiment', 'run', '--grad-accum-steps', 2)
    assert out.returncode == 0, out.stderr[-3000:]
    assert rates(tmp_path / 'run') == rates(two)


@pytest.mark.slow
def test_sharded_parameters_train_and_go_on_to_the_bit(tmp_path):
    arguments = (*TINY, '--output', tmp_path, '--checkpoint-every', 5, '--checkpoint-hist', 9)
    out = launch(2, HELPERS / 'sharded.py', *arguments, '--experiment', 'whole')
    assert out.returncode == 0, out.stderr[-3000:]
    whole, half = tmp_path / 'whole', tmp_path / 'half'
    shutil.copytree(whole / 'checkpoints' / 'step5', half / 'checkpoints' / 'step5')
    shutil.copy(whole / 'args.yaml', half)
    out = launch(2, HELPERS / 'sharded.py', *arguments, '--experiment', 'half', '--resume', 'auto')
    assert out.returncode == 0, out.stderr[-3000:]
    assert 'checkpoints/step5: epoch 1, 5 of 12 steps done' in out.stdout
    for name in ('model.safetensors', 'results.json', 'summary.csv'):
        assert (whole / name).read_bytes() == (half / name).read_bytes(), name
    # chance is 10; the shallowest exit learns first and comes to about 80
    assert json.loads((whole / 'results.json').read_text())['test'][0]['top1'] > 50


@pytest.mark.slow
def test_a_mistake_is_told_once(tmp_path):
    out = launch(2, TRAIN, '--model', 'resnet81', '--output', tmp_path)
    assert out.returncode != 0
    assert out.stderr.count('error: --model resnet81: timm has no such model') == 1
    assert list(tmp_path.iterdir()) == []
