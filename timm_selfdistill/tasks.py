"""Training tasks: a model and the loss that trains it, behind timm's TrainingTask."""
import logging
from typing import Any, Callable, Dict, List, Optional, Tuple

import torch
import torch.nn as nn
from timm.task import TrainingTask, resolve_classification_loss
from timm.utils import unwrap_model

from .losses import self_distillation_loss
from .multi_exit import MultiExit
from .wrapper import nested_group_matcher

__all__ = ['SelfDistillationModule', 'SelfDistillationTask']

_logger = logging.getLogger(__name__)


class SelfDistillationModule(nn.Module):
    """Everything that self-distillation trains, in one forward pass, so that DDP sees every parameter used.

    Args:
        model: The multi-exit network.
        hints: Also learn projections from the auxiliary exits' features to the deepest exit's. They exist for the hint
            loss alone and are no part of the model.
    """

    def __init__(self, model: MultiExit, hints: bool = True):
        super().__init__()
        self.model = model
        like = next(model.parameters())
        self.projections = nn.ModuleList(
            nn.Linear(head.num_features, model.head_hidden_size) for head in (model.exit_heads if hints else ())
        ).to(device=like.device, dtype=like.dtype)

    def no_weight_decay(self):
        return {f'model.{n}' for n in self.model.no_weight_decay()}

    def group_matcher(self, coarse: bool = False) -> Callable[[str], int]:
        return nested_group_matcher(self, 'model', coarse)

    def forward(
            self,
            x: torch.Tensor,
    ) -> Tuple[List[torch.Tensor], List[torch.Tensor], Optional[torch.Tensor]]:
        """Run all exits.

        Args:
            x: Images (N, C, H, W).

        Returns:
            Logits of every exit, each (N, num_classes); projected features of the auxiliary exits, each
            (N, num_features); features of the deepest exit (N, num_features), detached. The last two are an empty list
            and None without hints.
        """
        if not len(self.projections):
            return self.model.forward_exits(x), [], None
        logits, features = self.model.forward_exits(x, return_features=True)
        hints = [project(f) for project, f in zip(self.projections, features)]
        return logits, hints, features[-1]


class SelfDistillationTask(TrainingTask):
    """Be Your Own Teacher (Zhang et al., ICCV 2019, arXiv 1905.08094): the deepest exit teaches the shallow ones.

    With `alpha` and `hint_weight` 0 it is deep supervision; with a model without auxiliary exits, plain training.

    Args:
        model: The multi-exit network.
        criterion: Loss against the labels. Created from `criterion_kwargs` when None.
        criterion_kwargs: Arguments of timm's `create_classification_loss`.
        alpha: Share of the divergence against the cross entropy at auxiliary exits, 0 to 1.
        temperature: Softens teacher and student in the divergence, greater than 0.
        square_temperature: Multiply the divergence by the squared temperature.
        hint_weight: λ, the weight of the hint loss; 0 leaves it and its projections out.
        device: Device for task tensors.
        dtype: Dtype for task tensors.
        verbose: Log the settings.

    Raises:
        ValueError: A weight or the temperature is out of range.
    """

    def __init__(
            self,
            model: MultiExit,
            criterion: Optional[Callable] = None,
            criterion_kwargs: Optional[Dict[str, Any]] = None,
            alpha: float = 0.5,
            temperature: float = 3.0,
            square_temperature: bool = True,
            hint_weight: float = 0.03,
            device: Optional[torch.device] = None,
            dtype: Optional[torch.dtype] = None,
            verbose: bool = True,
    ):
        super().__init__(device=device, dtype=dtype, verbose=verbose)
        if not 0 <= alpha <= 1:
            raise ValueError(f'alpha={alpha}: expected a number from 0 to 1.')
        if not temperature > 0:
            raise ValueError(f'temperature={temperature}: expected a number greater than 0.')
        if not hint_weight >= 0:
            raise ValueError(f'hint_weight={hint_weight}: expected 0 or more.')
        self.criterion = resolve_classification_loss(criterion, self.device, criterion_kwargs=criterion_kwargs)
        self.loss_args = dict(
            alpha=alpha,
            temperature=temperature,
            square_temperature=square_temperature,
            hint_weight=hint_weight,
        )
        self.trainable_module = SelfDistillationModule(model, hints=hint_weight > 0)
        if self.verbose:
            _logger.info(f'{type(self).__name__}: {self.loss_args}')

    def prepare_distributed(self, device_ids: Optional[list] = None, **ddp_kwargs) -> 'SelfDistillationTask':
        """Wrap the model and its projections in DistributedDataParallel."""
        from torch.nn.parallel import DistributedDataParallel as DDP
        self.trainable_module = DDP(self.trainable_module, device_ids=device_ids, **ddp_kwargs)
        return self

    def compile(self, backend: str = 'inductor', mode: Optional[str] = None, **compile_kwargs) -> nn.Module:
        """Compile the training forward; evaluation uses the model as it is."""
        self.trainable_module = torch.compile(self.trainable_module, backend=backend, mode=mode, **compile_kwargs)
        return self.get_eval_model()

    def get_eval_model(self, module: Optional[nn.Module] = None, ema: bool = False) -> Optional[nn.Module]:
        """Return the multi-exit network, or its average with `ema`, without projections and wrappers."""
        module = module if module is not None else self.get_trainable_module(ema=ema)
        return None if module is None else unwrap_model(module).model

    def get_task_state(self, module: Optional[nn.Module] = None, ema: bool = False) -> Dict[str, Any]:
        module = module if module is not None else self.get_trainable_module(ema=ema)
        return {} if module is None else {'projections': unwrap_model(module).projections.state_dict()}

    def load_task_state(
            self,
            state: Optional[Dict[str, Any]],
            strict: bool = True,
            module: Optional[nn.Module] = None,
            ema: bool = False,
    ) -> None:
        module = module if module is not None else self.get_trainable_module(ema=ema)
        if state and module is not None:
            unwrap_model(module).projections.load_state_dict(state['projections'], strict=strict)

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> Dict[str, torch.Tensor]:
        """Forward pass through all exits and the loss.

        Args:
            input: Images (N, C, H, W).
            target: Labels (N,), or class probabilities (N, num_classes) with a criterion that takes them.

        Returns:
            `loss`, the scalar to differentiate; `output`, logits of the deepest exit (N, num_classes); and the loss's
            terms by name, see `self_distillation_loss`.
        """
        logits, hints, hint_target = self.trainable_module(input)
        loss, terms = self_distillation_loss(
            logits, target, hints, hint_target, criterion=self.criterion, **self.loss_args)
        return {'loss': loss, 'output': logits[-1], **terms}
