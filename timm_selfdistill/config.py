"""The flat dataclass that is the command line of `recipes/train.py`, and the YAML files that give its defaults."""
import ast
import dataclasses
import math
from typing import Any, Dict, FrozenSet, Literal, Optional, Tuple

from .errors import ConfigError

__all__ = ['DIGITS', 'INCIDENTAL', 'PLACES', 'TrainConfig']

DIGITS = 'digits'  # the data set when none is named

# Shares of the cross entropy by default. They are not of equal softness: see losses.eta_for_top_score.
_ETA = {'tsd': 0.6, 'label-smoothing': 0.9, 'confidence-penalty': 0.9}


def _place(hub_id: bool = False) -> Any:
    """Return a field for a place on this machine, of which the name alone is published; or for an id on the Hub."""
    return dataclasses.field(default=None, metadata=dict(kind='path', hub_id=hub_id))


def _cosmetic(default: Any) -> Any:
    """Return a field that leaves the result as it is: two sittings at a run may differ in it, and it is not published.
    """
    return dataclasses.field(default=default, metadata=dict(kind='cosmetic'))


@dataclasses.dataclass
class TrainConfig:
    """Train a multi-exit network by self-distillation."""

    model: str = 'resnet18'
    """Any timm model; resnet50 and resnet50_sd mean the same."""
    backbone_pretrained: bool = False
    """Start from timm's weights in the backbone (a tag in --model picks which: resnet50.a1_in1k)."""
    num_classes: Optional[int] = None
    """Classes of the model; those of the data when None."""
    in_chans: int = 3
    """Channels of the images: 3 for colour, 1 for grey."""
    img_size: Optional[int] = None
    """Side of the images in pixels. When None their own, between 32 and what the model was made for; with pretrained
    weights and for models of one fixed size the latter."""
    exits: Optional[Tuple[int, ...]] = None
    """Indices of feature_info after which auxiliary exits stand; the stage boundaries when None."""
    exit_head: str = 'bottleneck'
    """Kind of exit head: bottleneck, bottleneck-attention, bottleneck-wide, cascade, linear, pooled, separable or
    separable-double."""
    model_kwargs: Tuple[str, ...] = ()
    """More arguments of the model, as key=value."""

    dataset: Optional[str] = _place(hub_id=True)
    """digits, a Hugging Face Hub id, or a loader of the datasets library; found out from --data-dir when None."""
    data_dir: Optional[str] = _place()
    """Local folder: parquet or arrow files, or images in one folder a class."""
    image_column: Optional[str] = None
    """Column of the images, where the data set leaves a choice."""
    label_column: Optional[str] = None
    """Column of the labels, where the data set leaves a choice."""
    superclass_column: Optional[str] = None
    """Column of the superclasses of the labels; with it generations tell how much of them a network knows."""
    val_fraction: float = 0.1
    """Part of the training data held out for validation where the data set has no such part."""
    streaming: bool = False
    """Read the data as they come instead of preparing them on disk first; nothing is held out for validation then."""
    images_per_epoch: Optional[int] = None
    """Training images that count as an epoch of streamed data; all of them when None, where their number is known."""
    skip_unreadable: bool = False
    """Go on without the images that cannot be read. All are decoded once before training, streamed ones on the way."""
    loader: Optional[Literal['device', 'workers']] = None
    """Where batches are made. device: decoded images lie in the device's memory and are augmented there. workers: by
    timm's transforms, image by image. When None the former where the images fit and --crop is pad."""
    workers: Optional[int] = _cosmetic(None)
    """Loader processes; when None, 4 with an accelerator and none on a CPU, which is busy with training."""

    method: Literal['byot', 'deep-supervision', 'kd', 'plain'] = 'byot'
    """byot: the deepest exit teaches the others. deep-supervision: labels alone at every exit. kd: no exits, --teacher
    teaches. plain: no exits."""
    alpha: float = 0.5
    """Share of the divergence against the cross entropy at auxiliary exits."""
    alpha_end: Optional[float] = None
    """Value that --alpha reaches at the end of training, linearly; it stays as it is when None."""
    temperature: float = 3.0
    """Softens teacher and student in the divergence."""
    temperature_end: Optional[float] = None
    """Value that --temperature reaches, likewise."""
    square_temperature: bool = True
    """Multiply a divergence by its squared temperature."""
    hint_weight: float = 0.03
    """Weight of the hint, a distance between features; its size goes with --hint-form."""
    hint_weight_end: Optional[float] = None
    """Value that --hint-weight reaches, likewise."""
    hint_on: Literal['features', 'maps'] = 'features'
    """What the hint compares: pooled features, or the maps before the pooling."""
    hint_form: Literal['mean', 'sum', 'norm'] = 'mean'
    """Distance of the hint. mean: squared differences, mean over images and features. sum: their sum over the features,
    mean over images. norm: the square root of that."""
    hint_exits: Literal['all', 'all-but-last'] = 'all'
    """Which auxiliary exits have a hint: all, or all but the last one before the deepest."""
    hint_linear: bool = False
    """Learn a linear layer in front of every hint; otherwise only where the widths differ."""
    exit_teacher: Literal['deepest', 'ensemble', 'next', 'all'] = 'deepest'
    """Who teaches an auxiliary exit: the deepest exit, the mean of all, the next deeper one, or all deeper ones."""
    exit_weights: Literal['equal', 'cost', 'ramp', 'equilibrium'] = 'equal'
    """Weights of the auxiliary exits: equal; by their cost; rising from 0.01 to their share of the compute; equal with
    gradients scaled so that each section of the network learns from the mean of the exits behind it."""
    last_phase_epochs: int = 0
    """Last epochs, of --epochs, in which the network learns from its deepest exit alone and the other exits follow."""

    teacher: Optional[str] = _place()
    """Network that teaches every exit: folder of a run, hf-hub:org/name, or a timm name with weights."""
    label_weight: Optional[float] = None
    """Share of the labels against the teacher; when None 0.6, for kd 0.1."""
    teacher_temperature: Optional[float] = None
    """Softens teacher and student; when None 1, for kd 4."""
    patriarch: Literal['plain', 'tsd', 'label-smoothing', 'confidence-penalty'] = 'plain'
    """What a network without a teacher minimises beside the cross entropy to keep secondary information: nothing, the
    top score difference, the divergence from the uniform distribution, or the negative entropy."""
    eta: Optional[float] = None
    """Share of the cross entropy in a patriarch's loss; when None 0.6 for tsd, 0.9 for the others."""
    tsd_k: int = 5
    """Scores that the top score difference looks at, the largest included."""
    generations: Optional[int] = None
    """Train a patriarch, generation 0, and this many generations of students, each taught by the one before."""

    epochs: int = 20
    """Passes over the training data."""
    batch_size: int = 64
    """Images of one optimizer step, over all processes together: their number changes neither images nor rate."""
    grad_accum_steps: int = 1
    """Parts that each process takes its images of a step in, one after the other, to need less memory."""
    grad_checkpointing: bool = False
    """Compute activations anew in the backward pass instead of keeping them."""
    channels_last: bool = True
    """Keep images and convolutions with the channels innermost, which is faster."""
    compile: bool = False
    """Compile the forward pass and the loss with torch.compile."""
    opt: str = 'sgd'
    """timm's name of the optimizer."""
    lr: float = 0.05
    """Learning rate."""
    momentum: float = 0.9
    """Momentum of the optimizer."""
    weight_decay: float = 5e-4
    """Weight decay."""
    decay_norms_and_biases: bool = False
    """Let it act on norms and biases too."""
    clip_grad: Optional[float] = None
    """Largest norm of the gradient."""
    layer_decay: Optional[float] = None
    """Factor of the learning rate from layer to layer."""
    sched: Literal['cosine', 'tanh', 'poly', 'multistep', 'wsd', 'rsqrt', 'constant', 'none'] = 'cosine'
    """timm's name of the schedule of the learning rate, which is set anew at every step."""
    warmup_epochs: int = 1
    """Epochs in which the learning rate rises."""
    warmup_lr: float = 1e-4
    """Learning rate it rises from."""
    min_lr: float = 0.
    """Learning rate it falls to."""
    decay_milestones: Tuple[int, ...] = ()
    """Epochs after which the multistep schedule lowers the learning rate."""
    decay_rate: float = 0.1
    """Factor by which it does."""

    crop: Optional[Literal['pad', 'rrc']] = None
    """pad: shift by up to an eighth of the side. rrc: resize a random part. pad for images no larger than --img-size
    when None."""
    scale: Tuple[float, float] = (0.08, 1.0)
    """Range of the area that rrc cuts out."""
    hflip: Optional[float] = None
    """Probability of mirroring; 0.5 when None, 0 on digits, whose mirror images are no digits."""
    color_jitter: float = 0.
    """Strength of timm's colour jitter."""
    aa: Optional[str] = None
    """timm's augmentation policy, for example rand-m9-mstd0.5, or AutoAugment's cifar10 or svhn."""
    cutout: int = 0
    """Side in pixels of a square that is blotted out of every image."""
    reprob: float = 0.
    """Probability of random erasing."""
    mean: Optional[Tuple[float, ...]] = None
    """Mean of the channels, 0 to 1; the model's when None."""
    std: Optional[Tuple[float, ...]] = None
    """Standard deviation of the channels; the model's when None."""
    mixup: float = 0.
    """Alpha of mixup."""
    cutmix: float = 0.
    """Alpha of cutmix."""
    smoothing: float = 0.
    """Label smoothing."""
    drop: Optional[float] = None
    """Dropout before the classifiers."""
    drop_path: Optional[float] = None
    """Stochastic depth, where the model has it."""

    model_ema: bool = False
    """Evaluate and save the moving average of the weights."""
    model_ema_decay: float = 0.9998
    """Its decay, reached by and by."""

    seed: int = 42
    """Seed of the weights, the order and the augmentation."""
    output: str = _cosmetic('output/train')
    """Folder of runs."""
    experiment: Optional[str] = _cosmetic(None)
    """Name of this run's folder; date and model when None. Must not exist yet, unless --resume is given."""
    resume: Optional[Literal['auto']] = _cosmetic(None)
    """auto: go on with the run in --experiment's folder, without that with the newest run of these settings in
    --output, and begin where there is none."""
    checkpoint_every: Optional[str] = _cosmetic(None)
    """Optimizer steps between checkpoints, as in 500, or minutes, as in 10m. Ends of epochs have one in any case where
    the last is more than a minute old."""
    checkpoint_hist: int = _cosmetic(2)
    """Checkpoints to keep, the newest; the best weights by the validation part are kept beside them."""
    report_to: Tuple[str, ...] = _cosmetic(())
    """Trackers that follow the run: tensorboard, wandb, trackio, or another one that accelerate knows; all for all
    that are installed."""
    push_to_hub: Optional[str] = _cosmetic(None)
    """Put the complete run into this repository of the Hugging Face Hub, org/name, created as a private one if needed.
    Without a value: a name made of network, method and data set, under TIMM_SELFDISTILL_ORG or your own name."""
    log_interval: int = _cosmetic(50)
    """Steps between two looks at the loss on an accelerator; a CPU looks at every step."""
    results: Optional[str] = _cosmetic(None)
    """File of JSON lines that a complete run appends one to: its settings, every exit's figures, time and hardware."""
    recipe: Optional[str] = _cosmetic(None)
    """What that line is filed under; the name of the run's folder when None."""

    @property
    def has_exits(self) -> bool:
        """Whether the method trains auxiliary exits."""
        return self.method not in ('kd', 'plain')

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
        """Raise ConfigError for the first number that is out of range."""
        at_least = dict(
            epochs=1, batch_size=1, lr=0, momentum=0, weight_decay=0, warmup_epochs=0, hint_weight=0, reprob=0, mixup=0,
            cutmix=0, smoothing=0, alpha=0, hflip=0, workers=0, num_classes=1, img_size=1, log_interval=1, seed=0,
            model_ema_decay=0, color_jitter=0, drop=0, drop_path=0, min_lr=0, warmup_lr=0, decay_rate=0, clip_grad=0,
            layer_decay=0, alpha_end=0, hint_weight_end=0, last_phase_epochs=0, label_weight=0, eta=0, tsd_k=2,
            generations=0, cutout=0, images_per_epoch=1, grad_accum_steps=1, checkpoint_hist=1,
        )
        at_most = dict(
            alpha=1, hflip=1, reprob=1, smoothing=1, model_ema_decay=1, drop=1, drop_path=1, alpha_end=1,
            label_weight=1, eta=1, last_phase_epochs=self.epochs,
        )
        for name, low in at_least.items():
            value, high = getattr(self, name), at_most.get(name)
            if value is not None and not low <= value <= (math.inf if high is None else high) or value == math.inf:
                allowed = f'a number of {low} or more' if high is None else f'a number from {low} to {high}'
                raise ConfigError(f'`{name}={value}`: expected {allowed}.')
        for name in ('temperature', 'temperature_end', 'teacher_temperature'):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ConfigError(f'`{name}={value}`: expected more than 0.')
        if self.in_chans not in (1, 3):
            raise ConfigError(f'`in_chans={self.in_chans}`: expected 3 (colour) or 1 (grey).')
        for name in ('mean', 'std'):
            values = getattr(self, name)
            if values is not None and len(values) not in (1, self.in_chans):
                raise ConfigError(f'`{name}={" ".join(map(str, values))}`: expected 1 or {self.in_chans} numbers.')
        if self.std is not None and not min(self.std) > 0:
            raise ConfigError(f'`std={" ".join(map(str, self.std))}`: expected numbers greater than 0.')
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ConfigError(f'`scale={self.scale[0]} {self.scale[1]}`: expected two rising numbers from 0 to 1.')
        self.model_arguments()
        self.checkpoint_interval()
        self._check_data()
        self._check_teaching()

    def _check_data(self) -> None:
        """Raise ConfigError for settings about data that exclude or need each other."""
        if self.images_per_epoch is not None and not self.streaming:
            raise ConfigError(f'`images_per_epoch={self.images_per_epoch}`: goes with `streaming` only.')
        if self.streaming and self.loader == 'device':
            raise ConfigError('`loader=device`: streamed data are not kept; leave out `streaming` or pass workers.')
        for name in ('generations', 'superclass_column'):
            if self.streaming and getattr(self, name) is not None:
                raise ConfigError(
                    f'`{name}={getattr(self, name)}`: needs data that are not streamed; leave out `streaming`.')

    def _check_teaching(self) -> None:
        """Raise ConfigError for settings about teachers that exclude or need each other."""
        if self.method == 'kd' and self.teacher is None:
            raise ConfigError('`method=kd`: pass `teacher`, the network that teaches.')
        if self.teacher is not None and self.patriarch != 'plain':
            raise ConfigError(
                f'`patriarch={self.patriarch}`: a patriarch has no teacher, and `teacher={self.teacher}` was given.'
            )
        if self.teacher is not None and self.generations is not None:
            raise ConfigError(
                f'`teacher={self.teacher}`: with `generations={self.generations}` each generation teaches the next.')
        for name in ('label_weight', 'teacher_temperature'):
            if getattr(self, name) is not None and self.teacher is None and self.generations is None:
                raise ConfigError(
                    f'`{name}={getattr(self, name)}`: there is no teacher; pass `teacher` or `generations`.')
        if self.eta is not None and self.patriarch == 'plain':
            others = ', '.join(_ETA)
            raise ConfigError(f'`eta={self.eta}`: `patriarch=plain` has the cross entropy alone; others are {others}.')
        if self.resume is not None and self.generations is not None and self.experiment is None:
            raise ConfigError('`resume=auto`: pass `experiment`, the name of the generations to go on with.')

    def teaching(self) -> Dict[str, Any]:
        """Return what the settings say about labels, tolerance and teacher, defaults filled in."""
        classic = self.method == 'kd'
        return dict(
            tolerance=None if self.patriarch == 'plain' else self.patriarch,
            eta=self.eta if self.eta is not None else _ETA.get(self.patriarch, 1.0),
            k=self.tsd_k,
            label_weight=self.label_weight if self.label_weight is not None else 0.1 if classic else 0.6,
            teacher_temperature=self.teacher_temperature or (4.0 if classic else 1.0),
        )


def _of_kind(kind: str) -> FrozenSet[str]:
    return frozenset(f.name for f in dataclasses.fields(TrainConfig) if f.metadata.get('kind') == kind)


# Settings that leave the result as it is, and those that say where something lies.
INCIDENTAL, PLACES = _of_kind('cosmetic'), _of_kind('path')
