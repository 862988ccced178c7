#!/usr/bin/env python
"""Choose when images leave a trained network early: `python recipes/calibrate.py --checkpoint RUN --budget 0.5`."""
from timm_selfdistill.cli.calibrate import main

if __name__ == '__main__':
    main()
