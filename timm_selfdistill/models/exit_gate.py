"""ExitGate: learns from an exit's scores whether an image may leave there."""
from typing import List

import torch
import torch.nn as nn
import torch.nn.functional as F

__all__ = ['ExitGate', 'create_gates', 'gate_scores']

TOP = 5
HIDDEN = 16


def gate_scores(logits: torch.Tensor) -> torch.Tensor:
    """Return what a gate goes by.

    Args:
        logits: Logits of one exit (N, num_classes), divided by its temperature.

    Returns:
        The logarithms of the five largest probabilities, or of all where there are fewer, by how much the first exceeds
        the second, and the entropy in nats (N, 7 or fewer).
    """
    log_p = logits.log_softmax(-1)
    p = log_p.exp()
    top = p.topk(min(TOP, p.shape[-1]), dim=-1).values
    second = top[:, 1:2] if top.shape[-1] > 1 else torch.zeros_like(top)
    entropy = -(p * log_p).sum(-1, keepdim=True)
    return torch.cat((top.clamp_min(1e-6).log(), top[:, :1] - second, entropy), dim=-1)


class ExitGate(nn.Module):
    """Tells how likely an exit is right about an image, or the rest of the network would not mend it.

    A small network over the sorted scores of the exit: one hidden layer of 16, with 128 weights, hence 128 MACs, and
    17 biases (fewer weights below five classes). It is trained on held-out images when early exit is calibrated with
    the criterion `gate`, see `inference.gates.with_gates`.

    Args:
        num_classes: Classes of the network.
    """

    def __init__(self, num_classes: int):
        super().__init__()
        count = min(TOP, num_classes) + 2
        self.register_buffer('mean', torch.zeros(count))
        self.register_buffer('std', torch.ones(count))
        self.hidden = nn.Linear(count, HIDDEN)
        self.out = nn.Linear(HIDDEN, 1)
        self.requires_grad_(False)  # no training of the network changes it

    def logit(self, scores: torch.Tensor) -> torch.Tensor:
        """Map scores (N, count), see `gate_scores`, to the logit of the probability (N,)."""
        # wherever the network is, and in half precision too: scores are of float32
        mean, std, *weights = (
            tensor.to(scores) for tensor in (
                self.mean, self.std, self.hidden.weight, self.hidden.bias, self.out.weight, self.out.bias))
        hidden = F.relu(F.linear((scores - mean) / std, *weights[:2]))
        return F.linear(hidden, *weights[2:]).squeeze(-1)

    def forward(self, logits: torch.Tensor) -> torch.Tensor:
        """Map logits of the exit (N, num_classes), divided by its temperature, to the probability (N,)."""
        return self.logit(gate_scores(logits)).sigmoid()


def create_gates(num_exits: int, num_classes: int) -> nn.ModuleList:
    """Return untrained gates, one for each exit but the deepest, where all images that come stay."""
    gates: List[nn.Module] = [ExitGate(num_classes) for _ in range(num_exits - 1)]
    return nn.ModuleList(gates)
