"""Runs a multi-exit network in such a way that images leave the batch on the way."""
from collections import Counter
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Callable, Dict, List, Literal, Optional, Protocol, Sequence, Tuple

import torch
import torch.nn as nn
from timm.models import get_model_input_config

from ..models.multi_exit import MultiExit
from ..models.names import model_name, times
from ..models.probe import copy_model, forget_caches, meta_copy, take_taps

__all__ = ['AtExit', 'CompactingRun', 'choose_run', 'randomise', 'small_size']

# Called with the number of an exit and the logits of the images that came there. Returns the rows of those that go on,
# None for all of them; nothing at the deepest exit.
AtExit = Callable[[int, torch.Tensor], Optional[torch.Tensor]]

Grid = Tuple[int, int]  # height and width of a map

_MOST_SIZES = 1024  # of images, whose grids are remembered


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

    def read(self, output: Any, grid: Optional[Grid]) -> torch.Tensor:
        """Return the map (N, C, h, w) in a module's output.

        Args:
            output: What the module returned.
            grid: Height and width of the map, which nothing in a row of tokens tells; None for a map that has them.
        """
        x = output if self.position is None else output[self.position]
        if self.layout == 'NCHW':
            return x
        if self.layout == 'NHWC':
            return x.permute(0, 3, 1, 2)
        return x[:, self.prefix:].transpose(1, 2).unflatten(2, grid)


class _NoneLeft(Exception):
    """Stops a forward pass."""


@dataclass
class _Call:
    """A batch on its way through a network, of which hooks on modules know.

    Attributes:
        at_exit: Decides who goes on.
        wanted: For each exit whether it has to be called there.
        grids: Height and width of each auxiliary exit's map, {} where none has to be known.
        logits: Those of the exit before, of the images that went on.
    """
    at_exit: AtExit
    wanted: Sequence[bool]
    grids: Dict[int, Grid]
    logits: Optional[torch.Tensor] = None


# Each thread has its own; without one hooks do nothing.
_call: ContextVar[Optional[_Call]] = ContextVar('_call', default=None)


@dataclass
class _Leave:
    """A hook that takes images out of the batch behind a module.

    Attributes:
        number: Number of the exit.
        cut: The module, and how the map lies in its output.
        head: The exit's head.
    """
    number: int
    cut: _Cut
    head: nn.Module

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        call = _call.get()
        if call is None or not call.wanted[self.number]:
            return None
        tap = self.cut.read(output, call.grids.get(self.number))
        logits = self.head.forward_head(self.head.forward_features(tap), call.logits)
        rows = call.at_exit(self.number, logits)
        call.logits = logits if rows is None else logits[rows]
        if rows is None:
            return None
        if not len(rows):
            raise _NoneLeft
        return _take_rows(output, rows, len(tap))


