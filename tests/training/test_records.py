"""The line that a complete run leaves: what it says, and that it is there exactly once."""
import getpass
import json
import platform
import types
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import pytest
from filelock import FileLock
from helpers.images import write_two_colours
from helpers.runs import die, interrupted, resumable

from timm_selfdistill.config import TrainConfig
from timm_selfdistill.training import records
from timm_selfdistill.training.folders import recipe_problem
from timm_selfdistill.training.generations import train_generations
from timm_selfdistill.training.records import append_record
from timm_selfdistill.training.trainer import train


@pytest.fixture
def ticks(monkeypatch):
    """Let a second pass whenever somebody looks at the clock."""
    now = iter(range(1_000_000))
    monkeypatch.setattr(records, 'time', types.SimpleNamespace(monotonic=lambda: float(next(now))))


def rows_of(path):
    return [json.loads(line) for line in path.read_text(encoding='utf-8').splitlines()]


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp('runs')
    config = TrainConfig(
        model='test_resnet_sd', exits=(2, 3), epochs=1, output=str(folder), experiment='run', resume='auto', seed=7,
        results=str(folder / 'results' / 'rows.jsonl'), recipe='mine')
    return config, train(config)


def test_a_complete_run_files_its_figures(finished):
    config, folder = finished
    row, = rows_of(Path(config.results))
    *exits, ensemble = json.loads((folder / 'results.json').read_text())['test']
    assert (row['recipe'], row['network'], row['method'], row['seed'], row['epochs'], row['part']) == (
        'mine', 'test_resnet', 'byot', 7, 1, 'test')
    for key in ('top1', 'ece'):
        assert row[key] == [round(r[key], 4) for r in exits]
        assert row[f'ensemble_{key}'] == round(ensemble[key], 4)
    assert row['shares'][-1] == 1 and row['shares'] == sorted(row['shares'])
    assert row['hours'] > 0 and row['images_per_second'] > 0
    assert row['hardware'].startswith('1 × CPU') and row['precision'] == 'fp32'
    assert all(row[name] for name in ('torch', 'timm', 'accelerate', 'timm_selfdistill', 'commit', 'finished'))
    assert row['settings']['lr'] == config.lr


@pytest.mark.slow
def test_a_line_tells_nothing_of_user_machine_and_folders(tmp_path):
    data = write_two_colours(tmp_path)
    teacher = train(TrainConfig(
        model='test_resnet', method='plain', epochs=1, batch_size=16, data_dir=str(data), label_column='fine',
        output=str(tmp_path / 'teachers'), experiment='plain', results=str(tmp_path / 'rows.jsonl')))
    train(TrainConfig(
        model='test_resnet', exits=(2, 3), epochs=1, batch_size=16, data_dir=str(data), label_column='fine',
        teacher=str(teacher), output=str(tmp_path / 'runs'), results=str(tmp_path / 'rows.jsonl')))
    text = (tmp_path / 'rows.jsonl').read_text(encoding='utf-8')
    plain, taught = rows_of(tmp_path / 'rows.jsonl')
    assert taught['settings']['teacher'] == 'plain' and taught['dataset'] == data.name
    assert (plain['recipe'], plain['ensemble_top1']) == ('plain', None)
    for secret in (str(tmp_path.parent), platform.node(), str(Path.home()), f'/{getpass.getuser()}/'):
        assert secret not in text


def test_the_line_is_there_once_and_comes_back_when_it_was_lost(finished, capsys):
    config, folder = finished
    results = Path(config.results)
    before = results.read_bytes()
    train(config)
    assert results.read_bytes() == before
    results.unlink()  # killed between the last file of the run and the line
    train(config)
    assert results.read_bytes() == before
    (results.parent / 'folder').mkdir()
    train(TrainConfig(**{**vars(config), 'results': str(results.parent / 'folder')}))
    assert 'The run is complete; the same command with `experiment=run` `resume=auto`' in ' '.join(
        capsys.readouterr().out.split())


def test_half_a_line_goes_and_a_whole_one_without_its_end_stays(tmp_path):
    (tmp_path / 'record.json').write_text('{"recipe": "new"}\n')
    results = tmp_path / 'rows.jsonl'
    for rest, kept in (('{"recipe": "o', []), ('{"recipe": "other"}', ['other']), ('', [])):
        results.write_text('{"recipe": "old"}\n' + rest)
        append_record(tmp_path, results)
        assert [r['recipe'] for r in rows_of(results)] == ['old', *kept, 'new']


