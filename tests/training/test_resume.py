"""A run that was interrupted, wherever, ends as if it had not been."""
import os
import signal
import subprocess
import sys

import pytest
import timm
import torch
from helpers import HELPERS
from helpers.runs import die, interrupted, resumable
from torch.utils._python_dispatch import TorchDispatchMode

from timm_selfdistill.config import TrainConfig
from timm_selfdistill.errors import NonFiniteLossError
from timm_selfdistill.training.loss_meter import TermMeter
from timm_selfdistill.training.run import Run
from timm_selfdistill.training.trainer import create_accelerator, train

COMPARED = ('model.safetensors', 'best/model.safetensors', 'summary.csv', 'results.json')
STEPS = 12  # of an epoch of digits


def same(one, other):
    return [name for name in COMPARED if (one / name).read_bytes() != (other / name).read_bytes()] == []


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    return train(resumable(tmp_path_factory.mktemp('whole')))


@pytest.mark.slow
@pytest.mark.parametrize('at', [3, 7, STEPS, STEPS + 1, 2 * STEPS - 1])
def test_going_on_from_a_checkpoint_gives_the_same_bits(whole, tmp_path, monkeypatch, at):
    assert same(interrupted(resumable(tmp_path), monkeypatch, at, die), whole)


@pytest.mark.slow
@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_writes_a_checkpoint_after_the_step(whole, tmp_path, monkeypatch, number, capsys):
    config = resumable(tmp_path, checkpoint_every=None)
    before = signal.getsignal(number)
    assert same(interrupted(config, monkeypatch, 6, lambda: os.kill(os.getpid(), number)), whole)
    assert f'checkpoints/step7: epoch 1, 7 of {STEPS} steps done' in capsys.readouterr().out
    assert signal.getsignal(number) == before


@pytest.mark.slow
def test_settings_that_change_nothing_may_change(whole, tmp_path, monkeypatch):
    monkeypatch.setattr('timm_selfdistill.training.keeper._CHECKPOINT_AGE', 0.)
    assert same(interrupted(resumable(tmp_path, checkpoint_every='2'), monkeypatch, 9, die), whole)
    kept = sorted(p.name for p in (tmp_path / 'run' / 'checkpoints').iterdir())
    assert kept == ['step22', 'step24']


@pytest.mark.slow
def test_workers_and_accumulated_gradients_go_on_likewise(tmp_path, monkeypatch):
    more = dict(loader='workers', workers=1, grad_accum_steps=2)
    undisturbed = train(resumable(tmp_path / 'a', **more))
    assert same(interrupted(resumable(tmp_path / 'b', **more), monkeypatch, 8, die), undisturbed)


@pytest.mark.slow
def test_an_epoch_that_is_over_begins_no_new_one_when_stopped_at_its_end(whole, tmp_path, monkeypatch):
    at = 2 * STEPS - 1  # the last step of all
    config = resumable(tmp_path, checkpoint_every=None)
    assert same(interrupted(config, monkeypatch, at, lambda: os.kill(os.getpid(), signal.SIGTERM)), whole)


@pytest.mark.faults
@pytest.mark.parametrize('processes', [1, 2])
def test_killed_at_random_moments(processes):
    command = [sys.executable, str(HELPERS / 'kill_resume.py'), '--kills', '3', '--processes', str(processes)]
    out = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert out.returncode == 0, out.stdout + out.stderr
    assert f'3 kills of {processes} process(es)' in out.stdout


@pytest.mark.slow
def test_accumulated_gradients_are_those_of_the_whole_batch(tmp_path):
    ends = []
    for parts in (1, 4):
        folder = train(resumable(
            tmp_path, model='test_vit', exits=(1, 3), epochs=1, drop=None, mixup=0., experiment=f'parts{parts}',
            grad_accum_steps=parts, model_ema=False, clip_grad=1.0, batch_size=200,
        ))
        ends.append(timm.create_model(f'local-dir:{folder}', pretrained=True).state_dict())
    one, four = ends
    for name, value in one.items():
        assert torch.allclose(value, four[name], rtol=1e-3, atol=1e-5), name


class _NoSync(TorchDispatchMode):
    """Raises where the host would wait for an accelerator; `tolist` and its like are no operations to torch."""

    waiting = {'_local_scalar_dense', 'nonzero', 'is_nonzero', 'masked_select', 'equal', 'item'}

    def __enter__(self):
        self.patch = pytest.MonkeyPatch()
        for name in ('tolist', 'numpy', 'cpu', '__array__'):
            self.patch.setattr(torch.Tensor, name, self._refuse)
        return super().__enter__()

    def __exit__(self, *error):
        self.patch.undo()
        super().__exit__(*error)

    def _refuse(self, *args):
        raise AssertionError('reading a tensor waits for the device')

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        by_mask = name.startswith('index') and any(
            isinstance(i, torch.Tensor) and i.dtype == torch.bool for arg in args if isinstance(arg, (list, tuple))
            for i in arg)
        if name in self.waiting or by_mask:
            raise AssertionError(f'{func} waits for the device')
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize('more', [
    dict(mixup=0.2, model_ema=True, clip_grad=1.0, exit_weights='ramp', alpha_end=0.9),
    dict(hint_on='maps', exit_teacher='all', exit_weights='equilibrium', opt='adamw', patriarch='tsd'),
], ids=['mixup', 'patriarch'])
def test_no_step_waits_for_the_device(tmp_path, more):
    config = TrainConfig(model='test_resnet', exits=(2, 3), output=str(tmp_path), **more)
    run = Run(config, create_accelerator(config), tmp_path / 'run')
    run.setup.task.train()
    run.loop.look_every = 1000  # as on an accelerator between two looks
    batches = iter(run.setup.loader)
    for i in range(3):
        images, target = next(batches)
        if i == 0:  # what is made once may wait
            run.loop.train_batch(images, target)
        else:
            with _NoSync():
                run.loop.train_batch(images, target)
    assert run.keeper.progress.steps == 3
    meter, accelerator = run.keeper.meter, run.setup.accelerator
    for look in (lambda: meter.check(accelerator, 0), lambda: images[images > 0], lambda: target.max().item()):
        with pytest.raises(AssertionError, match='waits for the device'), _NoSync():
            look()


def test_the_meter_names_step_and_terms_of_the_first_bad_batch(tmp_path):
    accelerator = create_accelerator(TrainConfig())
    meter = TermMeter(torch.device('cpu'), accumulate=2)
    good, bad = torch.tensor(1.), torch.tensor(float('nan'))
    for i in range(8):
        meter.update(dict(loss=bad if i > 4 else good, ce0=good, kl0=bad if i == 5 else good, output=torch.zeros(3)))
    with pytest.raises(NonFiniteLossError, match='Loss not finite in epoch 7, step 2: kl0.$'):
        meter.check(accelerator, 7)
