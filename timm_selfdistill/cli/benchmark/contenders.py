"""What early exit is compared with, and the settings that say so."""
import copy
import dataclasses
import importlib.util
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Tuple

import numpy as np
import torch
import torch.nn as nn
from timm.data import resolve_data_config

from ...errors import ConfigError
from ...evaluation.trained_network import (
    EvaluationConfig,
    TrainedNetwork,
)
from ...hub.networks import load_network
from ...inference.calibration import choose_point
from ...inference.early_exit import EarlyExit
from ...models.exit_rule import ExitRule, single_exits
from ...models.multi_exit import MultiExit
from ...models.names import exit_names
from ...models.probe import copy_model, count_macs, meta_probe

Outcome = Tuple[torch.Tensor, torch.Tensor]


@dataclasses.dataclass(kw_only=True)
class LatencyBenchmarkConfig(EvaluationConfig):
    """Compare early exit with the plain network, with all exits, and with the network truncated at each of them, on
    images of the test split; thresholds are chosen on the validation split.

    Images lie on the device before anything is timed, and every batch is waited for.
    """

    checkpoint: str
    """Folder of a run."""
    batch_size: int = 256
    """Images at a time while the thresholds are chosen; nothing is timed with it."""
    batch_sizes: Tuple[int, ...] = (1, 32, 256)
    """Images at a time that everything is timed with."""
    images: int = 2048
    """Images of the test split to take, of every class its share; those that fill no last batch are left out."""
    budgets: Tuple[float, ...] = (0.4, 0.6, 0.8)
    """Thresholds to compare: the most accurate ones with which an image takes on average such a share of the plain
    network's MACs."""
    drops: Tuple[float, ...] = (0.,)
    """More thresholds: the cheapest ones that lose so many percentage points of top-1 accuracy at most."""
    static: Optional[str] = None
    """Checkpoint of a smaller network to compare with, trained and fed alike; its exits are left out."""
    earlyon: bool = False
    """Compare with the package earlyon 0.3 as well, on the same network, heads and thresholds; it has to be installed.
    """
    rounds: int = 7
    """Times that everything is compared."""
    channels_last: bool = True
    """Let all networks run with channels last in memory, as they were trained."""
    output: Optional[Path] = None
    """Write the figures to this CSV file, and a picture beside it."""

    def check(self) -> None:
        """Raise ConfigError where a setting is out of range."""
        for name, least in (('batch_sizes', 1), ('images', 1), ('rounds', 2)):
            value = getattr(self, name)
            values = value if isinstance(value, tuple) else (value,)
            if not values or min(values) < least:
                raise ConfigError(f'--{name.replace("_", "-")} {" ".join(map(str, values))}: expected {least} or more.')
        if self.output is not None and self.output.suffix != '.csv':
            raise ConfigError(f'--output {self.output}: expected the name of a CSV file.')
        if self.earlyon and importlib.util.find_spec('earlyon') is None:
            raise ConfigError('--earlyon: that package is not installed; pip install earlyon==0.3 does it.')


@dataclasses.dataclass
class Contender:
    """Something that classifies images.

    Attributes:
        name: What to call it.
        group: What it is a kind of, for the picture.
        run: Classifies a batch (N, C, H, W); this is timed.
        read: Takes from what `run` returned the logits (N, num_classes) and the number of the exit of each image (N,).
        expect: Says what should come of it, given the logits of every exit and the size of the batches; None where
            nothing is known.
        rule: When images leave, and so which parts of the network run; None for another network.
        share: MACs of the other network, as a share of the plain network's.
    """
    name: str
    group: str
    run: Callable[[torch.Tensor], Any]
    read: Callable[[Any], Outcome]
    expect: Optional[Callable[[List[torch.Tensor], int], Outcome]]
    rule: Optional[ExitRule] = None
    share: Optional[float] = None


def _at(number: int, logits: torch.Tensor) -> Outcome:
    return logits, torch.full(logits.shape[:1], number, device=logits.device)


def truncated(name: str, group: str, network: nn.Module, number: int, rule: ExitRule) -> Contender:
    """A network that ends at one exit, as if by a rule all images left there."""
    return Contender(
        name, group, network, lambda out: _at(number, out), lambda logits, size: _at(number, logits[number]), rule)


def early_exit(name: str, predictor: EarlyExit, rule: ExitRule) -> Contender:
    """EarlyExit with another rule."""
    predictor = copy.copy(predictor)  # probing how images leave takes seconds, so that is shared
    predictor.rule = rule

    def read(out: Any) -> Outcome:
        return out.logits, out.exit_index

    return Contender(
        name, 'early exit', predictor.run, read, lambda logits, size: read(predictor.simulate(logits)), rule)


