"""Training tasks: a model and the loss that trains it, behind timm's TrainingTask."""
import logging
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple, Union

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.task import DistillationTeacher, TrainingTask, resolve_classification_loss
from timm.utils import unwrap_model

from .losses import EXIT_TEACHERS, EXIT_WEIGHTS, HINT_FORMS, TOLERANCES, self_distillation_loss, weigh_exits
from .models.multi_exit import MultiExit
from .models.names import model_name
from .models.probe import meta_copy
from .models.wrapper import nested_group_matcher

__all__ = ['DistillationConfig', 'Linear', 'SelfDistillationModule', 'SelfDistillationTask']

_logger = logging.getLogger(__name__)

# Settings that the loss takes as they are.
_LOSS_ARGUMENTS = (
    'alpha', 'temperature', 'square_temperature', 'hint_weight', 'hint_form', 'exit_teacher', 'patriarch', 'eta',
    'tsd_k', 'label_weight', 'teacher_temperature',
)


@dataclass(frozen=True)
class Linear:
    """A number that changes linearly in the course of training.

    Args:
        start: Its value at the beginning.
        end: Its value at the end.

    >>> Linear(1.0, 3.0).at(0.25)
    1.5
    """
    start: float
    end: float

    def at(self, progress: float) -> float:
        """Return the value when a share of the training is done, 0 to 1."""
        return self.start + (self.end - self.start) * progress


@dataclass(frozen=True)
class DistillationConfig:
    """What every exit learns, and from whom.

    With `alpha` and `hint_weight` 0 it is deep supervision. The names are those of the options of the command line and
    of the arguments of `losses`.

    Args:
        alpha: Share of the divergence against the labels at auxiliary exits, 0 to 1.
        temperature: Softens teacher and student in the divergence, greater than 0.
        square_temperature: Multiply the divergence by the squared temperature.
        hint_weight: λ, the weight of the hint loss; 0 leaves it and its projections out.
        hint_on: What the hint compares: `features`, pooled vectors, or `maps`, before the pooling.
        hint_form: Distance of the hint, see `losses.hint_loss`.
        hint_exits: Which auxiliary exits have a hint, `all` or `all-but-last`.
        hint_linear: Learn a linear layer in front of every hint; otherwise only where the widths differ.
        exit_teacher: Who teaches the auxiliary exits, see `losses.exit_teachers`.
        exit_weights: How the auxiliary exits are weighted, see `losses.weigh_exits`.
        patriarch: What a network without a teacher minimises besides, see `losses.supervision_terms`.
        eta: η, share of the cross entropy against the tolerance of a patriarch, 0 to 1.
        tsd_k: K of the top score difference.
        label_weight: λ, share of the labels against a teacher outside the network, 0 to 1.
        teacher_temperature: Softens student and teacher, greater than 0.

    Raises:
        ValueError: A value is out of range.

    >>> DistillationConfig(alpha=Linear(0.1, 0.9)).at(0.5).alpha
    0.5
    """
    alpha: Union[float, Linear] = 0.5
    temperature: Union[float, Linear] = 3.0
    square_temperature: bool = True
    hint_weight: float = 0.03
    hint_on: str = 'features'
    hint_form: str = 'mean'
    hint_exits: str = 'all'
    hint_linear: bool = False
    exit_teacher: str = 'deepest'
    exit_weights: str = 'equal'
    patriarch: str = 'plain'
    eta: float = 0.6
    tsd_k: int = 5
    label_weight: float = 0.6
    teacher_temperature: float = 1.0

    def __post_init__(self):
        for name, fits, allowed in (
            ('alpha', lambda value: 0 <= value <= 1, 'from 0 to 1'),
            ('eta', lambda value: 0 <= value <= 1, 'from 0 to 1'),
            ('label_weight', lambda value: 0 <= value <= 1, 'from 0 to 1'),
            ('temperature', lambda value: value > 0, 'greater than 0'),
            ('teacher_temperature', lambda value: value > 0, 'greater than 0'),
            ('hint_weight', lambda value: value >= 0, 'of 0 or more'),
            ('tsd_k', lambda value: value >= 2, 'of 2 or more'),
        ):
            value = getattr(self, name)
            if not all(map(fits, (value.start, value.end) if isinstance(value, Linear) else (value,))):
                raise ValueError(f'{name}={value}: expected a number {allowed}.')
        for name, known in (
            ('hint_on', ('features', 'maps')), ('hint_form', HINT_FORMS), ('hint_exits', ('all', 'all-but-last')),
            ('exit_teacher', EXIT_TEACHERS), ('exit_weights', EXIT_WEIGHTS), ('patriarch', ('plain', *TOLERANCES)),
        ):
            value = getattr(self, name)
            if value not in known:
                raise ValueError(f'{name}={value!r}: unknown, expected one of {", ".join(known)}.')

    def at(self, progress: float) -> 'DistillationConfig':
        """Return the settings when a share of the training is done, 0 to 1."""
        return replace(self, **{
            name: value.at(progress) for name, value in vars(self).items() if isinstance(value, Linear)})


