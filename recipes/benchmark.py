#!/usr/bin/env python
"""Compare speed and size: `python recipes/benchmark.py` at inference, `python recipes/benchmark.py train` in training,
`python recipes/benchmark.py latency` with images that leave early.

Machines are noisy, so every figure is a ratio: what is compared runs in turn in the same process, again and again, and
the median of the ratios and their spread are told."""
from timm_selfdistill.cli.benchmark import main

if __name__ == '__main__':
    main()
