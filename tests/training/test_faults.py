"""What goes wrong amid a run is told in a sentence and costs nothing: going on gives the same to the bit."""
import math
import multiprocessing
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path

import datasets
import psutil
import pytest
import torch
from helpers import RECIPES
from helpers.images import write_two_colours

from timm_selfdistill.cli.launch import PREEMPTED, run_command
from timm_selfdistill.config import TrainConfig
from timm_selfdistill.data.epoch_order import EpochBatches
from timm_selfdistill.data.image_data import load_image_data
from timm_selfdistill.data.source import DataSource
from timm_selfdistill.errors import ConfigError, NonFiniteLossError, Preempted, UnreadableImageError
from timm_selfdistill.training.keeper import Keeper
from timm_selfdistill.training.loop import Loop
from timm_selfdistill.training.trainer import train

TRAIN = RECIPES / 'train.py'
COMPARED = ('model.safetensors', 'best/model.safetensors', 'summary.csv', 'results.json')
GOES_ON = 'The same command with --experiment run --resume auto goes on from the last checkpoint.'


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    """A data set that is trained on in four steps an epoch."""
    return write_two_colours(tmp_path_factory.mktemp('data'), train=80, test=16)


def settings(data, output, **other):
    return TrainConfig(**{**dict(
        model='test_resnet', exits=(2, 3), epochs=2, batch_size=16, data_dir=str(data), label_column='fine',
        val_fraction=0.2, drop=0.1, loader='workers', workers=0, checkpoint_every='1', output=str(output),
        experiment='run', resume='auto',
    ), **other})


def command(config, processes=1):
    """Return the command line of a config."""
    start = [sys.executable]
    if processes > 1:  # what `accelerate launch --cpu` ends in, see launch.relaunch_on_cpu, without its imports
        start += ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={processes}']
    arguments = []
    for name, value in config.settings().items():
        if value not in (None, [], TrainConfig.__dataclass_fields__[name].default):
            arguments += [f'--{name.replace("_", "-")}', *map(str, value if isinstance(value, list) else [value])]
    return [*start, str(TRAIN), *arguments]


@pytest.fixture(scope='module')
def whole(data, tmp_path_factory):
    """Folder of a run that nothing disturbed."""
    return train(settings(data, tmp_path_factory.mktemp('whole')))


@contextmanager
def before_step(number, act):
    """Let `act(run)` happen before step `number` of a run, counted from 0."""
    original = Loop.train_batch

    def train_batch(run, *batch):
        if run.keeper.progress.steps == number:
            act(run)
        return original(run, *batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Loop, 'train_batch', train_batch)
        yield


@pytest.fixture(scope='module')
def stopped(data, tmp_path_factory):
    """Folder of a run that was stopped after its sixth step, in the second epoch."""
    output = tmp_path_factory.mktemp('stopped')
    with before_step(5, lambda run: os.kill(os.getpid(), signal.SIGTERM)), pytest.raises(Preempted):
        train(settings(data, output))
    return output / 'run'


@pytest.fixture
def copy(stopped, tmp_path):
    """A copy of it to spoil."""
    return Path(shutil.copytree(stopped, tmp_path / 'run'))


def checkpoints(folder):
    return sorted(p.name for p in (folder / 'checkpoints').iterdir())


def assert_equal(folder, whole):
    for name in COMPARED:
        assert (folder / name).read_bytes() == (whole / name).read_bytes(), name


def fail(capfd, run):
    """Run what must fail; return exit status and message, which must be a line without a traceback."""
    with pytest.raises(SystemExit) as e:
        run_command(run)
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith(('error: ', 'Stopped by'))]
    assert len(lines) == 1
    assert 'Traceback' not in lines[0]
    return e.value.code, lines[0]


def await_checkpoint(process, folder, step, seconds=120):
    """Wait until a run has written a checkpoint after `step` or later."""
    end = time.monotonic() + seconds
    while not any(int(p.name[4:]) >= step for p in folder.glob('checkpoints/step*')):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < end
        time.sleep(0.002)


@pytest.mark.parametrize('name', ['SIGTERM', 'SIGINT'])
@pytest.mark.faults
def test_a_signal_ends_the_step_writes_a_checkpoint_and_exits_with_status_75(data, whole, tmp_path, capfd, name):
    number = getattr(signal, name)
    before = signal.getsignal(number)
    # no checkpoints but those that the signal asks for
    config = settings(data, tmp_path, checkpoint_every=None)
    with before_step(2, lambda run: os.kill(os.getpid(), number)):
        status, message = fail(capfd, lambda: train(config))
    assert status == PREEMPTED == 75
    assert message == f'Stopped by {name} after step 3. {GOES_ON}'
    assert checkpoints(tmp_path / 'run') == ['step3']
    assert signal.getsignal(number) == before
    train(config)
    assert f'resume  {tmp_path / "run" / "checkpoints" / "step3"}: epoch 1, 3 of 4 steps' in capfd.readouterr().out
    assert_equal(tmp_path / 'run', whole)


