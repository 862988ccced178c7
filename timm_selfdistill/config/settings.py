"""The settings of a training run: one flat dataclass, whose fields say what is known of each setting."""
import ast
import dataclasses
import math
from functools import partial
from typing import Any, Dict, FrozenSet, Literal, Optional, Tuple

from ..errors import ConfigError
from .checks import ETA, check_settings

__all__ = ['DIGITS', 'INCIDENTAL', 'PLACES', 'TrainConfig']

DIGITS = 'digits'  # the data set when none is named


def _setting(default: Any, **metadata: Any) -> Any:
    """Return a field of `TrainConfig`.

    Args:
        default: Its default.
        **metadata: What is known of it.
            `group`: heading in the command line's help and in the reference.
            `at_least`, `at_most`, `above`: bounds, a number or the name of another setting.
            `kind`: `path` is a place on this machine, whose name alone is published; with `hub_id` it may be an id on
            the Hub as well. `cosmetic` leaves the result as it is: it may change on resume, and is not published.
            `shown`: a model card always shows it.
    """
    return dataclasses.field(default=default, metadata=metadata)


_model = partial(_setting, group='model')
_data = partial(_setting, group='data')
_method = partial(_setting, group='method')
_teacher = partial(_setting, group='teachers and generations')
_optim = partial(_setting, group='optimization')
_augment = partial(_setting, group='augmentation')
_run = partial(_setting, group='run')


