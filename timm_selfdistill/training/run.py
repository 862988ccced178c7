"""A training run: its setup, its loop and its keeper."""
from pathlib import Path
from typing import Optional

from accelerate import Accelerator

from ..config import TrainConfig
from .folders import create_folder
from .keeper import Keeper
from .loop import Loop
from .reporter import Reporter
from .setup import set_up
from .signals import StopSignals

__all__ = ['Run']


class Run:
    """One training run in this process; all processes make one at the same time.

    Args:
        config: The settings.
        accelerator: Makes this process one of several.
        folder: The run's folder; created when all settings have been found to hold.
        reporter: Shows what happens; nobody when None.
        signals: Say when to stop; never when None.

    Attributes:
        setup: What is made once: data, network, loss, loaders, optimizer.
        keeper: Checkpoints, weights and rows, and where the run is.
        loop: Its steps.

    Raises:
        ConfigError: A setting does not fit the model or the data.
        DataError: The data cannot be used.
    """

    def __init__(
            self,
            config: TrainConfig,
            accelerator: Accelerator,
            folder: Path,
            reporter: Optional[Reporter] = None,
            signals: Optional[StopSignals] = None,
    ):
        self.folder = folder
        self.reporter = reporter or Reporter(enabled=False, epochs=config.epochs)
        self.setup = set_up(config, accelerator, folder)
        self.keeper = Keeper(self.setup, folder, self.reporter)
        self.loop = Loop(self.setup, self.keeper, signals or StopSignals())
        create_folder(config, folder, accelerator)