def truncate(checkpoint):
    os.truncate(checkpoint / 'state.pt', 1000)


def flip_a_bit(checkpoint):
    with (checkpoint / 'state.pt').open('r+b') as f:
        f.seek(2_000_000)
        byte = f.read(1)[0]
        f.seek(2_000_000)
        f.write(bytes([byte ^ 1]))


@pytest.mark.parametrize('damage, message', [
    (truncate, r'state.pt has 1,000 bytes of 5,\d+,\d+'),
    (flip_a_bit, 'the contents of state.pt have changed since it was written'),
    (lambda checkpoint: (checkpoint / 'about.json').unlink(), 'about.json cannot be read: No such file or directory'),
    (lambda checkpoint: (checkpoint / 'about.json').write_text('{"si'), 'about.json cannot be read'),
], ids=['truncated', 'bit', 'missing', 'json'])
@pytest.mark.faults
def test_a_damaged_checkpoint_is_told_of_and_the_one_before_is_used(data, whole, copy, capfd, damage, message):
    assert checkpoints(copy) == ['step5', 'step6']
    damage(copy / 'checkpoints' / 'step6')
    train(settings(data, copy.parent))
    out = capfd.readouterr().out
    place = re.escape(str(copy / 'checkpoints'))
    assert re.search(rf'^The checkpoint {place}/step6 is damaged and left out: {message}\.$', out, re.M)
    assert re.search(rf'^resume  {place}/step5: epoch 2, 1 of 4 steps done$', out, re.M)
    assert_equal(copy, whole)


@pytest.mark.faults
def test_without_any_good_checkpoint_a_run_begins_anew(data, whole, copy, capfd):
    for checkpoint in (copy / 'checkpoints').iterdir():
        truncate(checkpoint)
    train(settings(data, copy.parent))
    out = capfd.readouterr().out
    assert out.count(' is damaged and left out: ') == 2
    assert 'resume  ' not in out
    assert_equal(copy, whole)


def test_another_recipe_is_refused_and_its_changes_are_named(data, copy):
    before = {p: p.stat().st_mtime_ns for p in copy.rglob('*')}
    with pytest.raises(ConfigError) as e:
        train(settings(data, copy.parent, lr=0.5, method='plain', workers=1, checkpoint_every=None))
    assert str(e.value) == (
        f'`output={copy.parent}`, `experiment=run`: the folder {copy} holds a run of another recipe: '
        f'`method` was byot and is plain; `lr` was 0.05 and is 0.5.')
    assert {p: p.stat().st_mtime_ns for p in copy.rglob('*')} == before


def test_a_complete_run_is_left_as_it_is(data, whole, capfd):
    before = {p: p.stat().st_mtime_ns for p in whole.rglob('*')}
    assert train(settings(data, whole.parent)) == whole
    assert capfd.readouterr().out == f'The run in {whole} is complete; there is nothing to go on with.\n'
    assert {p: p.stat().st_mtime_ns for p in whole.rglob('*')} == before


