"""Writes a multi-exit network as graphs that run without this package."""
import importlib.metadata
import importlib.util
import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Tuple, Union

import torch
import torch.nn as nn
from timm.data import resolve_data_config
from timm.models import get_model_input_config
from timm.utils import unwrap_model

from ..errors import ConfigError, ExportError
from ..models.exit_rule import ExitRule
from ..models.multi_exit import MultiExit, shown_name
from ..models.names import model_name
from ..models.probe import copy_model, eval_view
from .graphs import AllExits, split_network, trace

__all__ = ['FORMATS', 'export_network']

FORMATS = ('onnx', 'torch-export')

# The graphs are tried with these numbers of images before they are kept. So far from torch, as a share of the largest
# logit, they may be.
_BATCHES = (1, 2, 7)
_TOLERANCE = 1e-4
# ONNX files cannot hold 2 GB; of larger networks the weights stand in a file beside the graph.
_LARGEST_FILE = 2 ** 30


@dataclass
class _Graph:
    """A graph to be written: what it is made of, and what its file and tensors are to be called."""
    program: torch.export.ExportedProgram
    file: str
    inputs: List[str]
    outputs: List[str]


class _Section(nn.Module):
    """One part of a network cut behind its exits, with the decision at this exit.

    Args:
        part: See `split_network`.
        rule: Says how sure the exit is.
        number: Number of the exit.
        memory: Names of what the rule wants to know of the exit before, see `ExitRule.judge`.

    The inputs are the confidence score, which the deepest exit does without, what the part takes, and the memory. The
    outputs are the logits that images leave with, whether they do (N,) except at the deepest exit, and what the next
    section takes.
    """

    def __init__(self, part: nn.Module, rule: ExitRule, number: int, memory: Sequence[str]):
        super().__init__()
        self.part = part
        self.rule = rule
        self.gates = rule.gates  # so that their weights are found
        self.number = number
        self.memory = tuple(memory)
        self.later: Tuple[str, ...] = ()

    def forward(self, *inputs: torch.Tensor) -> Tuple[torch.Tensor, ...]:
        deepest = self.number == self.rule.num_exits - 1
        tensors = inputs if deepest else inputs[1:]
        count = len(tensors) - len(self.memory)
        logits, *passed = self.part(*tensors[:count])
        decided, sure, memory = self.rule.judge(self.number, logits, dict(zip(self.memory, tensors[count:])))
        self.later = tuple(memory)
        return (decided,) if deepest else (decided, sure >= inputs[0], *passed, *memory.values())


def _stage(model: MultiExit, rule: ExitRule, x: torch.Tensor, suffix: str) -> Iterator[_Graph]:
    names, tensors, memory = ['images'], [x], ()
    for number, part in enumerate(split_network(model, x)):
        section = _Section(part, rule, number, memory)
        if number < rule.num_exits - 1:
            names, tensors = ['level', *names], [torch.tensor(rule.level(number)), *tensors]
        with torch.no_grad():
            found = section(*tensors)
        memory = section.later
        outputs = ['logits', 'leaves'][:len(found)]
        # a graph's inputs and outputs may not be called the same, so the exit that passes them on is in their names
        later = [f'passed{number}_{i}' for i in range(len(found) - len(outputs) - len(memory))]
        later += [f'{name}{number}' for name in memory]
        program = trace(section, tensors, model_name(model))
        yield _Graph(program, f'section{number}{suffix}', names, outputs + later if len(found) > 1 else outputs)
        names, tensors = later, list(found[2:])


def _write(graph: _Graph, folder: Path, format: str) -> None:
    for node in graph.program.graph.nodes:
        node.meta.pop('stack_trace', None)  # it names files of this machine
    if format == 'torch-export':
        torch.export.save(graph.program, folder / graph.file)
        return
    size = sum(t.numel() * t.element_size() for t in graph.program.state_dict.values())
    torch.onnx.export(
        graph.program, (), folder / graph.file, dynamo=True, input_names=graph.inputs, output_names=graph.outputs,
        external_data=size > _LARGEST_FILE, verbose=False,
    )


