"""Runners: three ways to execute a network from exit to exit while images leave the batch.

`CutRunner` runs the network itself. Hooks on a few of its modules (see `cuts`) compute the exit's logits from what the
module puts out, ask who leaves, and pass on a smaller batch. It takes images of any size.

`GraphRunner` is for networks that have no such module. torch.export turns the network into one graph, which is cut
behind each exit (see `graphs`); images leave between two graphs. It takes images of one size.

`WholeRunner` is for networks in which images cannot leave at all. It runs every batch to its end, so nothing is saved.

`choose_runner` tries them in this order.
"""
import hashlib
import threading
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Callable, Dict, List, Literal, Optional, Protocol, Sequence, Tuple

import torch
import torch.nn as nn
from timm.models import get_model_input_config

from ..errors import SplitError
from ..models.multi_exit import MultiExit
from ..models.names import model_name, times
from ..models.probe import copy_model, find_caches, forget_caches, meta_copy, take_taps
from .cuts import AtExit, Cut, Grid, agrees, draw_weights, find_candidates, small_size, spread

__all__ = ['CompiledRunner', 'CutRunner', 'GraphRunner', 'Runner', 'WholeRunner', 'choose_runner', 'find_cuts']

_MOST_SIZES = 1024  # of images, whose grids are remembered


class Runner(Protocol):
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


class _NoneLeft(Exception):
    """Stops a forward pass."""


@dataclass
class _Batch:
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
_batch: ContextVar[Optional[_Batch]] = ContextVar('_batch', default=None)


@dataclass
class _Leave:
    """A hook that takes images out of the batch behind a module.

    Attributes:
        number: Number of the exit.
        cut: The module, and how the map lies in its output.
        head: The exit's head.
    """
    number: int
    cut: Cut
    head: nn.Module

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        call = _batch.get()
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


class CutRunner:
    """Takes images out of the batch by hooks on the modules whose outputs the exit heads take.

    Args:
        model: The network, which nobody else runs; it is given the hooks.
        cuts: One for each auxiliary exit.
        size: Height and width of the images, if all that come have the same.
        grids: Height and width of each auxiliary exit's map of such images.
    """

    kind = 'hooks'
    how = 'images that leave are taken out of the batch'

    def __init__(
            self,
            model: MultiExit,
            cuts: Sequence[Cut],
            size: Optional[Grid] = None,
            grids: Optional[Dict[int, Grid]] = None,
    ):
        self.model = model
        self.cuts = cuts
        self._grids: Dict[Grid, Dict[int, Grid]] = {} if size is None else {size: grids}
        self._probe = meta_copy(model) if size is None and any(cut.layout == 'NLC' for cut in cuts) else None
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
        found = self._grids.get((height, width))
        if self._probe is None:
            return found or {}
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
        call = _Batch(at_exit, wanted, self.grids(*images.shape[1:]))
        before = _batch.set(call)
        try:
            logits = self.model.forward(images)
        except _NoneLeft:
            return
        finally:
            _batch.reset(before)
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


def find_cuts(
        probe: MultiExit,
        images: torch.Tensor,
        expected: Sequence[torch.Tensor],
) -> Optional[List[Cut]]:
    """Find modules after which images can be taken out of the batch; None if the network cannot do with fewer there.

    Which module makes a map is found by comparing outputs. Deep down random networks may hardly tell images apart;
    where rounding hides it, as TF32 may on a GPU, they are run in double precision.

    Args:
        probe: A copy of the network with random weights.
        images: Images (N, C, H, W) for it.
        expected: Their logits at every exit, each (N, num_classes).
    """
    noise = 1e-5
    if images.is_cuda or any(spread(logits) < 100 * noise * logits.abs().max() for logits in expected):
        probe, images, noise = probe.double(), images.double(), 1e-9
        expected = probe.forward_exits(images)
    candidates, grids = find_candidates(probe, images[:1])
    if not all(candidates):
        return None
    for choice in range(max(map(len, candidates))):
        cuts = [options[min(choice, len(options) - 1)] for options in candidates]
        run = CutRunner(probe, cuts, tuple(images.shape[-2:]), grids)
        passes = agrees(run, images, expected, noise)
        run.remove_hooks()
        if passes:
            return cuts
    return None


class GraphRunner:
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

    def run_part(self, number: int, passed: Sequence[torch.Tensor]) -> Tuple[torch.Tensor, ...]:
        """Return the logits of an exit, and what the next part takes."""
        return self.parts[number](*passed)

    def __call__(self, images: torch.Tensor, at_exit: AtExit, wanted: Sequence[bool]) -> None:
        if tuple(images.shape[1:]) != self.size:
            raise ValueError(
                f'images of {times(images.shape[1:])}: {self.name} was cut into graphs for {times(self.size)} '
                f'(channels, height, width).'
            )
        passed: Sequence[torch.Tensor] = [images]
        for number in range(len(self.parts)):
            logits, *passed = self.run_part(number, passed)
            rows = at_exit(number, logits) if wanted[number] else None
            if rows is not None:
                if not len(rows):
                    return
                passed = [_take_rows(tensor, rows, len(logits)) for tensor in passed]


