"""What a person sees of a run: a progress bar, a line an epoch, a table at the end."""
from pathlib import Path
from typing import Any, Dict, Iterable, Iterator, List

from accelerate import Accelerator
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

from ..costs import ExitCost
from ..data.image_data import ImageData
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
        self.progress = None

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

    def steps(self, batches: Iterable, count: int, epoch: int) -> Iterator:
        """Pass on an epoch's batches under a progress bar, which shows on terminals only."""
        if not (self.enabled and self.console.is_terminal):
            yield from batches
            return
        whole = Column(no_wrap=True, min_width=len(f'epoch {epoch + 1}/{self.epochs}'))
        columns = (
            TextColumn('epoch {task.fields[epoch]}/{task.fields[epochs]}', table_column=whole),
            BarColumn(bar_width=10),
            MofNCompleteColumn(table_column=Column(no_wrap=True, min_width=2 * len(str(count)) + 1)),
            TimeRemainingColumn(compact=True, table_column=Column(no_wrap=True, min_width=5)),
            TextColumn('{task.fields[terms]}', table_column=Column(no_wrap=True)),
        )
        with Progress(*columns, console=self.console, transient=True) as self.progress:
            self.bar = self.progress.add_task('', total=count, epoch=epoch + 1, epochs=self.epochs, terms='')
            for batch in batches:
                yield batch
                self.progress.advance(self.bar)
        self.progress = None

    def terms(self, meter: TermMeter) -> None:
        """Show the loss and its terms, averaged over the epoch so far, each kind exit by exit."""
        if self.progress is not None:
            kinds: Dict[str, List[str]] = {}
            for name, value in zip(meter.names, (meter.sums / meter.batches).tolist()):
                kinds.setdefault(name.rstrip('0123456789'), []).append(f'{value:.2f}')
            self.progress.update(self.bar, terms=' '.join(f'{kind} {"/".join(v)}' for kind, v in kinds.items()))

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
        accuracies = '  '.join(f'{name} {values["top1"]:.2f}' for name, values in metrics.items())
        self.say(
            f'epoch {epoch + 1:>{len(str(self.epochs))}}/{self.epochs}  loss {terms["loss"]:.4f}{beside}  '
            f'{split} top-1: {accuracies}  ({seconds:.1f} s)'
        )

    def finish(self, folder: Path, rows: List[Dict[str, Any]], split: str) -> None:
        """Show the table of all exits and how to load the network."""
        self.console.print(render_table(rows, f'{split} split, weights of the last epoch'))
        self.say('Load it with')
        self.say('    import timm, timm_selfdistill')
        self.say(f'    model = timm.create_model("local-dir:{folder}", pretrained=True)')
