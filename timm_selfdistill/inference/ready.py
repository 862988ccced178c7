"""A network made ready for early exit: a view of it, and a runner, kept as long as they fit."""
from typing import Tuple

import torch
import torch.nn as nn

from ..models.multi_exit import MultiExit
from ..models.probe import eval_view
from .runners import Runner, choose_runner

__all__ = ['Ready', 'device_and_dtype']


def device_and_dtype(model: nn.Module) -> Tuple[torch.device, torch.dtype]:
    """Return where the first of a network's parameters is, and its precision."""
    like = next(model.parameters())
    return like.device, like.dtype


class Ready:
    """A view of a network in eval mode, and a way to run it, which nobody else runs.

    Args:
        model: The network; neither it nor its mode is touched.
        compile: See `choose_runner`.
    """

    def __init__(self, model: MultiExit, compile: bool = False):
        self.view = eval_view(model)
        self.runner: Runner = choose_runner(self.view, compile)
        self.stages = model.stages
        self.children = [(m._modules, tuple(m._modules.values())) for m in model.modules() if m._modules]
        # graphs hold tensors and are made for one precision; whatever else runs finds those that the network has now
        held = [named for m in model.modules() for named in (m._parameters, m._buffers)]
        graphs = self.runner.kind == 'graphs'
        self.tensors = [(named, name, tensor) for named in held for name, tensor in named.items()] if graphs else []
        self.kind = device_and_dtype(model) if graphs else None

    def fits(self, model: MultiExit) -> bool:
        """Return whether the network still has the modules that it had."""
        return (
            self.stages is model.stages
            and all(tuple(now.values()) == children for now, children in self.children)
            and all(named.get(name) is tensor for named, name, tensor in self.tensors)
            and self.kind in (None, device_and_dtype(model))
        )
