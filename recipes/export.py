#!/usr/bin/env python
"""Write a trained network for deployment, for example `python recipes/export.py --checkpoint output/train/RUN`."""
from timm_selfdistill.cli.export import main

if __name__ == '__main__':
    main()
