#!/usr/bin/env python
"""Train a multi-exit network, for example `accelerate launch recipes/train.py --model wide_resnet50_2`."""
import os
import signal

if __name__ == '__main__':  # the imports take seconds, and a signal amid them would show the traceback of one of them
    def stop(number, frame):
        name = signal.Signals(number).name
        os.write(2, f'Stopped by {name} before training; the same command begins again.\n'.encode())
        os._exit(75)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)

from timm_selfdistill.cli.train import main

if __name__ == '__main__':
    main()
