"""Trains the gates of the criterion `gate` on held-out images."""
from dataclasses import replace
from typing import Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F

from ..models.exit_gate import create_gates, gate_scores
from ..models.exit_rule import ExitRule, decide_together

__all__ = ['with_gates']

_STEPS = 1000
_BATCH = 128


def with_gates(rule: ExitRule, logits: Sequence[torch.Tensor], target: torch.Tensor, seed: int = 0) -> ExitRule:
    """Return a rule of the criterion `gate` with gates trained on held-out images; any other rule as it is.

    A gate learns whether its exit is right about an image, or the end of the network is wrong as well: then nothing is
    lost if the image leaves. What it is given is what the exit puts out anyway.

    Args:
        rule: The rule, with its temperatures.
        logits: Logits of every exit, each (N, num_classes), of images that the network was not trained on.
        target: Labels (N,), or what the network answers at its end.
        seed: Draws first weights and batches. Torch's own random numbers are not touched.
    """
    if rule.criterion != 'gate':
        return rule
    decided = decide_together(logits) if rule.ensemble else logits
    lost_at_end = decided[-1].argmax(-1) != target
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        gates = create_gates(rule.num_exits, rule.num_classes)
        for gate, of_exit, temperature in zip(gates, decided, rule.temperatures):
            scores = gate_scores(of_exit.float() / temperature)
            _train(gate, scores, ((of_exit.argmax(-1) == target) | lost_at_end).float())
    return replace(rule, gates=gates)


def _train(gate: nn.Module, scores: torch.Tensor, may_leave: torch.Tensor) -> None:
    gate.mean.copy_(scores.mean(0))
    gate.std.copy_(scores.std(0, correction=0) + 1e-6)
    gate.requires_grad_(True)
    optimizer = torch.optim.AdamW(gate.parameters(), lr=3e-3, weight_decay=0.1)
    with torch.enable_grad():
        for _ in range(_STEPS):
            rows = torch.randint(len(scores), (_BATCH,))
            F.binary_cross_entropy_with_logits(gate.logit(scores[rows]), may_leave[rows]).backward()
            optimizer.step()
            optimizer.zero_grad()
    gate.requires_grad_(False)
