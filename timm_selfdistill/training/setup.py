"""Everything that a run needs and that is made once, before its first step."""
import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, Iterable, List, Optional

import torch
import torch.nn as nn
from accelerate import Accelerator
from accelerate.utils import set_seed
from timm.data import Mixup
from timm.optim import create_optimizer_v2, get_optimizer_class, list_optimizers
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from timm.utils import unwrap_model
from torch.nn.parallel import DistributedDataParallel

from ..config import TrainConfig
from ..costs import ExitCost, exit_costs
from ..data.image_data import ImageData
from ..data.loaders import Loaders, leave_out_unreadable, open_data
from ..data.unreadable import Unreadable
from ..errors import ConfigError, nearest
from ..hub.networks import class_names, names_of_run
from ..models.multi_exit import MultiExit, without_exits
from ..tasks import SelfDistillationTask
from .build import LOOKAHEAD, BuiltModel, build_model, build_task, check_optimizer, check_slices
from .checkpoints import is_sharded
from .cpu import keep_freed_memory, use_all_cores
from .initial import InitialNetwork, find_network
from .trackers import check_trackers

__all__ = ['Setup', 'set_up']


@dataclass
class Setup:
    """What the steps of a run share.

    Attributes:
        config: The settings.
        accelerator: Makes this process one of several.
        data: The images.
        unreadable: Images that were left out.
        data_config: Preprocessing of the network.
        costs: What each exit costs.
        task: The network and its loss.
        loaders: Make the loaders of all splits.
        loader: The loader of training batches.
        optimizer: The optimizer, as accelerate wraps it.
        scheduler: Sets the learning rate, None where it stays as it is.
        mixup: Mixes images, None where they are not mixed.
        notes: What is to be reported of the network before training.
    """
    config: TrainConfig
    accelerator: Accelerator
    data: ImageData
    unreadable: List[Unreadable]
    data_config: Dict[str, Any]
    costs: Dict[str, ExitCost]
    task: SelfDistillationTask
    loaders: Loaders
    loader: Iterable
    optimizer: torch.optim.Optimizer
    scheduler: Optional[Scheduler]
    mixup: Optional[Mixup]
    notes: List[str]

    @property
    def frozen(self) -> bool:
        """Whether the auxiliary exits alone learn."""
        return self.config.regime == 'disjoint'

    def wrap_for(self, alone: bool) -> None:
        """Wrap what is trained anew where the network is to learn without its auxiliary exits, or with them again.

        Several processes exchange gradients of all parameters that ask for them, so those that have none must not ask.
        Their optimizer is the same throughout, and passes over what has no gradient.
        """
        module = unwrap_model(self.task.trainable_module)
        if module.backbone_alone == alone:
            return
        module.backbone_alone = alone
        if isinstance(self.task.trainable_module, DistributedDataParallel):
            for exits in (module.model.exit_heads, module.projections):
                exits.requires_grad_(not alone)
            self.task.trainable_module = self.accelerator.unwrap_model(
                self.task.trainable_module, keep_fp32_wrapper=False)
            self.accelerator.free_memory()  # the wrapper before is gone when the next one listens to the gradients
            self.task.trainable_module, self.optimizer = self.accelerator.prepare(
                self.task.trainable_module, self.optimizer)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of an epoch."""
        return self.loader.batch_sampler.steps

    @property
    def model(self) -> MultiExit:
        """The network as it would be saved now: the moving average where there is one."""
        return self.task.get_eval_model(ema=self.task.has_ema())

    @property
    def network(self) -> nn.Module:
        """What is saved of the model: timm's plain network where the method has no auxiliary exits."""
        return self.model if self.config.has_exits else without_exits(self.model)


def set_up(config: TrainConfig, accelerator: Accelerator, folder: Path) -> Setup:
    """Make everything that a run needs; nothing is written.

    Args:
        config: The settings.
        accelerator: Makes this process one of several.
        folder: The run's folder; if it has begun, classes keep the numbers that its network knows them by.

    Raises:
        ConfigError: A setting does not fit the model or the data.
        DataError: The data cannot be used.
    """
    device = accelerator.device
    if device.type == 'cpu':
        use_all_cores()
        keep_freed_memory()
    check_trackers(config.report_to)
    set_seed(config.seed)
    network = find_network(config.model)
    data = _open_data(config, accelerator, network, folder)
    _check_held_out(config, data)
    unreadable: List[Unreadable] = []
    if config.skip_unreadable and not config.streaming:
        unreadable = leave_out_unreadable(data, accelerator, folder)
    built = build_model(config, data, network)
    model, data_config = built.model, built.data_config
    if config.unlabelled:
        data.num_classes, data.label_names = model.num_classes, network.class_names or class_names(model)
    if config.regime == 'disjoint':
        model.freeze_backbone()
    costs = exit_costs(model, data_config['input_size'])
    if config.grad_checkpointing:
        try:
            model.set_grad_checkpointing()
        except AssertionError as e:
            raise ConfigError(
                f'`grad_checkpointing`: {config.model} has none; leave it out. `grad_accum_steps` saves memory too.'
            ) from e
    task = build_task(config, model, device, data_config, data).to(device)
    if config.channels_last and not is_sharded(accelerator):  # FSDP asks for contiguous parameters
        task.to(memory_format=torch.channels_last)
    check_slices(
        task, data_config['input_size'], config.batch_size, accelerator.num_processes * config.grad_accum_steps)
    loaders = Loaders(config, data, data_config, accelerator)
    loader = loaders.train()
    optimizer = _create_optimizer(config, task, accelerator)
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched=config.sched,
        num_epochs=config.epochs,
        warmup_epochs=config.warmup_epochs,
        warmup_lr=config.warmup_lr,
        min_lr=config.min_lr,
        decay_milestones=list(config.decay_milestones),
        decay_rate=config.decay_rate,
        step_on_epochs=False,
        updates_per_epoch=loader.batch_sampler.steps,
    )
    mixup = _create_mixup(config, accelerator.num_processes, model.num_classes)
    optimizer = _prepare(config, accelerator, task, optimizer)
    return Setup(
        config, accelerator, data, unreadable, data_config, costs, task, loaders, loader, optimizer, scheduler, mixup,
        _notes(config, built))


