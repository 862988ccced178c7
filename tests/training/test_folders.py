"""Folders of runs, their checkpoints, and the signals that stop them."""
import errno
import json
import os
import re
import signal
import threading
import time

import pytest
import torch
import yaml
from accelerate import Accelerator

from timm_selfdistill.config import TrainConfig
from timm_selfdistill.data.workers import _let_loader_notice, readable
from timm_selfdistill.errors import CheckpointError, ConfigError, DataError, WorkerDiedError, os_error_behind
from timm_selfdistill.run_files import is_complete, keep_rows
from timm_selfdistill.training.checkpoints import Checkpoints
from timm_selfdistill.training.folders import choose_folder, create_folder, run_folder
from timm_selfdistill.training.signals import StopSignals

STATE = dict(model=dict(weight=torch.arange(1000.)), at=dict(step=3, best={}), names=['loss'])


@pytest.fixture(scope='module')
def accelerator():
    return Accelerator(cpu=True)


def make_run(folder, age=0., **settings):
    """Make what a run of these settings leaves, `age` seconds ago."""
    folder.mkdir(parents=True)
    args = folder / 'args.yaml'
    args.write_text(yaml.safe_dump(dict(TrainConfig(**settings).settings(), output='elsewhere', workers=7)))
    os.utime(args, (time.time() - age,) * 2)
    return folder


def choose(accelerator, output, **settings):
    return choose_folder(TrainConfig(output=str(output), **settings), accelerator)


def test_a_run_is_named_by_its_experiment_else_by_date_and_model(tmp_path):
    assert run_folder(TrainConfig(output=str(tmp_path), experiment='mine')) == tmp_path / 'mine'
    dated = run_folder(TrainConfig(output=str(tmp_path), model='resnet50'))
    assert dated.name.startswith(time.strftime('%Y')) and dated.name.endswith('-resnet50_sd')


def test_resume_without_a_name_takes_the_newest_run_of_these_settings(tmp_path, accelerator):
    make_run(tmp_path / 'old', age=300, lr=0.2)
    make_run(tmp_path / 'a', age=200, lr=0.2)
    make_run(tmp_path / 'newest-but-other', age=100, lr=0.3)
    assert choose(accelerator, tmp_path, lr=0.2, resume='auto') == tmp_path / 'a'
    assert choose(accelerator, tmp_path, lr=0.2, resume='auto', experiment='old') == tmp_path / 'old'
    fresh = choose(accelerator, tmp_path, lr=0.4, resume='auto')
    assert not fresh.exists()
    assert not choose(accelerator, tmp_path, lr=0.2).exists(), 'nothing is gone on with unasked'


def test_a_folder_that_is_no_run_of_these_settings_is_refused(tmp_path, accelerator):
    make_run(tmp_path / 'run', lr=0.2)
    (tmp_path / 'thesis').mkdir()
    (tmp_path / 'thesis' / 'thesis.txt').write_text('precious')
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'odd').mkdir()
    (tmp_path / 'odd' / 'args.yaml').write_text('lr: [')
    for name, settings, message in (
        ('run', dict(lr=0.2), 'exists, and runs are never overwritten; .* pass `resume=auto` to go on with it'),
        ('run', dict(lr=0.2, epochs=9, resume='auto'), 'of another recipe: `epochs` was 20 and is 9'),
        ('thesis', dict(resume='auto'), 'has no args.yaml and so is no run of this program'),
        ('odd', dict(resume='auto'), 'holds a run whose args.yaml cannot be read: '),
    ):
        with pytest.raises(ConfigError, match=f'`experiment={name}`: the folder {tmp_path / name} {".*" + message}'):
            choose(accelerator, tmp_path, experiment=name, **settings)
    assert choose(accelerator, tmp_path, experiment='empty', resume='auto') == tmp_path / 'empty'


def test_a_folder_appears_once_unless_it_is_gone_on_with(tmp_path, accelerator):
    for resume, again in ((None, False), ('auto', True)):
        config = TrainConfig(output=str(tmp_path), experiment=f'run-{resume}', resume=resume)
        create_folder(config, tmp_path / 'deep' / config.experiment, accelerator)
        if again:
            create_folder(config, tmp_path / 'deep' / config.experiment, accelerator)
        else:
            with pytest.raises(ConfigError, match='run-None cannot be created: File exists'):
                create_folder(config, tmp_path / 'deep' / config.experiment, accelerator)
    (tmp_path / 'file').write_text('')
    with pytest.raises(ConfigError, match='`output=.*`: the folder .*file/run cannot be created: Not a directory'):
        create_folder(TrainConfig(output=str(tmp_path / 'file')), tmp_path / 'file' / 'run', accelerator)