def earlyon(
        name: str,
        predictor: EarlyExit,
        rule: ExitRule,
        input_size: Tuple[int, int, int],
) -> Contender:
    """The package earlyon with the same network, heads, temperatures and thresholds.

    Its batches of more than one image leave as a whole, where all images are sure.

    Raises:
        ConfigError: It cannot take this network.
    """
    from earlyon.core.types import FINAL_HEAD, EarlyExitConfig, ExitPoint
    from earlyon.core.wrappers import EarlyExitWrapper
    model = copy_model(predictor.model)  # its hooks stay, and would be called in every other pass as well
    cuts = getattr(predictor.runner, 'cuts', None)
    if cuts is None or any(head.takes_logits for head in model.exit_heads):
        raise ConfigError('--earlyon: it needs a module for every exit, and heads that take nothing but its output.')
    names = exit_names(model)[:model.num_exits - 1]
    deepest = len(names)
    places = zip(names, cuts, model.exits)
    grids = predictor.runner.grids(*input_size)
    config = EarlyExitConfig(
        'own', model.num_classes,
        [ExitPoint(name, f'backbone.{cut.module}', model.stages[i].num_chs) for name, cut, i in places],
        confidence_thresholds=[1. if t is None else t for t in rule.thresholds],
        enabled_exits=[t is not None for t in rule.thresholds],
        temperatures=dict(zip([*names, FINAL_HEAD], rule.temperatures)),
    )
    wrapper = EarlyExitWrapper(
        model, dict(zip(names, model.exit_heads)), nn.Identity(), config, (1, *input_size),
        {name: lambda output, i=i, cut=cut: cut.read(output, grids.get(i))
         for i, (name, cut) in enumerate(zip(names, cuts))},
    ).eval()

    def run(images: torch.Tensor) -> Any:
        return wrapper(images) if len(images) == 1 else wrapper.forward_inference_batched(images)

    def read(out: Any) -> Outcome:
        logits = out.prediction if hasattr(out, 'prediction') else out.predictions
        return _at(out.exit_taken if out.exit_taken >= 0 else deepest, logits)

    def expect(logits: List[torch.Tensor], size: int) -> Outcome:
        sure = torch.stack([rule.judge(i, z, {})[1] >= rule.level(i) for i, z in enumerate(logits)])
        exits = sure.unflatten(1, (-1, size)).all(2).int().argmax(0).repeat_interleave(size)
        return torch.stack(logits)[exits, torch.arange(len(exits), device=exits.device)], exits

    return Contender(name, 'earlyon', run, read, expect, rule)


def open_static(checkpoint: str, network: TrainedNetwork) -> nn.Module:
    """Open the smaller network that is compared with, without its exits.

    Raises:
        ConfigError: It cannot be opened, or expects other images or classes than the network.
    """
    try:
        model, _ = load_network(checkpoint)
    except (OSError, RuntimeError, ValueError) as e:
        raise ConfigError(f'--static {checkpoint}: {e}') from e
    if isinstance(model, MultiExit):
        model = model.truncate(model.num_exits - 1)
    theirs, ours = (
        dict(resolve_data_config(model=m), num_classes=m.num_classes) for m in (model, network.model))
    same = {name for name in ours if np.array_equal(theirs[name], ours[name])}  # a JSON file makes tuples to lists
    other = ', '.join(f'{name} {theirs[name]} (not {value})' for name, value in ours.items() if name not in same)
    if other:
        raise ConfigError(f'--static {checkpoint}: it expects {other}; only what is fed alike can be compared.')
    return model.to(network.device)


def choose_rules(predictor: EarlyExit, network: TrainedNetwork, config: LatencyBenchmarkConfig) -> Dict[str, ExitRule]:
    """Choose the thresholds on the validation split; return the rules by name.

    Raises:
        ConfigError: No thresholds stay within a budget.
    """
    calibration = predictor.calibrate(network.batches(network.data.validation), accuracy_drop=0.)
    rules = dict(
        none=dataclasses.replace(calibration.rule, thresholds=None),
        # all heads run and are asked, but at such temperatures no image is ever sure, however far apart its logits lie
        never=dataclasses.replace(calibration.rule, thresholds=1., temperatures=[1e9] * predictor.rule.num_exits),
    )
    aims = [('budget', value) for value in config.budgets] + [('accuracy_drop', value) for value in config.drops]
    for aim, value in aims:
        try:
            point = choose_point(calibration.curve, **{aim: value})
        except ValueError as e:
            raise ConfigError(f'--{"budgets" if aim == "budget" else "drops"} {value}: {e}') from e
        name = f'{aim.removeprefix("accuracy_")} {value:g}'
        rules[name] = dataclasses.replace(calibration.rule, thresholds=point['thresholds'])
    return rules


def list_contenders(network: TrainedNetwork, config: LatencyBenchmarkConfig) -> List[Contender]:
    """Return everything that is compared, the plain network first."""
    model, size = network.model, network.data_config['input_size']
    static = None if config.static is None else open_static(config.static, network)
    predictor = EarlyExit(model, thresholds=1.)  # its own rule, if it has one, is of no account
    rules = choose_rules(predictor, network, config)
    last = model.num_exits - 1
    alone = [ExitRule(model.num_exits, model.num_classes, thresholds) for _, thresholds in single_exits(last + 1)]
    contenders = [
        truncated('plain', 'plain network', model.truncate(last), last, alone[last]),
        Contender(
            'all exits', 'all exits', model.forward_exits, lambda out: _at(last, out[-1]),
            lambda logits, size: _at(last, logits[-1]), rules['never']),
    ]
    contenders += [
        truncated(f'only {name}', 'truncated', model.truncate(i), i, alone[i])
        for i, name in enumerate(exit_names(model)[:last])]
    contenders += [early_exit(f'early exit, {name}', predictor, rule) for name, rule in rules.items()]
    if config.earlyon:
        contenders += [
            earlyon(f'earlyon, {name}', predictor, rule, size)
            for name, rule in rules.items() if name not in ('none', 'never')]
    if static is not None:
        share = plain_macs(static, size) / plain_macs(model, size)
        contenders.append(
            Contender('static', 'static network', static, lambda out: _at(last, out), None, share=share))
    return contenders


def plain_macs(model: nn.Module, input_size: Tuple[int, int, int]) -> int:
    """Count the MACs of a forward pass of one image."""
    return count_macs(*meta_probe(model, input_size))[0]