def test_a_run_waits_for_another_that_is_writing_and_files_nothing_twice(tmp_path):
    (tmp_path / 'record.json').write_text('{"recipe": "new"}\n')
    results = tmp_path / 'rows.jsonl'
    with ThreadPoolExecutor(8) as pool:
        with FileLock(tmp_path / '.rows.jsonl.lock'), results.open('a+b') as f:
            waiting = [pool.submit(append_record, tmp_path, results) for _ in range(8)]
            f.write(b'{"recipe": ')
            f.flush()
            assert not wait(waiting, timeout=0.5).done
            f.write(b'"old"}\n')
        for run in waiting:
            run.result()
    assert [r['recipe'] for r in rows_of(results)] == ['old', 'new']


@pytest.mark.slow
def test_the_time_of_all_sittings_counts_and_that_of_lost_steps_does_not(tmp_path, monkeypatch, ticks):
    results = str(tmp_path / 'rows.jsonl')
    train(resumable(tmp_path, experiment='whole', results=results))
    interrupted(resumable(tmp_path, results=results), monkeypatch, 7, die)
    whole, gone_on = rows_of(tmp_path / 'rows.jsonl')
    # a tick a step, one when an epoch's are done
    assert whole['images_per_second'] == gone_on['images_per_second'] == round(24 * 100 / (24 + 2), 1)
    assert gone_on['hours'] >= whole['hours'] > 24 / 3600


@pytest.mark.slow
def test_where_sittings_are_not_known_no_time_is_claimed(tmp_path, monkeypatch):
    monkeypatch.setattr(records.TimeSheet, 'go_on', lambda sheet, sittings: None)
    interrupted(resumable(tmp_path, results=str(tmp_path / 'rows.jsonl')), monkeypatch, 7, die)
    row, = rows_of(tmp_path / 'rows.jsonl')
    assert (row['hours'], row['images_per_second']) == (None, None)


@pytest.mark.slow
def test_sittings_on_different_machines_are_all_named(tmp_path, monkeypatch):
    names = iter(('1 × A', '1 × B'))
    monkeypatch.setattr(records, '_hardware', lambda accelerator: next(names))
    interrupted(resumable(tmp_path, results=str(tmp_path / 'rows.jsonl')), monkeypatch, 7, die)
    row, = rows_of(tmp_path / 'rows.jsonl')
    assert row['hardware'] == '1 × A, then 1 × B'


@pytest.mark.slow
def test_every_generation_files_a_line_once(tmp_path):
    config = TrainConfig(
        model='test_resnet', method='plain', epochs=1, batch_size=16, generations=1, patriarch='tsd', resume='auto',
        data_dir=str(write_two_colours(tmp_path)), label_column='fine', workers=0, output=str(tmp_path),
        experiment='line', results=str(tmp_path / 'rows.jsonl'))
    train_generations(config)
    rows = rows_of(tmp_path / 'rows.jsonl')
    assert [(r['recipe'], r['seed'], r['settings']['patriarch'], r['settings']['teacher']) for r in rows] == [
        ('line/generation0', 42, 'tsd', None), ('line/generation1', 43, 'plain', 'generation0')]
    (tmp_path / 'rows.jsonl').unlink()
    for _ in range(2):
        train_generations(config)
        assert rows_of(tmp_path / 'rows.jsonl') == rows


def test_data_that_have_moved_are_known_by_their_name(tmp_path):
    for name in ('here/cifar100', 'there/cifar100', 'there/other'):
        (tmp_path / name).mkdir(parents=True)
    args = tmp_path / 'args.yaml'
    args.write_text(f'data_dir: {tmp_path}/here/cifar100\nteacher: null\n')
    there = TrainConfig(data_dir=str(tmp_path / 'there' / 'cifar100'))
    assert recipe_problem(args, there, moved=True) is None
    assert '`data_dir` was' in recipe_problem(args, there)  # a run that nobody named is not gone on with
    other = TrainConfig(data_dir=str(tmp_path / 'there' / 'other'))
    assert '`data_dir` was' in recipe_problem(args, other, moved=True)
    assert '`teacher` was None' in recipe_problem(args, TrainConfig(teacher=str(tmp_path / 'here')), moved=True)
