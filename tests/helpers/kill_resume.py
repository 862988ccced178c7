"""Kill a run at random moments until it is complete, and compare it with one that was never disturbed.

    python tests/helpers/kill_resume.py --kills 20 --processes 2

Kills are SIGKILL, sent to all processes of the run at once, so that nothing can be tidied up. Every third one is aimed
at the writing of a checkpoint: it is sent as soon as a half-written one is seen. Prints a line a kill, and exits with
status 1 if weights, averages, results or `summary.csv` differ in a single bit.
"""
import argparse
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import psutil

TRAIN = Path(__file__).parents[2] / 'recipes' / 'train.py'
SETTINGS = (
    '--model', 'test_resnet', '--exits', '2', '3', '--epochs', '4', '--batch-size', '52', '--model-ema',
    '--mixup', '0.2', '--drop', '0.1', '--reprob', '0.2', '--checkpoint-every', '3', '--last-phase-epochs', '1',
    '--alpha-end', '0.9',
)
COMPARED = ('model.safetensors', 'best/model.safetensors', 'summary.csv', 'results.json')


def start(folder: Path, processes: int, log: Path) -> subprocess.Popen:
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={processes}']
    command += [str(TRAIN), *SETTINGS, '--output', str(folder.parent), '--experiment', folder.name, '--resume', 'auto']
    env = dict(os.environ, HF_HUB_OFFLINE='1')
    return subprocess.Popen(command, stdout=log.open('a'), stderr=subprocess.STDOUT, env=env, start_new_session=True)


def kill(process: subprocess.Popen) -> None:
    """Kill the launcher and all that it started, wherever they have put themselves."""
    family = [psutil.Process(process.pid)]
    family += family[0].children(recursive=True)
    for act in (psutil.Process.suspend, psutil.Process.kill):  # suspended, none sees another one die
        for member in family:
            with suppress(psutil.NoSuchProcess):  # gone meanwhile, as helpers of the launcher are
                act(member)
    process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--kills', type=int, default=20)
    parser.add_argument('--processes', type=int, default=1)
    parser.add_argument('--seed', type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    root = Path(tempfile.mkdtemp(prefix='kill-resume-'))
    log = root / 'log.txt'
    whole, killed = root / 'whole', root / 'killed'
    process = start(whole, args.processes, log)
    training(process, whole, time.time())
    began = time.monotonic()
    if process.wait():
        sys.exit(f'The undisturbed run failed:\n{log.read_text()[-3000:]}')
    seconds = time.monotonic() - began
    done = amid_writing = 0
    while done < args.kills:
        halves = set(killed.glob('checkpoints/.writing-*'))
        process = start(killed, args.processes, log)
        if done % 5:  # every fifth moment may lie before the first step
            training(process, killed, time.time())
        began, moment, half_written = time.monotonic(), rng.uniform(0., 0.6) * seconds, False
        while process.poll() is None and time.monotonic() - began < moment and not half_written:
            half_written = done % 3 == 2 and bool(set(killed.glob('checkpoints/.writing-*')) - halves)
            time.sleep(0.0005)
        if process.poll() is not None:  # it came to its end: begin another one
            finish(process, log, whole, killed)
            shutil.rmtree(killed)
            continue
        kill(process)
        done += 1
        amid_writing += bool(set(killed.glob('checkpoints/.writing-*')) - halves)
        steps = sorted(int(p.name[4:]) for p in killed.glob('checkpoints/step*'))
        print(f'kill {done:>2}, {time.monotonic() - began:4.1f} s on; checkpoints of steps {steps}', flush=True)
    finish(start(killed, args.processes, log), log, whole, killed)
    print(f'{done} kills of {args.processes} process(es), {amid_writing} amid the writing of a checkpoint: all equal')
    shutil.rmtree(root)


def training(process: subprocess.Popen, folder: Path, since: float) -> None:
    """Wait until a run that was started at `since` is about to train: it writes its settings then."""
    args = folder / 'args.yaml'
    while process.poll() is None and not (args.exists() and args.stat().st_mtime > since):
        time.sleep(0.01)


def finish(process: subprocess.Popen, log: Path, whole: Path, killed: Path) -> None:
    if process.wait():
        sys.exit(f'The run failed by itself:\n{log.read_text()[-3000:]}')
    for name in COMPARED:
        if (whole / name).read_bytes() != (killed / name).read_bytes():
            sys.exit(f'{killed / name} differs from {whole / name}')
    print('complete, and equal to the undisturbed run', flush=True)


if __name__ == '__main__':
    main()
