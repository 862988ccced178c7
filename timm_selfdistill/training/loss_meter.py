"""Running means of the loss and its terms that do not make a step wait for the device."""
from collections import OrderedDict
from typing import Any, Dict, List

import torch
from accelerate import Accelerator

from ..errors import NonFiniteLossError

__all__ = ['TermMeter']


class TermMeter:
    """Running sums of the loss and its terms over the batches of an epoch, kept on the device.

    Args:
        device: Where they are kept.
        accumulate: Batches of one optimizer step.
    """

    def __init__(self, device: torch.device, accumulate: int = 1):
        self.device = device
        self.accumulate = accumulate
        self.names: List[str] = []
        self.batches = 0

    def _start(self, names: List[str]) -> None:
        self.names = names
        self.sums = torch.zeros(len(names), device=self.device)
        self.first_bad = torch.full((len(names),), -1, dtype=torch.long, device=self.device)

    def update(self, result: Dict[str, torch.Tensor]) -> None:
        """Add what the task returned for a batch."""
        if not self.names:
            self._start([name for name in result if name != 'output'])
        values = torch.stack([result[name].detach().float() for name in self.names])
        bad = ~values.isfinite() & (self.first_bad < 0)
        self.first_bad.masked_fill_(bad, self.batches // self.accumulate)
        self.sums += values
        self.batches += 1

    def check(self, accelerator: Accelerator, epoch: int, wishes: int = 0) -> int:
        """Look at the sums, in every process alike.

        Args:
            accelerator: Knows the other processes.
            epoch: Number of the epoch, for the message.
            wishes: What this process wants to be done, as bits.

        Returns:
            What any of the processes wants.

        Raises:
            NonFiniteLossError: A term was not finite in one of the processes.
        """
        if accelerator.num_processes == 1:
            first_bad, wanted = self.first_bad[None].tolist(), wishes
        else:
            own = torch.cat((self.first_bad, torch.tensor([wishes], device=self.device)))
            table = accelerator.gather(own[None]).tolist()
            first_bad, wanted = [row[:-1] for row in table], 0
            for row in table:
                wanted |= row[-1]
        steps = [step for row in first_bad for step in row if step >= 0]
        if not steps:
            return wanted
        step = min(steps)
        names = [name for i, name in enumerate(self.names) if any(row[i] == step for row in first_bad)]
        # the loss is bad because a term is: name the term
        names = [name for name in names if name != 'loss'] or names
        raise NonFiniteLossError(f'Loss not finite in epoch {epoch}, step {step}: {", ".join(names)}.')

    def means(self, accelerator: Accelerator) -> 'OrderedDict[str, float]':
        """Average over the batches of all processes."""
        sums = accelerator.reduce(self.sums, 'sum') / (self.batches * accelerator.num_processes)
        return OrderedDict(zip(self.names, sums.tolist()))

    def state(self, accelerator: Accelerator) -> Dict[str, Any]:
        """Return the sums of every process."""
        sums = accelerator.gather(self.sums[None]).cpu() if self.batches else None
        return dict(names=self.names, sums=sums, batches=self.batches)

    def load_state(self, state: Dict[str, Any], accelerator: Accelerator) -> None:
        """Go on where `state` was taken; other processes than then share its sums evenly."""
        self.batches, sums = state['batches'], state['sums']
        if not self.batches:
            return
        self._start(state['names'])
        own = sums[accelerator.process_index] if len(sums) == accelerator.num_processes else sums.mean(0)
        self.sums = own.to(self.device)