class SelfDistillationModule(nn.Module):
    """Everything that self-distillation trains, in one forward pass, so that DDP sees every parameter used.

    Args:
        model: The multi-exit network.
        config: With a `hint_weight` above 0 projections are learned from what the auxiliary exits see to what the
            deepest one sees. They exist for the hint loss alone and do not belong to the model. With `exit_weights`
            `equilibrium` gradients in the backbone are scaled so that each of its sections learns from the mean, not
            the sum, of the exits behind it: gradient equilibrium (Li et al., ICCV 2019, arXiv 1908.06294).

    Attributes:
        detach_taps: Train the backbone by the deepest exit alone; the other exits follow it.
        backbone_alone: Train the backbone by the deepest exit alone; the other exits do not even run.

    A frozen backbone (`MultiExit.freeze_backbone`, called before) is no part of this module's state: checkpoints and
    moving averages hold what is trained. Loading such a state leaves the backbone as it is.

    Raises:
        ValueError: Gradients of a frozen backbone are to be scaled.
    """

    def __init__(self, model: MultiExit, config: DistillationConfig = DistillationConfig()):
        super().__init__()
        self.model = model
        self.hint_on = config.hint_on
        self.hint_linear = config.hint_linear
        self.detach_taps = self.backbone_alone = False
        like = next(model.parameters())
        heads = list(model.exit_heads) if config.hint_weight > 0 else []
        self.projections = nn.ModuleList(
            self._projection(head) for head in (heads[:-1] if config.hint_exits == 'all-but-last' else heads)
        ).to(device=like.device, dtype=like.dtype)
        if config.exit_weights == 'equilibrium':
            if model.backbone_frozen:
                raise ValueError('exit_weights=equilibrium: scales gradients in a backbone, and a frozen one has none.')
            self._scale_gradients()
        self.register_state_dict_post_hook(_drop_frozen)
        self.register_load_state_dict_post_hook(_expect_no_frozen)

    def _projection(self, head: nn.Module) -> nn.Module:
        if self.hint_on == 'maps':
            narrow, wide, create = head.map_chs, self.model.stages[-1].num_chs, partial(nn.Conv2d, kernel_size=1)
        else:
            narrow, wide, create = head.num_features, self.model.head_hidden_size, nn.Linear
        return create(narrow, wide) if self.hint_linear or narrow != wide else nn.Identity()

    def _scale_gradients(self) -> None:
        # The paper rescales at every exit what comes from its head and what comes from behind. Multiplied up, a section
        # with m exits behind it receives 1/m of the gradient of each of them, which is done here in one step.
        probe, seen = meta_copy(self.model), set()
        parameters = dict(self.model.backbone.named_parameters())
        for k in range(self.model.num_exits - 1):
            needed = {name for name, _ in probe.truncate(k).backbone.named_parameters()}
            for name in needed - seen:
                parameters[name].register_hook(partial(self._scale_gradient, 1 / (self.model.num_exits - k)))
            seen |= needed

    def _scale_gradient(self, scale: float, gradient: torch.Tensor) -> torch.Tensor:
        return gradient if self.detach_taps else gradient * scale

    def is_frozen(self, name: str) -> bool:
        """Return whether a parameter or buffer of this module belongs to a frozen backbone."""
        of_deepest = name.startswith('model.') and not name.startswith('model.exit_heads.')
        return self.model.backbone_frozen and of_deepest

    def no_weight_decay(self):
        return {f'model.{n}' for n in self.model.no_weight_decay()}

    def group_matcher(self, coarse: bool = False) -> Callable[[str], int]:
        return nested_group_matcher(self, 'model', coarse)

    @property
    def num_classes(self) -> int:
        return self.model.num_classes

    @property
    def num_exits(self) -> int:
        return self.model.num_exits

    def forward_exits(self, x: torch.Tensor) -> List[torch.Tensor]:
        """Return the network's logits, for evaluation where parameters are sharded and this module brings them back."""
        return self.model.forward_exits(x)

    def forward(
            self,
            x: torch.Tensor,
    ) -> Tuple[List[torch.Tensor], List[Optional[torch.Tensor]], Optional[torch.Tensor]]:
        """Run all exits.

        Args:
            x: Images (N, C, H, W).

        Returns:
            Logits of every exit, each (N, num_classes); projected features of the auxiliary exits, each
            (N, num_features), or maps (N, num_features, H, W), None at exits without a hint; the same of the deepest
            exit, detached, None where no exit has a hint.
        """
        if self.backbone_alone:
            return [self.model(x)], [], None
        without = [None] * (self.num_exits - 1 - len(self.projections))
        if not len(self.projections):
            return self.model.forward_exits(x, detach_taps=self.detach_taps), without, None
        on_maps = self.hint_on == 'maps'
        logits, seen = self.model.forward_exits(
            x, return_features=not on_maps, return_maps=on_maps, detach_taps=self.detach_taps)
        hints = [project(s) for project, s in zip(self.projections, seen)]
        if on_maps:  # sizes that the heads' strides do not divide
            size = seen[-1].shape[-2:]
            hints = [h if h.shape[-2:] == size else F.adaptive_avg_pool2d(h, size) for h in hints]
        return logits, hints + without, seen[-1]


def _drop_frozen(module: SelfDistillationModule, state: Dict[str, Any], prefix: str, *_: Any) -> None:
    for name in [n for n in state if n.startswith(prefix) and module.is_frozen(n[len(prefix):])]:
        del state[name]


def _expect_no_frozen(module: SelfDistillationModule, keys: Any) -> None:
    # the names have the prefixes of the modules around this one
    for name in [n for n in keys.missing_keys if module.is_frozen('model.' + n.partition('model.')[2])]:
        keys.missing_keys.remove(name)


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
