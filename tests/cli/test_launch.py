"""A recipe that fails says why in a sentence, has status 2 (75 after a signal) and leaves no process behind."""
import errno
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from types import SimpleNamespace

import datasets
import psutil
import pytest
import timm
import torch
from helpers import ROOT
from helpers.images import noise_images
from safetensors.torch import save_file

from timm_selfdistill.cli.launch import run_command
from timm_selfdistill.config import TrainConfig
from timm_selfdistill.data.image_data import load_image_data
from timm_selfdistill.data.workers import keep_worker_alive, starting_workers
from timm_selfdistill.errors import ConfigError, DataError
from timm_selfdistill.evaluation.trained_network import EvaluationConfig, open_network
from timm_selfdistill.tasks import SelfDistillationTask
from timm_selfdistill.training import cpu
from timm_selfdistill.training.build import build_model, check_slices
from timm_selfdistill.training.trackers import start_trackers
from timm_selfdistill.training.trainer import train

TRAIN = ROOT / 'recipes' / 'train.py'
TINY = ('--model', 'test_resnet', '--exits', 2, 3, '--epochs', 1, '--batch-size', 8)


def start(*command, **environment):
    """Start a command in a session of its own, by which all its processes are known."""
    return subprocess.Popen(
        [sys.executable, *map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True, env={**os.environ, 'PYTHONPATH': str(ROOT), **environment})


def members(session):
    """Return the processes of a session that run."""
    found = []
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (OSError, psutil.Error):
            pass
    return found


def end(process, seconds=120):
    """Wait for a command; return its status, what it wrote, and the processes it has left a few seconds later."""
    try:
        out, err = process.communicate(timeout=seconds)
        until = time.monotonic() + 10
        while members(process.pid) and time.monotonic() < until:
            time.sleep(0.1)
        return process.returncode, out, err, members(process.pid)
    finally:
        for left in members(process.pid):
            left.kill()


def error_line(err):
    """Return the one sentence of an error; no traceback may stand beside it."""
    assert 'Traceback' not in err, err
    line, = [line for line in err.splitlines() if line.startswith('error: ')]
    return line


# Loader workers

LOADER = '''
import os, sys, time
from torch.utils.data import DataLoader
from timm_selfdistill.data.workers import keep_worker_alive

class Slow:
    def __len__(self):
        return 1000
    def __getitem__(self, row):
        time.sleep(float(sys.argv[4]) if row else 0)
        return row

if __name__ == '__main__':
    loader = DataLoader(
        Slow(), num_workers=2, persistent_workers=sys.argv[2] == 'persistent', worker_init_fn=keep_worker_alive,
        multiprocessing_context=sys.argv[1])
    batches = iter(loader)
    next(batches)
    print('begun', flush=True)
    if sys.argv[3] == 'wait':
        time.sleep(600)
    raise {'memory': MemoryError, 'interrupt': KeyboardInterrupt, 'value': ValueError}[sys.argv[3]]('on purpose')
'''


@pytest.mark.parametrize('method, kind, error, pause', [
    ('fork', 'persistent', 'memory', 0), ('fork', 'passing', 'value', 0), ('fork', 'persistent', 'interrupt', 60),
    ('forkserver', 'persistent', 'value', 0), ('spawn', 'passing', 'memory', 60),
])
@pytest.mark.slow
def test_a_program_that_fails_ends_with_its_workers(tmp_path, method, kind, error, pause):
    script = tmp_path / 'script.py'
    script.write_text(LOADER)
    process = start(script, method, kind, error, pause)
    assert process.stdout.readline() == 'begun\n'
    began = time.monotonic()
    status, _, err, left = end(process)
    assert status == (-signal.SIGINT if error == 'interrupt' else 1)
    assert 'on purpose' in err
    assert left == []
    assert time.monotonic() - began < 25  # torch gives each worker 5 s to finish an item


@pytest.mark.parametrize('method', ['fork', 'forkserver', 'spawn'])
@pytest.mark.slow
def test_workers_end_when_their_program_is_killed(tmp_path, method):
    script = tmp_path / 'script.py'
    script.write_text(LOADER)
    process = start(script, method, 'persistent', 'wait', 60)
    assert process.stdout.readline() == 'begun\n'
    assert len(members(process.pid)) >= 3
    process.kill()
    assert end(process)[3] == []


def _worker(ready):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # jobs in the background may come without
    keep_worker_alive(0)
    ready.set()
    while True:
        time.sleep(0.01)


@pytest.mark.parametrize('method', ['fork', 'forkserver', 'spawn'])
@pytest.mark.slow
def test_a_worker_obeys_its_own_program_alone(method):
    before, context = multiprocessing.get_start_method(), multiprocessing.get_context(method)
    multiprocessing.set_start_method(method, force=True)
    ready = context.Event()
    worker = context.Process(target=_worker, args=(ready,), daemon=True)
    with starting_workers():
        worker.start()
    try:
        assert ready.wait(60)
        for name in ('INT', 'TERM', 'TERM', 'INT', 'TERM'):  # of somebody else, as often as he likes
            subprocess.run(['kill', f'-{name}', str(worker.pid)], check=True)
            worker.join(0.2)
            assert worker.exitcode is None
        worker.terminate()
        worker.join(10)
        assert worker.exitcode == 0
    finally:
        worker.kill()
        multiprocessing.set_start_method(before, force=True)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """An image folder of two classes, one of whose training images is cut short."""
    root = tmp_path_factory.mktemp('set')
    for split, count in (('train', 24), ('validation', 8)):
        for i, image in enumerate(noise_images(count)):
            path = root / split / 'ab'[i % 2] / f'{i:02}.png'
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path)
    broken = root / 'train' / 'b' / '05.png'
    broken.write_bytes(broken.read_bytes()[:200])
    return root


