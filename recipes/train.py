#!/usr/bin/env python
"""Train a multi-exit network, for example `accelerate launch recipes/train.py --model wide_resnet50_2`."""
import os
import signal
import sys

if __name__ == '__main__':  # the imports take seconds, and a signal amid them would show the traceback of one of them
    def stop(number, frame):
        name = signal.Signals(number).name
        os.write(2, f'Stopped by {name} before training; the same command begins again.\n'.encode())
        os._exit(75)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)

from timm_selfdistill.cli.launch import relaunch_on_cpu, run_command
from timm_selfdistill.cli.options import parse_train_config
from timm_selfdistill.training.generations import train_generations
from timm_selfdistill.training.trainer import train


def main() -> None:
    config = parse_train_config(sys.argv[1:])
    relaunch_on_cpu()
    if config.generations is None:
        train(config)
    else:
        train_generations(config)


if __name__ == '__main__':
    run_command(main)
