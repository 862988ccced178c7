"""Put a trained network on the Hugging Face Hub: `python recipes/publish.py --checkpoint RUN --repo org/name`."""
import dataclasses
from pathlib import Path
from typing import Optional

import tyro
from huggingface_hub import constants

from ..hub.networks import load_checkpoint
from ..hub.push import AUTO, push_to_hub
from .demo import write_space
from .launch import run_command


@dataclasses.dataclass(kw_only=True)
class PublishConfig:
    """Put weights, config, card, pictures, figures and settings of a run on the Hub, in one commit.

    Log in with `hf auth login` before, or set HF_TOKEN. A second time changes nothing, unless the run has changed.
    """

    checkpoint: str
    """Folder of a run that is complete."""
    repo: str = 'auto'
    """org/name, created if needed. auto: the organisation of TIMM_SELFDISTILL_ORG or your own name, and a name made of
    network, method and data set."""
    exit: Optional[int] = None
    """Publish the network that ends at this exit, with nothing of the rest in it."""
    public: bool = False
    """Let everybody see a repository that has to be created; without this it is private."""
    revision: Optional[str] = None
    """Branch, created if needed; main when None."""
    dataset: Optional[str] = None
    """Hub id of the data set, for the card, where the run has read a local copy: uoft-cs/cifar100."""
    space: Optional[Path] = None
    """Write a folder for a Space instead, with the page of `timm-selfdistill demo`; nothing is sent. The page loads
    --repo, or without that the weights, which are put into the folder."""


def _main() -> None:
    config = tyro.cli(PublishConfig)
    if config.space is not None:
        model, source = load_checkpoint(config.checkpoint)
        named = config.repo != AUTO
        if source is None and not named:
            config.repo, named = config.checkpoint.removeprefix('hf-hub:'), True
        write_space(model, f'hf-hub:{config.repo}', config.space, None if named else source)
        print(f'{config.space}: hf upload <org>/<name> {config.space} . --repo-type space puts it on the Hub')
        return
    folder = config.checkpoint.removeprefix('local-dir:')
    repo, commit = push_to_hub(
        folder, config.repo, config.exit, config.public, config.revision, dataset_id=config.dataset)
    print(f'{constants.ENDPOINT}/{repo}/tree/{commit}')
    print(f'import timm, timm_selfdistill; timm.create_model("hf-hub:{repo}", pretrained=True)')


def main() -> None:
    """Run the command."""
    run_command(_main)


if __name__ == '__main__':
    main()
