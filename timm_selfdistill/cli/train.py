"""Train a multi-exit network, for example `accelerate launch recipes/train.py --model wide_resnet50_2`.

Several processes on CPUs: `torchrun --nproc_per_node 2 recipes/train.py ...`.
"""
import sys

from ..training.trainer import train
from .launch import run_command
from .options import parse_train_config

__all__ = ['main']


def _main() -> None:
    train(parse_train_config(sys.argv[1:]))


def main() -> None:
    """Run the command."""
    run_command(_main)


if __name__ == '__main__':
    main()
