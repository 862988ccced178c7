"""Write a trained network for deployment, for example `python recipes/export.py --checkpoint output/train/RUN`."""
import dataclasses
from pathlib import Path
from typing import Literal, Optional

import tyro

from ..errors import ConfigError
from ..evaluation.trained_network import EvaluationConfig
from ..hub.networks import load_checkpoint
from ..inference.export import export_network
from .export_int8 import export_int8
from .launch import run_command


@dataclasses.dataclass(kw_only=True)
class ExportConfig(EvaluationConfig):
    """Write a trained network as graphs that run without this package.

    The options for data are for --int8, which takes the validation split.
    """

    checkpoint: str
    """Folder of a run, or hf-hub:org/name."""
    exit: Optional[int] = None
    """Cut the network off at this exit; all exits when None."""
    staged: bool = False
    """One graph for each exit, for images to leave where they are sure."""
    int8: bool = False
    """Quantize the stages for CPUs, choose temperatures and thresholds anew, and measure both beside float32."""
    format: Literal['onnx', 'torch-export'] = 'onnx'
    """For onnxruntime, or for torch.export.load."""
    output: Optional[str] = None
    """Folder to write; output/export/ and a name made of the checkpoint's and these settings when None."""


def _main() -> None:
    config = tyro.cli(ExportConfig)
    if config.int8 and not (config.staged and config.format == 'onnx'):
        raise ConfigError('--int8: goes with --staged and --format onnx.')
    model, folder = load_checkpoint(config.checkpoint)
    what = 'staged' if config.staged else 'exits' if config.exit is None else f'exit{config.exit}'
    name = folder.resolve().name if folder else config.checkpoint.rpartition('/')[2]
    output = Path(config.output or f'output/export/{name}-{what}-{config.format}')
    if config.int8:
        output = Path(config.output or f'output/export/{name}-staged-int8')
        manifest = export_int8(config.checkpoint, output, config)
    else:
        manifest = export_network(model, output, config.exit, config.staged, config.format)
    print(f'{output}:')
    for path in sorted(output.iterdir()):
        print(f'  {path.name:<20} {path.stat().st_size / 1e6:10,.2f} MB')
    parity = manifest['parity']
    sizes = ', '.join(map(str, parity['batch_sizes']))
    if config.int8:
        ratios = ', '.join(f'{ratio:.1f}' for ratio in manifest['int8']['signal_to_noise_db'])
        print(f'signal over quantization noise of the exits\' logits: {ratios} dB')
    else:
        print(f'differs from torch by {parity["largest_difference"]:.1e} of the largest logit (batches of {sizes})')
    if config.staged and all(level is None for level in manifest['early_exit']['levels']):
        print('No exit has a threshold, so nothing leaves early until levels are set.')


def main() -> None:
    """Run the command."""
    run_command(_main)


if __name__ == '__main__':
    main()
