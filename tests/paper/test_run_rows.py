"""The driver of the table's rows: order, going on, time limit, failures."""
import importlib.util
import json
import signal
import subprocess
import sys
import time

import pytest
import yaml
from helpers import PAPER

SCRIPT = PAPER / 'run_rows.py'


@pytest.fixture
def driver(monkeypatch, tmp_path):
    """The driver as a module, whose `run` calls it on two rows of digits; `trained` lists what it has trained."""
    spec = importlib.util.spec_from_file_location('run_rows', SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules['run_rows'] = module
    spec.loader.exec_module(module)
    module.trained, module.broken = [], ()
    for name in ('one', 'two'):
        (tmp_path / f'{name}.yaml').write_text('model: test_resnet\nmethod: plain\nepochs: 1\n')
    (tmp_path / 'line.yaml').write_text('model: test_resnet\nmethod: plain\nepochs: 1\ngenerations: 1\n')

    def train(job, log, environment, deadline, signals):
        module.trained.append(job.name)
        log.write_text('it said so\n')
        if job.name not in module.broken:
            for folder in job.parts():
                (folder / 'checkpoints' / 'step9').mkdir(parents=True)
                (folder / 'record.json').write_text(json.dumps(dict(recipe=job.name, part=folder.name)) + '\n')
                (folder / 'results.json').write_text('{}')
            (job.folder / 'generations.csv').write_text('generation\n0\n1\n')
            (job.folder / 'args.yaml').write_text(yaml.safe_dump(job.config.settings()))
        return False

    def run(*words, rows=('one', 'two')):
        module.trained.clear()
        command = [
            'run_rows.py', '--rows', *(str(f) if (f := tmp_path / f'{row}.yaml').is_file() else row for row in rows),
            '--seeds', '0', '1',
            '--output', str(tmp_path / 'out'), '--results', str(tmp_path / 'rows.jsonl'), *words]
        monkeypatch.setattr(sys, 'argv', command)
        with pytest.raises(SystemExit) as e:
            module.run_command(module.main)
        return e.value.code

    monkeypatch.setattr(module, 'train', train)
    module.run = run
    yield module
    del sys.modules['run_rows']


def recipes(path):
    return [json.loads(line)['recipe'] for line in path.read_text().splitlines()]


def test_one_seed_of_all_comes_first_and_what_is_complete_is_left_alone(driver, tmp_path):
    names = ['one-seed0', 'two-seed0', 'one-seed1', 'two-seed1']
    assert driver.run() == 0
    assert driver.trained == recipes(tmp_path / 'rows.jsonl') == names
    assert not list((tmp_path / 'out').glob('*/checkpoints'))
    (tmp_path / 'rows.jsonl').unlink()
    assert driver.run() == 0
    assert driver.trained == [] and recipes(tmp_path / 'rows.jsonl') == names


def test_a_row_that_fails_holds_up_no_other(driver, tmp_path, capsys):
    driver.broken = ('two-seed0',)
    assert driver.run() == 1
    assert len(driver.trained) == 4
    assert recipes(tmp_path / 'rows.jsonl') == ['one-seed0', 'one-seed1', 'two-seed1']
    out = capsys.readouterr().out
    assert 'two-seed0: failed' in out and 'it said so' in out and '3 of 4 complete, 1 failed, 0 left' in out
    driver.broken = ()
    assert driver.run() == 0
    assert driver.trained == ['two-seed0']


def test_when_the_time_is_up_nothing_begins(driver, capsys):
    assert driver.run('--hours', '0') == 75
    assert driver.trained == []
    out = capsys.readouterr().out
    assert 'left: one-seed0, two-seed0, one-seed1, two-seed1' in out
    assert 'run_rows.py --rows' in out and '--hours 0' in out


def test_generations_are_complete_when_all_are_measured(driver, tmp_path):
    assert driver.run(rows=('line',)) == 0
    assert recipes(tmp_path / 'rows.jsonl') == ['line-seed0'] * 2 + ['line-seed1'] * 2
    assert driver.run(rows=('line',)) == 0
    assert driver.trained == []
    (tmp_path / 'out' / 'line-seed0' / 'generations.csv').write_text('generation\n0\n')
    assert driver.run(rows=('line',)) == 0
    assert driver.trained == ['line-seed0']


def test_what_does_not_fit_is_told_before_anything_begins(driver, tmp_path, capsys):
    assert driver.run('--', '--lr', '-1') == 2
    assert '--lr -1.0: expected' in capsys.readouterr().err
    assert driver.run('--', '--lr', '0.3') == 0
    assert driver.run(rows=('two', 'one')) == 2
    assert 'of another recipe: --lr was 0.3 and is 0.05' in capsys.readouterr().err
    assert driver.trained == []
    assert driver.run(rows=('resnet18_plan',)) == 2


def test_a_row_that_there_is_not_is_named(driver):
    with pytest.raises(driver.ConfigError, match='no such file; the nearest names are resnet18_plain'):
        driver.find_rows(('resnet18_plan',))
    (block,) = driver.find_rows(('resnet18_*_best', 'resnet18_byot', 'resnet18_byot*'))
    assert [row.name for row in block] == [
        'resnet18_byot_best', 'resnet18_deep_supervision_best', 'resnet18_plain_best', 'resnet18_byot',
        'resnet18_byot_later']


def test_a_row_starts_from_the_run_of_its_seed(driver, tmp_path, capsys):
    names = ['lite0_plain', 'lite0_disjoint_inverted', 'lite0_mixed']
    assert [row.name for row in driver.find_rows(('lite0_mixed',))[0]] == names
    config = driver.RowsConfig(rows=('lite0_mixed',), seeds=(0, 1), output='out', initial_checkpoint='w.safetensors')
    planned = driver.plan(config, [])
    for seed, jobs in enumerate((planned[:3], planned[3:])):
        plain, disjoint, mixed = (job.config for job in jobs)
        assert (plain.model, plain.initial_checkpoint) == ('tf_efficientnet_lite0', 'w.safetensors')
        assert (disjoint.model, disjoint.initial_checkpoint) == (f'out/lite0_plain-seed{seed}', None)
        assert mixed.model == f'out/lite0_disjoint_inverted-seed{seed}' and {c.seed for c in (plain, mixed)} == {seed}
        assert f'--model out/lite0_plain-seed{seed}' in ' '.join(jobs[1].arguments)
    driver.broken = ('lite0_plain-seed0',)
    assert driver.run(rows=('lite0_mixed',)) == 1
    assert driver.trained == ['lite0_plain-seed0', *(f'{name}-seed1' for name in names)]
    assert 'lite0_mixed-seed0: does not begin, lite0_disjoint_inverted-seed0 has not' in capsys.readouterr().out
    driver.broken = ()
    assert driver.run(rows=('lite0_mixed',)) == 0
    assert driver.trained == [f'{name}-seed0' for name in names]


@pytest.mark.slow
def test_from_start_to_stop_and_on_elsewhere_to_the_end(tmp_path):
    (tmp_path / 'row.yaml').write_text('model: test_resnet\nexits: [2, 3]\nepochs: 15\n')
    (tmp_path / 'last.yaml').write_text('model: test_resnet\nmethod: plain\nepochs: 1\n')

    def start(place):
        return subprocess.Popen(
            [sys.executable, SCRIPT, '--rows', tmp_path / 'row.yaml', tmp_path / 'last.yaml', '--seeds', '3',
             '--output', place / 'out', '--results', place / 'rows.jsonl', '--', '--batch-size', '200'],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    here, there = tmp_path / 'here', tmp_path / 'there'
    process = start(here)
    summary = here / 'out' / 'row-seed3' / 'summary.csv'
    while process.poll() is None and not (summary.exists() and summary.stat().st_size):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=200)
    assert process.returncode == 75, out
    assert 'row-seed3: told to stop' in out and 'left: row-seed3, last-seed3' in out
    steps = [int(path.name[4:]) for path in here.glob('out/row-seed3/checkpoints/step*')]
    assert max(steps) < 90 and not (here / 'rows.jsonl').exists()
    here.rename(there)
    process = start(there)
    out, _ = process.communicate(timeout=400)
    assert process.returncode == 0, out
    assert f'step{max(steps)}: epoch' in (there / 'out' / 'row-seed3.log').read_text()
    row, last = (json.loads(line) for line in (there / 'rows.jsonl').read_text().splitlines())
    assert (row['recipe'], row['seed'], len(row['top1']), last['recipe']) == ('row', 3, 3, 'last')
    assert row['hours'] > 0
