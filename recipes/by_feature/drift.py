#!/usr/bin/env python
"""Notice that other images come than those that thresholds were calibrated on.

    python recipes/by_feature/drift.py

A network with exits learns the digits of scikit-learn, and early exit is calibrated on some that it did not learn from.
Others like these leave where they did; with noise on them they leave elsewhere, which shows without a single label.
"""
import timm
import torch
from own_loop import load_images

import timm_selfdistill


def main(epochs=5):
    images, labels = load_images()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    train, held_out, later = (rows for rows in order.split([1000, 400, 397]))
    network = timm.create_model('test_resnet_sd', num_classes=10, exits=(0, 1, 2), exit_head='linear')
    task = timm_selfdistill.SelfDistillationTask(network, verbose=False)
    optimizer = torch.optim.SGD(task.trainable_module.parameters(), lr=0.05, momentum=0.9)
    task.train()
    for _ in range(epochs):
        for rows in train[torch.randperm(len(train))].split(64):
            task(images[rows], labels[rows])['loss'].backward()
            optimizer.step()
            optimizer.zero_grad()

    predictor = timm_selfdistill.EarlyExit(task.get_eval_model())
    predictor.calibrate([(images[held_out], labels[held_out])], accuracy_drop=0.)
    verdicts = []
    for noise in (0., 0.5):
        predictor.counter.reset()
        x = images[later]
        for batch in (x + noise * torch.randn_like(x)).split(32):
            predictor(batch)
        verdicts.append(predictor.drift())
        print(f'noise {noise:g}: {verdicts[-1]}')
    return verdicts


if __name__ == '__main__':
    main()