@pytest.mark.parametrize('options', [
    ('--workers', 1), ('--workers', 2, '--streaming', '--images-per-epoch', 24), ('--workers', 0),
], ids=['workers', 'stream', 'none'])
@pytest.mark.slow
def test_a_run_that_meets_a_bad_image_ends_with_status_2_and_its_workers(folder, tmp_path, options):
    process = start(TRAIN, *TINY, '--loader', 'workers', '--data-dir', folder, '--output', tmp_path / 'out', *options)
    status, _, err, left = end(process)
    assert (status, left) == (2, []), err
    assert 'Cannot read the image' in error_line(err)


@pytest.mark.slow
def test_of_two_processes_the_one_with_the_bad_image_speaks_and_both_end(folder, tmp_path):
    process = start(
        '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', TRAIN, *TINY, '--loader', 'workers',
        '--workers', 1, '--data-dir', folder, '--output', tmp_path / 'out', ACCELERATE_USE_CPU='true')
    status, _, err, left = end(process, 180)
    assert (status, left) == (1, []), err  # torch's launcher makes 1 of it
    assert err.count('Cannot read the image') == 1
    assert TRAIN.name not in ''.join(re.findall(r'File "(.*?)"', err)), err  # tracebacks are the launcher's alone


DRIVER = '''
import sys
from timm_selfdistill.cli.options import parse_train_config
from timm_selfdistill.cli.launch import run_command
from timm_selfdistill.training.loop import Loop
from timm_selfdistill.training.trainer import train

original = Loop.train_batch

def fail(run, *batch):
    if run.keeper.progress.steps == 1:
        raise eval(sys.argv[1])
    return original(run, *batch)

Loop.train_batch = fail
run_command(lambda: train(parse_train_config(sys.argv[2:])))
'''


@pytest.mark.parametrize('error, message', [
    ('MemoryError()', r'error: The memory of the machine is full\. A smaller --batch-size needs less; .*'),
    ('RuntimeError("[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can\'t allocate memory: you tried 9 B")',
     r'error: The memory of the machine is full \(.*you tried 9 B\)\. A smaller --batch-size .*'),
    ('KeyboardInterrupt("SIGINT")', 'Stopped by a second SIGINT, amid a step. The same command with --experiment run '
     '--resume auto goes on from the last checkpoint.'),
    ('KeyError("oops")', r'This is a fault of timm_selfdistill .*\. Please report it where you got it from, with .*'),
])
@pytest.mark.slow
def test_whatever_the_error_a_run_with_workers_ends_with_status_and_sentence(tmp_path, error, message):
    script = tmp_path / 'script.py'
    script.write_text(DRIVER)
    status, _, err, left = end(start(
        script, error, *TINY, '--loader', 'workers', '--workers', 1, '--output', tmp_path, '--experiment', 'run'))
    assert (status, left) == (75 if 'Keyboard' in error else 2, []), err
    assert re.search(f'^{message}$', err, re.M), err
    assert ('Traceback' in err) == ('KeyError' in error)


# What run_command makes of errors

