"""Runs an exported network in stages with onnxruntime; nothing else of this package, nor torch, is needed for it."""
import json
import math
import threading
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple, Union

import numpy as np
import onnxruntime

__all__ = ['StagedSession']


class StagedSession:
    """Classifies images, each by the first exit that is sure of it.

    At each exit the images that are sure leave, the rest go on in a smaller batch; when none is left, no further graph
    runs.

    Args:
        folder: What `recipes/export.py --staged` wrote.
        levels: How sure each exit but the deepest has to be of an image, see `levels`; those in `export.json` when
            None.
        providers: Where onnxruntime computes, in order of preference; on the CPU when None.
        threads: Threads of an operator; as many as there are cores when None.

    Attributes:
        manifest: What `export.json` holds: input size, mean and standard deviation, names of the classes and so on.

    Raises:
        ValueError: The folder holds no network exported in stages for onnxruntime, or `levels` do not fit it.
    """

    def __init__(
            self,
            folder: Union[str, Path],
            levels: Optional[Sequence[Optional[float]]] = None,
            providers: Optional[Sequence[str]] = None,
            threads: Optional[int] = None,
    ):
        path = Path(folder, 'export.json')
        try:
            self.manifest: Dict[str, Any] = json.loads(path.read_text(encoding='utf-8'))
            found = {key: self.manifest[key] for key in ('format_version', 'kind', 'format')}
            if found != dict(format_version=1, kind='staged', format='onnx'):
                raise ValueError(f'{found}, expected format_version 1, kind staged and format onnx')
            self._input_size = tuple(map(int, self.manifest['input_size']))
            self._num_classes = int(self.manifest['num_classes'])
            self._graphs: List[Dict[str, Any]] = self.manifest['graphs']
            files = [graph['file'] for graph in self._graphs]
            for file in files:
                if Path(file).name != file or '\\' in file or file in ('', '..'):
                    raise ValueError(f'{file!r} is not the name of a file in this folder')
            self._names = [(tuple(graph['inputs']), tuple(graph['outputs'])) for graph in self._graphs]
            own_levels = self.manifest['early_exit']['levels']
        except KeyError as error:
            raise ValueError(f'{path}: {error} is missing.') from error
        except (OSError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f'{path}: not of a network exported in stages for onnxruntime: {error}.') from error
        self.levels = own_levels if levels is None else levels
        self._lock = threading.Lock()
        self.reset_counts()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or 0
        providers = list(providers or ['CPUExecutionProvider'])
        try:
            self._sessions = [
                onnxruntime.InferenceSession(str(Path(folder, file)), options, providers=providers) for file in files
            ]
        except Exception as error:  # onnxruntime's own exceptions share no other base
            raise ValueError(f'{folder}: onnxruntime cannot load the graphs: {error}') from error

    @property
    def levels(self) -> Tuple[Optional[float], ...]:
        """How sure each exit but the deepest has to be of an image for it to leave, None where nothing leaves.

        For confidence, margin and patience these are the thresholds; for entropy the thresholds with their sign
        changed, so that more is surer. They may be set at any time.
        """
        return self._levels

    @levels.setter
    def levels(self, levels: Sequence[Optional[float]]) -> None:
        count = len(self._graphs) - 1
        if isinstance(levels, str) or not np.iterable(levels):
            raise ValueError(f'levels={levels!r}: expected {count} numbers or None, one for each exit but the deepest.')
        levels = tuple(levels)
        if len(levels) != count:
            raise ValueError(
                f'levels={levels}: {len(levels)} given, expected {count}, one for each exit but the deepest.')
        for level in levels:
            # NumPy's scalars and arrays of no dimension are numbers as well
            kind = np.asarray(level, object).ndim == 0 and np.asarray(level).dtype.kind
            if level is not None and (kind not in tuple('iuf') or np.isnan(level)):
                raise ValueError(f'levels={levels}: {level!r} is no level, expected a number or None.')
        self._levels = tuple(None if level is None else float(level) for level in levels)

    def reset_counts(self) -> None:
        """Forget the images that have been counted."""
        with self._lock:
            self._counts = np.zeros((2, len(self._graphs)))

    @property
    def counts(self) -> Tuple[int, ...]:
        """Images that `run` has seen leave at each exit.

        Those of the calibration are in the manifest's `early_exit`, as `leaving`. A two-sample test of both, such as
        scipy's `chi2_contingency`, tells whether other images come now.
        """
        with self._lock:
            return tuple(int(count) for count in self._counts[0])

    @property
    def confidence(self) -> Tuple[Optional[float], ...]:
        """Mean over these images of the largest probability, by the exit's logits as they are; None without images."""
        with self._lock:
            return tuple(float(total / count) if count else None for count, total in self._counts.T)

    def _count(self, logits: np.ndarray, exit_index: np.ndarray) -> None:
        largest = 1 / np.exp(logits - logits.max(-1, keepdims=True), dtype=np.float64).sum(-1)
        with self._lock:
            for row, weights in enumerate((None, largest)):
                self._counts[row] += np.bincount(exit_index, weights, len(self._graphs))

    def run(self, images: np.ndarray) -> Tuple[np.ndarray, np.ndarray]:
        """Classify images.

        Args:
            images: Images (N, C, H, W), float32, preprocessed as the manifest says.

        Returns:
            The logits that each image leaves with (N, num_classes), float32, and the number of the exit it leaves at
            (N,), int64, both in the order of the images.

        Raises:
            ValueError: There are no images, they are of another shape or type, or some are not finite.
        """
        self._check(images)
        here = np.arange(len(images))
        logits = np.empty((len(images), self._num_classes), np.float32)
        exit_index = np.empty(len(images), np.int64)
        tensors: Dict[str, np.ndarray] = {'images': images}
        for number, (session, (inputs, outputs)) in enumerate(zip(self._sessions, self._names)):
            deepest = number == len(self._sessions) - 1
            if not deepest:
                level = self._levels[number]
                tensors['level'] = np.array(math.inf if level is None else level, np.float32)
            tensors = dict(zip(outputs, session.run(outputs, {name: tensors[name] for name in inputs})))
            decided = tensors.pop('logits')
            leaves = np.ones(len(here), bool) if deepest else tensors.pop('leaves')
            logits[here[leaves]], exit_index[here[leaves]] = decided[leaves], number
            here = here[~leaves]
            if not len(here):
                break
            tensors = {name: tensor[~leaves] for name, tensor in tensors.items()}
        self._check_finite('logits', logits)
        self._count(logits, exit_index)
        return logits, exit_index

    def run_exits(self, images: np.ndarray) -> List[np.ndarray]:
        """Classify images at every exit; none leaves.

        Args:
            images: As `run` takes them.

        Returns:
            The logits that images would leave with at each exit, each (N, num_classes), float32. Where exits decide
            together these are means.

        Raises:
            ValueError: See `run`.
        """
        self._check(images)
        found = []
        tensors: Dict[str, np.ndarray] = {'images': images}
        for session, (inputs, outputs) in zip(self._sessions, self._names):
            tensors['level'] = np.array(math.inf, np.float32)
            tensors = dict(zip(outputs, session.run(outputs, {name: tensors[name] for name in inputs})))
            found.append(tensors['logits'])
            self._check_finite('logits', found[-1])
        return found

    def _check(self, images: np.ndarray) -> None:
        expected = f'(N, {", ".join(map(str, self._input_size))})'
        if not isinstance(images, np.ndarray) or images.dtype != np.float32:
            kind = images.dtype if isinstance(images, np.ndarray) else type(images).__name__
            raise ValueError(f'images of {kind}: expected an array of float32 {expected}.')
        if images.ndim != 4 or images.shape[1:] != self._input_size or not len(images):
            raise ValueError(f'images of shape {images.shape}: expected {expected} with one image or more.')
        self._check_finite('images', images)

    @staticmethod
    def _check_finite(what: str, array: np.ndarray) -> None:
        rows = np.flatnonzero(~np.isfinite(array.reshape(len(array), -1)).all(1)).tolist()
        if rows:
            some = ', '.join(map(str, rows[:10])) + (', ...' if len(rows) > 10 else '')
            raise ValueError(f'{what} {some} of {len(array)}: not finite, so no exit can be sure of them.')