def _load(path: Path, format: str, inputs: Sequence[str]) -> Callable[..., List[torch.Tensor]]:
    if format == 'torch-export':
        module = torch.export.load(path).module()

        def run(*tensors: torch.Tensor) -> List[torch.Tensor]:
            with torch.no_grad():
                found = module(*tensors)
            return [found] if isinstance(found, torch.Tensor) else list(found)
    else:
        import onnxruntime

        try:
            session = onnxruntime.InferenceSession(str(path), providers=['CPUExecutionProvider'])
        except Exception as error:  # its own exceptions share no other base
            raise ExportError(f'onnxruntime cannot load {path.name}: {error}') from error

        def run(*tensors: torch.Tensor) -> List[torch.Tensor]:
            feeds = {name: tensor.numpy() for name, tensor in zip(inputs, tensors)}
            return [torch.from_numpy(array) for array in session.run(None, feeds)]
    return run


def _staged_logits(runs: Sequence[Callable], x: torch.Tensor) -> Iterator[Tuple[torch.Tensor, torch.Tensor]]:
    """Run sections, each with an image less than the one before where there is one; yield rows and their logits."""
    rows, tensors = torch.arange(len(x)), [x]
    for number, run in enumerate(runs):
        if number == len(runs) - 1:
            logits, = run(*tensors)
        else:
            logits, leaves, *tensors = run(torch.tensor(torch.inf), *tensors)
            if leaves.any():
                raise ExportError(f'exit {number} lets images leave that should stay.')
        yield rows, logits
        gone = int(len(rows) > 1)
        rows, tensors = rows[gone:], [tensor[gone:] for tensor in tensors]


@torch.no_grad()
def _measure_parity(
        model: MultiExit,
        runs: Sequence[Callable[..., List[torch.Tensor]]],
        rule: Optional[ExitRule],
        number: Optional[int],
        input_size: Sequence[int],
) -> float:
    """Return the largest difference between the graphs' logits and torch's, as a share of the largest logit."""
    generator = torch.Generator().manual_seed(0)
    worst = 0.
    for count in _BATCHES:
        x = torch.randn(count, *input_size, generator=generator)
        expected = model.forward_exits(x, upto=number)
        if number is not None:
            expected = expected[-1:]
        if rule is None:
            found = [(slice(None), logits) for logits in runs[0](x)]
        else:
            found = list(_staged_logits(runs, x))
            memory: Dict[str, torch.Tensor] = {}
            for i, logits in enumerate(expected):
                expected[i], _, memory = rule.judge(i, logits, memory)
        for wanted, (rows, logits) in zip(expected, found):
            difference = (logits - wanted[rows]).abs().max() / wanted.abs().max().clamp_min(1e-12)
            if not difference <= _TOLERANCE:  # NaN as well
                raise ExportError(
                    f'{model_name(model)} cannot be exported: for {count} images the logits differ from torch\'s by '
                    f'{difference:.2g} of the largest one, {_TOLERANCE:g} at most is allowed.'
                )
            worst = max(worst, difference.item())
    return worst


def _versions(format: str) -> Dict[str, str]:
    names = ('torch', 'timm') + (('onnx', 'onnxscript', 'onnxruntime') if format == 'onnx' else ())
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f'`format=onnx`: {", ".join(missing)} not installed; pip install onnx onnxscript onnxruntime')
    return {name: importlib.metadata.version(name) for name in names}


