import pytest
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from timm_selfdistill.config import TrainConfig
from timm_selfdistill.errors import ConfigError
from timm_selfdistill.training import trackers
from timm_selfdistill.training.trainer import train

TINY = dict(model='test_resnet', exits=(2, 3), batch_size=200)


@pytest.mark.slow
def test_tensorboard_follows_a_run_and_goes_on_with_it(tmp_path):
    config = dict(TINY, output=str(tmp_path), experiment='run', report_to=('tensorboard',))
    folder = train(TrainConfig(**config, epochs=2))
    log = EventAccumulator(str(folder / 'trackers' / 'timm_selfdistill'))
    log.Reload()
    logged = log.Tags()['scalars']
    assert {'train/loss', 'train/kl0', 'eval/exit0_top1', 'eval/ensemble_ece', 'lr'} <= set(logged)
    assert [e.step for e in log.Scalars('train/loss')] == [0, 1]
    header, *rows = (line.split(',') for line in (folder / 'summary.csv').read_text().splitlines())
    column = header.index('eval_exit0_top1')
    assert [e.value for e in log.Scalars('eval/exit0_top1')] == pytest.approx([float(row[column]) for row in rows])


def test_a_run_without_trackers_starts_none(tmp_path, monkeypatch):
    monkeypatch.setattr('timm_selfdistill.training.trainer.start_trackers', lambda *args: pytest.fail('started'))
    assert not (train(TrainConfig(**TINY, output=str(tmp_path), epochs=1)) / 'trackers').exists()


class _Recorder(GeneralTracker):
    name, requires_logging_directory, main_process_only = 'recorder', False, True
    tracker = None
    made = []

    def __init__(self, project, **kwargs):
        super().__init__()
        self.project, self.kwargs = project, kwargs
        self.made.append(self)

    def start(self):
        pass

    def store_init_configuration(self, values):
        self.values = values

    def log(self, values, step=None, **kwargs):
        pass


def test_trackers_that_can_are_told_which_run_goes_on(tmp_path, monkeypatch):
    """Those that are not installed here, by what accelerate would be told."""
    told = {}
    accelerator = Accelerator(cpu=True)
    monkeypatch.setattr(accelerator, 'init_trackers', lambda project, config, init_kwargs: told.update(init_kwargs))
    runs = []
    for name in ('a', 'a', 'b'):
        trackers.start_trackers(accelerator, ['wandb'], tmp_path / name, dict(lr=0.1, exits=[1, 2]), first_epoch=3)
        runs.append(told['wandb']['id'])
        assert told['wandb']['resume'] == told['trackio']['resume'] == 'allow'
        assert told['wandb']['name'] == told['trackio']['name'] == name
        assert told['tensorboard']['purge_step'] == 3
    assert runs[0] == runs[1] != runs[2]


def test_all_means_all_that_are_installed(tmp_path, monkeypatch):
    monkeypatch.setattr(trackers, 'get_available_trackers', lambda: ['recorder'])
    monkeypatch.setitem(trackers.LOGGER_TYPE_TO_CLASS, 'recorder', _Recorder)
    accelerator = Accelerator(cpu=True)
    trackers.check_trackers(['all'])
    trackers.start_trackers(accelerator, ['all'], tmp_path, dict(lr=0.1, exits=[1, 2]), first_epoch=0)
    assert _Recorder.made[-1].project == 'timm_selfdistill'
    assert _Recorder.made[-1].values == dict(lr=0.1, exits='[1, 2]')


@pytest.mark.parametrize('name, message', [
    ('tensorbord', '`report_to=tensorbord`: unknown, expected all or some of .*nearest names are tensorboard'),
    ('wandb', '`report_to=wandb`: is not installed; pip install wandb does it'),
])
def test_trackers_that_cannot_be_had_are_refused_before_anything_is_written(tmp_path, monkeypatch, name, message):
    monkeypatch.setattr(trackers, 'get_available_trackers', lambda: ['tensorboard'])
    with pytest.raises(ConfigError, match=message):
        train(TrainConfig(**TINY, output=str(tmp_path), report_to=(name,)))
    assert list(tmp_path.iterdir()) == []
