"""The house: who imports whom, how large files are, what an import costs."""
import re
import subprocess
import sys

import pytest
from helpers import ROOT

PACKAGE = ROOT / 'timm_selfdistill'


@pytest.mark.slow
def test_imports_go_in_the_directions_of_the_contracts():
    code = 'import sys; from importlinter.cli import lint_imports_command; sys.exit(lint_imports_command())'
    out = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True)
    assert out.returncode == 0 and ' 0 broken' in out.stdout, out.stdout + out.stderr


def test_every_folder_and_module_at_the_top_has_a_contract():
    text = (ROOT / 'pyproject.toml').read_text(encoding='utf-8')
    bound = set(re.findall(r'source_modules = \["timm_selfdistill\.(\w+)"\]', text))
    there = {p.stem for p in PACKAGE.iterdir() if p.suffix == '.py' or (p / '__init__.py').exists()}
    assert there - bound == {'__init__', 'cli'}  # which may import everything


def test_files_are_few_at_the_top_and_none_is_long():
    assert sum(p.is_file() for p in PACKAGE.iterdir()) <= 12
    sizes = {p.relative_to(ROOT): len(p.read_text(encoding='utf-8').splitlines()) for p in PACKAGE.rglob('*.py')}
    assert {p: n for p, n in sizes.items() if n > 400} == {}


def test_the_files_that_contributing_names_exist():
    named = re.findall(r'`(timm_selfdistill/[\w/.]+)`', (ROOT / 'CONTRIBUTING.md').read_text(encoding='utf-8'))
    assert len(named) >= 15 and [name for name in named if not (ROOT / name).exists()] == []


@pytest.mark.slow
def test_an_import_brings_nothing_that_training_alone_needs():
    code = 'import sys, timm_selfdistill; print(*sys.modules)'
    loaded = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.split()
    assert {'accelerate', 'datasets', 'matplotlib', 'sklearn', 'tyro', 'rich'}.isdisjoint(loaded)
