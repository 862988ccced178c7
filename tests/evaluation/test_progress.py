"""How far a long task is, on a terminal and in a log."""
import io

import pytest
from rich.console import Console

from timm_selfdistill.evaluation import progress
from timm_selfdistill.evaluation.progress import Watch, follow


@pytest.fixture
def clock(monkeypatch):
    """A clock that goes on when it is told to."""
    class Clock:
        now = 0.

    monkeypatch.setattr(progress.time, 'monotonic', lambda: Clock.now)
    return Clock


def test_a_log_has_a_line_a_minute(clock):
    out = io.StringIO()
    with Watch(Console(file=out, width=40)) as watch:
        watch.begin('train', total=100)
        for _ in range(100):
            clock.now += 3.
            watch.advance('train', images=32, text='lr 0.1')
    lines = out.getvalue().splitlines()
    assert lines == [
        f'train {n}/100  11 images/s  {left} left  lr 0.1'
        for n, left in ((20, '0:04:00'), (40, '0:03:00'), (60, '0:02:00'), (80, '0:01:00'), (100, '0:00:00'))
    ]


def test_a_resumed_task_counts_from_where_it_was(clock):
    out = io.StringIO()
    with Watch(Console(file=out)) as watch:
        watch.begin('train', total=100, done=90)
        clock.now += 61.
        watch.advance('train', images=610)
    assert out.getvalue() == 'train 91/100  10 images/s  0:09:09 left\n'


def test_an_unknown_number_of_steps_has_no_end(clock):
    out = io.StringIO()
    with Watch(Console(file=out)) as watch:
        watch.begin('evaluate test')
        clock.now += 60.
        watch.advance('evaluate test', images=30)
    assert out.getvalue() == 'evaluate test 1  0.5 images/s\n'


def test_a_terminal_has_a_bar_that_keeps_what_matters_in_sight(clock):
    out = io.StringIO()
    with Watch(Console(file=out, force_terminal=True, width=50)) as watch:
        watch.begin('train', total=4)
        watch.begin('evaluate validation', total=2)
        clock.now += 1.
        watch.advance('train', images=8, text='lr 0.1 and a very long list of terms')
        watch.advance('evaluate validation', images=8)
        watch.end('evaluate validation')
        watch._bars.refresh()
    assert 'train 1/4  8 images/s  0:00:03 left' in out.getvalue() and '━' in out.getvalue()


def test_a_quiet_console_shows_nothing(clock):
    out = io.StringIO()
    with Watch(Console(file=out, quiet=True, force_terminal=True)) as watch:
        watch.begin('train', total=1)
        clock.now += 100.
        watch.advance('train', images=1)
    assert out.getvalue() == ''


def test_follow_passes_everything_on():
    batches = [([1, 2], 'a'), ([3], 'b')]
    assert list(follow(batches, 'x', Console(quiet=True))) == batches
    assert list(follow(iter(batches), 'x', Console(quiet=True))) == batches


def test_a_task_without_images_has_a_count_and_an_end_alone(clock):
    out = io.StringIO()
    with Watch(Console(file=out)) as watch:
        watch.begin('compare', total=3)
        clock.now += 60.
        watch.advance('compare')
    assert out.getvalue() == 'compare 1/3  0:02:00 left\n'