class _HookedRun:
    """Takes images out of the batch by hooks on the modules whose outputs the exit heads take.

    Args:
        model: The network, which nobody else runs; it is given the hooks.
        cuts: One for each auxiliary exit.
    """

    kind = 'hooks'
    how = 'images that leave are taken out of the batch'

    def __init__(self, model: MultiExit, cuts: Sequence[_Cut]):
        self.model = model
        self.cuts = cuts
        self._grids: Dict[Grid, Dict[int, Grid]] = {}
        self._probe = meta_copy(model) if any(cut.layout == 'NLC' for cut in cuts) else None
        self._hooks = [
            model.backbone.get_submodule(cut.module).register_forward_hook(_Leave(number, cut, head))
            for number, (cut, head) in enumerate(zip(cuts, model.exit_heads))
        ]

    def remove_hooks(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def grids(self, channels: int, height: int, width: int) -> Dict[int, Grid]:
        """Ask the network for height and width of each auxiliary exit's map of such images.

        Returns:
            By the number of the exit; nothing where all modules put out maps that have them.
        """
        if self._probe is None:
            return {}
        found = self._grids.get((height, width))
        if found is None:
            like = next(self._probe.parameters())
            images = torch.empty(1, channels, height, width, device='meta', dtype=like.dtype)
            try:
                taps = take_taps(self._probe.backbone, images, self._probe.exits)
            except (AssertionError, RuntimeError) as error:
                self.model.explain_refusal(images, error)
                raise
            found = {number: tuple(tap.shape[-2:]) for number, tap in enumerate(taps)}
            if len(self._grids) >= _MOST_SIZES:
                self._grids.clear()
            self._grids[height, width] = found
        return found

    def __call__(self, images: torch.Tensor, at_exit: AtExit, wanted: Sequence[bool]) -> None:
        call = _Call(at_exit, wanted, self.grids(*images.shape[1:]))
        before = _call.set(call)
        try:
            logits = self.model.forward(images)
        except _NoneLeft:
            return
        finally:
            _call.reset(before)
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
def randomise(model: nn.Module, generator: Optional[torch.Generator] = None) -> None:
    """Give a network weights with which every layer changes what passes it; many a fresh one begins as an identity.

    Args:
        model: The network.
        generator: Draws them; torch's own when None.
    """
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=(2 / max(1, parameter[0].numel())) ** 0.5, generator=generator)
        else:
            parameter.add_(torch.empty_like(parameter).normal_(generator=generator), alpha=0.02)


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
                        seen = cut.read(output, tap.shape[-2:])
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


def _find_cuts(
        probe: MultiExit,
        images: torch.Tensor,
        expected: Sequence[torch.Tensor],
) -> Optional[List[_Cut]]:
    """Find modules after which images can be taken out of the batch; None if the network cannot do with fewer there.

    Which module makes a map is found by comparing outputs. Deep down random networks may hardly tell images apart;
    where rounding hides it, as TF32 may on a GPU, they are run in double precision.

    Args:
        probe: A copy of the network with random weights.
        images: Images (N, C, H, W) for it.
        expected: Their logits at every exit, each (N, num_classes).
    """
    noise = 1e-5
    if images.is_cuda or any(_spread(logits) < 100 * noise * logits.abs().max() for logits in expected):
        probe, images, noise = probe.double(), images.double(), 1e-9
        expected = probe.forward_exits(images)
    candidates = _candidates(probe, images[:1])
    if not all(candidates):
        return None
    for choice in range(max(map(len, candidates))):
        cuts = [options[min(choice, len(options) - 1)] for options in candidates]
        run = _HookedRun(probe, cuts)
        agrees = _agrees(run, images, expected, noise)
        run.remove_hooks()
        if agrees:
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
        from .graphs import split_network  # torch.export takes long to import
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

    Everything is tried on a copy with random weights.

    Args:
        model: The network, in eval mode. It is given hooks, and keeps nothing any more that depends on its weights, so
            it has to be one that nobody else runs, such as `eval_view` gives.
    """
    if not model.exits:
        return _HookedRun(model, [])
    like = next(model.parameters())
    device = torch.device('cpu') if like.device.type == 'mps' else like.device
    probe = copy_model(model).to(device, torch.float)
    generator = torch.Generator(device).manual_seed(0)
    randomise(probe, generator)
    count = max(3, model.num_exits)
    images = torch.randn(count, *small_size(model), generator=generator, device=device)
    expected = probe.forward_exits(images)
    forget_caches(model, probe)
    cuts = _find_cuts(probe, images, expected)
    if cuts is not None:
        return _HookedRun(model, cuts)
    del probe
    from ..errors import SplitError
    size = get_model_input_config(model)['input_size']
    images = torch.randn(count, *size, generator=generator, device=device).to(like)
    try:
        run = _SegmentedRun(model, images)
    except SplitError as error:
        return _WholeRun(model, str(error))
    # TF32 rounds to 11 bits, bfloat16 to 8
    if not _agrees(run, images, model.forward_exits(images), noise=1e-3 if like.dtype.itemsize > 2 else 1e-2):
        return _WholeRun(model, 'the rest of the network does not go on with some of the images')
    return run
