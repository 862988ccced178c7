#!/usr/bin/env python
"""Exits on a trained network that stays bit for bit what it is, from a torch checkpoint, in forty lines."""
import sys

import timm
import torch
from own_loop import load_images
from torch.utils.data import DataLoader, TensorDataset

import timm_selfdistill


def main(checkpoint, model='test_resnet', epochs=5):
    images, labels = load_images()
    backbone = timm.create_model(model, num_classes=10)
    backbone.load_state_dict(torch.load(checkpoint, weights_only=True))
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    network = timm_selfdistill.add_exits(backbone)
    network.freeze_backbone()  # before the task and the optimizer are made
    task = timm_selfdistill.SelfDistillationTask(network, verbose=False)
    learning = [p for p in task.trainable_module.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(learning, lr=0.05, momentum=0.9)
    for _ in range(epochs):
        task.train()  # the frozen part stays in eval mode
        for x, y in DataLoader(TensorDataset(images[:1400], labels[:1400]), batch_size=64, shuffle=True):
            task(x, y)['loss'].backward()
            optimizer.step()
            optimizer.zero_grad()

    assert all(torch.equal(tensor, before[name]) for name, tensor in backbone.state_dict().items())
    network.eval()
    with torch.no_grad():
        logits = network.forward_exits(images[1400:])
    accuracies = [(z.argmax(-1) == labels[1400:]).float().mean().item() for z in logits]
    print('top-1 of the exits:', ', '.join(f'{100 * a:.1f} %' for a in accuracies))
    return network, accuracies


if __name__ == '__main__':
    main(*sys.argv[1:2])
