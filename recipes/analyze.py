#!/usr/bin/env python
"""Run the papers' analyses of trained networks, for example `python recipes/analyze.py --checkpoint RUN1 RUN2`."""
from timm_selfdistill.cli.analyze import main

if __name__ == '__main__':
    main()
