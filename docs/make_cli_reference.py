"""Write `docs/cli.md`, the reference of `recipes/train.py`, from the fields of `TrainConfig`.

    python docs/make_cli_reference.py
"""
import dataclasses
import typing
from pathlib import Path

from timm_selfdistill.cli.options import setting_helps
from timm_selfdistill.config import TrainConfig

HEAD = """# Command line

Made by `docs/make_cli_reference.py` from the fields of `TrainConfig`; a test compares them. `-c/--config FILE` reads
defaults from YAML, `--preset byot-scan|byot-tpami` takes those of the authors of *Be Your Own Teacher*. The other
commands list their options with `--help`: `timm-selfdistill evaluate --help`, likewise `calibrate`, `predict`,
`export`, `publish`, `benchmark`, `analyze`, `transfer` and `demo`. From a clone `python recipes/train.py` and its
siblings do the same. For several processes: `accelerate launch recipes/train.py`, or
`accelerate launch -m timm_selfdistill.cli.train`.
"""


def describe_type(hint) -> str:
    """Return a type as a reader of the command line sees it."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Union:
        return describe_type(next(a for a in arguments if a is not type(None)))
    if origin is typing.Literal:
        return ', '.join(f'`{a}`' for a in arguments)
    if origin is tuple:
        if arguments[-1] is ...:
            return f'{describe_type(arguments[0])} ...'
        return ' '.join(map(describe_type, arguments))
    return {'str': 'text', 'int': 'whole number', 'float': 'number', 'bool': 'switch'}[hint.__name__]


def make() -> str:
    """Return the reference as Markdown."""
    helps, hints = setting_helps(), typing.get_type_hints(TrainConfig)
    lines, group = [HEAD], None
    for field in dataclasses.fields(TrainConfig):
        if field.metadata['group'] != group:
            group = field.metadata['group']
            lines.append(f'\n## {group.capitalize()}\n\n| option | value | default | |\n|---|---|---|---|\n')
        option = f'--{field.name.replace("_", "-")}'
        default = field.default
        if isinstance(default, tuple):
            default = ' '.join(map(str, default))
        shown = '' if default is None or default == '' else f'`{default}`'
        text = helps[field.name].replace('|', '\\|').replace('<', '&lt;')
        lines.append(f'| `{option}` | {describe_type(hints[field.name])} | {shown} | {text} |\n')
    return ''.join(lines)


if __name__ == '__main__':
    Path(__file__).with_name('cli.md').write_text(make(), encoding='utf-8')