@dataclasses.dataclass
class TrainConfig:
    """Train a multi-exit network by self-distillation."""

    model: str = _model('resnet18', kind='path', hub_id=True, shown=True)
    """What to train: a timm name (resnet50 and resnet50_sd mean the same), or a network with its weights: the folder of
    a run, hf-hub:org/name or local-dir:folder, with exits or without."""
    initial_checkpoint: Optional[str] = _model(None, kind='path')
    """File of weights to start from, safetensors or .pth, of the network with exits or without."""
    backbone_pretrained: bool = _model(False)
    """Start from timm's weights in the backbone (a tag in --model picks which: resnet50.a1_in1k)."""
    num_classes: Optional[int] = _model(None, at_least=1)
    """Classes of the model; those of the data when None."""
    in_chans: int = _model(3)
    """Channels of the images: 3 for colour, 1 for grey."""
    img_size: Optional[int] = _model(None, at_least=1)
    """Side of the images in pixels. When None their own, between 32 and what the model was made for; with pretrained
    weights and for models of one fixed size the latter."""
    exits: Optional[Tuple[int, ...]] = _model(None)
    """Indices of feature_info after which auxiliary exits stand; when None those of the network in --model, else the
    stage boundaries."""
    exit_head: Optional[str] = _model(None)
    """Kind of exit head: bottleneck, bottleneck-attention, bottleneck-wide, cascade, inverted, linear, pooled,
    separable or separable-double. When None that of the network in --model, else bottleneck."""
    model_kwargs: Tuple[str, ...] = _model(())
    """More arguments of the model, as key=value."""

    dataset: Optional[str] = _data(None, kind='path', hub_id=True)
    """digits, a Hugging Face Hub id, or a loader of the datasets library; found out from --data-dir when None."""
    data_dir: Optional[str] = _data(None, kind='path')
    """Local folder: parquet or arrow files, or images in one folder a class."""
    image_column: Optional[str] = _data(None)
    """Column of the images, where the data set leaves a choice."""
    label_column: Optional[str] = _data(None)
    """Column of the labels, where the data set leaves a choice."""
    superclass_column: Optional[str] = _data(None)
    """Column of the superclasses of the labels; with it generations tell how much of them a network knows."""
    unlabelled: bool = _data(False)
    """Learn from images without labels, any under --data-dir: the deepest exit alone teaches the others. Takes --regime
    disjoint and --alpha 1; the exits are judged by their agreement with the deepest one."""
    val_fraction: float = _data(0.1)
    """Share of the training data held out for validation where the data set has no such split."""
    streaming: bool = _data(False)
    """Read the data as they come instead of preparing them on disk first; nothing is held out for validation then."""
    images_per_epoch: Optional[int] = _data(None, at_least=1)
    """Training images that count as an epoch of streamed data; all of them when None, where their number is known."""
    skip_unreadable: bool = _data(False)
    """Go on without the images that cannot be read. All are decoded once before training, streamed ones on the way."""
    loader: Optional[Literal['device', 'workers']] = _data(None)
    """Where batches are made. device: decoded images lie in the device's memory and are augmented there. workers: by
    timm's transforms, image by image. When None the former where the images fit and --crop is pad."""
    workers: Optional[int] = _data(None, at_least=0, kind='cosmetic')
    """Loader processes; when None, 4 with an accelerator and none on a CPU, which is busy with training."""

    method: Literal['byot', 'deep-supervision', 'kd', 'plain'] = _method('byot', shown=True)
    """byot: the deepest exit teaches the others. deep-supervision: labels alone at every exit. kd: no exits, --teacher
    teaches. plain: no exits."""
    regime: Literal['joint', 'disjoint', 'mixed'] = _method('joint')
    """Who learns when. joint: the network and its auxiliary exits together. disjoint: the network stays bit for bit
    what it is, and the auxiliary exits learn. mixed: first the network alone, then all together."""
    backbone_epochs: Optional[int] = _method(None, at_least=1, at_most='epochs')
    """First epochs, of --epochs, in which a mixed run trains the network alone; half of them when None."""
    alpha: float = _method(0.5, at_least=0, at_most=1)
    """Share of the divergence against the cross entropy at auxiliary exits."""
    alpha_end: Optional[float] = _method(None, at_least=0, at_most=1)
    """Value that --alpha reaches at the end of training, linearly; it stays as it is when None."""
    temperature: float = _method(3.0, above=0)
    """Softens teacher and student in the divergence."""
    temperature_end: Optional[float] = _method(None, above=0)
    """Value that --temperature reaches, likewise."""
    square_temperature: bool = _method(True)
    """Multiply a divergence by its squared temperature."""
    hint_weight: float = _method(0.03, at_least=0)
    """Weight of the hint, a distance between features; its size goes with --hint-form."""
    hint_on: Literal['features', 'maps'] = _method('features')
    """What the hint compares: pooled features, or the maps before the pooling."""
    hint_form: Literal['mean', 'sum', 'norm'] = _method('mean')
    """Distance of the hint. mean: squared differences, mean over images and features. sum: their sum over the features,
    mean over images. norm: the square root of that."""
    hint_exits: Literal['all', 'all-but-last'] = _method('all')
    """Which auxiliary exits have a hint: all, or all but the last one before the deepest."""
    hint_linear: bool = _method(False)
    """Learn a linear layer in front of every hint; otherwise only where the widths differ."""
    exit_teacher: Literal['deepest', 'ensemble', 'next', 'all'] = _method('deepest')
    """Who teaches an auxiliary exit: the deepest exit, the mean of all, the next deeper one, or all deeper ones."""
    exit_weights: Literal['equal', 'cost', 'ramp', 'equilibrium'] = _method('equal')
    """Weights of the auxiliary exits: equal; by their cost; rising from 0.01 to their share of the compute; equal with
    gradients scaled so that each section of the network learns from the mean of the exits behind it."""
    last_phase_epochs: int = _method(0, at_least=0, at_most='epochs')
    """Last epochs, of --epochs, in which the network learns from its deepest exit alone and the other exits follow."""

    teacher: Optional[str] = _teacher(None, kind='path')
    """Network that teaches every exit: folder of a run, hf-hub:org/name, or a timm name with weights."""
    label_weight: Optional[float] = _teacher(None, at_least=0, at_most=1)
    """Share of the labels against the teacher; when None 0.6, for kd 0.1."""
    teacher_temperature: Optional[float] = _teacher(None, above=0)
    """Softens teacher and student; when None 1, for kd 4."""
    patriarch: Literal['plain', 'tsd', 'label-smoothing', 'confidence-penalty'] = _teacher('plain')
    """What a network without a teacher minimises beside the cross entropy to keep secondary information: nothing, the
    top score difference, the divergence from the uniform distribution, or the negative entropy."""
    eta: Optional[float] = _teacher(None, at_least=0, at_most=1)
    """Share of the cross entropy in a patriarch's loss; when None 0.6 for tsd, 0.9 for the others."""
    tsd_k: int = _teacher(5, at_least=2)
    """Scores that the top score difference looks at, the largest included."""
    generations: Optional[int] = _teacher(None, at_least=0)
    """Train a patriarch, generation 0, and this many generations of students, each taught by the one before."""

    epochs: int = _optim(20, at_least=1, shown=True)
    """Passes over the training data."""
    max_steps: Optional[int] = _optim(None, at_least=1)
    """End after this many optimizer steps, for a trial; rates change as they would in the whole run."""
    batch_size: int = _optim(64, at_least=1, shown=True)
    """Images of one optimizer step, over all processes together: their number changes neither images nor rate."""
    grad_accum_steps: int = _optim(1, at_least=1)
    """Parts that each process takes its images of a step in, one after the other, to need less memory."""
    grad_checkpointing: bool = _optim(False)
    """Compute activations anew in the backward pass instead of keeping them."""
    channels_last: bool = _optim(True)
    """Keep images and convolutions with the channels innermost, which is faster."""
    compile: bool = _optim(False)
    """Compile the forward pass and the loss with torch.compile."""
    opt: str = _optim('sgd', shown=True)
    """timm's name of the optimizer."""
    lr: float = _optim(0.05, at_least=0, shown=True)
    """Learning rate."""
    momentum: float = _optim(0.9, at_least=0)
    """Momentum of the optimizer."""
    weight_decay: float = _optim(5e-4, at_least=0)
    """Weight decay."""
    decay_norms_and_biases: bool = _optim(False)
    """Let it act on norms and biases too."""
    clip_grad: Optional[float] = _optim(None, at_least=0)
    """Largest norm of the gradient."""
    layer_decay: Optional[float] = _optim(None, at_least=0)
    """Factor of the learning rate from layer to layer."""
    sched: Literal['cosine', 'tanh', 'poly', 'multistep', 'wsd', 'rsqrt', 'constant', 'none'] = _optim(
        'cosine', shown=True)
    """timm's name of the schedule of the learning rate, which is set anew at every step."""
    warmup_epochs: int = _optim(1, at_least=0)
    """Epochs in which the learning rate rises."""
    warmup_lr: float = _optim(1e-4, at_least=0)
    """Learning rate it rises from."""
    min_lr: float = _optim(0., at_least=0)
    """Learning rate it falls to."""
    decay_milestones: Tuple[int, ...] = _optim(())
    """Epochs after which the multistep schedule lowers the learning rate."""
    decay_rate: float = _optim(0.1, at_least=0)
    """Factor by which it does."""

    crop: Optional[Literal['pad', 'rrc']] = _augment(None)
    """pad: shift by up to an eighth of the side. rrc: resize a random part. pad for images no larger than --img-size
    when None."""
    scale: Tuple[float, float] = _augment((0.08, 1.0))
    """Range of the area that rrc cuts out."""
    hflip: Optional[float] = _augment(None, at_least=0, at_most=1)
    """Probability of mirroring; 0.5 when None, 0 on digits, whose mirror images are no digits."""
    color_jitter: float = _augment(0., at_least=0)
    """Strength of timm's colour jitter."""
    aa: Optional[str] = _augment(None)
    """timm's augmentation policy, for example rand-m9-mstd0.5, or AutoAugment's cifar10 or svhn."""
    cutout: int = _augment(0, at_least=0)
    """Side in pixels of a square that is blotted out of every image."""
    reprob: float = _augment(0., at_least=0, at_most=1)
    """Probability of random erasing."""
    mean: Optional[Tuple[float, ...]] = _augment(None)
    """Mean of the channels, 0 to 1; the model's when None."""
    std: Optional[Tuple[float, ...]] = _augment(None)
    """Standard deviation of the channels; the model's when None."""
    mixup: float = _augment(0., at_least=0)
    """Alpha of mixup."""
    cutmix: float = _augment(0., at_least=0)
    """Alpha of cutmix."""
    smoothing: float = _augment(0., at_least=0, at_most=1)
    """Label smoothing."""
    drop: Optional[float] = _augment(None, at_least=0, at_most=1)
    """Dropout before the classifiers."""
    drop_path: Optional[float] = _augment(None, at_least=0, at_most=1)
    """Stochastic depth, where the model has it."""

    model_ema: bool = _augment(False)
    """Evaluate and save the moving average of the weights."""
    model_ema_decay: float = _augment(0.9998, at_least=0, at_most=1)
    """Its decay, reached by and by."""

    seed: int = _run(42, at_least=0, shown=True)
    """Seed of the weights, the order and the augmentation."""
    output: str = _run('output/train', kind='cosmetic')
    """Folder of runs."""
    experiment: Optional[str] = _run(None, kind='cosmetic')
    """Name of this run's folder; date and model when None. Must not exist yet, unless --resume is given."""
    resume: Optional[Literal['auto']] = _run(None, kind='cosmetic')
    """auto: go on with the run in --experiment's folder, without that with the newest run of these settings in
    --output, and begin where there is none."""
    checkpoint_every: Optional[str] = _run(None, kind='cosmetic')
    """Optimizer steps between checkpoints, as in 500, or minutes, as in 10m. Ends of epochs have one in any case where
    the last is more than a minute old."""
    checkpoint_hist: int = _run(2, at_least=1, kind='cosmetic')
    """Checkpoints to keep, the newest; the best weights by the validation split are kept beside them."""
    report_to: Tuple[str, ...] = _run((), kind='cosmetic')
    """Trackers that follow the run: tensorboard, wandb, trackio, or another one that accelerate knows; all for all
    that are installed."""
    push_to_hub: Optional[str] = _run(None, kind='cosmetic')
    """Put the complete run into this repository of the Hugging Face Hub, org/name, created as a private one if needed.
    Without a value: a name made of network, method and data set, under TIMM_SELFDISTILL_ORG or your own name."""
    results: Optional[str] = _run(None, kind='cosmetic')
    """File of JSON lines that a complete run appends one to: its settings, every exit's figures, time and hardware."""
    recipe: Optional[str] = _run(None, kind='cosmetic')
    """What that line is filed under; the name of the run's folder when None."""

    @property
    def has_exits(self) -> bool:
        """Whether the method trains auxiliary exits."""
        return self.method not in ('kd', 'plain')

    @property
    def epochs_alone(self) -> int:
        """First epochs in which the network learns without its auxiliary exits."""
        if self.regime != 'mixed':
            return 0
        return self.backbone_epochs if self.backbone_epochs is not None else max(1, self.epochs // 2)

    def model_arguments(self) -> Dict[str, Any]:
        """Return `model_kwargs` as a dict, values read as Python literals where they are such."""
        arguments = {}
        for pair in self.model_kwargs:
            key, equals, text = pair.partition('=')
            if not equals or not key.isidentifier():
                raise ConfigError(f'`model_kwargs={pair}`: expected key=value.')
            try:
                arguments[key] = ast.literal_eval(text)
            except (SyntaxError, ValueError):
                arguments[key] = text
        return arguments

    def checkpoint_interval(self) -> Tuple[Optional[int], Optional[float]]:
        """Return the optimizer steps and the seconds between checkpoints, of which `checkpoint_every` gives one."""
        text = self.checkpoint_every
        if text is None:
            return None, None
        try:
            value = float(text[:-1]) if text.endswith('m') else int(text)
        except ValueError:
            value = 0
        if not 0 < value < math.inf:
            raise ConfigError(f'`checkpoint_every={text}`: expected steps, as in 500, or minutes, as in 10m.')
        return (None, 60. * value) if text.endswith('m') else (value, None)

    def settings(self) -> Dict[str, Any]:
        """Return the settings as a dict of what YAML and JSON know, lists for tuples."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}

    def check(self) -> None:
        """Raise ConfigError for the first setting that is out of its bounds or excludes another one."""
        check_settings(self)

    @property
    def patriarch_eta(self) -> float:
        """η of the patriarch, its default filled in."""
        return self.eta if self.eta is not None else ETA.get(self.patriarch, 1.0)


def _of_kind(kind: str) -> FrozenSet[str]:
    return frozenset(f.name for f in dataclasses.fields(TrainConfig) if f.metadata.get('kind') == kind)


# Settings that leave the result as it is, and those that say where something lies.
INCIDENTAL, PLACES = _of_kind('cosmetic'), _of_kind('path')
