"""Training tasks: a model and the loss that trains it."""
from .config import DistillationConfig, Linear
from .module import SelfDistillationModule
from .task import SelfDistillationTask

__all__ = ['DistillationConfig', 'Linear', 'SelfDistillationModule', 'SelfDistillationTask']
