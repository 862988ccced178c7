"""`timm-selfdistill COMMAND ...`: all commands of this package."""
import importlib
import sys

from ..errors import nearest
from ..version import __version__

__all__ = ['COMMANDS', 'main']

COMMANDS = {
    'train': 'train a network with exits, or exits on a trained network',
    'evaluate': 'measure every exit of a trained network',
    'calibrate': 'choose when images leave early',
    'predict': 'classify images, each as deep as it needs',
    'export': 'write graphs for ONNX or torch.export',
    'publish': 'put a run on the Hugging Face Hub',
    'benchmark': 'compare speed and memory',
    'analyze': 'analyses of the papers: flat minima, gradients, features',
    'transfer': 'linear classifiers on frozen features',
    'demo': 'a page where a picture is dropped and every exit answers',
}


def _usage() -> str:
    width = max(map(len, COMMANDS))
    lines = '\n'.join(f'  {name:<{width}}  {what}' for name, what in COMMANDS.items())
    return (
        f'usage: timm-selfdistill COMMAND [options]\n\n{lines}\n\n'
        f'timm-selfdistill COMMAND --help lists its options. For several processes:\n'
        f'  accelerate launch -m timm_selfdistill.cli.train [options]'
    )


def main() -> None:
    """Run the command that the first argument names."""
    command, *rest = sys.argv[1:] or ['--help']
    if command in ('-h', '--help', 'help'):
        print(_usage())
        return
    if command == '--version':
        print(__version__)
        return
    if command not in COMMANDS:
        print(
            f'error: {command}: there is no such command{nearest(command, COMMANDS)}; there are {", ".join(COMMANDS)}.',
            file=sys.stderr)
        sys.exit(2)
    sys.argv = [f'timm-selfdistill {command}', *rest]
    importlib.import_module(f'.{command}', __package__).main()


if __name__ == '__main__':
    main()
