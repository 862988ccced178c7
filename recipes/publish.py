#!/usr/bin/env python
"""Put a trained network on the Hugging Face Hub: `python recipes/publish.py --checkpoint RUN --repo org/name`."""
from timm_selfdistill.cli.publish import main

if __name__ == '__main__':
    main()