def fail(capfd, error, argv=('recipe.py',)):
    """Let a recipe raise an error; return the status and what it wrote."""
    def main():
        raise error

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as e:
        patch.setattr(sys, 'argv', list(argv))
        run_command(main)
    return e.value.code, capfd.readouterr().err


@pytest.mark.parametrize('error, argv, message', [
    (PermissionError(errno.EACCES, 'Permission denied', '/data/out/args.yaml'), ['--output', '/data/out'],
     'error: --output /data/out (/data/out/args.yaml): Permission denied. Choose a place that this user may write to'),
    (OSError(errno.ENOSPC, 'No space left on device', '/x/f'), [], 'error: /x/f: No space left on device. Free some'),
    (OSError(errno.EROFS, 'Read-only file system', b'/r/f'), ['--results', '/r/f'], 'error: --results /r/f: Read-only'),
    (IsADirectoryError(errno.EISDIR, 'Is a directory', '/d'), [], 'error: /d: Is a directory. A file is needed in'),
    (OSError(errno.EADDRINUSE, 'Address already in use'), [], 'error: Address already in use. Another program uses'),
    (OSError(errno.EMFILE, 'Too many open files'), [], 'error: Too many open files. ulimit -n allows more'),
    (FileNotFoundError('there is no config.json in x'), [], 'error: there is no config.json in x\n'),
    (ConfigError(), [], 'error: ConfigError.\n'),
    (DataError('two\n  lines'), [], 'error: two lines\n'),
    (torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 9 GiB.'), [],
     'error: The memory of the device is full (CUDA out of memory). A smaller --batch-size needs less'),
    (ModuleNotFoundError("No module named 'onnxruntime_'", name='onnxruntime_'), [],
     'error: The package onnxruntime_ is needed for this and is not installed; pip install "timm_selfdistill[export]"'),
    (BrokenPipeError(errno.EPIPE, 'Broken pipe'), [], 'error: Nobody reads the standard output any more'),
], ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else '')
def test_what_the_system_refuses_is_told_with_place_and_remedy(capfd, monkeypatch, error, argv, message):
    monkeypatch.setattr(os, 'dup2', lambda *_: None)  # pytest reads the standard output on
    status, err = fail(capfd, error, ['recipe.py', *argv])
    assert status == 2
    assert err.startswith(message)
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize('error', [KeyError('x'), AssertionError(), OSError('of a library'), ValueError('shape'),
                                   FileNotFoundError(), ModuleNotFoundError('torch.nope', name='torch.nope')])
def test_anything_unforeseen_is_a_fault_of_the_package_above_its_traceback(capfd, error):
    status, err = fail(capfd, error, ['recipes/evaluate.py', '--checkpoint', 'a b'])
    assert status == 2
    lines = err.splitlines()
    assert re.match(r'This is a fault of timm_selfdistill .* report it where you got it from, with the comm', lines[0])
    assert lines[1] == "$ recipes/evaluate.py --checkpoint 'a b'"
    assert lines[2] == 'Traceback (most recent call last):'


@pytest.mark.parametrize('variable', ['HF_DATASETS_CACHE', 'HF_HOME'])
def test_a_cache_that_cannot_be_written_is_named_by_its_variable(capfd, monkeypatch, variable):
    monkeypatch.setattr(datasets.config, 'HF_DATASETS_CACHE', '/ro/hub/datasets')
    monkeypatch.delenv('HF_DATASETS_CACHE', raising=False)
    monkeypatch.setenv(variable, '/ro/hub')
    refused = PermissionError(errno.EACCES, 'Permission denied', '/ro/hub')
    wrapped = DataError('--data-dir x (read as parquet): [Errno 13] Permission denied')
    wrapped.__cause__ = refused
    for error in (refused, wrapped):
        status, err = fail(capfd, error)
        assert (status, err.partition('.')[0]) == (
            2, f'error: /ro/hub (the environment variable {variable} says where the cache is, /ro/hub/datasets now): '
               'Permission denied')


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_nobody_waits_for_ends_a_recipe_with_75(capfd, number):
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as e:
        run_command(lambda: os.kill(os.getpid(), number))
    assert e.value.code == 75
    assert capfd.readouterr().err.startswith(f'Stopped by {signal.Signals(number).name}. ')
    assert signal.getsignal(number) is before


@pytest.mark.parametrize('delay', [0.5, 1.5, 3, 5])
@pytest.mark.slow
def test_ctrl_c_while_a_run_starts_has_a_sentence(tmp_path, delay):
    process = start(TRAIN, *TINY, '--epochs', 1000, '--output', tmp_path)
    time.sleep(delay)
    os.killpg(process.pid, signal.SIGINT)
    status, _, err, left = end(process)
    assert (status, left) == (75, []), err
    assert re.search('^Stopped by SIGINT', err, re.M)
    assert 'Traceback' not in err


