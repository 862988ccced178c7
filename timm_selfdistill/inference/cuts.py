"""Where a network may be cut: the module behind which images can be taken out of the batch.

An exit head takes a feature map. Some module of the network puts that map out, in one of a few layouts: (N, C, H, W),
(N, H, W, C), or as a row of tokens. No list of modules by name could be kept for all of timm, so the module is found by
running a copy of the network with random weights, and comparing what its modules put out with the map.

That the map passes there does not mean that nothing else does. Relative positions, a second branch or a cache may still
belong to the whole batch. So each candidate is tried: images are dropped at every exit, and those that stay must get
the logits that they get in a whole batch. The first choice of modules that passes is taken.
"""
from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import torch
import torch.nn as nn
from timm.models import get_model_input_config

from ..models.multi_exit import MultiExit
from ..models.probe import count_macs, meta_copy, take_taps

__all__ = ['AtExit', 'Cut', 'Grid', 'agrees', 'draw_weights', 'find_candidates', 'randomise', 'small_size', 'spread']

# Called with the number of an exit and the logits of the images that came there. Returns the rows of those that go on,
# None for all of them; nothing at the deepest exit.
AtExit = Callable[[int, torch.Tensor], Optional[torch.Tensor]]

_DRAWN = 2 ** 22 - 3  # a prime: rows of weights do not repeat
_APART, _STEP = 2 ** 16, 7919  # where weights begin that share their numbers
_SIDES = (96, 112, 128, 192)  # multiples of patches of 16, 14, 32

Grid = Tuple[int, int]  # height and width of a map


@dataclass(frozen=True)
class Cut:
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


def _items(output: Any) -> List[Tuple[Optional[int], torch.Tensor]]:
    if isinstance(output, torch.Tensor):
        return [(None, output)]
    if type(output) not in (tuple, list):
        return []
    return [(i, item) for i, item in enumerate(output) if isinstance(item, torch.Tensor)]