def _open_data(
        config: TrainConfig,
        accelerator: Accelerator,
        network: InitialNetwork,
        folder: Path,
) -> ImageData:
    """Open the data; classes have the numbers that the run, or else the network that it starts from, knows them by.

    The latter where it knows all of them; else it has to learn all of them anew.
    """
    known = names_of_run(folder)
    data = open_data(config, accelerator, known)
    names = network.class_names
    if known is None and names and data.label_names and names != data.label_names:
        if {*data.label_names} <= {*names}:
            return open_data(config, accelerator, names)
    return data


def _notes(config: TrainConfig, built: BuiltModel) -> List[str]:
    """Return what is to be reported of the network, and a warning where it cannot teach."""
    notes = list(built.notes)
    if config.regime == 'disjoint' and built.fresh_classifier:
        notes.append(
            'warning: `regime=disjoint` keeps the deepest exit as it is, and its classifier is untrained; expected '
            'a network that knows these classes. Train it first, or use `regime=mixed`.'
        )
    return notes


def _check_held_out(config: TrainConfig, data: ImageData) -> None:
    if data.validation is None and data.test is None:
        option = '`streaming`' if config.streaming else f'`val_fraction={config.val_fraction:g}`'
        raise ConfigError(
            f'{option}: {data.name} has neither a validation nor a test split, so some of its training split '
            f'must be held out{", which takes data that are not streamed" if config.streaming else ""}.'
        )


def _create_optimizer(
        config: TrainConfig,
        task: SelfDistillationTask,
        accelerator: Accelerator,
) -> torch.optim.Optimizer:
    name = config.opt.removeprefix(LOOKAHEAD)
    if name not in list_optimizers():
        raise ConfigError(
            f'`opt={config.opt}`: timm has no such optimizer{nearest(config.opt, list_optimizers())}.')

    def create(module: nn.Module, **other: Any) -> torch.optim.Optimizer:
        options = inspect.signature(get_optimizer_class(name, bind_defaults=False)).parameters
        # fused SGD takes no sharded parameters, nor some that have had no gradient yet among others (torch 2.15)
        fusable = 'fused' in options and accelerator.device.type in ('cpu', 'cuda')
        fusable = fusable and not is_sharded(accelerator) and config.regime != 'mixed'
        return create_optimizer_v2(
            module,
            opt=config.opt,
            lr=config.lr,
            weight_decay=config.weight_decay,
            filter_bias_and_bn=not config.decay_norms_and_biases,
            momentum=config.momentum,
            **(dict(fused=True) if fusable else {}),
            **other,
        )

    check_optimizer(create, config.opt, accelerator.device)
    return create(task.trainable_module, layer_decay=config.layer_decay)


def _create_mixup(config: TrainConfig, processes: int, num_classes: int) -> Optional[Mixup]:
    if config.mixup == config.cutmix == 0:
        return None
    if config.batch_size // (processes * config.grad_accum_steps) % 2:
        parts = f' and each of `grad_accum_steps={config.grad_accum_steps}`' if config.grad_accum_steps > 1 else ''
        raise ConfigError(
            f'`batch_size={config.batch_size}`: mixup and cutmix pair images and need an even number of them in '
            f'each of {processes} processes{parts}.'
        )
    return Mixup(config.mixup, config.cutmix, label_smoothing=config.smoothing, num_classes=num_classes)


def _prepare(
        config: TrainConfig,
        accelerator: Accelerator,
        task: SelfDistillationTask,
        optimizer: torch.optim.Optimizer,
) -> torch.optim.Optimizer:
    """Have accelerate wrap what is trained, for several processes or sharded over them."""
    if is_sharded(accelerator):
        equilibrium = config.exit_weights == 'equilibrium'  # by hooks on parameters that FSDP replaces
        for option, given in (
            ('`model_ema`', config.model_ema), ('`compile`', config.compile),
            ('`exit_weights=equilibrium`', equilibrium),
        ):
            if given:
                raise ConfigError(f'{option}: cannot be had together with FSDP.')
        if not accelerator.is_fsdp2:
            raise ConfigError('FSDP: version 2 is needed; pass --fsdp_version 2 to accelerate launch.')
    if config.model_ema:
        task.setup_ema(decay=config.model_ema_decay, use_warmup=True)
    if config.compile:
        task.compile()
    accelerator.gradient_accumulation_steps = config.grad_accum_steps
    task.trainable_module, optimizer = accelerator.prepare(task.trainable_module, optimizer)
    if is_sharded(accelerator):
        from torch.distributed.fsdp import register_fsdp_forward_method
        register_fsdp_forward_method(task.trainable_module, 'forward_exits')
    return optimizer