@pytest.mark.slow
def test_a_reader_that_goes_ends_a_recipe_in_a_sentence(tmp_path):
    script = tmp_path / 'script.py'
    script.write_text(
        'import sys\nfrom rich.console import Console\nfrom timm_selfdistill.cli.launch import run_command\n'
        'show = Console().print if sys.argv[1] == "rich" else print\n'
        'run_command(lambda: [show("line " * 9) for _ in range(100_000)])\n')
    for kind in ('rich', 'plain'):
        process = start(script, kind)
        process.stdout.readline()
        process.stdout.close()
        assert process.wait(60) == 2
        assert process.stderr.read().startswith('error: Nobody reads the standard output any more')
        process.stderr.close()


class _Store:
    """What the store of torch's launchers is to the processes of a run."""
    counts = {}

    def __init__(self, *_, **__):
        pass

    def add(self, key, amount):
        self.counts[key] = self.counts.get(key, 0) + amount
        return self.counts[key]


def test_of_several_processes_the_first_one_shows_its_traceback(capfd, monkeypatch):
    monkeypatch.setattr(torch.distributed, 'TCPStore', _Store)
    monkeypatch.setattr(_Store, 'counts', {})
    for name, value in dict(WORLD_SIZE='3', MASTER_ADDR='here', MASTER_PORT='1').items():
        monkeypatch.setenv(name, value)
    lost = RuntimeError('[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:9')
    errors = []
    for rank, error in ((1, KeyError('bug')), (0, KeyError('bug')), (2, lost)):
        monkeypatch.setenv('RANK', str(rank))
        errors.append(fail(capfd, error))
    assert [status for status, _ in errors] == [2, 2, 2]
    assert [err.count('Traceback') for _, err in errors] == [1, 0, 0]
    assert [err for _, err in errors][1:] == ['', '']
    monkeypatch.setattr(_Store, 'counts', {})
    assert fail(capfd, lost)[1].startswith('error: Process 2 has lost the connection to another process of the run')
    monkeypatch.setenv('RANK', '1')
    assert fail(capfd, ConfigError('known to all'))[1] == ''


# What is found out before training

@pytest.mark.parametrize('settings, message', [
    (dict(batch_size=1), r'`batch_size=1`: batch norm cannot take the variance of a single image .*Pass 2 or more'),
    (dict(batch_size=6, grad_accum_steps=6), '`batch_size=6`: batch norm .* one pixel. Pass 12 or more, two images'),
    (dict(model='vgg13_bn', exits=None, grad_checkpointing=True), '`grad_checkpointing`: vgg13_bn has none; leave it'),
    (dict(opt='bnblion'), r'`opt=bnblion`: cannot be used on cpu: .*\. Choose another one, such as sgd or adamw'),
    (dict(opt='fusednovograd'), r'`opt=fusednovograd`: cannot be used on cpu: .*\. Choose another one'),
    (dict(opt='lookahead_adahessian'), '`opt=lookahead_adahessian`: needs gradients of gradients'),
    (dict(opt='lookahead_sdg'), '`opt=lookahead_sdg`: timm has no such optimizer'),
    (dict(model_kwargs=('features_only=True', 'out_indices=(1,)')),
     r'`model_kwargs=features_only=True out_indices=\(1,\)`: .* FeatureGetterNet, which has no exits to train'),
    (dict(exits=None, model_kwargs=('truncate=0',)), '`model_kwargs=truncate=0`: .* which has no exits to train'),
    (dict(model_kwargs=('act_layer=nope',)), r"`model=test_resnet`: KeyError: 'nope' \(with .*act_layer=nope"),
    (dict(model_kwargs=('block=7',)), '`model=test_resnet`: AttributeError: .*block=7'),
    (dict(model_kwargs=('checkpoint_path=/no/weights.safetensors',)),
     '`model_kwargs=checkpoint_path=/no/weights.safetensors`: there is no such file'),
    (dict(model_kwargs=(f'checkpoint_path={ROOT}',)), '`model_kwargs=checkpoint_path=.*`: this is a folder, a file'),
    (dict(model_kwargs=(f'checkpoint_path={__file__}',)), '`model_kwargs=checkpoint_path=.*`: cannot be read as'),
])
@pytest.mark.slow
def test_what_a_network_or_an_optimizer_refuses_is_told_before_training(tmp_path, settings, message):
    with pytest.raises(ConfigError, match=message):
        train(TrainConfig(**{**dict(model='test_resnet', exits=(2, 3), epochs=1), **settings}, output=str(tmp_path)))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize('model, size, refused', [
    ('test_vit', 160, False), ('resnet20_cifar', 32, False), ('test_resnet', 160, False), ('test_resnet', 32, True),
    ('mobilenetv3_small_050', 32, True),
])
def test_one_image_at_a_time_is_refused_only_where_batch_norm_sees_a_single_pixel(model, size, refused):
    task = SelfDistillationTask(timm.create_model(f'{model}_sd', num_classes=5, exits=()), verbose=False)
    before = {k: v.clone() for k, v in task.state_dict().items()}
    with pytest.raises(ConfigError) if refused else nullcontext():
        check_slices(task, (3, size, size), 4, 4)
    check_slices(task, (3, size, size), 8, 4)
    assert all(torch.equal(v, before[k]) for k, v in task.state_dict().items())