@contextmanager
def largest_file(size):
    """Let the system refuse to write beyond a number of bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.faults
def test_a_checkpoint_that_cannot_be_written_is_told_of_and_training_goes_on(data, whole, copy, capfd):
    kept = {name: (copy / 'checkpoints' / name / 'state.pt').read_bytes() for name in ('step5', 'step6')}
    with largest_file(4_000_000):  # weights have 2.5 million bytes, checkpoints 5
        train(settings(data, copy.parent))
    warnings = [line for line in capfd.readouterr().out.splitlines() if line.startswith('warning: ')]
    assert warnings[0] == (
        f'warning: Cannot write the checkpoint {copy / "checkpoints" / "step7"}: File too large. '
        f'Those before it are kept. Training goes on.')
    assert len(warnings) == 3  # of the steps 7 and 8, and the end of the epoch
    assert checkpoints(copy) == ['step5', 'step6']
    for name, state in kept.items():
        assert (copy / 'checkpoints' / name / 'state.pt').read_bytes() == state
    assert_equal(copy, whole)


@pytest.mark.faults
def test_weights_that_cannot_be_written_end_the_run_but_not_for_good(data, whole, copy, capfd):
    weights = (copy / 'model.safetensors').read_bytes()
    with largest_file(1_000_000):
        status, message = fail(capfd, lambda: train(settings(data, copy.parent)))
    assert status == 2
    assert message.startswith(f'error: Cannot write the weights to {copy}: ')
    assert re.search(r': File too large .*\. Those before are kept\.$', message)
    assert (copy / 'model.safetensors').read_bytes() == weights
    assert not (copy / 'results.json').exists()
    train(settings(data, copy.parent))
    assert_equal(copy, whole)


def end_workers(number):
    for worker in multiprocessing.active_children():
        subprocess.run(['kill', f'-{number:d}', str(worker.pid)], check=True)  # as a scheduler does, not the trainer
        if number == signal.SIGKILL:
            time.sleep(0.2)  # what then happens shall happen amid the step


@pytest.mark.faults
def test_a_killed_worker_ends_the_run_between_two_steps(data, whole, tmp_path, capfd):
    with before_step(2, lambda run: end_workers(signal.SIGKILL)):
        status, message = fail(capfd, lambda: train(settings(data, tmp_path, workers=1, checkpoint_every=None)))
    assert status == 2
    assert re.match(r'error: A loader process died: DataLoader worker \(pid.* \d+\) .*\. Often the memory was full, .* '
                    r'--workers need less of it\. ', message)
    assert message.endswith(GOES_ON)
    step, = checkpoints(tmp_path / 'run')
    assert int(step[4:]) >= 3  # batches that had been loaded are not lost
    train(settings(data, tmp_path))
    assert_equal(tmp_path / 'run', whole)


@pytest.mark.faults
def test_a_sigterm_to_its_workers_does_not_disturb_a_run(data, whole, tmp_path):
    with before_step(1, lambda run: end_workers(signal.SIGTERM)):
        train(settings(data, tmp_path, workers=1))
    assert_equal(tmp_path / 'run', whole)


@pytest.mark.faults
def test_sigterm_to_all_processes_of_a_run_ends_it_with_a_checkpoint_and_status_75(data, whole, tmp_path):
    process = subprocess.Popen(
        command(settings(data, tmp_path, workers=1)), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        start_new_session=True)
    await_checkpoint(process, tmp_path / 'run', 2)
    worker, = psutil.Process(process.pid).children()
    os.killpg(process.pid, signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == PREEMPTED, err
    assert re.search(rf'^Stopped by SIGTERM after step [2-8]\. {GOES_ON}$', err, re.M)
    assert 'Traceback' not in err
    assert not worker.is_running()
    train(settings(data, tmp_path))
    assert_equal(tmp_path / 'run', whole)


@pytest.mark.parametrize('workers', [0, 1])
@pytest.mark.faults
def test_an_unreadable_image_amid_an_epoch_is_named_and_can_be_repaired(data, whole, tmp_path, capfd, workers):
    folder = Path(shutil.copytree(data, tmp_path / 'set'))
    train_part = load_image_data(DataSource(data_dir=str(folder), label_column='fine', val_fraction=0.2)).train
    row = int(train_part.index[EpochBatches(64, 16, seed=42).order()[40]])  # in the third batch
    good = (folder / 'train.parquet').read_bytes()
    table = datasets.Dataset.from_parquet(str(folder / 'train.parquet'), cache_dir=str(tmp_path / 'cache'))
    features, rows = table.features, table.cast_column('image', datasets.Image(decode=False))[:]
    rows['image'][row]['bytes'] = rows['image'][row]['bytes'][:50]
    plain = datasets.Features({**features, 'image': datasets.Image(decode=False)})
    broken = datasets.Dataset.from_dict(rows, features=plain).cast(features)
    broken.to_parquet(folder / 'train.parquet')

    status, message = fail(
        capfd, lambda: train(settings(folder, tmp_path, workers=workers, checkpoint_every=None)))
    assert status == 2
    assert re.fullmatch(rf'error: Cannot read the image in row {row} of the train split: .*[^.]\. {GOES_ON}', message)
    assert checkpoints(tmp_path / 'run') == ['step2']
    (folder / 'train.parquet').write_bytes(good)
    train(settings(folder, tmp_path))
    assert_equal(tmp_path / 'run', whole)


@pytest.mark.faults
def test_checkpoints_hold_finite_numbers_when_the_loss_does_not(data, tmp_path):
    def spoil(run):
        for group in run.setup.optimizer.param_groups:
            group['lr'] = 1e30
        run.setup.scheduler = None
        run.look_every = 100  # as accelerators do, which then know of the loss when they write a checkpoint

    with before_step(5, spoil), pytest.raises(NonFiniteLossError) as e:
        train(settings(data, tmp_path, checkpoint_hist=10))
    step = 4 + int(re.search(r'in epoch 1, step (\d):', str(e.value))[1])  # of the first bad loss, counted from 0
    kept = sorted(int(p[4:]) for p in checkpoints(tmp_path / 'run'))
    assert kept == list(range(1, step + 1))
    for number in kept:
        state = torch.load(tmp_path / 'run' / 'checkpoints' / f'step{number}' / 'state.pt', weights_only=True)
        numbers = [*state['model'].values(), state['meter']['sums']]
        numbers += [v for values in state['optimizer']['state'].values() for v in values.values()]
        assert all(v.isfinite().all() for v in numbers if torch.is_tensor(v)), number


@pytest.mark.faults
def test_no_checkpoint_holds_weights_that_are_not_finite(data, whole, tmp_path):
    """A gradient may be bad where no term of the loss is."""
    def spoil(run):
        parameter = next(run.setup.task.get_eval_model().backbone.parameters())
        handle = parameter.register_hook(lambda grad: (handle.remove(), grad * math.nan)[1])

    with before_step(2, spoil), pytest.raises(NonFiniteLossError, match='Weights not finite after step 3: model.backb'):
        train(settings(data, tmp_path))
    assert checkpoints(tmp_path / 'run') == ['step1', 'step2']
    train(settings(data, tmp_path))
    assert_equal(tmp_path / 'run', whole)


@pytest.mark.faults
def test_a_disk_that_was_full_for_a_while_costs_nothing(data, whole, tmp_path, capfd):
    original = Keeper.end_epoch

    def end_epoch(run, *args):
        with largest_file(1000) if run.progress.epoch == 0 else nullcontext():
            original(run, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Keeper, 'end_epoch', end_epoch)
        train(settings(data, tmp_path))
    assert capfd.readouterr().out.count('warning: Cannot write the weights') == 1
    for name in ('model.safetensors', 'summary.csv', 'results.json'):
        assert (tmp_path / 'run' / name).read_bytes() == (whole / name).read_bytes(), name


@pytest.mark.faults
def test_what_fails_amid_the_evaluation_costs_no_epoch(data, whole, tmp_path, capfd):
    def evaluate(*args, **more):
        raise UnreadableImageError('Cannot read the image in row 3 of the validation split: broken')

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr('timm_selfdistill.training.loop.evaluate_exits', evaluate)
        status, message = fail(capfd, lambda: train(settings(data, tmp_path, checkpoint_every=None)))
    assert (status, message) == (2, f'error: Cannot read the image in row 3 of the validation split: broken. {GOES_ON}')
    assert checkpoints(tmp_path / 'run') == ['step4']
    train(settings(data, tmp_path))
    assert_equal(tmp_path / 'run', whole)


@pytest.mark.faults
def test_a_rank_that_dies_takes_the_others_along_within_a_minute(data, tmp_path, monkeypatch):
    monkeypatch.setenv('ACCELERATE_USE_CPU', 'true')
    reference = settings(data, tmp_path / 'whole')
    subprocess.run(command(reference, 2), check=True, capture_output=True, timeout=300)
    config = settings(data, tmp_path)
    process = subprocess.Popen(
        command(config, 2), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True)
    await_checkpoint(process, tmp_path / 'run', 2)
    family = psutil.Process(process.pid).children(recursive=True)
    ranks = [p for p in family if p.environ().get('RANK') is not None]
    assert len(ranks) == 2
    ranks[1].kill()
    died = time.monotonic()
    process.communicate(timeout=60)
    _, alive = psutil.wait_procs(family, timeout=max(0, died + 60 - time.monotonic()))
    assert alive == []
    print(f'gone after {time.monotonic() - died:.1f} s')
    assert process.returncode != 0
    assert not (tmp_path / 'run' / 'results.json').exists()
    out = subprocess.run(command(config, 2), check=True, capture_output=True, text=True, timeout=300).stdout
    assert f'resume  {tmp_path / "run" / "checkpoints"}' in out
    assert_equal(tmp_path / 'run', tmp_path / 'whole' / 'run')


def test_a_hub_data_set_without_network_is_told_in_a_sentence(data, tmp_path, capfd):
    config = settings(None, tmp_path, data_dir=None, dataset='nobody/nothing')
    status, message = fail(capfd, lambda: train(config))
    assert status == 2
    assert message.startswith("error: --dataset nobody/nothing: Couldn't reach 'nobody/nothing' on the Hub")
    assert list(tmp_path.iterdir()) == []
