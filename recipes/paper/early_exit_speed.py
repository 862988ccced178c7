"""What early exit costs by itself: `python recipes/paper/early_exit_speed.py`, with `pip install earlyon==0.3` beside.

Two bounds, on networks with random weights, in turn in one process, for batches of several sizes. Thresholds that no
image passes: early exit runs all exits and asks at each, against `forward_exits`, which runs them and asks nothing.
Thresholds that all images pass: early exit stops at exit 0, against the network truncated there. The package earlyon
has the same network, heads and thresholds. Ratios are medians over rounds, with the middle half.
"""
import dataclasses
import json
import platform
import time
from pathlib import Path
from typing import Any, Dict, List, Tuple

import timm
import torch
import tyro
from rich.console import Console

from timm_selfdistill import EarlyExit
from timm_selfdistill.cli.benchmark.contenders import earlyon
from timm_selfdistill.cli.benchmark.paired import compare
from timm_selfdistill.evaluation.tables import print_rows
from timm_selfdistill.models.exit_rule import ExitRule


@dataclasses.dataclass
class SpeedConfig:
    """Measure what early exit costs by itself."""

    networks: Tuple[str, ...] = ('resnet18', 'vit_tiny_patch16_224', 'tf_efficientnet_lite0')
    """Names of timm models."""
    batch_sizes: Tuple[int, ...] = (1, 8, 32, 256)
    """Images at a time."""
    rounds: int = 21
    """Times that everything is compared; fewer for large batches."""
    device: str = 'cuda' if torch.cuda.is_available() else 'cpu'
    """Where to compute."""
    threads: int = 1
    """Threads on a CPU."""
    label: str = ''
    """What to call this version in the rows."""
    output: Path = Path('recipes/paper/results/early_exit_speed.jsonl')
    """File that the rows are appended to."""


@torch.inference_mode()
def measure(name: str, config: SpeedConfig) -> List[Dict[str, Any]]:
    """Measure one network; return a row for every size and bound."""
    torch.manual_seed(0)
    model = timm.create_model(f'{name}_sd', num_classes=100).eval().to(config.device)
    begin = time.process_time()
    EarlyExit(model)
    made = time.process_time() - begin
    size = model.pretrained_cfg['input_size']
    count = model.num_exits
    # at such temperatures no image is ever sure
    never = ExitRule(count, model.num_classes, 1., temperatures=[1e9] * count)
    rules = dict(never=never, exit0=ExitRule(count, model.num_classes, [0.] + [1.] * (count - 2)))
    rows = []
    for images in config.batch_sizes:
        x = torch.randn(images, *size, device=config.device)
        for bound, base in (('never', model.forward_exits), ('exit0', model.truncate(0).eval())):
            rule = rules[bound]
            predictor = EarlyExit(model, rule.thresholds, temperatures=rule.temperatures)
            calls = [base, predictor.run, earlyon(bound, predictor, rule, size).run]

            def seconds(call: Any, x: torch.Tensor = x) -> float:
                if x.is_cuda:
                    torch.cuda.synchronize()
                start = time.perf_counter()
                call(x)
                if x.is_cuda:
                    torch.cuda.synchronize()
                return time.perf_counter() - start

            for call in calls:
                call(x)
                call(x)
            rounds = max(5, min(config.rounds, config.rounds * 16 // images))
            figures = compare([lambda call=call: seconds(call) for call in calls], rounds)
            for who, figure in zip(('ours', 'earlyon'), figures[1:]):
                rows.append(dict(
                    label=config.label, network=name, batch_size=images, bound=bound, who=who, rounds=rounds,
                    base_ms=1000 * figures[0]['seconds'], ratio=figure['ratio'], low=figure['low'],
                    high=figure['high'], made_cpu_seconds=made))
    return rows


def main(config: SpeedConfig) -> None:
    torch.set_num_threads(config.threads)
    machine = torch.cuda.get_device_name() if config.device.startswith('cuda') else f'{platform.machine()} CPU'
    config.output.parent.mkdir(parents=True, exist_ok=True)
    EarlyExit(timm.create_model('test_resnet_sd', exits=(2, 3)))  # whatever happens once a process
    for name in config.networks:
        rows = [dict(row, device=machine, threads=config.threads, torch=torch.__version__) for row in
                measure(name, config)]
        with config.output.open('a', encoding='utf-8') as file:
            file.writelines(json.dumps(row) + '\n' for row in rows)
        shown = ('batch_size', 'bound', 'who', 'rounds', 'base_ms', 'ratio', 'low', 'high')
        title = f'{name}: against forward_exits (never) and the truncated network (exit0); made in ' \
                f'{rows[0]["made_cpu_seconds"]:.2f} CPU seconds'
        print_rows(Console(), [{key: row[key] for key in shown} for row in rows], title)


if __name__ == '__main__':
    main(tyro.cli(SpeedConfig))
