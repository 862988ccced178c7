"""A page where a picture is dropped and every exit answers: `timm-selfdistill demo --checkpoint RUN`."""
import dataclasses
import shutil
import time
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

import torch
import tyro
from PIL import Image, ImageOps
from timm.data import resolve_data_config

from ..costs import exit_costs
from ..data.augment import eval_transform
from ..errors import ConfigError
from ..hub.networks import class_names, load_checkpoint
from ..inference.early_exit import EarlyExit
from ..models.multi_exit import MultiExit, shown_name
from ..models.names import SUFFIX
from ..run_files import CONFIG_NAME, WEIGHTS_NAME
from .launch import run_command

__all__ = ['Answers', 'DemoConfig', 'Exits', 'main', 'make_page', 'write_space']

_COLUMNS = ('exit', 'after', 'MACs', 'answer', 'confidence', 'leaves from', 'time')

# Times that each network is run for the median of its time.
_REPEATS = 5

_APP = '''"""The page of `timm-selfdistill demo`, for a Space."""
from timm_selfdistill.cli.demo import make_page

make_page({checkpoint!r}).launch()
'''

_SPACE = '''---
title: {title}
emoji: 🚪
colorFrom: blue
colorTo: green
sdk: gradio
app_file: app.py
pinned: false
---

Drop a picture and see what each exit of `{name}` thinks of it, where it left, and how long that took.
Made by `timm_selfdistill`.
'''


@dataclasses.dataclass(kw_only=True)
class DemoConfig:
    """Show a page where a picture is dropped and every exit answers. Needs the extra `demo`."""

    checkpoint: str
    """Folder of a run, or hf-hub:org/name."""
    thresholds: Optional[Tuple[float, ...]] = None
    """Confidence from which on an image leaves, one number or one for each auxiliary exit; those of the weights when
    None, or 0.9 where they have none."""
    host: str = '127.0.0.1'
    """Address to listen on; 0.0.0.0 lets other machines in."""
    port: Optional[int] = None
    """Port to listen on; a free one from 7860 on when None."""


@dataclasses.dataclass
class Answers:
    """What the exits make of one picture.

    Attributes:
        rows: One dict an exit, with the columns of the page's table.
        scores: Confidence by class of the exit that the picture left at.
        exit_index: Number of that exit.
        early_ms: Milliseconds that early exit took.
        whole_ms: Milliseconds that the whole network takes.
    """
    rows: List[Dict[str, str]]
    scores: Dict[str, float]
    exit_index: int
    early_ms: float
    whole_ms: float

    @property
    def summary(self) -> str:
        """One sentence, in Markdown."""
        best = max(self.scores, key=self.scores.get)
        last = self.exit_index == len(self.rows) - 1
        where = f'ran to the end, exit {self.exit_index}' if last else f'left at exit {self.exit_index}'
        return (
            f'**{best}** ({100 * self.scores[best]:.1f} %): the picture {where}, after {self.early_ms:.1f} ms. '
            f'Running to the end takes {self.whole_ms:.1f} ms.'
        )


