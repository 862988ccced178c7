"""int8 for the edge: the graphs of a network exported in stages, quantized by onnxruntime's own tool."""
import contextlib
import io
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Sequence, Union

import numpy as np

from ..errors import ConfigError, ExportError

__all__ = ['LEAST_DB', 'quantize_staged']

# Signal over quantization noise of an exit's logits, in decibels, below which the files are refused: at 10 the noise
# has a tenth of the signal's power.
LEAST_DB = 10.

# What is computed in int8, and what may stand between; decisions, on a few numbers an image, stay in float32.
_OPERATIONS = (
    'Add', 'AveragePool', 'Clip', 'Concat', 'Conv', 'Flatten', 'Gemm', 'GlobalAveragePool', 'MatMul', 'MaxPool', 'Mul',
    'Relu', 'Reshape', 'Transpose',
)
_BATCH = 32


def _feeds(tensors: Dict[str, np.ndarray], names: Sequence[str]) -> Iterator[Dict[str, np.ndarray]]:
    count = max(len(tensors[name]) for name in names if tensors[name].ndim)
    for start in range(0, count, _BATCH):
        yield {
            name: tensors[name][start:start + _BATCH] if tensors[name].ndim else tensors[name] for name in names}


def _run(path: Path, graph: Dict[str, Any], tensors: Dict[str, np.ndarray]) -> Dict[str, np.ndarray]:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=['CPUExecutionProvider'])
    parts = [session.run(graph['outputs'], feeds) for feeds in _feeds(tensors, graph['inputs'])]
    return {name: np.concatenate(arrays) for name, arrays in zip(graph['outputs'], zip(*parts))}


def _quantize(source: Path, target: Path, feeds: Iterator[Dict[str, np.ndarray]]) -> None:
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def get_next(self) -> Optional[Dict[str, np.ndarray]]:
            return next(feeds, None)

    prepared = target.with_name(f'prepared-{target.name}')
    # the tool prints, and its shape inference by symbols fails on what torch exports
    with contextlib.redirect_stdout(io.StringIO()):
        quant_pre_process(source, prepared, skip_symbolic_shape=True)
        # weights of 7 bits: CPUs without VNNI add products of 8 bits up in 16, which overflow
        quantize_static(
            prepared, target, Reader(), quant_format=QuantFormat.QDQ, per_channel=True, reduce_range=True,
            activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8, op_types_to_quantize=list(_OPERATIONS))
    prepared.unlink()


def quantize_staged(source: Union[str, Path], folder: Union[str, Path], images: np.ndarray) -> Dict[str, Any]:
    """Quantize a network exported in stages to int8: weights by channel, activations by the range they have on images.

    Static quantization in the QDQ format (Jacob et al., CVPR 2018, arXiv 1712.05877). Weights take 7 of the 8 bits, so
    that sums do not overflow on CPUs without VNNI, which the files may come to from any machine. What stages pass on,
    and the decision who leaves, stay in float32. Temperatures and levels are those of the source.

    Args:
        source: What `export_network` wrote with `staged`, as ONNX.
        folder: Where to; it may not hold anything yet.
        images: Images (N, C, H, W), float32, preprocessed, such as some of the validation split. A few hundred do.

    Returns:
        What `export.json` holds. Its `int8` has the number of `images` and `signal_to_noise_db` of each exit's logits.

    Raises:
        ConfigError: The source is no such folder, or the target holds something.
        ExportError: A stage cannot be quantized, or its logits have too little left of those in float32.
    """
    from onnxruntime.quantization.qdq_loss_debug import compute_signal_to_quantization_noice_ratio

    source, folder = Path(source), Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f'`output={folder}`: exists already, and nothing is overwritten; choose another folder.')
    try:
        manifest = json.loads((source / 'export.json').read_text(encoding='utf-8'))
        kind = manifest['kind'], manifest['format'], manifest['precision']['graphs']
    except (KeyError, OSError, TypeError, ValueError) as error:
        raise ConfigError(f'{source}: not of a network exported in stages: {error!r}') from error
    if kind != ('staged', 'onnx', 'float32'):
        raise ConfigError(f'{source}: {", ".join(kind)}: expected a network exported in stages, as ONNX, in float32.')
    folder.parent.mkdir(parents=True, exist_ok=True)
    ratios: List[float] = []
    exact = {'images': np.ascontiguousarray(images, np.float32)}
    rounded = dict(exact)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix='.quantizing-') as beside:
        made = Path(beside, 'made')
        made.mkdir()
        for number, graph in enumerate(manifest['graphs']):
            for tensors in (exact, rounded):
                tensors['level'] = np.array(np.inf, np.float32)  # all images go on
            try:
                _quantize(source / graph['file'], made / graph['file'], _feeds(exact, graph['inputs']))
                exact, rounded = (
                    _run(place / graph['file'], graph, tensors)
                    for place, tensors in ((source, exact), (made, rounded)))
            except Exception as error:  # the tool fails in many ways
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                raise ExportError(f'exit {number} cannot be quantized: {reason}') from error
            ratio = compute_signal_to_quantization_noice_ratio(exact['logits'], rounded['logits'])
            ratios.append(round(ratio, 2))
        if not all(ratio >= LEAST_DB for ratio in ratios):  # NaN as well
            found = ', '.join(f'exit {number}: {ratio:.1f}' for number, ratio in enumerate(ratios))
            raise ExportError(
                f'int8 leaves too little of the logits: signal over quantization noise in decibels is {found}; '
                f'{LEAST_DB:g} at least is expected. Nothing was written.'
            )
        shutil.copyfile(Path(__file__).with_name('staged_session.py'), made / 'staged_session.py')
        manifest['precision']['graphs'] = 'int8'
        manifest['int8'] = dict(images=len(images), signal_to_noise_db=ratios)
        (made / 'export.json').write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + '\n', encoding='utf-8')
        os.replace(made, folder)
    return manifest
