#!/usr/bin/env python
"""Exits in your own training loop: `SelfDistillationTask` is the model and its loss, everything else stays yours."""
import timm
import torch
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

import timm_selfdistill


def load_images():
    """Return scikit-learn's digits as colour images (1797, 3, 32, 32) and labels (1797,)."""
    digits = load_digits()
    images = torch.from_numpy(digits.images / 16).float()[:, None]
    return torch.nn.functional.interpolate(images, size=32).expand(-1, 3, -1, -1), torch.from_numpy(digits.target)


def main(model='test_resnet_sd', epochs=5):
    images, labels = load_images()
    train, test = TensorDataset(images[:1400], labels[:1400]), (images[1400:], labels[1400:])
    task = timm_selfdistill.SelfDistillationTask(timm.create_model(model, num_classes=10), verbose=False)
    # what is trained is more than the network: a hint loss may learn projections
    optimizer = torch.optim.SGD(task.trainable_module.parameters(), lr=0.05, momentum=0.9)
    for _ in range(epochs):
        task.train()
        for x, y in DataLoader(train, batch_size=64, shuffle=True):
            result = task(x, y)
            result['loss'].backward()
            optimizer.step()
            optimizer.zero_grad()
    network = task.get_eval_model().eval()  # a plain timm model with exits, without projections
    with torch.no_grad():
        accuracies = [(z.argmax(-1) == test[1]).float().mean().item() for z in network.forward_exits(test[0])]
    print('top-1 of the exits:', ', '.join(f'{100 * a:.1f} %' for a in accuracies))
    return accuracies


if __name__ == '__main__':
    main()
