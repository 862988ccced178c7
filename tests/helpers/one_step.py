"""Launched by test_distributed.py: one training step and one evaluation, dumped for comparison.

Batch norm normalizes by each process's own slice of a batch, so its layers are kept in eval mode: everything else must
not depend on the number of processes.
"""
import sys

import torch

from timm_selfdistill.cli.options import parse_train_config
from timm_selfdistill.training.folders import run_folder
from timm_selfdistill.training.run import Run
from timm_selfdistill.training.trainer import close, create_accelerator


def main(path, arguments):
    config = parse_train_config(arguments)
    run = Run(config, create_accelerator(config), run_folder(config))
    run.setup.task.train()
    for module in run.setup.task.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.eval()
    run.setup.loader.batch_sampler.set_epoch(3)
    images, target = next(iter(run.setup.loader))
    result = run.setup.task(images, target)
    run.setup.accelerator.backward(result['loss'])
    reduce = run.setup.accelerator.reduce
    terms = {name: reduce(value.detach(), 'mean') for name, value in result.items() if name != 'output'}
    grads = {name.removeprefix('module.'): p.grad for name, p in run.setup.task.trainable_module.named_parameters()}
    metrics = {part: run.loop.evaluate(run.setup.data.splits()[part]) for part in ('validation', 'test')}
    if run.setup.accelerator.is_main_process:
        torch.save(dict(
            processes=run.setup.accelerator.num_processes, local_batch=len(images), terms=terms, grads=grads,
            metrics={part: {k: dict(v) for k, v in m.items()} for part, m in metrics.items()},
        ), path)
    close(run.setup.accelerator)


if __name__ == '__main__':
    main(sys.argv[1], sys.argv[2:])
