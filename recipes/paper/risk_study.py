"""Do thresholds with a guarantee keep it? `python recipes/paper/risk_study.py --checkpoint RUN --data-dir PATH`

A thousand times held-out images are drawn, with replacement, from the images of the test split. Thresholds are chosen
on them, and the accuracy that early exit then loses is counted on all images of the split. As these are what the
held-out images are drawn from, that is the risk itself, not an estimate of it. Beside it stands plain calibration by
`accuracy_drop`, which aims at the same loss and promises nothing.
"""
import dataclasses
import json
from pathlib import Path
from typing import Dict, List, Tuple

import matplotlib
import torch
import tyro
from rich.console import Console
from rich.progress import track

from timm_selfdistill.costs import compute_costs
from timm_selfdistill.evaluation.trained_network import EvaluationConfig, open_network
from timm_selfdistill.inference.calibration import choose_point, exit_curve, fit_temperatures, measure_thresholds
from timm_selfdistill.inference.risk_control import BOUNDS, choose_path, count_losses, count_passing
from timm_selfdistill.metrics import collect_logits
from timm_selfdistill.models.exit_rule import ExitRule
from timm_selfdistill.models.multi_exit import shown_name

matplotlib.use('agg')
import matplotlib.pyplot as plt

RISKS = (0.01, 0.02, 0.05)
CONFIDENCES = (0.9, 0.95)
PLAIN = 'accuracy_drop'


@dataclasses.dataclass(kw_only=True)
class RiskStudyConfig(EvaluationConfig):
    """Count how often thresholds lose more accuracy than was promised."""

    checkpoint: str
    """Folder of a run, or hf-hub:org/name."""
    draws: int = 1000
    """Times that held-out images are drawn."""
    images: int = 5000
    """Images drawn."""
    output: Path = Path('recipes/paper/results/risk_study.json')
    """Where the figures go; a picture is put beside it."""


Row = Tuple[str, float, float]  # how thresholds were chosen, risk, confidence


def choose(
        logits: List[torch.Tensor],
        target: torch.Tensor,
        rule: ExitRule,
        costs,
        seed: int,
        count: int,
) -> Dict[Row, ExitRule]:
    """Draw held-out images, and choose thresholds on them in every way."""
    rows = torch.randint(len(target), (count,), generator=torch.Generator().manual_seed(seed))
    held, of_held = [z[rows] for z in logits], target[rows]
    found: Dict[Row, ExitRule] = {}
    plain = dataclasses.replace(rule, temperatures=fit_temperatures(held, of_held))
    curve = exit_curve(plain, held, of_held, costs)
    for risk in RISKS:
        point = choose_point(curve, accuracy_drop=100 * risk)
        found[PLAIN, risk, 0.] = dataclasses.replace(plain, thresholds=point['thresholds'])
    quarter = count // 4
    safe, path = choose_path(rule, [z[:quarter] for z in held], of_held[:quarter], costs)
    before = count_losses(safe, path, [z[:quarter] for z in held], of_held[:quarter])
    counts = count_losses(safe, path, [z[quarter:] for z in held], of_held[quarter:])
    for bound in BOUNDS:
        for risk in RISKS:
            for confidence in CONFIDENCES:
                passed = count_passing(counts, count - quarter, before, quarter, risk, confidence, bound)
                thresholds = path[passed - 1] if passed else None  # they are sorted by cost
                found[bound, risk, confidence] = dataclasses.replace(safe, thresholds=thresholds)
    return found


def main(config: RiskStudyConfig) -> None:
    torch.set_num_threads(1)  # everything is small
    network = open_network(config.checkpoint, config)
    logits, target = collect_logits(network.model, network.batches(network.data.test), network.device)
    costs = compute_costs(network.model)
    rule = ExitRule(network.model.num_exits, network.model.num_classes)
    at_end = 100 * (logits[-1].argmax(-1) == target).double().mean().item()
    lost: Dict[Row, List[float]] = {}
    cost: Dict[Row, List[float]] = {}
    for seed in track(range(config.draws), 'draw', console=Console(stderr=True)):
        for row, chosen in choose(logits, target, rule, costs, seed, config.images).items():
            point, = measure_thresholds(chosen, [('', chosen.thresholds)], logits, target, costs)
            lost.setdefault(row, []).append(at_end - point['top1'])
            cost.setdefault(row, []).append(point['cost'])
    rows = []
    for (how, risk, confidence), points in lost.items():
        broken = sum(value > 100 * risk + 1e-9 for value in points) / config.draws
        rows.append(dict(
            thresholds=how, risk=risk, confidence=confidence or None, broken=broken,
            lost_mean=sum(points) / config.draws, lost_most=max(points),
            saved=1 - sum(cost[how, risk, confidence]) / config.draws))
    summary = dict(
        network=shown_name(network.model), dataset=network.data.name, draws=config.draws, images=config.images,
        population=len(target), rows=rows)
    config.output.parent.mkdir(parents=True, exist_ok=True)
    config.output.write_text(json.dumps(summary, indent=1) + '\n', encoding='utf-8')
    plot(lost, summary, config.output.with_suffix('.png'))
    print(f'| thresholds | risk | confidence | promise broken | points lost, mean (most) | MACs saved |\n{"|---" * 6}|')
    for row in rows:
        asked = '–' if row['confidence'] is None else f'{row["confidence"]:g}'
        print(f'| {row["thresholds"]} | {row["risk"]:g} | {asked} | {100 * row["broken"]:.1f} % | '
              f'{row["lost_mean"]:.2f} ({row["lost_most"]:.2f}) | {100 * row["saved"]:.1f} % |')


def plot(lost: Dict[Row, List[float]], summary: Dict, path: Path) -> None:
    """Draw what was lost in every draw: a histogram for each risk, and the loss allowed as a line."""
    figure, axes = plt.subplots(1, len(RISKS), figsize=(12, 3.6), layout='constrained')
    for axis, risk in zip(axes, RISKS):
        for row, label in (((PLAIN, risk, 0.), f'accuracy_drop={100 * risk:g}'),
                           (('betting', risk, CONFIDENCES[-1]), f'risk={risk:g}, confidence={CONFIDENCES[-1]:g}')):
            axis.hist(lost[row], bins=40, alpha=0.6, label=label)
        axis.axvline(100 * risk, color='black', linestyle='--', linewidth=1)
        axis.set_xlabel('points of accuracy lost against running to the end')
        axis.legend(fontsize=8)
    axes[0].set_ylabel(f'of {summary["draws"]:,} draws')
    title = f"{summary['network']} on {summary['dataset']}: {summary['images']:,} held-out images a draw"
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == '__main__':
    main(tyro.cli(RiskStudyConfig))
