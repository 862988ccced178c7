#!/usr/bin/env python
"""Measure every exit of a trained network, for example `python recipes/evaluate.py --checkpoint output/train/RUN`."""
from timm_selfdistill.cli.evaluate import main

if __name__ == '__main__':
    main()