class Exits:
    """Asks every exit of a network.

    Args:
        checkpoint: Folder of a run, or `hf-hub:org/name`.
        thresholds: See `DemoConfig`.

    Raises:
        ConfigError: The checkpoint cannot be loaded, or the thresholds do not fit it.
    """

    def __init__(self, checkpoint: str, thresholds: Optional[Tuple[float, ...]] = None):
        self.model, _ = load_checkpoint(checkpoint)
        self.data_config = resolve_data_config(model=self.model)
        self.transform = eval_transform(self.data_config)
        self.mode = 'L' if self.data_config['input_size'][0] == 1 else 'RGB'
        self.names = class_names(self.model) or [f'class {i}' for i in range(self.model.num_classes)]
        self.costs = exit_costs(self.model, self.data_config['input_size'])
        rule = self.model.exit_rule
        try:
            if thresholds is None and rule is not None:
                self.predictor = EarlyExit(self.model)
            else:
                given = thresholds or (0.9,)
                temperatures = rule.temperatures if rule is not None else None
                self.predictor = EarlyExit(
                    self.model, given[0] if len(given) == 1 else given, temperatures=temperatures)
        except ValueError as e:
            raise ConfigError(f'`thresholds={" ".join(map(str, thresholds or ()))}`: {e}') from e

    def _median_ms(self, function: Any) -> float:
        taken = []
        for _ in range(_REPEATS):
            began = time.perf_counter()
            function()
            taken.append(time.perf_counter() - began)
        return 1000 * sorted(taken)[_REPEATS // 2]

    @torch.no_grad()
    def ask(self, picture: Image.Image) -> Answers:
        """Return what each exit makes of a picture, where it leaves, and how long that takes."""
        images = self.transform(ImageOps.exif_transpose(picture).convert(self.mode))[None]
        rule, stages = self.predictor.rule, [self.model.stages[i].module for i in (*self.model.exits, -1)]
        every = self.model.forward_exits(images)
        out = self.predictor.simulate(every)
        left, rows = out.exit_index.item(), []
        for i, (logits, temperature) in enumerate(zip(every, rule.temperatures)):
            confidence, answer = (logits.float() / temperature).softmax(-1)[0].max(-1)
            threshold = rule.thresholds[i] if i < len(rule.thresholds) else None
            deepest = i == self.model.num_exits - 1
            ms = self._median_ms(lambda i=i: self.model.forward_exits(images, upto=i))
            rows.append(dict(zip(_COLUMNS, (
                f'{"▶ " if i == left else ""}exit {i}',
                stages[i],
                f'{100 * self.costs[f"exit{i}"].share:.0f} %',
                self.names[answer],
                f'{100 * confidence.item():.1f} %',
                'always' if deepest else 'never' if threshold is None else _threshold(rule.criterion, threshold),
                f'{ms:.1f} ms',
            ))))
        scores, classes = out.probabilities[0].topk(min(5, self.model.num_classes))
        return Answers(
            rows=rows,
            scores={self.names[c]: s for c, s in zip(classes.tolist(), scores.tolist())},
            exit_index=left,
            early_ms=self._median_ms(lambda: self.predictor(images)),
            whole_ms=self._median_ms(lambda: self.model(images)),
        )


def _threshold(criterion: str, value: float) -> str:
    return f'{100 * value:.1f} %' if criterion == 'confidence' else f'{criterion} {value:.3g}'


def make_page(checkpoint: str, thresholds: Optional[Tuple[float, ...]] = None) -> Any:
    """Return the page as Gradio's `Blocks`, to be launched.

    Args:
        checkpoint: Folder of a run, or `hf-hub:org/name`.
        thresholds: See `DemoConfig`.

    Raises:
        ConfigError: See `hub.networks.load_checkpoint`; or the network has no auxiliary exits.
        ModuleNotFoundError: Gradio is not installed.
    """
    import gradio as gr

    exits = Exits(checkpoint, thresholds)
    name, count = shown_name(exits.model), exits.model.num_exits

    def answer(picture: Optional[Image.Image]) -> Tuple[str, Optional[Dict[str, float]], List[List[str]]]:
        if picture is None:
            return 'Drop a picture.', None, []
        found = exits.ask(picture)
        return found.summary, found.scores, [list(row.values()) for row in found.rows]

    with gr.Blocks(title=f'Exits of {name}', analytics_enabled=False) as page:
        gr.Markdown(
            f'# What each exit thinks\n`{name}`, {count} exits, {exits.model.num_classes} classes. A picture leaves at '
            f'the first exit that is sure enough of it.'
        )
        with gr.Row():
            picture = gr.Image(type='pil', label='Picture', height=320)
            with gr.Column():
                summary = gr.Markdown('Drop a picture.')
                scores = gr.Label(label='Answer', num_top_classes=5)
        table = gr.Dataframe(headers=list(_COLUMNS), label='Exits, shallow to deep', interactive=False)
        picture.change(answer, picture, [summary, scores, table])
        gr.Markdown(
            f'Times are medians of {_REPEATS} runs of one picture on this machine; MACs are the share of the plain '
            f'network\'s; confidence is calibrated where the weights have temperatures.'
        )
    return page


def write_space(model: MultiExit, checkpoint: str, folder: Path, source: Optional[Path] = None) -> None:
    """Write the page as the folder of a Space of the Hugging Face Hub.

    Args:
        model: The network.
        checkpoint: What the page loads, `hf-hub:org/name`; not needed with `source`.
        folder: Where to; it must not exist yet, or be empty.
        source: Folder of the weights, which are copied beside the page.

    Raises:
        ConfigError: There is something in the folder.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f'`space={folder}`: exists and is not empty; choose another folder.')
    folder.mkdir(parents=True, exist_ok=True)
    if source is not None:
        checkpoint = 'model'
        (folder / checkpoint).mkdir()
        for name in (CONFIG_NAME, WEIGHTS_NAME):
            shutil.copyfile(source / name, folder / checkpoint / name)
    name = shown_name(model)
    title = f'Exits of {name.removesuffix(SUFFIX)}'
    (folder / 'app.py').write_text(_APP.format(checkpoint=checkpoint), encoding='utf-8')
    (folder / 'requirements.txt').write_text('timm_selfdistill[demo]\n', encoding='utf-8')
    (folder / 'README.md').write_text(_SPACE.format(title=title, name=name), encoding='utf-8')


def _main() -> None:
    config = tyro.cli(DemoConfig)
    make_page(config.checkpoint, config.thresholds).launch(server_name=config.host, server_port=config.port)


def main() -> None:
    """Run the command."""
    run_command(_main)


if __name__ == '__main__':
    main()
