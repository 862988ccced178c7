import dataclasses

import pytest
import yaml

from timm_selfdistill.cli.launch import as_options
from timm_selfdistill.cli.options import parse_train_config
from timm_selfdistill.config import TrainConfig
from timm_selfdistill.errors import ConfigError
from timm_selfdistill.tasks import Linear
from timm_selfdistill.training.build import distillation_config
from timm_selfdistill.training.presets import PRESETS


def test_the_command_line_is_the_dataclass():
    assert parse_train_config([]) == TrainConfig()
    config = parse_train_config([
        '--model', 'resnet50', '--exits', '1', '2', '--no-square-temperature', '--model-ema', '--lr', '1e-3',
        '--model_kwargs', 'drop_rate=0.1', 'act_layer=gelu'])
    assert (config.model, config.exits, config.square_temperature, config.model_ema, config.lr) == (
        'resnet50', (1, 2), False, True, 1e-3)
    assert config.model_arguments() == dict(drop_rate=0.1, act_layer='gelu')


def test_yaml_gives_defaults_and_the_command_line_wins(tmp_path):
    first, second = tmp_path / 'a.yaml', tmp_path / 'b.yaml'
    first.write_text('epochs: 5\nlr: 1e-3\nexits: [1, 2]\nmodel-ema: true\nmodel_kwargs: {drop_rate: 0.1}\n')
    second.write_text('epochs: 7\nexits: null\n')
    config = parse_train_config(['-c', str(first)])
    assert (config.epochs, config.lr, config.exits, config.model_ema) == (5, 1e-3, (1, 2), True)
    assert config.model_arguments() == dict(drop_rate=0.1)
    assert parse_train_config(['--epochs', '9', '--config', str(first)]).epochs == 9
    config = parse_train_config(['-c', str(first), '-c', str(second)])
    assert (config.epochs, config.exits, config.lr) == (7, None, 1e-3)


def test_a_config_file_stands_on_another(tmp_path):
    (tmp_path / 'rows').mkdir()
    (tmp_path / 'base.yaml').write_text('epochs: 5\nlr: 0.3\nexits: [1]\n')
    (tmp_path / 'rows' / 'later.yaml').write_text('base: ../base.yaml\nepochs: 7\n')
    (tmp_path / 'rows' / 'row.yaml').write_text('base: later.yaml\nexits: null\n')
    config = parse_train_config(['-c', str(tmp_path / 'rows' / 'row.yaml')])
    assert (config.epochs, config.lr, config.exits) == (7, 0.3, None)


@pytest.mark.parametrize('base, message', [
    ('nowhere.yaml', 'nowhere.yaml: No such file'),
    ('row.yaml', 'base: row.yaml comes back to itself'),
])
def test_a_base_that_cannot_be_read_is_named(tmp_path, base, message):
    (tmp_path / 'row.yaml').write_text(f'base: {base}\n')
    with pytest.raises(ConfigError, match=message):
        parse_train_config(['-c', str(tmp_path / 'row.yaml')])


def test_args_yaml_repeats_a_run(tmp_path):
    config = parse_train_config(['--exits', '2', '--mixup', '0.2', '--no-square-temperature', '--mean', '0.1'])
    (tmp_path / 'args.yaml').write_text(yaml.safe_dump(config.settings()))
    assert parse_train_config(['-c', str(tmp_path / 'args.yaml')]) == config


@pytest.mark.parametrize('text, message', [
    ('epoch: 3', 'there is no setting epoch; the nearest names are epochs'),
    ('- 3', 'expected lines of "name: value"'),
    ('a: [', 'not YAML'),
])
def test_a_config_file_that_makes_no_sense_is_refused(tmp_path, text, message):
    path = tmp_path / 'c.yaml'
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        parse_train_config(['-c', str(path)])


def test_a_config_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ConfigError, match='nowhere.yaml: No such file'):
        parse_train_config(['-c', str(tmp_path / 'nowhere.yaml')])


