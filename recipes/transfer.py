#!/usr/bin/env python
"""Measure how frozen features carry over to other data: `python recipes/transfer.py --checkpoint RUN --dataset ID`."""
from timm_selfdistill.cli.transfer import main

if __name__ == '__main__':
    main()