def test_weights_are_read_from_checkpoint_path(tmp_path):
    weights = timm.create_model('test_resnet_sd', num_classes=10, exits=(2, 3)).state_dict()
    save_file(weights, tmp_path / 'w.safetensors')
    config = TrainConfig(model='test_resnet', exits=(2, 3), model_kwargs=(f'checkpoint_path={tmp_path}/w.safetensors',))
    model = build_model(config, load_image_data()).model
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize('name, value', [
    ('ACCELERATE_MIXED_PRECISION', 'bf17'), ('ACCELERATE_MIXED_PRECISION', 'fp8'), ('ACCELERATE_USE_CPU', 'perhaps'),
])
@pytest.mark.slow
def test_settings_of_accelerate_that_cannot_be_had_are_named(tmp_path, name, value):
    status, _, err, _ = end(start(TRAIN, *TINY, '--output', tmp_path, **{name: value}))
    assert status == 2
    assert error_line(err).endswith(f'environment variables: {name}={value}.')


@pytest.mark.parametrize('error', [KeyError('api_key'), ConnectionError('no route to host')])
def test_a_tracker_that_cannot_be_started_is_named(tmp_path, error):
    class Accelerator:
        project_configuration = SimpleNamespace()

        def init_trackers(self, *_, **__):
            raise error

    with pytest.raises(ConfigError, match=f'`report_to=wandb`: cannot be started: {type(error).__name__}: .*leave the'):
        start_trackers(Accelerator(), ['wandb'], tmp_path, {}, 0)


@pytest.mark.parametrize('settings, message', [
    (dict(device='cuda:99'), '`device=cuda:99`: '), (dict(device='gpu'), '`device=gpu`: Expected one of cpu'),
    (dict(batch_size=0), '`batch_size=0`: expected 1'), (dict(workers=-2), '`workers=-2`: expected 0 or more'),
])
def test_a_machine_that_cannot_do_what_is_asked_is_told_of(settings, message):
    with pytest.raises(ConfigError, match=message):
        open_network('nowhere', EvaluationConfig(**settings))


# Threads

THREADS = '''
import os, torch
from timm_selfdistill.training.cpu import use_all_cores
use_all_cores()
os.write(1, f'{torch.get_num_threads()}\\n'.encode())
'''


def threads_of(tmp_path, *launcher, **given):
    script = tmp_path / 'script.py'
    script.write_text(THREADS)
    status, out, err, _ = end(start(*launcher, script, **given))
    assert status == 0, err
    found, = set(out.split())
    return int(found)


@pytest.mark.parametrize('launcher', [
    (), ('-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=1'),
    ('-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2'),
], ids=['alone', 'torchrun', 'two'])
@pytest.mark.slow
def test_a_process_has_its_share_of_the_cores_whatever_the_launcher_sets(tmp_path, monkeypatch, launcher):
    monkeypatch.delenv('OMP_NUM_THREADS', raising=False)
    share = cpu.share_of_cores(2 if '--nproc_per_node=2' in launcher else 1)
    assert threads_of(tmp_path, *launcher) == share


@pytest.mark.slow
def test_the_users_number_of_threads_stays(tmp_path):
    assert threads_of(tmp_path, OMP_NUM_THREADS='1') == 1
    launcher = ('-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2')
    given = dict(OMP_NUM_THREADS='3')
    assert threads_of(tmp_path, *launcher, **given) == threads_of(tmp_path, **given) > 1
