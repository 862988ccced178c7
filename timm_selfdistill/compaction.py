"""Runs a multi-exit network in such a way that images leave the batch on the way."""
import math
import threading
from collections import Counter
from dataclasses import dataclass
from typing import Any, Callable, List, Literal, Optional, Protocol, Sequence, Tuple

import torch
import torch.nn as nn
from timm.models import get_model_input_config

from .multi_exit import MultiExit
from .stages import copy_model, meta_copy, take_taps
from .wrapper import model_name, times

__all__ = ['AtExit', 'CompactingRun', 'choose_run', 'randomise', 'small_size']

# Called with the number of an exit and the logits of the images that came there. Returns the rows of those that go on,
# None for all of them; nothing at the deepest exit.
AtExit = Callable[[int, torch.Tensor], Optional[torch.Tensor]]


class CompactingRun(Protocol):
    """One way to run a network.

    Attributes:
        kind: `hooks` and `graphs` spare images that leave the rest of the network, `whole` does not. Graphs belong to
            the device and the precision that the network had when they were made.
        how: What it does, in words.
    """
    kind: Literal['hooks', 'graphs', 'whole']
    how: str

    def __call__(self, images: torch.Tensor, at_exit: AtExit, wanted: Sequence[bool]) -> None:
        """Run images (N, C, H, W) from exit to exit until none is left.

        Args:
            images: The images.
            at_exit: Decides who goes on.
            wanted: For each exit whether `at_exit` has to be called there.
        """


