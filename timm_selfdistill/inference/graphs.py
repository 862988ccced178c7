"""A multi-exit network cut into graphs, one for each exit, which are run one after the other."""
import contextlib
import inspect
import io
import operator
from typing import Any, Dict, List, Optional, Sequence, Set, Tuple

import torch
import torch.nn as nn
from torch.fx import Graph, GraphModule, Node

from ..errors import SplitError
from ..models.multi_exit import MultiExit
from ..models.names import model_name

__all__ = ['AllExits', 'split_network', 'trace']

aten = torch.ops.aten


class AllExits(nn.Module):
    """A multi-exit network that, called, gives the logits of every exit."""

    def __init__(self, model: MultiExit):
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> Tuple[torch.Tensor, ...]:
        return tuple(self.model.forward_exits(x))


def trace(module: nn.Module, inputs: Sequence[torch.Tensor], name: str) -> torch.export.ExportedProgram:
    """Export a module for any number of images, without in-place operations.

    Args:
        module: What to export, in eval mode.
        inputs: Its inputs: tensors with at least three images along the first dimension, or numbers.
        name: What to call it in errors.

    Raises:
        SplitError: torch.export fails, or would tie the graph to this number of images.
    """
    batch = torch.export.Dim('batch', min=1, max=2 ** 16)
    shapes = tuple({0: batch} if tensor.ndim else None for tensor in inputs)
    variadic = any(p.kind is p.VAR_POSITIONAL for p in inspect.signature(module.forward).parameters.values())
    try:
        # where it fails torch prints all it has traced so far
        with torch.no_grad(), contextlib.redirect_stderr(io.StringIO()):
            program = torch.export.export(
                module, tuple(inputs), dynamic_shapes=(shapes,) if variadic else shapes, strict=False)
            return program.run_decompositions({})
    except Exception as error:  # torch.export fails in many ways, all of which mean the same here
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise SplitError(f'{name} cannot be exported: {reason}') from error


def split_network(model: MultiExit, x: torch.Tensor) -> List[GraphModule]:
    """Cut a network behind each of its exits.

    The graph that torch.export makes of all exits is sorted by what each exit needs beyond the one before. Whatever a
    later part needs of an earlier one is passed on, with the images along the first dimension, so that any of them may
    be left out on the way. What depends on no image is computed anew in each part.

    Args:
        model: The network, in eval mode. Its parameters are shared, not copied.
        x: Images (N, C, H, W), at least three. Any number of images of this size may be passed later.

    Returns:
        One graph an exit. The first takes images, each of the others what the one before passed on. Each returns the
        exit's logits (N, num_classes), followed by what it passes on, tensors (N, ...).

    Raises:
        SplitError: The network cannot be exported for any number of images, or it passes something on in which the
            images cannot be told apart. That images are mixed within a part is not noticed here.
    """
    whole = trace(AllExits(model), (x,), model_name(model)).module()
    return _Splitter(whole, model_name(model)).split()


