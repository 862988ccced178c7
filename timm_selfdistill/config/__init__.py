"""The settings of a training run."""
from .settings import DIGITS, INCIDENTAL, PLACES, TrainConfig

__all__ = ['DIGITS', 'INCIDENTAL', 'PLACES', 'TrainConfig']