@pytest.mark.parametrize('arguments, message', [
    (['--epochs', '0'], '--epochs 0: expected a number of 1 or more'),
    (['--alpha', '1.1'], '--alpha 1.1: expected a number from 0 to 1'),
    (['--lr', 'nan'], '--lr nan'),
    (['--lr', 'inf'], '--lr inf'),
    (['--temperature', '0'], '--temperature 0.0: expected more than 0'),
    (['--in-chans', '2'], '--in-chans 2: expected 3'),
    (['--mean', '0.1', '0.2'], '--mean 0.1 0.2: expected 1 or 3 numbers'),
    (['--std', '0'], '--std 0.0: expected numbers greater than 0'),
    (['--scale', '0.5', '0.1'], '--scale 0.5 0.1: expected two rising numbers'),
    (['--model-kwargs', 'drop_rate'], '--model-kwargs drop_rate: expected key=value'),
    (['--eta', '1.2', '--patriarch', 'tsd'], '--eta 1.2: expected a number from 0 to 1'),
    (['--label-weight', '-0.1'], '--label-weight -0.1: expected a number from 0 to 1'),
    (['--tsd-k', '1'], '--tsd-k 1: expected a number of 2 or more'),
    (['--generations', '-1'], '--generations -1: expected a number of 0 or more'),
    (['--teacher-temperature', '0', '--generations', '1'], '--teacher-temperature 0.0: expected more than 0'),
    (['--last-phase-epochs', '9', '--epochs', '5'], '--last-phase-epochs 9: expected a number from 0 to 5'),
    (['--preset', 'byot'], '--preset byot: unknown, expected one of byot-scan, byot-tpami'),
    (['--method', 'kd'], '--method kd: pass --teacher'),
    (['--teacher', 'a/b', '--patriarch', 'tsd'], '--patriarch tsd: a patriarch has no teacher, and --teacher a/b'),
    (['--teacher', 'a/b', '--generations', '2'], '--teacher a/b: with --generations 2 each generation teaches'),
    (['--label-weight', '0.5'], '--label-weight 0.5: there is no teacher; pass --teacher or --generations'),
    (['--eta', '0.5'], '--eta 0.5: --patriarch plain has the cross entropy alone; others are tsd, label-smoothing'),
    (['--resume', 'auto', '--generations', '1'], '--resume auto: pass --experiment, the name of the generations'),
    (['--checkpoint-every', '0'], '--checkpoint-every 0: expected steps, as in 500, or minutes, as in 10m'),
    (['--checkpoint-every', '2.5'], '--checkpoint-every 2.5: expected steps'),
    (['--checkpoint-every', 'm'], '--checkpoint-every m: expected steps'),
    (['--images-per-epoch', '9'], '--images-per-epoch 9: goes with --streaming only'),
    (['--streaming', '--loader', 'device'], '--loader device: streamed data are not kept'),
    (['--streaming', '--generations', '1'], '--generations 1: needs data that are not streamed'),
    (['--streaming', '--superclass-column', 'a'], '--superclass-column a: needs data that are not streamed'),
    (['--grad-accum-steps', '0'], '--grad-accum-steps 0: expected a number of 1 or more'),
])
def test_values_out_of_range_are_refused(arguments, message):
    with pytest.raises(ConfigError) as e:
        parse_train_config(arguments)
    assert message in as_options(str(e.value))


@pytest.mark.parametrize('arguments, words', [
    (['--epoch', '3'], ('--epoch', '--epochs')),  # the nearest name is offered
    (['--method', 'magic'], ('--method', 'magic', 'deep-supervision')),
    (['--epochs', 'ten'], ('--epochs', 'ten')),
])
def test_arguments_that_do_not_exist_are_explained(arguments, words, capsys):
    with pytest.raises(SystemExit):
        parse_train_config(arguments)
    err = capsys.readouterr().err
    assert all(word in err for word in words)


def test_every_setting_is_explained(capsys):
    with pytest.raises(SystemExit):
        parse_train_config(['--help'])
    out = capsys.readouterr().out
    for field in dataclasses.fields(TrainConfig):
        assert f'--{field.name.replace("_", "-")}' in out


@pytest.mark.parametrize('name', PRESETS)
def test_presets_are_defaults(name):
    config = parse_train_config(['--preset', name])
    expected = {k: tuple(v) if isinstance(v, list) else v for k, v in PRESETS[name].items()}
    assert {k: getattr(config, k) for k in expected} == expected
    assert parse_train_config(['--preset', name, '--epochs', '7', '--alpha', '0.9']).alpha == 0.9


def test_the_authors_settings():
    scan, tpami = (parse_train_config(['--preset', name]) for name in ('byot-scan', 'byot-tpami'))
    assert (scan.alpha, scan.temperature, scan.square_temperature) == (0.5, 3.0, True)
    assert (scan.hint_weight, scan.hint_form, scan.hint_exits, scan.hint_linear) == (
        pytest.approx(5e-7 * 128, rel=1e-9), 'sum', 'all', False)
    assert (tpami.hint_weight, tpami.hint_form, tpami.hint_exits, tpami.hint_linear) == (
        pytest.approx(0.03 * 128 ** 0.5, rel=1e-5), 'norm', 'all-but-last', True)
    for config in (scan, tpami):
        assert (config.opt, config.weight_decay, config.decay_norms_and_biases) == ('momentum', 5e-4, True)
        assert config.mean == (0.4914, 0.4822, 0.4465) and config.std == (0.2023, 0.1994, 0.2010)
    assert (scan.exit_head, tpami.exit_head) == ('bottleneck-attention', 'separable-double')
    assert (scan.epochs, scan.decay_milestones, tpami.epochs, tpami.decay_milestones) == (
        200, (75, 130, 180), 250, (83, 166, 240))
    assert (tpami.alpha, tpami.temperature, tpami.square_temperature) == (0.3, 3.0, False)
    assert (tpami.aa, tpami.cutout, scan.aa, scan.cutout) == ('cifar10', 16, None, 0)


def test_defaults_of_teaching_depend_on_the_method():
    def distillation(*arguments):
        return distillation_config(parse_train_config(arguments))

    assert distillation().patriarch == 'plain'
    tsd = distillation('--patriarch', 'tsd')
    assert (tsd.patriarch, tsd.eta, tsd.tsd_k) == ('tsd', 0.6, 5)
    kd = distillation('--method', 'kd', '--teacher', 'resnet50')
    assert (kd.label_weight, kd.teacher_temperature, kd.alpha, kd.hint_weight) == (0.1, 4.0, 0., 0.)
    byot = distillation('--teacher', 'resnet50', '--label-weight', '0', '--alpha-end', '0.9')
    assert (byot.label_weight, byot.teacher_temperature, byot.alpha) == (0., 1.0, Linear(0.5, 0.9))
