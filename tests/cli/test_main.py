"""One command for everything, and the names at the top of the package."""
import importlib
import subprocess
import sys

import pytest
from helpers import RECIPES, ROOT

import timm_selfdistill
from timm_selfdistill.cli import main as module
from timm_selfdistill.cli.main import COMMANDS, main


def call(monkeypatch, *arguments):
    monkeypatch.setattr(sys, 'argv', ['timm-selfdistill', *arguments])
    main()


def test_every_command_is_a_module_with_a_recipe(monkeypatch):
    for command in COMMANDS:
        assert callable(importlib.import_module(f'timm_selfdistill.cli.{command}').main)
        assert command == 'demo' or (RECIPES / f'{command}.py').is_file()


def test_help_lists_the_commands(monkeypatch, capsys):
    for words in ((), ('--help',)):
        call(monkeypatch, *words)
        out = capsys.readouterr().out
        assert all(f'  {command} ' in out for command in COMMANDS) and '-m timm_selfdistill.cli.train' in out
    call(monkeypatch, '--version')
    assert capsys.readouterr().out.strip() == timm_selfdistill.__version__


def test_a_mistyped_command_offers_the_nearest(monkeypatch, capsys):
    with pytest.raises(SystemExit) as stopped:
        call(monkeypatch, 'trian')
    assert stopped.value.code == 2
    assert 'trian: there is no such command; the nearest names are train' in capsys.readouterr().err


def test_a_command_gets_its_options_and_its_name(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        call(monkeypatch, 'predict', '--help')
    out = capsys.readouterr().out
    assert 'usage: timm-selfdistill predict' in out and '--all-exits' in out
    with pytest.raises(SystemExit) as stopped:
        call(monkeypatch, 'train', '--epochs', '0')
    assert stopped.value.code == 2 and '--epochs 0: expected a number of 1 or more' in capsys.readouterr().err


def test_the_package_declares_it():
    assert f'timm-selfdistill = "{module.__name__}:main"' in (ROOT / 'pyproject.toml').read_text()


def test_names_at_the_top_come_when_they_are_asked_for():
    code = (
        'import sys, timm_selfdistill as t\n'
        'assert not {"accelerate", "datasets", "matplotlib", "sklearn"} & set(sys.modules)\n'
        'assert {"train", "TrainConfig", "SelfDistillationTask", "losses"} <= set(dir(t))\n'
        'assert t.losses.top_score_difference and t.TrainConfig().epochs and t.SelfDistillationTask\n'
        'assert "accelerate" not in sys.modules\n'
        'assert t.train.__module__ == "timm_selfdistill.training.trainer"\n'
    )
    subprocess.run([sys.executable, '-c', code], check=True)


def test_a_name_that_does_not_exist_is_none():
    with pytest.raises(AttributeError, match='no attribute'):
        timm_selfdistill.no_such_name  # noqa: B018
    assert all(getattr(timm_selfdistill, name) is not None for name in timm_selfdistill.__all__)


def test_training_from_python_checks_its_settings():
    with pytest.raises(ValueError, match='`epochs=0`'):
        timm_selfdistill.train(timm_selfdistill.TrainConfig(epochs=0))
