#!/usr/bin/env python
"""Train a multi-exit network, for example `accelerate launch recipes/train.py --model wide_resnet50_2`."""
import sys

from timm_selfdistill.config import parse_train_config
from timm_selfdistill.generations import train_generations
from timm_selfdistill.launch import relaunch_on_cpu, run_command
from timm_selfdistill.trainer import train


def main() -> None:
    config = parse_train_config(sys.argv[1:])
    relaunch_on_cpu()
    if config.generations is None:
        train(config)
    else:
        train_generations(config)


if __name__ == '__main__':
    run_command(main)
