"""Are gates better than confidence? `python recipes/paper/gate_study.py --checkpoint RUN --data-dir PATH`

Of the test split some images, drawn by each seed, stand for held-out ones: temperatures are fitted and gates trained on
them. On all others the curve of accuracy over cost is followed, with one threshold for all exits. Its accuracy is given
at a quarter, a half and three quarters of the way from the cost of the first exit to that of the whole network.
"""
import dataclasses
import json
from pathlib import Path

import numpy as np
import torch
import tyro

from timm_selfdistill.costs import compute_costs
from timm_selfdistill.evaluation.trained_network import EvaluationConfig, open_network
from timm_selfdistill.inference.calibration import exit_curve, fit_temperatures
from timm_selfdistill.inference.gates import with_gates
from timm_selfdistill.metrics import collect_logits
from timm_selfdistill.models.exit_rule import ExitRule
from timm_selfdistill.models.multi_exit import shown_name

CRITERIA = ('confidence', 'margin', 'entropy', 'gate')
SHARES = (0.25, 0.5, 0.75)


@dataclasses.dataclass(kw_only=True)
class GateStudyConfig(EvaluationConfig):
    """Compare criteria of early exit at equal cost."""

    checkpoint: str
    """Folder of a run, or hf-hub:org/name."""
    seeds: int = 3
    """Times that held-out images are drawn."""
    images: int = 2000
    """Images drawn."""
    output: Path = Path('recipes/paper/results/gate_study.json')
    """Where the figures go."""


def main(config: GateStudyConfig) -> None:
    torch.set_num_threads(1)  # everything is small
    network = open_network(config.checkpoint, config)
    model = network.model
    logits, target = collect_logits(model, network.batches(network.data.test), network.device)
    costs = compute_costs(model)
    rows = []
    for seed in range(config.seeds):
        order = torch.randperm(len(target), generator=torch.Generator().manual_seed(seed))
        held, others = order[:config.images], order[config.images:]
        temperatures = fit_temperatures([z[held] for z in logits], target[held])
        for criterion in CRITERIA:
            rule = ExitRule(model.num_exits, model.num_classes, criterion=criterion, temperatures=temperatures)
            rule = with_gates(rule, [z[held] for z in logits], target[held], seed)
            curve = exit_curve(rule, [z[others] for z in logits], target[others], costs, points=300)
            shared = sorted((row['cost'], row['top1']) for row in curve if row['family'] in ('shared', 'deepest'))
            cost, top1 = map(np.array, zip(*shared))
            at = [cost[0] + share * (cost[-1] - cost[0]) for share in SHARES]
            rows.append(dict(criterion=criterion, seed=seed, cost=at, top1=np.interp(at, cost, top1).tolist()))
    summary = dict(
        network=shown_name(model), dataset=network.data.name, images=config.images, shares=SHARES, rows=rows)
    config.output.parent.mkdir(parents=True, exist_ok=True)
    config.output.write_text(json.dumps(summary, indent=1) + '\n', encoding='utf-8')
    print('| criterion | ' + ' | '.join(f'at {100 * share:.0f} %' for share in SHARES) + ' |\n' + '|---' * 4 + '|')
    for criterion in CRITERIA:
        of_seeds = np.array([row['top1'] for row in rows if row['criterion'] == criterion])
        cells = [f'{mean:.2f} ± {sd:.2f}' for mean, sd in zip(of_seeds.mean(0), of_seeds.std(0, ddof=1))]
        print(f'| {criterion} | {" | ".join(cells)} |')


if __name__ == '__main__':
    main(tyro.cli(GateStudyConfig))