class _Splitter:
    """Sorts the nodes of a graph by the exit that first needs them.

    Args:
        whole: From images to the logits of all exits.
        name: What to call the network in errors.
    """

    def __init__(self, whole: GraphModule, name: str):
        self.whole = whole
        self.name = name
        nodes = list(whole.graph.nodes)
        self.images = next(n for n in nodes if n.op == 'placeholder')
        self.symbol = self.images.meta['val'].shape[0].node.expr
        self.exits: Sequence[Node] = tuple(nodes[-1].all_input_nodes)
        # what depends on the images; sizes do not count, they are found anew in each part
        self.dependent: Set[Node] = {self.images}
        for node in nodes:
            if not self._is_size(node) and any(i in self.dependent for i in node.all_input_nodes):
                self.dependent.add(node)
        self.number: Dict[Node, int] = {}
        for number, logits in enumerate(self.exits):
            self._mark(logits, number)
        for node in nodes:  # the parts of a tuple come with it
            if node.target is operator.getitem and node.args[0] in self.number:
                self.number[node] = self.number[node.args[0]]

    @staticmethod
    def _is_size(node: Node) -> bool:
        return isinstance(node.meta.get('val'), (int, float, torch.SymInt, torch.SymFloat, torch.SymBool))

    def _mark(self, node: Node, number: int) -> None:
        waiting = [node]
        while waiting:
            node = waiting.pop()
            if node in self.dependent and node not in self.number:
                self.number[node] = number
                waiting += node.all_input_nodes

    def split(self) -> List[GraphModule]:
        passed: List[Node] = [self.images]
        parts = []
        for number in range(len(self.exits)):
            later = [
                node for node, made in self.number.items()
                if made <= number and any(self.number.get(user, -1) > number for user in node.users)
            ]
            parts.append(_Part(self, number, passed).build(later))
            passed = later
        return parts

    def batch_dim(self, node: Node) -> Tuple[int, int]:
        """Return the dimension of a tensor along which the images lie, and how many entries of it an image has."""
        found = []
        for dim, size in enumerate(node.meta['val'].shape):
            factor, rest = self.linear(size)
            if factor:
                found.append((dim, factor if not rest else 0))
        if len(found) != 1 or not found[0][1]:
            shape = tuple(node.meta['val'].shape)
            raise SplitError(f'{self.name} passes on a tensor of {shape}, in which no dimension counts the images.')
        return found[0]

    def linear(self, size: Any) -> Tuple[int, int]:
        """Return a and b of a size that is a times the number of images plus b."""
        expr = getattr(getattr(size, 'node', None), 'expr', None)
        if expr is None:
            return 0, int(size)
        factor, rest = expr.coeff(self.symbol), expr.subs(self.symbol, 0)
        if not (factor.is_Integer and rest.is_Integer and (factor * self.symbol + rest - expr).expand() == 0):
            raise SplitError(f'{self.name} computes with {expr} images.')
        return int(factor), int(rest)


class _Part:
    """Builds the graph of one exit.

    Args:
        splitter: The whole.
        number: Number of the exit.
        passed: What the part before passes on.
    """

    def __init__(self, splitter: _Splitter, number: int, passed: Sequence[Node]):
        self.splitter = splitter
        self.number = number
        self.passed = passed
        self.graph = Graph()
        self.copies: Dict[Node, Node] = {}
        self.count: Optional[Node] = None

    def build(self, later: Sequence[Node]) -> GraphModule:
        given = [self.graph.placeholder(f'passed{i}') for i in range(len(self.passed))]
        self.count = self.graph.call_function(aten.sym_size.int, (given[0], 0))
        for node, tensor in zip(self.passed, given):
            self.copies[node] = tensor
            dim, factor = self.splitter.batch_dim(node)
            if factor > 1:
                self.copies[node] = self.graph.call_function(aten.flatten.using_ints, (self.copies[node], 0, 1))
            if dim:
                self.copies[node] = self.graph.call_function(aten.movedim.int, (self.copies[node], 0, dim))
        for node in self.splitter.whole.graph.nodes:
            if self.splitter.number.get(node) == self.number and node not in self.copies:
                self._copy(node)
        outputs = [self.copies[self.splitter.exits[self.number]]]
        for node in later:
            tensor = self.copies[node]
            dim, factor = self.splitter.batch_dim(node)
            if dim:
                tensor = self.graph.call_function(aten.movedim.int, (tensor, dim, 0))
            if factor > 1:
                tensor = self.graph.call_function(aten.unflatten.int, (tensor, 0, (self.count, factor)))
            outputs.append(tensor)
        self.graph.output(tuple(outputs))
        self.graph.eliminate_dead_code()
        return GraphModule(self.splitter.whole, self.graph)

    def _copy(self, node: Node) -> Any:
        if node in self.copies:
            return self.copies[node]
        if self.splitter._is_size(node) and node.op != 'get_attr':
            factor, rest = self.splitter.linear(node.meta['val'])
            if not factor:
                return rest
            size = self.count
            if factor != 1:
                size = self.graph.call_function(operator.mul, (size, factor))
            if rest:
                size = self.graph.call_function(operator.add, (size, rest))
            self.copies[node] = size
            return size
        self.copies[node] = self.graph.node_copy(node, self._copy)
        return self.copies[node]
