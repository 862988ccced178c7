#!/usr/bin/env python
"""Exits on a trained network from images without labels: the deepest exit teaches the others.

    python recipes/by_feature/unlabelled_images.py output/train/RUN path/to/images
"""
import json
import sys

import timm_selfdistill


def main(run, folder, output='output/train', epochs=10):
    trained = timm_selfdistill.train(timm_selfdistill.TrainConfig(
        model=run,  # a run, local-dir:..., hf-hub:..., or a timm name with initial_checkpoint or backbone_pretrained
        data_dir=folder,  # any images below it
        unlabelled=True,
        regime='disjoint',
        method='byot',
        alpha=1.,  # nothing is left to labels
        epochs=epochs,
        output=output,
    ))
    split, rows = json.loads((trained / 'results.json').read_text()).popitem()
    for row in rows:
        print(f'{row["exit"]} agrees with the deepest exit on {row["top1"]:.1f} % of the {split} images')
    return trained


if __name__ == '__main__':
    main(*sys.argv[1:3])