@torch.no_grad()
def draw_weights(model: nn.Module, generator: Optional[torch.Generator] = None) -> Dict[int, nn.Parameter]:
    """Draw weights with which every layer changes what passes it; many a fresh one begins as an identity.

    They are for a copy that is run and nothing else. Those of one scale are windows into the same numbers, each
    beginning elsewhere, as filling memory would take longer than all else.

    Args:
        model: The network.
        generator: Draws them; torch's own when None.

    Returns:
        A parameter for each of the network's, by the id of that one.
    """
    drawn: Dict[int, nn.Parameter] = {}
    scales: Dict[float, List[nn.Parameter]] = defaultdict(list)
    for p in model.parameters():
        if p.ndim > 1:
            scales[(2 / max(1, p[0].numel())) ** 0.5].append(p)
        else:
            noise = torch.empty_like(p).normal_(generator=generator)
            drawn[id(p)] = nn.Parameter(p + 0.02 * noise, requires_grad=False)
    most = {std: max(p.numel() for p in of_scale) + _APART for std, of_scale in scales.items()}
    like = next(model.parameters(), torch.empty(()))
    numbers = torch.randn(
        min(_DRAWN, max(most.values(), default=0)), generator=generator, device=like.device, dtype=like.dtype)
    for std, of_scale in scales.items():
        scaled = numbers.repeat(-(-most[std] // len(numbers)))[:most[std]] * std
        for i, p in enumerate(of_scale):
            window = scaled[_STEP * i % _APART:][:p.numel()].view(p.shape)
            drawn[id(p)] = nn.Parameter(window, requires_grad=False)
    return drawn


@torch.no_grad()
def randomise(model: nn.Module, generator: Optional[torch.Generator] = None) -> None:
    """Set weights such as `draw_weights` gives."""
    drawn = draw_weights(model, generator)
    for parameter in list(model.parameters()):
        parameter.copy_(drawn[id(parameter)])


def _close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-4, atol=1e-6)


def find_candidates(probe: MultiExit, images: torch.Tensor) -> Tuple[List[List[Cut]], Dict[int, Grid]]:
    """Find for every auxiliary exit the modules that put out the map its head takes, the last to do so first.

    Returns:
        The candidates of each exit, and height and width of its map.
    """
    taps = [tap.clone() for tap in take_taps(probe.backbone, images, probe.exits)]
    found: List[List[Cut]] = [[] for _ in taps]
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
                        cut = Cut(name, position, layout, prefix)
                        seen = cut.read(output, tap.shape[-2:])
                        if seen.shape != tap.shape or not _close(seen[..., 0, 0], tap[..., 0, 0]):
                            continue
                        if _close(seen, tap):
                            cuts.insert(0, cut)
                            break
        return hook

    handles = [m.register_forward_hook(hook_for(n)) for n, m in probe.backbone.named_modules() if n]
    try:
        probe.forward(images)
    finally:
        for handle in handles:
            handle.remove()
    grids = {number: tuple(tap.shape[-2:]) for number, tap in enumerate(taps)}
    return [[cut for cut in cuts if calls[cut.module] == 1] for cuts in found], grids


def spread(logits: torch.Tensor) -> torch.Tensor:
    """Return how far the logits (N, num_classes) of images differ from their mean."""
    return (logits - logits.mean(0)).abs().max()


def agrees(run: Callable[..., None], images: torch.Tensor, expected: Sequence[torch.Tensor], noise: float) -> bool:
    """Return whether a runner gives every image the logits expected at every exit although others leave before it.

    Args:
        run: The runner.
        images: Images (N, C, H, W).
        expected: Their logits at every exit, each (N, num_classes).
        noise: What may be rounding, as a share of the largest logit.
    """
    left = torch.arange(len(images), device=images.device)
    agreed = []

    def drop_one(number: int, logits: torch.Tensor) -> Optional[torch.Tensor]:
        nonlocal left
        target = expected[number]
        allowed = max(0.01 * spread(target), noise * target.abs().max())
        agreed.append(len(logits) == len(left) and bool((logits - target[left]).abs().max() <= allowed))
        rows = torch.arange(len(left), device=left.device).roll(-1 - number)[:max(1, len(left) - 1)].sort().values
        left = left[rows]
        return rows

    try:
        run(images, drop_one, [True] * len(expected))
    except (AssertionError, IndexError, RuntimeError, TypeError, ValueError):  # whatever a wrong size leads to
        return False
    return len(agreed) == len(expected) and all(agreed)


def small_size(model: MultiExit, resize: bool = False) -> Tuple[int, ...]:
    """Return channels, height and width of images that are quickly run, no larger than those it was built for.

    Args:
        model: The network.
        resize: Build it for smaller images where it can be, if it takes no others than those it was built for.
    """
    own = tuple(get_model_input_config(model)['input_size'])
    sizes = [(own[0], side, side) for side in _SIDES if side < min(own[1:])]
    probe = meta_copy(model)
    taken = next((size for size in sizes if _takes(probe, size)), own)
    if taken != own or not resize or not hasattr(model.backbone, 'set_input_size'):
        return taken
    for size in [(own[0], 64, 64), (own[0], 56, 56), *sizes]:  # built for them, networks take less
        try:
            probe.backbone.set_input_size(img_size=size[1:])
            if _takes(probe, size):
                model.backbone.set_input_size(img_size=size[1:])
                return size
        except (AssertionError, RuntimeError, TypeError, ValueError):  # it can be built for some sizes only
            pass
        probe = meta_copy(model)
    return own


def _takes(probe: MultiExit, size: Tuple[int, ...]) -> bool:
    try:
        count_macs(probe.forward_exits, torch.empty(1, *size, device='meta'))  # faster
    except (AssertionError, RuntimeError, ValueError):  # built for another size
        return False
    return True
