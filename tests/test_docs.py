"""The documents: links lead somewhere, code compiles, the reference is that of the settings."""
import re
import runpy

import pytest
from helpers import ROOT

PAGES = sorted([*ROOT.glob('*.md'), *ROOT.glob('docs/*.md'), *ROOT.glob('docs/api/*.md')])
LINK = re.compile(r'\]\(([^)\s]+)\)')
PYTHON = re.compile(r'^```python\n(.*?)^```', re.DOTALL | re.MULTILINE)


def anchors(page):
    headings = re.findall(r'^#+ (.+)$', page.read_text(encoding='utf-8'), re.MULTILINE)
    return {re.sub(r'[^\w\- ]', '', heading.lower()).replace(' ', '-') for heading in headings}


@pytest.mark.parametrize('page', PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_within_the_project_lead_somewhere(page):
    for link in LINK.findall(page.read_text(encoding='utf-8')):
        if re.match(r'[a-z]+:', link):
            continue
        path, _, anchor = link.partition('#')
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize('page', PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_code_compiles(page):
    for number, code in enumerate(PYTHON.findall(page.read_text(encoding='utf-8'))):
        compile(code, f'{page.name}, block {number}', 'exec')


@pytest.mark.slow
@pytest.mark.parametrize(
    'page', ['README.md', 'docs/early_exit.md', 'docs/training.md', 'docs/models.md', 'docs/regimes.md'])
def test_code_runs_as_pasted(page, capsys):
    for code in PYTHON.findall((ROOT / page).read_text(encoding='utf-8')):
        exec(compile(code, page, 'exec'), {})
    if page == 'docs/models.md':
        said = capsys.readouterr().out.splitlines()  # to the percent it depends on how this machine decodes and adds
        assert [re.sub(r'\d+%', '', line) for line in said] == ['butterfly, ', *['rose, '] * 3, 'rose at exit 1']


def test_the_readme_is_read_in_a_few_minutes():
    lines = (ROOT / 'README.md').read_text(encoding='utf-8').splitlines()
    assert len(lines) <= 150
    for start in ('pip install -e . ', 'pip install -e ".[test]"'):  # .ci/run takes the commands from there
        assert sum(line.startswith(start) for line in lines) == 1


def test_the_reference_is_made_from_the_settings():
    made = runpy.run_path(str(ROOT / 'docs' / 'make_cli_reference.py'))['make']()
    assert (ROOT / 'docs' / 'cli.md').read_text(encoding='utf-8') == made, 'run docs/make_cli_reference.py'