def test_results_make_a_run_complete(tmp_path):
    assert not is_complete(tmp_path / 'nowhere')
    (tmp_path / '.results.json').write_text('{}')
    assert not is_complete(tmp_path)
    (tmp_path / 'results.json').write_text('{}')
    assert is_complete(tmp_path)


@pytest.mark.parametrize('lines, epochs, kept', [
    (4, 2, 2), (4, 4, 4), (4, 9, 4),
    (4, 0, None),  # then the header is written anew too
    (0, 3, None),
])
def test_rows_of_later_epochs_go(tmp_path, lines, epochs, kept):
    summary = tmp_path / 'summary.csv'
    rows = [b'epoch,loss\r\n'] + [b'%d,0.5\r\n' % i for i in range(lines)]
    summary.write_bytes(b''.join(rows))
    keep_rows(summary, epochs)
    assert summary.read_bytes() == b''.join(rows[:kept + 1] if kept else [])
    assert [p.name for p in tmp_path.iterdir()] == ['summary.csv']


def test_a_row_that_was_cut_short_goes(tmp_path):
    summary = tmp_path / 'summary.csv'
    keep_rows(summary, 3)
    assert not summary.exists()
    summary.write_bytes(b'epoch,loss\r\n0,0.5\r\n1,0.')
    keep_rows(summary, 3)
    assert summary.read_bytes() == b'epoch,loss\r\n0,0.5\r\n'
    summary.write_bytes(b'')
    keep_rows(summary, 3)
    assert summary.read_bytes() == b''


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def test_the_newest_checkpoints_are_kept_and_read_as_written(tmp_path):
    checkpoints = Checkpoints(tmp_path / 'c', keep=2)
    assert checkpoints.newest(pytest.fail) is None
    checkpoints.clean()
    for step in (8, 9, 10):  # by number: as words, step10 comes before step9
        assert checkpoints.write(dict(STATE, step=step), step) == tmp_path / 'c' / f'step{step}'
    assert names(tmp_path / 'c') == ['step10', 'step9']
    newest = checkpoints.newest(pytest.fail)
    state = checkpoints.read(newest)
    assert newest.name == 'step10'
    assert state['step'] == 10
    assert torch.equal(state['model']['weight'], STATE['model']['weight'])
    assert {k: state[k] for k in ('at', 'names')} == {k: STATE[k] for k in ('at', 'names')}


