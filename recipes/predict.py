#!/usr/bin/env python
"""Classify images: `python recipes/predict.py --checkpoint RUN --input FOLDER --output out.csv`."""
from timm_selfdistill.cli.predict import main

if __name__ == '__main__':
    main()
