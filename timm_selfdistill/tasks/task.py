"""The training task: a model and the loss that trains it, behind timm's TrainingTask."""
import logging
from typing import Any, Callable, Dict, Optional, Sequence

import torch
import torch.nn as nn
from timm.task import DistillationTeacher, TrainingTask, resolve_classification_loss
from timm.utils import unwrap_model

from ..losses import self_distillation_loss, weigh_exits
from ..models.multi_exit import MultiExit
from ..models.names import model_name
from .config import DistillationConfig, Linear
from .module import SelfDistillationModule

__all__ = ['SelfDistillationTask']

_logger = logging.getLogger(__name__)

# Settings that the loss takes as they are.
_LOSS_ARGUMENTS = (
    'alpha', 'temperature', 'square_temperature', 'hint_weight', 'hint_form', 'exit_teacher', 'patriarch', 'eta',
    'tsd_k', 'label_weight', 'teacher_temperature',
)


class SelfDistillationTask(TrainingTask):
    """Be Your Own Teacher (Zhang et al., ICCV 2019, arXiv 1905.08094): the deepest exit teaches the shallow ones.

    With a model without auxiliary exits it is plain training; with a frozen backbone (`MultiExit.freeze_backbone`) the
    auxiliary exits alone learn. With a `patriarch` the network becomes a tolerant
    patriarch, with a `teacher` the student of one (Yang et al., AAAI 2019, arXiv 1805.05551) or of any other network
    (classic distillation), at every one of its exits.

    Args:
        model: The multi-exit network.
        config: What the exits learn.
        criterion: Loss against the labels. Created from `criterion_kwargs` when None.
        criterion_kwargs: Arguments of timm's `create_classification_loss`.
        teacher: A timm model. It is frozen, runs in eval mode and sees the same images, normalised as it expects.
        teacher_classes: For each class of the model its number among the teacher's; the same numbers when None.
        mean: Mean of the channels that the images were normalised with; the model's when None. The teacher needs it.
        std: Standard deviation of the channels, likewise.
        device: Device for task tensors.
        dtype: Dtype for task tensors.
        verbose: Log the settings.

    Raises:
        ValueError: A setting does not fit the model, or the teacher has other classes than the model.

    Examples:
        >>> import timm, timm_selfdistill
        >>> task = SelfDistillationTask(timm.create_model('test_resnet_sd', num_classes=5, exits=(2, 3)), verbose=False)
        >>> result = task.train()(torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 3]))
        >>> result['loss'].backward()
    """

    def __init__(
            self,
            model: MultiExit,
            config: DistillationConfig = DistillationConfig(),
            criterion: Optional[Callable] = None,
            criterion_kwargs: Optional[Dict[str, Any]] = None,
            teacher: Optional[nn.Module] = None,
            teacher_classes: Optional[Sequence[int]] = None,
            mean: Optional[Sequence[float]] = None,
            std: Optional[Sequence[float]] = None,
            device: Optional[torch.device] = None,
            dtype: Optional[torch.dtype] = None,
            verbose: bool = True,
    ):
        super().__init__(device=device, dtype=dtype, verbose=verbose)
        if config.patriarch == 'tsd' and config.tsd_k > model.num_classes:
            raise ValueError(
                f'tsd_k={config.tsd_k}: expected a number from 2 to {model.num_classes}, the number of classes.')
        self.config = config
        self.criterion = resolve_classification_loss(criterion, self.device, criterion_kwargs=criterion_kwargs)
        self.compute_loss, self.compiled = self_distillation_loss, False
        self.shares = [model.stages[i].share for i in model.exits]
        self.trainable_module = SelfDistillationModule(model, config)
        self.teacher: Optional[DistillationTeacher] = None
        if teacher is not None:
            self._set_teacher(teacher, teacher_classes, model, mean, std)
        self.set_progress(0.)
        if self.verbose:
            _logger.info(f'{type(self).__name__}: {config}')

    def _set_teacher(
            self,
            teacher: nn.Module,
            classes: Optional[Sequence[int]],
            model: MultiExit,
            mean: Optional[Sequence[float]],
            std: Optional[Sequence[float]],
    ) -> None:
        if classes is not None:
            if len(classes) != model.num_classes or not all(0 <= c < teacher.num_classes for c in classes):
                raise ValueError(
                    f'teacher_classes={list(classes)}: expected {model.num_classes} numbers of classes from 0 to '
                    f'{teacher.num_classes - 1}, one for each class of {model_name(model)}.'
                )
            classes = torch.tensor(classes, device=self.device)
        elif teacher.num_classes != model.num_classes:
            raise ValueError(
                f'The teacher {model_name(teacher)} has {teacher.num_classes} classes, the student '
                f'{model_name(model)} {model.num_classes}; they must be the same.'
            )
        self.teacher = DistillationTeacher(teacher.requires_grad_(False), device=self.device, dtype=self.dtype)
        mean, std = (
            torch.tensor(given or model.pretrained_cfg[key], device=self.device, dtype=self.dtype).view(1, -1, 1, 1)
            for key, given in (('mean', mean), ('std', std))
        )
        # timm's teacher compares mean and std at every step, which waits for the device
        scale, shift = std / self.teacher.std_kd, (mean - self.teacher.mean_kd) / self.teacher.std_kd
        self.same_view = bool((scale == 1).all() and (shift == 0).all())
        self.register_buffer('teacher_classes', classes, persistent=False)
        self.register_buffer('teacher_scale', scale, persistent=False)
        self.register_buffer('teacher_shift', shift, persistent=False)

    def train(self, mode: bool = True) -> 'SelfDistillationTask':
        """Set the mode of training; the teacher stays in eval mode."""
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
        return self

    def set_progress(self, progress: float) -> None:
        """Set what changes in the course of training to its value when a share of it is done, 0 to 1."""
        now = self.config.at(progress)
        # torch 2.8 compiles numbers that are calculated with into the graph, changing ones anew in every step
        moving = torch.tensor if self.compiled else float
        self.loss_args = {name: getattr(now, name) for name in _LOSS_ARGUMENTS}
        for name in ('alpha', 'temperature'):
            value = getattr(self.config, name)
            if isinstance(value, Linear) and value.start != value.end:
                self.loss_args[name] = moving(self.loss_args[name])
        weights = weigh_exits(now.exit_weights, self.shares, progress)
        self.loss_args['weights'] = [moving(w) for w in weights] if now.exit_weights == 'ramp' else weights

    def set_last_phase(self, enable: bool = True) -> None:
        """Train the backbone by the deepest exit alone; the other exits follow it without changing it."""
        unwrap_model(self.trainable_module).detach_taps = enable

    def set_backbone_alone(self, enable: bool = True) -> None:
        """Train the backbone by the deepest exit alone, without running the other exits."""
        unwrap_model(self.trainable_module).backbone_alone = enable

    def setup_ema(self, *args: Any, **kwargs: Any) -> nn.Module:
        """Create a moving average of what is trained, see timm; it shares a frozen backbone with the network itself."""
        ema = super().setup_ema(*args, **kwargs)
        model, average = self.get_eval_model(), self.get_eval_model(ema=True)
        if model.backbone_frozen:
            average.backbone, average.head = model.backbone, model.head
        return ema

    def prepare_distributed(self, device_ids: Optional[list] = None, **ddp_kwargs) -> 'SelfDistillationTask':
        """Wrap the model and its projections in DistributedDataParallel."""
        from torch.nn.parallel import DistributedDataParallel as DDP
        self.trainable_module = DDP(self.trainable_module, device_ids=device_ids, **ddp_kwargs)
        return self

    def compile(self, backend: str = 'inductor', mode: Optional[str] = None, **compile_kwargs) -> nn.Module:
        """Compile the training forward, the teacher's and the loss, each as one graph; modules stay what they are.

        Call it before the modules are wrapped for several processes. Evaluation runs the network as it is.
        """
        compile_kwargs = dict(dict(fullgraph=True), backend=backend, mode=mode, **compile_kwargs)
        self.trainable_module.compile(**compile_kwargs)
        if self.teacher is not None:
            self.teacher.compile(**compile_kwargs)
        self.compute_loss, self.compiled = torch.compile(self_distillation_loss, **compile_kwargs), True
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

    def forward(self, input: torch.Tensor, target: Optional[torch.Tensor] = None) -> Dict[str, torch.Tensor]:
        """Forward pass through all exits and the loss.

        Args:
            input: Images (N, C, H, W).
            target: Labels (N,), or class probabilities (N, num_classes) with a criterion that takes them; None where
                there are none, see `self_distillation_loss`.

        Returns:
            `loss`, the scalar to differentiate; `output`, logits of the deepest exit (N, num_classes); and the loss's
            terms by name, see `self_distillation_loss`.
        """
        logits, hints, hint_target = self.trainable_module(input)
        teacher_logits = None
        if self.teacher is not None:
            with torch.no_grad():
                view = input if self.same_view else input * self.teacher_scale + self.teacher_shift
                teacher_logits = self.teacher(view)
                if self.teacher_classes is not None:
                    teacher_logits = teacher_logits[:, self.teacher_classes]
        loss, terms = self.compute_loss(
            logits, target, hints, hint_target, criterion=self.criterion, teacher_logits=teacher_logits,
            **self.loss_args)
        return {'loss': loss, 'output': logits[-1], **terms}