class CompiledRunner(GraphRunner):
    """Runs the network as a chain of graphs that torch.compile has compiled, each for a few numbers of images.

    What is left of a batch is padded to the next power of two, so that nothing is compiled again for every number.

    Args:
        model: The network.
        images: Images of the size that will come, at least three.

    Raises:
        SplitError: The network cannot be cut into such graphs.
    """

    how = GraphRunner.how.replace('graphs made', 'compiled graphs made')

    def __init__(self, model: MultiExit, images: torch.Tensor):
        super().__init__(model, images)
        self._compiled: Dict[Tuple[int, int], Callable[..., Any]] = {}
        self._lock = threading.Lock()

    def _part(self, number: int, size: int) -> Callable[..., Any]:
        with self._lock:
            if (number, size) not in self._compiled:
                part = self.parts[number]
                # with code of its own, as torch.compile counts how often one code is compiled, and gives up
                alone = torch.fx.GraphModule(part, part.graph)
                self._compiled[number, size] = torch.compile(alone, dynamic=False, fullgraph=True)
            return self._compiled[number, size]

    def run_part(self, number: int, passed: Sequence[torch.Tensor]) -> Tuple[torch.Tensor, ...]:
        count = len(passed[0])
        size = 1 << (count - 1).bit_length()
        padded = [_pad(tensor, size) for tensor in passed] if size > count else passed
        outputs = self._part(number, size)(*padded)
        return tuple(tensor[:count] for tensor in outputs) if size > count else outputs


def _pad(tensor: torch.Tensor, size: int) -> torch.Tensor:
    """Repeat the first image until there are `size`; what it is like may matter to no other."""
    return torch.cat([tensor, tensor[:1].expand(size - len(tensor), *tensor.shape[1:])])


class WholeRunner:
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


# What was found by probing, by architecture: where it is cut, if it can be, and what its modules keep.
_found: Dict[str, Tuple[Optional[List[Cut]], List[Tuple[str, str]]]] = {}


def _architecture(model: MultiExit) -> str:
    """Hash all that says how a network computes: its modules, the shapes of its weights, its images and its exits."""
    config = get_model_input_config(model)
    parts = [model.backbone, model.exit_heads, model.head]
    shapes = [(n, tuple(t.shape)) for part in parts if part is not None for n, t in part.state_dict().items()]
    told = (type(model.backbone), parts, shapes, sorted(config.items(), key=str), model.exits)
    return hashlib.sha256(repr(told).encode()).hexdigest()


def _find(model: MultiExit) -> Tuple[Optional[List[Cut]], List[Tuple[str, str]]]:
    """Probe a copy with random weights; return where the network may be cut, and what its modules keep."""
    like = next(model.parameters())
    device = torch.device('cpu') if like.device.type == 'mps' else like.device
    generator = torch.Generator(like.device).manual_seed(0)
    probe = copy_model(model, draw_weights(model, generator)).to(device, torch.float)
    size = small_size(probe, resize=True)
    generator = torch.Generator(device).manual_seed(0)
    images = torch.randn(max(3, model.num_exits), *size, generator=generator, device=device)
    expected = probe.forward_exits(images)
    return find_cuts(probe, images, expected), find_caches(probe)


@torch.no_grad()
def choose_runner(model: MultiExit, compile: bool = False) -> Runner:
    """Find by probing how images can leave a network on the way.

    Everything is tried on a copy with random weights.

    Args:
        model: The network, in eval mode. It is given hooks, and keeps nothing any more that depends on its weights, so
            it has to be one that nobody else runs, such as `eval_view` gives.
        compile: Compile it, whatever else would do.

    Raises:
        SplitError: It is to be compiled, and cannot be cut into graphs.
    """
    if not model.exits:
        return CutRunner(model, [])
    like = next(model.parameters())
    key = _architecture(model)
    cuts, caches = _found.get(key) or _find(model)
    _found[key] = cuts, caches
    forget_caches(model, caches)
    if cuts is not None and not compile:
        return CutRunner(model, cuts)
    device = torch.device('cpu') if like.device.type == 'mps' else like.device
    generator = torch.Generator(device).manual_seed(0)
    count = max(3, model.num_exits)
    size = get_model_input_config(model)['input_size']
    images = torch.randn(count, *size, generator=generator, device=device).to(like)
    try:
        run = (CompiledRunner if compile else GraphRunner)(model, images)
    except SplitError as error:
        if compile:
            raise
        return WholeRunner(model, str(error))
    # TF32 rounds to 11 bits, bfloat16 to 8
    if not agrees(run, images, model.forward_exits(images), noise=1e-3 if like.dtype.itemsize > 2 else 1e-2):
        return WholeRunner(model, 'the rest of the network does not go on with some of the images')
    return run
