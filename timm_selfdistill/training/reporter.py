"""What a person sees of a run: how far it is, a line an epoch, a table at the end."""
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Dict, Iterable, Iterator, List, Optional

from accelerate import Accelerator
from rich.console import Console

from ..costs import ExitCost
from ..data.image_data import ImageData
from ..evaluation.progress import Watch, follow
from ..evaluation.tables import render_table
from .loss_meter import TermMeter

__all__ = ['Reporter']


class Reporter:
    """Shows the progress of a run on a terminal, or line by line in a log.

    Args:
        enabled: False in all processes but one.
        epochs: Epochs of the run.
    """

    def __init__(self, enabled: bool, epochs: int):
        self.enabled = enabled
        self.epochs = epochs
        self.console = Console(quiet=not enabled, highlight=False)
        self.watch: Optional[Watch] = None
        self.shown = ''

    def say(self, text: str) -> None:
        """Print a line, however long."""
        self.console.print(text, soft_wrap=True, markup=False)

    def start(
            self,
            folder: Path,
            data: ImageData,
            model_notes: List[str],
            costs: Dict[str, ExitCost],
            architecture: str,
            accelerator: Accelerator,
    ) -> None:
        """Report what is about to be trained on what."""
        shares = ', '.join(f'{name} {100 * cost.share:.0f} %' for name, cost in costs.items() if name != 'ensemble')
        for note in data.described():
            self.say(f'data    {note}')
        self.say(f'model   {architecture}; share of the MACs: {shares}')
        for note in model_notes:
            self.say(f'model   {note}')
        precision = accelerator.mixed_precision if accelerator.mixed_precision != 'no' else 'fp32'
        self.say(f'device  {accelerator.num_processes} × {accelerator.device.type}, {precision}')
        self.say(f'folder  {folder}')

    @contextmanager
    def watching(self, total: int, done: int) -> Iterator[None]:
        """Show how far the run is, of `total` optimizer steps, while the context lasts."""
        with Watch(self.console) as self.watch:
            self.watch.begin('train', total, done)
            yield
        self.watch = None

    def step(self, images: int, epoch: int, rate: float) -> None:
        """Say that an optimizer step of so many images is done, in epoch `epoch`, at a learning rate."""
        if self.watch is not None:
            self.watch.advance('train', images, f'epoch {epoch + 1}/{self.epochs}  lr {rate:.3g}  {self.shown}')

    def terms(self, meter: TermMeter) -> None:
        """Show the loss and its terms from now on, averaged over the epoch so far, each kind exit by exit."""
        if self.watch is not None and self.enabled:
            kinds: Dict[str, List[str]] = {}
            for name, value in zip(meter.names, (meter.sums / meter.batches).tolist()):
                kinds.setdefault(name.rstrip('0123456789'), []).append(f'{value:.2f}')
            self.shown = ' '.join(f'{kind} {"/".join(v)}' for kind, v in kinds.items())

    def evaluation(self, batches: Iterable, split: str, total: Optional[int]) -> Iterator:
        """Pass on the batches of an evaluation, `total` if that is known, showing how far it is."""
        label = f'evaluate {split}'
        if self.watch is None:
            yield from follow(batches, label, self.console, total)
            return
        self.watch.begin(label, total)
        for images, target in batches:
            yield images, target
            self.watch.advance(label, len(images))
        self.watch.end(label)

    def epoch(
            self,
            epoch: int,
            terms: Dict[str, float],
            metrics: Dict[str, Dict[str, Any]],
            split: str,
            seconds: float,
    ) -> None:
        """Print the line of an epoch.

        The total loss may rise in a healthy run, as its weights change and the exits learn to follow, so the deepest
        exit's cross entropy stands beside it.
        """
        deepest = [name for name in metrics if name != 'ensemble'][-1].replace('exit', 'ce')
        beside = f' ({deepest} {terms[deepest]:.4f})' if deepest in terms else ''
        measure = 'agreement' if next(iter(metrics.values())).get('agreement') else 'top-1'
        accuracies = '  '.join(f'{name} {values["top1"]:.2f}' for name, values in metrics.items())
        self.say(
            f'epoch {epoch + 1:>{len(str(self.epochs))}}/{self.epochs}  loss {terms["loss"]:.4f}{beside}  '
            f'{split} {measure}: {accuracies}  ({seconds:.1f} s)'
        )

    def finish(self, folder: Path, rows: List[Dict[str, Any]], split: str) -> None:
        """Show the table of all exits and how to load the network."""
        self.console.print(render_table(rows, f'{split} split, weights of the last epoch'))
        self.say('Load it with')
        self.say('    import timm, timm_selfdistill')
        self.say(f'    model = timm.create_model("local-dir:{folder}", pretrained=True)')
