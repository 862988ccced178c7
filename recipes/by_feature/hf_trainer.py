#!/usr/bin/env python
"""Train exits with the Trainer of transformers, which takes any module that returns a loss and logits."""
import tempfile

import timm
import torch
from own_loop import load_images
from transformers import Trainer, TrainingArguments

import timm_selfdistill


class ForTrainer(torch.nn.Module):
    """A task as the Trainer calls it."""

    def __init__(self, network):
        super().__init__()
        self.task = timm_selfdistill.SelfDistillationTask(network, verbose=False)

    def forward(self, pixel_values, labels):
        result = self.task(pixel_values, labels)
        return dict(loss=result['loss'], logits=result['output'])


def main(model='test_resnet_sd', epochs=5):
    images, labels = load_images()
    examples = [dict(pixel_values=x, labels=y) for x, y in zip(images, labels)]
    module = ForTrainer(timm.create_model(model, num_classes=10))
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, num_train_epochs=epochs, per_device_train_batch_size=64, per_device_eval_batch_size=256,
            learning_rate=3e-3, report_to='none', save_strategy='no', logging_strategy='epoch', use_cpu=True,
        )
        trainer = Trainer(
            module, arguments, train_dataset=examples[:1400], eval_dataset=examples[1400:],
            compute_metrics=lambda p: dict(accuracy=(p.predictions.argmax(-1) == p.label_ids).mean().item()),
        )
        trainer.train()
        accuracy = trainer.evaluate()['eval_accuracy']
    network = module.task.get_eval_model()  # what to save, publish or deploy
    print(f'top-1 of the deepest of {network.num_exits} exits: {100 * accuracy:.1f} %')
    return accuracy


if __name__ == '__main__':
    main()