def export_network(
        model: MultiExit,
        folder: Union[str, Path],
        number: Optional[int] = None,
        staged: bool = False,
        format: str = 'onnx',
) -> Dict[str, Any]:
    """Write a network as graphs for any number of images, and `export.json`, which says all that is needed to use them.

    The graphs are compared with torch on random images in batches of 1, 2 and 7 before the folder appears.

    Args:
        model: The network, in any mode and precision, on any device. The graphs compute in float32: onnxruntime has
            few operators in half precision on CPUs. Its exit rule (`model.exit_rule`) goes with it.
        folder: Where to; it may not hold anything yet.
        number: Number of the exit at which the network is cut off; when None it gives the logits of all exits,
            `exit0`, `exit1`, ..., each (N, num_classes).
        staged: Write one graph an exit instead, to be run one after the other on the images that are left. Each but the
            last takes `level`, how sure the exit has to be for an image to leave (see `ExitRule.level`; infinity: none
            leaves), besides what the one before passed on, and gives `logits`, `leaves` (N,), and what it passes on,
            tensors (N, ...). For onnx, `staged_session.py`, which runs them, is put beside them.
        format: One of `FORMATS`: files for onnxruntime and others, or for `torch.export.load`.

    Returns:
        What `export.json` holds.

    Raises:
        ConfigError: An argument does not fit, the network has no exits, or packages are missing.
        ExportError: The network cannot be exported, or computes something else when it is; nothing is written then.
    """
    folder, model = Path(folder), unwrap_model(model)
    if not isinstance(model, MultiExit):
        raise ConfigError(f'{model_name(model)} has no exits: expected a model such as resnet50_sd.')
    if format not in FORMATS:
        raise ConfigError(f'`format={format}`: expected one of {", ".join(FORMATS)}.')
    if staged and number is not None:
        raise ConfigError(f'`staged`, `exit={number}`: expected one of them at most.')
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f'`output={folder}`: exists already, and nothing is overwritten; choose another folder.')
    versions = _versions(format)
    precision = next(model.parameters()).dtype
    model = copy_model(eval_view(model)).to('cpu', torch.float)
    data_config = resolve_data_config(dict(input_size=get_model_input_config(model)['input_size']), model=model)
    if model.exit_rule is None:
        rule = ExitRule(model.num_exits, model.num_classes)
    else:
        rule = model.exit_rule
    kind = 'staged' if staged else 'exits' if number is None else 'exit'
    manifest = dict(
        format_version=1,
        kind=kind,
        format=format,
        architecture=shown_name(model),
        num_classes=model.num_classes,
        num_exits=model.num_exits,
        exit=number,
        precision=dict(graphs='float32', network=str(precision).removeprefix('torch.')),
        **{key: data_config[key] for key in ('input_size', 'mean', 'std', 'interpolation', 'crop_pct', 'crop_mode')},
        label_names=model.pretrained_cfg.get('label_names'),
    )
    if number is None:
        levels = [rule.level(i) if t is not None else None for i, t in enumerate(rule.thresholds)]
        manifest['early_exit'] = dict(
            criterion=rule.criterion, ensemble=rule.ensemble, temperatures=list(rule.temperatures), levels=levels)
        if rule.leaving is not None:
            manifest['early_exit']['leaving'] = list(rule.leaving.images)
        if rule.promise is not None:
            manifest['early_exit']['promise'] = str(rule.promise)
    suffix = '.onnx' if format == 'onnx' else '.pt2'
    x = torch.randn(3, *data_config['input_size'], generator=torch.Generator().manual_seed(1))
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix='.exporting-') as beside:
        made = Path(beside, 'made')
        made.mkdir()
        try:
            if staged:
                graphs = list(_stage(eval_view(model), rule, x, suffix))
            else:
                network = AllExits(eval_view(model)) if number is None else model.truncate(number)
                names = [f'exit{i}' for i in range(model.num_exits)] if number is None else ['logits']
                program = trace(network.eval(), [x], model_name(model))
                graphs = [_Graph(program, f'network{suffix}', ['images'], names)]
            for graph in graphs:
                _write(graph, made, format)
        except torch.onnx.OnnxExporterError as error:
            raise ExportError(f'{model_name(model)} cannot be written as ONNX: {str(error).splitlines()[0]}') from error
        except ValueError as error:  # no such exit, or a SplitError
            raise ExportError(str(error)) from error
        runs = [_load(made / graph.file, format, graph.inputs) for graph in graphs]
        worst = _measure_parity(model, runs, rule if staged else None, number, data_config['input_size'])
        if staged and format == 'onnx':
            shutil.copyfile(Path(__file__).with_name('staged_session.py'), made / 'staged_session.py')
        manifest.update(
            graphs=[dict(file=graph.file, inputs=graph.inputs, outputs=graph.outputs) for graph in graphs],
            parity=dict(largest_difference=worst, tolerance=_TOLERANCE, batch_sizes=list(_BATCHES)),
            versions=versions,
        )
        (made / 'export.json').write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + '\n', encoding='utf-8')
        os.replace(made, folder)
    return manifest
