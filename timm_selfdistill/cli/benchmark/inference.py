"""Speed and size at inference, for `python recipes/benchmark.py`."""
import dataclasses
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Tuple

import timm
import torch
import torch.nn as nn
from rich.console import Console
from rich.table import Table
from torch.utils.benchmark import Timer

from ...evaluation.trained_network import check_device
from ...models.probe import count_macs, meta_copy
from .paired import compare


@dataclasses.dataclass
class InferenceBenchmarkConfig:
    """Compare multi-exit networks at inference with the plain backbone and with networks cut by hand."""

    models: Tuple[str, ...] = ('resnet50', 'vit_small_patch16_224', 'convnext_tiny', 'efficientnet_b0')
    """Names of timm models."""
    batch_size: int = 2
    """Images at a time."""
    rounds: int = 31
    """Times that each pair is compared."""
    device: str = 'cuda' if torch.cuda.is_available() else 'cpu'
    """Where to compute."""
    output: Optional[Path] = None
    """Write the figures to this JSON file as well."""


class HandCut(nn.Module):
    """What one would write without this package: timm's pruning and the same head."""

    def __init__(self, backbone: nn.Module, index: int, head: nn.Module):
        super().__init__()
        backbone.prune_intermediate_layers([index], prune_norm=True, prune_head=True)
        self.backbone = backbone
        self.index = index
        self.head = head

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        maps = self.backbone.forward_intermediates(
            x, indices=[self.index], stop_early=True, intermediates_only=True, output_fmt='NCHW')
        return self.head(maps[-1])


def paired_ratio(ours: Callable, rival: Callable, x: torch.Tensor, rounds: int) -> Dict[str, float]:
    """Time two callables in turn; return the median of ours over the rival's, and the middle half of the ratios."""
    timers = [Timer('f(x)', globals=dict(f=f, x=x), num_threads=torch.get_num_threads()) for f in (rival, ours)]
    for timer in timers:
        timer.timeit(2)
    figures = compare([lambda timer=timer: timer.timeit(1).mean for timer in timers], rounds)[1]
    return {name: figures[name] for name in ('ratio', 'low', 'high')}


def size(network: nn.Module, input_size: Tuple[int, int, int]) -> Tuple[int, int]:
    """Count the parameters of a network, and its MACs for one image."""
    macs, _ = count_macs(meta_copy(network), torch.empty(1, *input_size, device='meta'))
    return sum(p.numel() for p in network.parameters()), macs


@torch.inference_mode()
def compare_network(name: str, config: InferenceBenchmarkConfig) -> List[Dict[str, Any]]:
    """Measure one network against its plain backbone, and each truncated one against the same cut by hand."""
    check_device(config.device)
    model = timm.create_model(f'{name}_sd').eval().to(config.device)
    input_size = model.pretrained_cfg['input_size']
    x = torch.randn(config.batch_size, *input_size, device=config.device)
    pairs: List[Tuple[str, nn.Module, str, nn.Module]] = [('MultiExit', model, 'plain backbone', model.backbone)]
    for k, index in enumerate(model.exits):
        plain = timm.create_model(name).eval().to(config.device)
        plain.load_state_dict(model.backbone.state_dict())
        pairs.append((f'truncate({k})', model.truncate(k), 'cut by hand', HandCut(plain, index, model.exit_heads[k])))
    rows = []
    for ours_name, ours, rival_name, rival in pairs:
        if not torch.equal(ours(x), rival(x)):
            raise RuntimeError(f'{name}: {ours_name} and {rival_name} disagree, so their speed compares nothing.')
        row = dict(model=name, ours=ours_name, rival=rival_name, **paired_ratio(ours, rival, x, config.rounds))
        # the auxiliary heads do not run in a plain forward pass, but they are there
        row.update(zip(('params', 'macs'), size(ours, input_size)))
        row.update(zip(('rival_params', 'rival_macs'), size(rival, input_size)))
        rows.append(row)
    return rows


def import_seconds(rounds: int) -> Dict[str, float]:
    """Time `import timm_selfdistill` after `import timm` in fresh processes: median and middle half, in seconds."""
    code = (
        'import time, timm; start = time.perf_counter(); import timm_selfdistill; print(time.perf_counter() - start)'
    )
    seconds = [float(subprocess.check_output([sys.executable, '-W', 'ignore', '-c', code])) for _ in range(rounds)]
    low, median, high = statistics.quantiles(seconds, n=4)
    return dict(seconds=median, low=low, high=high)


def run_benchmark(config: InferenceBenchmarkConfig, console: Console) -> Dict[str, Any]:
    """Measure inference and show it; return the figures."""
    table = Table(title=f'inference on {config.device}, batches of {config.batch_size}, {config.rounds} rounds')
    for column in ('model', 'ours / rival', 'time', 'middle half', 'params', 'MACs'):
        table.add_column(column)
    rows = []
    for name in config.models:
        for row in compare_network(name, config):
            rows.append(row)
            table.add_row(
                row['model'], f'{row["ours"]} / {row["rival"]}',
                f'{row["ratio"]:.3f}', f'{row["low"]:.3f} to {row["high"]:.3f}',
                *('equal' if row[k] == row[f'rival_{k}'] else f'{row[k] / row[f"rival_{k}"]:.3f}'
                  for k in ('params', 'macs')),
            )
    console.print(table)
    imported = import_seconds(11)
    console.print('import timm_selfdistill after timm: {seconds:.3f} s ({low:.3f} to {high:.3f})'.format(**imported))
    return dict(rows=rows, import_seconds=imported)