def test_a_checkpoint_is_replaced_when_its_step_comes_again(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    (checkpoints.write(STATE, 5) / 'state.pt').write_bytes(b'damaged')
    checkpoints.write(dict(STATE, again=True), 5)
    assert checkpoints.read(checkpoints.newest(pytest.fail))['again']
    assert names(tmp_path) == ['step5']


def spoil(checkpoint, what):
    if what == 'other-bytes':
        data = bytearray((checkpoint / 'state.pt').read_bytes())
        data[len(data) // 2] ^= 1
        (checkpoint / 'state.pt').write_bytes(data)
    elif what == 'too-long':
        (checkpoint / 'state.pt').open('ab').write(b'\0')
    elif what == 'no-state':
        (checkpoint / 'state.pt').unlink()
    elif what == 'no-size':
        (checkpoint / 'about.json').write_text(json.dumps(dict(crc32=0)))
    else:
        (checkpoint / 'about.json').write_bytes(b'\xff\x00')


@pytest.mark.parametrize('what, message', [
    ('other-bytes', 'the contents of state.pt have changed since it was written'),
    ('too-long', 'state.pt has .* bytes of '),
    ('no-state', 'state.pt cannot be read: No such file or directory'),
    ('no-size', 'about.json cannot be read'),
    ('no-text', 'about.json cannot be read'),
])
def test_damage_is_told_and_the_checkpoint_before_taken(tmp_path, what, message):
    checkpoints, told = Checkpoints(tmp_path), []
    for step in (1, 2):
        checkpoints.write(STATE, step)
    spoil(tmp_path / 'step2', what)
    assert checkpoints.newest(told.append).name == 'step1'
    assert len(told) == 1
    assert told[0].startswith(f'The checkpoint {tmp_path / "step2"} is damaged and left out: ')
    assert re.search(message, told[0])


def test_leftovers_are_no_checkpoints_and_are_cleaned_away(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.write(STATE, 1)
    for name in ('.writing-0f', '.removing-0f', 'step2.old', 'steps'):
        (tmp_path / name).mkdir()
        (tmp_path / name / 'state.pt').write_bytes(b'half')
    assert checkpoints.newest(pytest.fail).name == 'step1'
    checkpoints.clean()
    assert names(tmp_path) == ['step1', 'step2.old', 'steps']


def test_a_state_that_cannot_be_written_leaves_those_before(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.write(STATE, 1)

    def full(*args):  # torch wraps what the system says
        try:
            raise OSError(errno.ENOSPC, 'No space left on device')
        except OSError as e:
            raise RuntimeError('PytorchStreamWriter failed') from e

    monkeypatch.setattr(torch, 'save', full)
    with pytest.raises(CheckpointError, match=r'step2: No space left on device\. Those before it are kept\.'):
        checkpoints.write(STATE, 2)
    monkeypatch.undo()
    assert names(tmp_path) == ['step1']
    with pytest.raises(RuntimeError) as e:  # the program's mistake, which must not pass for the disk's
        monkeypatch.setattr(torch, 'save', lambda *args: torch.zeros(2) @ torch.zeros(3))
        checkpoints.write(STATE, 2)
    assert not isinstance(e.value, CheckpointError)
    assert names(tmp_path) == ['step1']


def test_a_state_is_read_without_running_anything(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.write(dict(innocent=threading.Thread), 1)
    with pytest.raises(Exception, match='(?i)weights_only'):
        checkpoints.read(tmp_path / 'step1')


def test_the_systems_reason_is_found_behind_others():
    assert os_error_behind(RuntimeError('x')) is None
    inner, middle, outer = OSError(errno.EIO, 'Input/output error'), RuntimeError('x'), ValueError('y')
    middle.__cause__, outer.__context__ = inner, middle
    assert os_error_behind(outer) is inner


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_is_noted_and_a_late_second_one_obeyed(number, monkeypatch):
    obeyed = []
    before = signal.signal(number, lambda *args: obeyed.append(number))
    try:
        ours = signal.getsignal(number)
        with StopSignals() as signals:
            assert signals.received is None
            for _ in range(2):  # the second is the launcher's copy of the first
                os.kill(os.getpid(), number)
            assert (signals.received, obeyed) == (signal.Signals(number).name, [])
            monkeypatch.setattr(StopSignals, 'PATIENCE', -1.)
            os.kill(os.getpid(), number)
            assert obeyed == [number]
        assert signal.getsignal(number) is ours
    finally:
        signal.signal(number, before)


def test_outside_the_main_thread_signals_are_left_alone():
    before, seen = signal.getsignal(signal.SIGTERM), []

    def work():
        with StopSignals() as signals:
            _let_loader_notice()
            seen.append((signals.received, signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(None, before)]


def test_what_went_wrong_in_a_worker_is_told_as_if_it_had_been_here():
    def batches(error):
        yield 1
        raise error

    caught = 'Caught DataError in DataLoader worker process 0.\nOriginal Traceback ...\nmodule.DataError: Row 3: bad.\n'
    for error, kind, message in (
        (DataError('Row 3: bad.'), DataError, r'^Row 3: bad\.$'),
        (DataError(caught), DataError, r'^Row 3: bad\.$'),
        (RuntimeError('DataLoader worker (pid 7) is killed by signal: Killed. '), WorkerDiedError,
         r'^A loader process died: DataLoader worker \(pid 7\) is killed by signal: Killed\. Often'),
        (RuntimeError('DataLoader worker (pid(s) 7) exited unexpectedly'), WorkerDiedError, r'unexpectedly\. Often'),
        (RuntimeError('shapes do not fit'), RuntimeError, '^shapes do not fit$'),
    ):
        passed = readable(batches(error))
        assert next(passed) == 1
        with pytest.raises(kind, match=message) as e:
            next(passed)
        assert type(e.value) is kind