# -- in the network itself --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Cut:
    """A module whose output is the map that an exit head takes.

    Attributes:
        module: Its name in the backbone.
        position: Which item of its output, None where that is no tuple.
        layout: How the map lies there, a name in `_LAYOUTS`.
        prefix: Tokens before those of the map.
    """
    module: str
    position: Optional[int]
    layout: str
    prefix: int = 0

    def read(self, output: Any, height: int, width: int) -> torch.Tensor:
        """Return the map (N, C, h, w) in a module's output, of images of this height and width."""
        x = output if self.position is None else output[self.position]
        if self.layout == 'NCHW':
            return x
        if self.layout == 'NHWC':
            return x.permute(0, 3, 1, 2)
        tokens = x.shape[1] - self.prefix
        rows = max(1, round(math.sqrt(tokens * height / width)))
        return x[:, self.prefix:].transpose(1, 2).unflatten(2, (rows, tokens // rows))


class _NoneLeft(Exception):
    """Stops a forward pass."""


class _HookedRun:
    """Takes images out of the batch by hooks on the modules whose outputs the exit heads take.

    Args:
        model: The network.
        cuts: One for each auxiliary exit.
    """

    kind = 'hooks'
    how = 'images that leave are taken out of the batch'

    def __init__(self, model: MultiExit, cuts: Sequence[_Cut]):
        self.model = model
        self.cuts = cuts

    def __call__(self, images: torch.Tensor, at_exit: AtExit, wanted: Sequence[bool]) -> None:
        thread = threading.get_ident()
        previous: List[torch.Tensor] = []

        def hook_for(number: int, cut: _Cut, head: nn.Module) -> Callable[..., Any]:
            def hook(module: nn.Module, args: Any, output: Any) -> Any:
                if threading.get_ident() != thread:  # another thread runs the same network
                    return None
                tap = cut.read(output, *images.shape[-2:])
                logits = head.forward_head(head.forward_features(tap), previous[-1] if previous else None)
                rows = at_exit(number, logits)
                previous[:] = [logits if rows is None else logits[rows]]
                if rows is None:
                    return None
                if not len(rows):
                    raise _NoneLeft
                return _take_rows(output, rows, len(tap))
            return hook

        handles = [
            self.model.backbone.get_submodule(cut.module).register_forward_hook(hook_for(number, cut, head))
            for number, (cut, head) in enumerate(zip(self.cuts, self.model.exit_heads)) if wanted[number]
        ]
        try:
            logits = self.model.forward(images)  # not a compiled one, in which hooks would not run
        except _NoneLeft:
            return
        finally:
            for handle in handles:
                handle.remove()
        at_exit(len(self.cuts), logits)


def _take_rows(output: Any, rows: torch.Tensor, count: int) -> Any:
    """Keep these of `count` images in whatever a module returned."""
    if isinstance(output, (tuple, list)):
        return type(output)(_take_rows(item, rows, count) for item in output)
    if not isinstance(output, torch.Tensor) or not output.ndim or len(output) != count:
        return output
    taken = output[rows]
    if output.ndim == 4 and output.is_contiguous(memory_format=torch.channels_last):
        taken = taken.contiguous(memory_format=torch.channels_last)
    return taken


def _items(output: Any) -> List[Tuple[Optional[int], torch.Tensor]]:
    if isinstance(output, torch.Tensor):
        return [(None, output)]
    if type(output) not in (tuple, list):
        return []
    return [(i, item) for i, item in enumerate(output) if isinstance(item, torch.Tensor)]


@torch.no_grad()
def randomise(model: nn.Module) -> None:
    """Give a network weights with which every layer changes what passes it; many a fresh one begins as an identity."""
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=(2 / max(1, parameter[0].numel())) ** 0.5)
        else:
            parameter.add_(torch.randn_like(parameter), alpha=0.02)


def _candidates(probe: MultiExit, images: torch.Tensor) -> List[List[_Cut]]:
    """Find for every auxiliary exit the modules that put out the map its head takes, the last to do so first."""
    taps = [tap.clone() for tap in take_taps(probe.backbone, images, probe.exits)]
    found: List[List[_Cut]] = [[] for _ in taps]
    calls: Counter = Counter()

    def hook_for(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            calls[name] += 1
            for position, item in _items(output):
                for cuts, tap in zip(found, taps):
                    prefix = item.shape[1] - tap.shape[-2:].numel() if item.ndim == 3 else 0
                    for layout, ndim in (('NCHW', 4), ('NHWC', 4), ('NLC', 3)):
                        if item.ndim != ndim or item.numel() < tap.numel() or prefix < 0:
                            continue
                        cut = _Cut(name, position, layout, prefix)
                        seen = cut.read(output, *images.shape[-2:])
                        if seen.shape == tap.shape and torch.allclose(seen, tap, rtol=1e-4, atol=1e-6):
                            cuts.insert(0, cut)
                            break
        return hook

    handles = [m.register_forward_hook(hook_for(n)) for n, m in probe.backbone.named_modules() if n]
    try:
        probe.forward(images)
    finally:
        for handle in handles:
            handle.remove()
    return [[cut for cut in cuts if calls[cut.module] == 1] for cuts in found]


def _find_cuts(model: MultiExit) -> Optional[List[_Cut]]:
    """Find modules after which images can be taken out of the batch; None if the network cannot do with fewer there.

    Everything is tried on a copy with random weights: which module makes a map is found by comparing outputs. Deep down
    random networks may hardly tell images apart; where rounding hides it, as TF32 may on a GPU, the copy is run in
    double precision.
    """
    device = next(model.parameters()).device
    probe = copy_model(model).eval().to('cpu' if device.type == 'mps' else device, torch.float)
    randomise(probe)
    images = torch.randn(max(3, model.num_exits), *small_size(model)).to(next(probe.parameters()))
    expected = probe.forward_exits(images)
    noise = 1e-5
    if images.is_cuda or any(_spread(logits) < 100 * noise * logits.abs().max() for logits in expected):
        probe, images, noise = probe.double(), images.double(), 1e-9
        expected = probe.forward_exits(images)
    candidates = _candidates(probe, images[:1])
    if not all(candidates):
        return None
    for choice in range(max(map(len, candidates))):
        cuts = [options[min(choice, len(options) - 1)] for options in candidates]
        if _agrees(_HookedRun(probe, cuts), images, expected, noise):
            return cuts
    return None


def _spread(logits: torch.Tensor) -> torch.Tensor:
    """Return how far the logits (N, num_classes) of images differ from their mean."""
    return (logits - logits.mean(0)).abs().max()


# -- as a chain of graphs ---------------------------------------------------------------------------------------------


class _SegmentedRun:
    """Runs the network as a chain of graphs, of which each takes what the one before passed on.

    Args:
        model: The network.
        images: Images of the size that will come, at least three.

    Raises:
        SplitError: The network cannot be cut into such graphs.
    """

    kind = 'graphs'
    how = 'images that leave are taken out of the batch, between graphs made for images of '

    def __init__(self, model: MultiExit, images: torch.Tensor):
        from .segments import split_network  # torch.export takes long to import
        self.name = model_name(model)
        self.size = tuple(images.shape[1:])
        self.how += times(self.size)
        self.parts = split_network(model, images)

    def __call__(self, images: torch.Tensor, at_exit: AtExit, wanted: Sequence[bool]) -> None:
        if tuple(images.shape[1:]) != self.size:
            raise ValueError(
                f'images of {times(images.shape[1:])}: {self.name} was cut into graphs for {times(self.size)} '
                f'(channels, height, width).'
            )
        passed: Sequence[torch.Tensor] = [images]
        for number, part in enumerate(self.parts):
            logits, *passed = part(*passed)
            rows = at_exit(number, logits) if wanted[number] else None
            if rows is not None:
                if not len(rows):
                    return
                passed = [_take_rows(tensor, rows, len(logits)) for tensor in passed]


# -- not at all -------------------------------------------------------------------------------------------------------


class _WholeRun:
    """Runs all images to the end.

    Args:
        model: The network.
        reason: Why nothing better works.
    """

    kind = 'whole'

    def __init__(self, model: MultiExit, reason: str):
        self.model = model
        self.how = f'whole batches run to the end, nothing is saved: {reason}'

    def __call__(self, images: torch.Tensor, at_exit: AtExit, wanted: Sequence[bool]) -> None:
        left = torch.arange(len(images), device=images.device)
        for number, logits in enumerate(self.model.forward_exits(images)):
            rows = at_exit(number, logits[left]) if wanted[number] else None
            if rows is not None:
                left = left[rows]


def _agrees(run: CompactingRun, images: torch.Tensor, expected: Sequence[torch.Tensor], noise: float) -> bool:
    """Say whether a run gives every image the logits expected at every exit although others leave before it.

    Args:
        run: The run.
        images: Images (N, C, H, W).
        expected: Their logits at every exit, each (N, num_classes).
        noise: What may be rounding, as a share of the largest logit.
    """
    left = torch.arange(len(images), device=images.device)
    agreed = []

    def drop_one(number: int, logits: torch.Tensor) -> Optional[torch.Tensor]:
        nonlocal left
        target = expected[number]
        allowed = max(0.01 * _spread(target), noise * target.abs().max())
        agreed.append(len(logits) == len(left) and bool((logits - target[left]).abs().max() <= allowed))
        rows = torch.arange(len(left), device=left.device).roll(-1 - number)[:max(1, len(left) - 1)].sort().values
        left = left[rows]
        return rows

    try:
        run(images, drop_one, [True] * len(expected))
    except (AssertionError, IndexError, RuntimeError, TypeError, ValueError):  # whatever a wrong size leads to
        return False
    return len(agreed) == len(expected) and all(agreed)


def small_size(model: MultiExit) -> Tuple[int, ...]:
    """Return channels, height and width of images that are quickly run, no larger than those it was built for."""
    own = tuple(get_model_input_config(model)['input_size'])
    probe = meta_copy(model)
    for side in (96, 112, 128, 192):  # multiples of patches of 16, 14, 32
        if side < min(own[1:]):
            try:
                probe.forward_exits(torch.empty(1, own[0], side, side, device='meta'))
            except (AssertionError, RuntimeError, ValueError):  # built for another size
                continue
            return own[0], side, side
    return own


@torch.no_grad()
def choose_run(model: MultiExit) -> CompactingRun:
    """Find by probing how images can leave a network on the way.

    Args:
        model: The network, in eval mode.
    """
    if not model.exits:
        return _HookedRun(model, [])
    like = next(model.parameters())
    with torch.random.fork_rng(devices=[like.device] if like.is_cuda else []):
        torch.manual_seed(0)
        cuts = _find_cuts(model)
        if cuts is not None:
            return _HookedRun(model, cuts)
        images = torch.randn(max(3, model.num_exits), *get_model_input_config(model)['input_size']).to(like)
    from .segments import SplitError
    try:
        run = _SegmentedRun(model, images)
    except SplitError as error:
        return _WholeRun(model, str(error))
    # TF32 rounds to 11 bits, bfloat16 to 8
    if not _agrees(run, images, model.forward_exits(images), noise=1e-3 if like.dtype.itemsize > 2 else 1e-2):
        return _WholeRun(model, 'the rest of the network does not go on with some of the images')
    return run
