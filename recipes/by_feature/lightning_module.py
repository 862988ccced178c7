#!/usr/bin/env python
"""Train exits with Lightning: the task is a module of the LightningModule, and its terms are what is logged."""
import lightning
import timm
import torch
from own_loop import load_images
from torch.utils.data import DataLoader, TensorDataset

import timm_selfdistill


class MultiExitModule(lightning.LightningModule):
    """A network with exits, its loss, and its optimizer."""

    def __init__(self, network, lr=0.05):
        super().__init__()
        self.task, self.lr = timm_selfdistill.SelfDistillationTask(network, verbose=False), lr

    def training_step(self, batch, index):
        result = self.task(*batch)
        self.log_dict({name: value for name, value in result.items() if name != 'output'})
        return result['loss']

    def validation_step(self, batch, index):
        images, labels = batch
        for i, logits in enumerate(self.task.get_eval_model().forward_exits(images)):
            self.log(f'exit{i}_top1', (logits.argmax(-1) == labels).float().mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.task.trainable_module.parameters(), lr=self.lr, momentum=0.9)


def main(model='test_resnet_sd', epochs=5):
    images, labels = load_images()
    train = DataLoader(TensorDataset(images[:1400], labels[:1400]), batch_size=64, shuffle=True)
    test = DataLoader(TensorDataset(images[1400:], labels[1400:]), batch_size=256)
    trainer = lightning.Trainer(
        max_epochs=epochs, accelerator='cpu', logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(MultiExitModule(timm.create_model(model, num_classes=10)), train, test)
    accuracies = [trainer.callback_metrics[name].item() for name in sorted(trainer.callback_metrics) if 'top1' in name]
    print('top-1 of the exits:', ', '.join(f'{100 * a:.1f} %' for a in accuracies))
    return accuracies


if __name__ == '__main__':
    main()
