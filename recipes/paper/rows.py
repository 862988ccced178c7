"""The rows of the tables: a network, a protocol of `recipes/cifar100` or `finetune`, and what differs from it."""
import fnmatch
from pathlib import Path
from typing import Dict, List, NamedTuple, Optional, Tuple

from timm_selfdistill.errors import ConfigError, nearest

__all__ = ['METHODS', 'PROTOCOLS', 'ROWS', 'Row', 'find_rows']

FILES = Path(__file__).parents[1]

METHODS = {'plain': 'plain', 'deep_supervision': 'deep-supervision', 'byot': 'byot'}
PROTOCOLS = {'': 'byot_scan', '_later': 'byot_tpami', '_best': 'best'}  # by the end of a row's name
# Networks of Be Your Own Teacher; of the first two every method is trained by every protocol.
NETWORKS = (
    'resnet18', 'resnet50', 'vgg19_bn', 'resnet101', 'resnet152', 'resnext29_8x64d', 'wide_resnet20_8',
    'wide_resnet44_8', 'wide_resnet28_12', 'pyramidnet101_a240',
)


class Row(NamedTuple):
    """A row of the table.

    Attributes:
        name: Its name.
        arguments: Those of `recipes/train.py`.
        start: Name of the row whose run, of the same seed, has the weights that it starts from.
    """
    name: str
    arguments: Tuple[str, ...]
    start: Optional[str] = None


def _protocol(name: str, *arguments: str) -> Tuple[str, ...]:
    return ('-c', str(FILES / 'cifar100' / f'{name}.yaml'), *arguments)


def _finetune(name: str, *arguments: str) -> Tuple[str, ...]:
    return ('-c', str(FILES / 'finetune' / f'{name}.yaml'), *arguments)


def _rows() -> Dict[str, Row]:
    rows = []
    for network in NETWORKS:
        for end, protocol in PROTOCOLS.items():
            for method, option in METHODS.items():
                if network in NETWORKS[:2] or end == '' or (end, method) == ('_later', 'byot'):
                    arguments = _protocol(protocol, '--model', f'{network}_cifar', '--method', option)
                    rows.append(Row(f'{network}_{method}{end}', arguments))
    for network in ('resnet110', 'densenet100_12'):
        for end, more in (('', ()), ('_tsd', ('--patriarch', 'tsd'))):
            rows.append(Row(f'{network}_generations{end}', _protocol(f'generations_{network}', *more)))
    rows += [Row('resnet20_packaged', _protocol('packaged')),
             Row('resnet20_packaged_plain', _protocol('packaged', '--method', 'plain'))]
    rows += [
        Row('lite0_plain', _finetune('photos')),
        *(Row(f'lite0_{method}', _finetune('photos', '--method', METHODS[method], '--exit-head', 'inverted'))
          for method in ('deep_supervision', 'byot')),
        *(Row(f'lite0_disjoint_{head.replace("-", "_")}', _finetune('exits', '--exit-head', head), 'lite0_plain')
          for head in ('inverted', 'bottleneck', 'bottleneck-wide', 'separable')),
        Row('lite0_mixed', _finetune('mixed'), 'lite0_disjoint_inverted'),
    ]
    return {row.name: row for row in rows}


ROWS = _rows()

# What is wanted first; of each line one seed of everything comes before the next seed.
ORDER = (
    ('resnet18_plain', 'resnet18_deep_supervision', 'resnet18_byot'),
    ('resnet18_plain_later', 'resnet18_deep_supervision_later', 'resnet18_byot_later'),
    (
        'resnet50_plain', 'resnet50_deep_supervision', 'resnet50_byot', 'resnet50_plain_later',
        'resnet50_deep_supervision_later', 'resnet50_byot_later',
    ),
    ('resnet110_generations', 'resnet110_generations_tsd'),
    ('resnet18_*_best', 'resnet50_*_best'),
    ('densenet100_12_*',),
    ('vgg19_bn_*', 'wide_resnet20_8_*', 'resnext29_8x64d_*', 'pyramidnet101_a240_*', 'resnet101_*', 'resnet152_*'),
    ('wide_resnet44_8_*', 'wide_resnet28_12_*'),
)


def _line(row: Row) -> List[Row]:
    """Return a row behind those that it starts from."""
    return [*(_line(ROWS[row.start]) if row.start else ()), row]


def find_rows(rows: Tuple[str, ...]) -> List[List[Row]]:
    """Return rows, in blocks that belong together, those that others start from first.

    Args:
        rows: Names, patterns of them such as `resnet18_*`, or YAML files of settings; the whole CIFAR-100 table in its
            order where there are none.

    Raises:
        ConfigError: There is no such row.

    >>> [row.name for row in find_rows(('resnet50_*_best',))[0]]
    ['resnet50_byot_best', 'resnet50_deep_supervision_best', 'resnet50_plain_best']
    """
    blocks = []
    for block in [rows] if rows else ORDER:
        found: Dict[str, Row] = {}
        for name in block:
            matching = [ROWS[known] for known in sorted(fnmatch.filter(ROWS, name))]
            if not matching and Path(name).is_file():
                matching = [Row(Path(name).stem, ('-c', name))]
            if not matching:
                raise ConfigError(f'`rows={name}`: no such row and no such file{nearest(name, ROWS)}.')
            found.update((row.name, row) for last in matching for row in _line(last))
        blocks.append(list(found.values()))
    return blocks
