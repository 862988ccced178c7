"""Configs and weights of strangers: whatever is wrong with them is refused in words, before it does any harm."""
import json
import os
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from timm_selfdistill.errors import WeightsError
from timm_selfdistill.hub.networks import save_model
from timm_selfdistill.hub.sources import read_source

RULE = dict(
    num_classes=10,
    criterion='confidence',
    thresholds=[0.5, None],
    temperatures=[1., 1., 1.],
    ensemble=False,
)
GOOD = dict(num_classes=10, exits=(0, 1), early_exit=RULE)
NAN = float('nan')


@pytest.fixture(scope='module')
def good(tmp_path_factory):
    """A folder with nothing wrong."""
    folder = tmp_path_factory.mktemp('good')
    save_model(timm.create_model('resnet20_cifar_sd', **GOOD), folder)
    return folder


@pytest.fixture
def folder(good, tmp_path):
    """A copy of it, to be spoiled."""
    return Path(shutil.copytree(good, tmp_path / 'folder'))


def change(folder, part=None, /, **values):
    """Change entries of the config, or of a part of it."""
    config = json.loads((folder / 'config.json').read_text())
    (config if part is None else config[part]).update(values)
    (folder / 'config.json').write_text(json.dumps(config))


def create(folder):
    return timm.create_model(f'local-dir:{folder}', pretrained=True)


def rule(**values):
    return dict(early_exit=dict(RULE, **values))


# What stands in config.json instead, and what of it the message has to say, besides the folder and what is allowed.

ARGS = [
    (dict(num_classes=-1), 'num_classes = -1'),
    (dict(num_classes=10 ** 12), 'num_classes = 1000000000000'),
    (dict(num_classes=1e6), 'num_classes = 1000000.0'),
    (dict(num_classes=True), 'num_classes = True'),
    (dict(num_classes='10'), "num_classes = '10'"),
    (dict(img_size=10 ** 6), 'img_size = 1000000'),
    (dict(img_size=[32]), r'img_size = \[32\]'),
    (dict(img_size='32'), "img_size = '32'"),
    (dict(exits=10 ** 9), 'exits = 1000000000'),
    (dict(exits=[10 ** 9]), r'exits = \[1000000000\]'),
    (dict(exits=[[0], [1]]), r'exits = \[\[0\], \[1\]\]'),
    (dict(exits=dict(a=1)), "exits = {'a': 1}"),
    (dict(exits=[-1]), r'exits = \[-1\]'),
    (dict(exits=list(range(101))), r'exits = \[0, 1, 2'),
    (dict(exit_head=['linear']), r"exit_head = \['linear'\]"),
    (dict(truncate=10 ** 9), 'truncate = 1000000000'),
    (dict(truncate='1'), "truncate = '1'"),
    (dict(drop_rate=NAN), 'drop_rate = nan'),
    (dict(drop_path_rate=2), 'drop_path_rate = 2'),
    (dict(window_size=1000), 'window_size = 1000'),
    (dict(depth=10 ** 7), 'depth = 10000000'),
    (dict(layers=[10 ** 400] * 4), r'layers\[0\] = 1000'),
    (dict(layers=[60_000, 60_000]), r'layers\[1\] = 60000'),
    (dict(anything=[[[[[[[[[[1]]]]]]]]]]), 'anything'),
    (dict(anything=[None] * 100_000), 'anything'),
    (dict(anything='x' * 20_000), "anything = 'xxx"),
    (rule(thresholds=[NAN, 0.5]), r'early_exit.thresholds\[0\] = nan'),
    (rule(thresholds=[float('inf'), 0.5]), r'early_exit.thresholds\[0\] = inf'),
    (rule(temperatures=[1e300, 1., 1.]), r'early_exit.temperatures\[0\] = 1e\+300'),
    *((dict([(key, 'x')]), f"key '{key}'") for key in (
        'checkpoint_path', 'backbone_pretrained', 'features_only', 'device', 'dtype', 'model_cfg', 'pruned',
        'pretrained_model_args', 'kwargs', 'a b',
    )),
]
CFG = [
    (dict(url='http://example.org/x'), "url = 'http"),
    (dict(state_dict=dict(a=1)), 'state_dict = '),
    (dict(hf_hub_filename='../../x'), "hf_hub_filename = '../../x'"),
    (dict(custom_load=True), 'custom_load = True'),
    (dict(custom_load='hf'), "custom_load = 'hf'"),
    (dict(unknown=1), "unknown key, 'unknown'"),
    (dict(input_size=[3, 10 ** 9, 1]), 'input_size = .3, 1000000000'),
    (dict(mean=[]), r'mean = \[\]'),
    (dict(mean=[0.5, 0.5]), '2 values in pretrained_cfg.mean: expected 3'),
    (dict(mean=[NAN] * 3), r'mean = \[nan'),
    (dict(std=[0, 0, 0]), r'std = \[0, 0, 0\]'),
    (dict(interpolation='evil'), "interpolation = 'evil'"),
    (dict(crop_mode='evil'), "crop_mode = 'evil'"),
    (dict(crop_pct=float('inf')), 'crop_pct = inf'),
    (dict(fixed_input_size='yes'), "fixed_input_size = 'yes'"),
    (dict(classifier=['a', 5]), r"classifier = \['a', 5\]"),
    (dict(first_conv=5), 'first_conv = 5'),
    (dict(label_offset=-1), 'label_offset = -1'),
    (dict(license=['a']), 'license = '),
    (dict(notes=[1e9]), r'notes\[0\] = 1000000000'),
]
TOP = [
    (dict(num_classes=-1), 'num_classes = -1'),
    (dict(num_classes=2.5), 'num_classes = 2.5'),
    (dict(label_names=['a']), '1 label_names: expected 10, one for each'),
    (dict(label_names='abcdefghij'), "label_names = 'abcdefghij'"),
    (dict(label_names=[1] * 10), r'label_names = \[1'),
    (dict(label_descriptions=[1]), r'label_descriptions = \[1\]'),
]
CONFIGS = [
    *((None, *case) for case in TOP),
    *(('model_args', *case) for case in ARGS),
    *(('pretrained_cfg', *case) for case in CFG),
]


def name_of(value):
    return value.replace('\\', '').replace('/', '') if isinstance(value, str) else ''


@pytest.mark.parametrize('part, values, words', CONFIGS, ids=name_of)
def test_a_config_is_refused_for_a_value_before_anything_is_built(folder, part, values, words):
    change(folder, part, **values)
    (folder / 'model.safetensors').unlink()  # nobody gets as far as that
    for read in (lambda folder: read_source(f'local-dir:{folder}'), create):
        with pytest.raises(WeightsError, match=f'{folder}: (?=.*{words}).*(expected|unknown|no config may decide)'):
            read(folder)


# What timm makes of a folder before this package sees it: any error will do there, but here it has to be told well.
UNREADABLE = {
    'an array': ('[]', r'config.json = \[\]: expected a JSON object'),
    'no JSON': ('architecture: x', 'not JSON'),
    'cut off': ('{"architecture": "resnet20_cifar_sd", ', 'not JSON'),
    'bytes': (b'\xff\xfe\x00', 'not JSON'),
    'deep': ('[' * 100_000 + ']' * 100_000, 'not JSON'),
    'digits': (f'{{"architecture": {"1" * 10_000}}}', 'not JSON'),
    'large': (' ' * 9_000_000, 'has 9,000,000 bytes: expected 8,388,608 at most'),
    'nothing': ('{}', 'architecture = None'),
    'unknown': ('{"architecture": "nonsense_sd"}', 'architecture = nonsense_sd: timm knows no such model'),
    'path': ('{"architecture": "../../x"}', "architecture = '../../x': expected the name of a timm model"),
    'module': ('{"architecture": "os.system"}', "architecture = 'os.system': expected the name of a timm model"),
    'number': ('{"architecture": 3}', 'architecture = 3: expected the name of a timm model'),
    'list': ('{"architecture": ["resnet20_cifar_sd"]}', 'architecture = .*: expected the name of a timm model'),
    'args': ('{"architecture": "resnet18_sd", "pretrained_cfg": {}, "model_args": 1}', 'model_args = 1: expected'),
    'cfg': ('{"architecture": "resnet18_sd", "pretrained_cfg": []}', r'pretrained_cfg = \[\]: expected'),
    'timm args': (
        '{"architecture": "resnet20_cifar_sd", "pretrained_cfg": {}, "model_args": {"cache_dir": "/x"}}',
        "key 'cache_dir', which no config may decide",
    ),
    'older format': ('{"architecture": "resnet20_cifar_sd", "custom_load": true}', 'custom_load = True: expected'),
    'older, unknown': ('{"architecture": "resnet20_cifar_sd", "x": true}', "unknown key, 'x'"),
    'older, classes': ('{"architecture": "resnet20_cifar_sd", "num_classes": 0.5}', 'num_classes = 0.5: expected'),
}


@pytest.mark.parametrize('text, words', UNREADABLE.values(), ids=UNREADABLE)
def test_a_config_is_refused_that_timm_itself_cannot_read(folder, text, words):
    (folder / 'config.json').write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(WeightsError, match=f'{folder}: .*{words}'):
        read_source(f'local-dir:{folder}')
    with pytest.raises((ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)):
        create(folder)


def test_a_config_that_is_no_file_is_not_read(folder):
    (folder / 'config.json').unlink()
    with pytest.raises(FileNotFoundError, match=f'{folder}: there is no config.json'):
        read_source(f'local-dir:{folder}')
    os.mkfifo(folder / 'config.json')  # whoever opens it waits for ever
    with pytest.raises(FileNotFoundError, match=f'{folder}: there is no config.json'):
        read_source(f'local-dir:{folder}')


NETWORKS = [
    ('model_args', dict(num_classes=10 ** 6), 'has num_classes = 10, .*: expected the 1,000,000 classes'),
    (None, dict(num_classes=20), 'backbone.head.fc.weight is 10×64: expected 20×64'),
    ('pretrained_cfg', dict(label_offset=1), 'label_offset = 1: expected .* no offset'),
    ('model_args', dict(in_chans=1024), '16×3×3×3: expected 16×1024×3×3'),
    ('model_args', dict(img_size=64), 'img_size=64: .* takes no img_size'),
    ('model_args', dict(exits=1000), 'exits=1000: .* 0 to 5 auxiliary exits'),
    ('model_args', dict(exits=[1, 0]), r'exits=\(1, 0\): indices must increase'),
    ('model_args', dict(exits=[0], early_exit=None), 'holds unknown tensors, .*exit_heads'),
    ('model_args', dict(exits=[0, 1, 2], early_exit=None), 'lacks .*exit_heads'),
    ('model_args', dict(exit_head='evil'), "exit_head='evil': unknown, expected one of"),
    ('model_args', dict(exit_head='linear'), 'unknown tensors'),
    ('model_args', dict(truncate=50), 'exit 50: .* has the exits 0 to 2'),
    ('model_args', dict(truncate=0), 'lacks .*head'),
    ('model_args', dict(block='os.system'), 'no network that can be built: TypeError'),
    *(('model_args', dict([(key, 'x')]), f"unexpected keyword argument '{key}'") for key in ('url', '__class__')),
    ('model_args', dict(base='resnet50'), "multiple values for argument 'base'"),
    ('model_args', rule(thresholds=[0.5]), r'thresholds=\[0.5\]: 1 given .* expected 2'),
    ('model_args', rule(thresholds=[0.5, 2]), r'thresholds=\[0.5, 2\]: 2 is out of range for confidence, .* 0 to 1'),
    ('model_args', rule(criterion='evil'), "criterion='evil': unknown, expected one of"),
    ('model_args', rule(temperatures=[0., 1., 1.]), '0.0 is no temperature, expected a number above 0'),
    ('model_args', rule(unknown=1), 'expected a dict with the keys criterion'),
    ('model_args', dict(early_exit=[1]), r'early_exit=\[1\]: expected a dict'),
]


@pytest.mark.parametrize('part, values, words', NETWORKS, ids=name_of)
def test_a_config_is_refused_for_a_network_that_cannot_be_built_or_is_not_that_of_the_weights(
        folder, part, values, words):
    change(folder, part, **values)
    with pytest.raises(WeightsError, match=f'{folder}: .*{words}'):
        create(folder)


def test_sources_that_a_config_names_are_not_followed(folder, good):
    change(folder, 'pretrained_cfg', file=str(good / 'elsewhere'), hf_hub_id='stranger/net', source='url')
    assert torch.equal(create(folder).get_classifier().weight, create(good).get_classifier().weight)


# -- weights ----------------------------------------------------------------------------------------------------------


class _Touch:
    """Pickled, it is a call that writes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def plant_pickle(folder, *names):
    for name in names:
        torch.save(dict(weight=_Touch(folder / 'touched')), folder / name)


def only_pickles(folder):
    (folder / 'model.safetensors').unlink()
    plant_pickle(folder, 'pytorch_model.bin', 'model.pth', 'checkpoint.pt', 'model_ema.bin')


def change_tensors(change):
    """Return what spoils the tensors of a folder."""
    def spoil(folder):
        tensors = load_file(folder / 'model.safetensors')
        change(tensors)
        save_file(tensors, folder / 'model.safetensors')
    return spoil


def put(name, make):
    return change_tensors(lambda tensors: tensors.update({name: make(tensors.get(name))}))


def change_header(change):
    """Return what spoils the header of a folder's weights."""
    def spoil(folder):
        data = (folder / 'model.safetensors').read_bytes()
        size, = struct.unpack('<Q', data[:8])
        header = change(json.loads(data[8:8 + size]))
        header = header if isinstance(header, bytes) else json.dumps(header).encode()
        (folder / 'model.safetensors').write_bytes(struct.pack('<Q', len(header)) + header + data[8 + size:])
    return spoil


def overlap(header):
    header['backbone.head.fc.bias']['data_offsets'] = header['exit_heads.0.fc.bias']['data_offsets']
    return header


def outside(header):
    header['backbone.head.fc.bias']['data_offsets'] = [10 ** 15, 10 ** 15 + 40]
    return header


def retype(header):
    header['backbone.head.fc.bias'].update(dtype='I32')
    return header


def overwrite(data):
    return lambda folder: (folder / 'model.safetensors').write_bytes(data)


def truncate(folder):
    with (folder / 'model.safetensors').open('r+b') as f:
        f.truncate(100_000)


def be_folder(folder):
    (folder / 'model.safetensors').unlink()
    (folder / 'model.safetensors').mkdir()


def point_nowhere(folder):
    (folder / 'model.safetensors').unlink()
    (folder / 'model.safetensors').symlink_to('../../nothing')


def point_to_device(folder):
    (folder / 'model.safetensors').unlink()
    (folder / 'model.safetensors').symlink_to('/dev/zero')


def point_to_other(folder):
    (folder / 'secret.txt').write_text('secret ' * 100)
    (folder / 'model.safetensors').unlink()
    (folder / 'model.safetensors').symlink_to('secret.txt')


BIAS, NO_FILE, NOT_SAFE = 'backbone.head.fc.bias', 'there is no model.safetensors', 'no (complete )?safetensors file'
WEIGHTS = {
    'none': (lambda folder: (folder / 'model.safetensors').unlink(), NO_FILE),
    'only pickles': (only_pickles, f'{NO_FILE}. Other files .* are not read, as they may hold code'),
    'a folder of that name': (be_folder, NO_FILE),
    'a link to nothing': (point_nowhere, NO_FILE),
    'a link to a device': (point_to_device, NO_FILE),
    'a link to something else': (point_to_other, NOT_SAFE),
    'a renamed pickle': (lambda folder: plant_pickle(folder, 'model.safetensors'), NOT_SAFE),
    'empty': (overwrite(b''), NOT_SAFE),
    'cut off': (truncate, NOT_SAFE),
    'a header longer than the file': (overwrite(struct.pack('<Q', 2 ** 20) + b'{}'), NOT_SAFE),
    'an absurd header': (overwrite(struct.pack('<Q', 2 ** 63 - 1) + b'{}'), 'expected 16,777,216 at most'),
    'no header': (change_header(lambda header: b'nonsense'), NOT_SAFE),
    'overlapping tensors': (change_header(overlap), NOT_SAFE),
    'a tensor outside': (change_header(outside), NOT_SAFE),
    'a tensor twice': (
        change_header(lambda header: json.dumps(header)[:-1].encode() + b', "x": {}, "x": {}}'), NOT_SAFE),
    'another type': (change_header(retype), f'{BIAS} has the type I32: expected torch.float32'),
    'complex': (put(BIAS, lambda t: t.to(torch.complex64)), f'{BIAS} has the type C64: expected torch.float32'),
    'float for counts': (
        put('backbone.stem.bn.num_batches_tracked', lambda t: t.float()), 'has the type F32: expected torch.int64'),
    'a tensor less': (change_tensors(lambda tensors: tensors.pop(BIAS)), f"lacks '{BIAS}'"),
    'a tensor more': (put('../../evil', lambda t: torch.zeros(3)), "unknown tensors, '../../evil'"),
    'another shape': (put(BIAS, lambda t: torch.zeros(11)), f'{BIAS} is 11: expected 10'),
    'a dimension more': (put(BIAS, lambda t: t[None]), f'{BIAS} is 1×10: expected 10'),
    'an empty tensor': (put(BIAS, lambda t: t[:0]), f'{BIAS} is 0: expected 10'),
    'another network': (
        lambda folder: save_file(timm.create_model('test_resnet').state_dict(), folder / 'model.safetensors'), 'lacks'),
}


@pytest.mark.parametrize('spoil, words', WEIGHTS.values(), ids=WEIGHTS)
def test_weights_are_refused_that_are_no_safetensors_or_do_not_fit(folder, spoil, words):
    spoil(folder)
    plant_pickle(folder, 'pytorch_model.bin')
    with pytest.raises(WeightsError, match=f'^local-dir:{folder}: .*{words}'):
        create(folder)
    assert not (folder / 'touched').exists(), 'code of a stranger ran'


def test_the_pickle_of_these_tests_would_do_harm_if_anyone_read_it(folder):
    plant_pickle(folder, 'pytorch_model.bin')
    torch.load(folder / 'pytorch_model.bin', weights_only=False)
    assert (folder / 'touched').exists()


# -- memory and time --------------------------------------------------------------------------------------------------

# Loads folder after folder; says what the error was, how long it took, and what memory the worst of them took.
LOAD = """
import json, logging, resource, sys, time
import timm, timm_selfdistill
from timm_selfdistill.hub.sources import read_source

logging.disable()
def peak():
    # not ru_maxrss, which starts with what the parent had
    with open('/proc/self/status') as f:
        return next(int(line.split()[1]) for line in f if line.startswith('VmHWM')) // 1024
out = {}
good, *folders = sys.argv[1:]
timm.create_model('local-dir:' + good, pretrained=True)
with open('/proc/self/statm') as f:  # should the checks fail, the machine must not suffer
    most = int(f.read().split()[0]) * resource.getpagesize() + 4 * 2 ** 30
resource.setrlimit(resource.RLIMIT_AS, (most, most))
for folder in folders:
    before, start = peak(), time.process_time()
    errors = []
    for pretrained in (True, False):
        try:
            read_source('local-dir:' + folder)
            timm.create_model('local-dir:' + folder, pretrained=pretrained)
            errors.append('none')
        except Exception as e:
            errors.append(f'{type(e).__name__}: {e}')
    out[folder] = errors, time.process_time() - start, peak() - before
print(json.dumps(out))
"""
SMALL = dict(swin_tiny_patch4_window7_224=dict(embed_dim=24, depths=(2, 1, 1, 1)))
BLOATED = {
    'swin masks': ('swin_tiny_patch4_window7_224', dict(img_size=8192), 'network of .* bytes'),  # 1.2 GB of them
    'vit positions': ('test_vit', dict(img_size=8192, patch_size=1), 'is .*: expected', 'network of .* bytes'),
    'vit depth': ('test_vit', dict(depth=99_999), 'network of more than .* parameters'),
    'vit width': ('test_vit', dict(embed_dim=99_999, num_heads=1), 'is .*: expected', 'network of .* bytes'),
    'resnet layers': ('test_resnet', dict(layers=[20_000] * 4), 'network of more than .* parameters'),
    'resnet width': ('test_resnet', dict(channels=[20_000] * 4), 'lacks', 'network of .* bytes'),
    'convnext layers': ('test_convnext', dict(depths=[20_000] * 4), 'network of more than .* parameters'),
    'convnext width': ('test_convnext', dict(dims=[20_000] * 4), 'is .*: expected', 'network of .* bytes'),
    'classes': ('test_resnet', dict(num_classes=10 ** 7), 'classes'),
    'truncated': ('test_vit', dict(depth=99_999, truncate=0), 'network of more than .* parameters'),
    'truncated, wide': (
        'test_convnext', dict(dims=[24, 32, 48, 20_000], exits=[0, 1], truncate=0), 'network of .* bytes'),
}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != 'linux', reason='counts memory as Linux does')
def test_no_config_or_header_takes_much_memory_or_time(good, tmp_path):
    words = {}

    def new(name, *expected):
        words[str(tmp_path / name)] = expected
        return Path(shutil.copytree(good, tmp_path / name))

    saved = {}
    for name, (base, args, *expected) in BLOATED.items():
        kept = SMALL.get(base, {}) | ({k: args[k] for k in ('exits', 'truncate')} if 'exits' in args else {})
        key = (base, *kept)
        if key not in saved:
            saved[key] = tmp_path / '-'.join(key)
            save_model(timm.create_model(f'{base}_sd', **kept), saved[key])
        change(shutil.copytree(saved[key], tmp_path / name), 'model_args', **args)
        words[str(tmp_path / name)] = expected
    for name, junk in {'objects': '{},', 'numbers': '1.5,', 'lists': '[' * 100}.items():
        text = (new(name, 'unknown key|not JSON') / 'config.json').read_text()
        text = text.replace('"crop_pct"', f'"x": [{junk * (8_000_000 // len(junk))}0], "crop_pct"')
        (tmp_path / name / 'config.json').write_text(text)
    header = json.dumps({f't{i}': dict(dtype='F32', shape=[0], data_offsets=[0, 0]) for i in range(230_000)}).encode()
    (new('header', 'lacks', 'none') / 'model.safetensors').write_bytes(struct.pack('<Q', len(header)) + header)
    (new('sparse', NOT_SAFE, 'none') / 'model.safetensors').write_bytes(struct.pack('<Q', 2 ** 24))
    os.truncate(tmp_path / 'sparse' / 'model.safetensors', 10 ** 9)

    done = subprocess.run([sys.executable, '-c', LOAD, good, *words], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for folder, (errors, seconds, grown) in json.loads(done.stdout.splitlines()[-1]).items():
        for error, expected in zip(errors, (words[folder][0], words[folder][-1])):
            expected = expected if expected == 'none' else f'WeightsError: local-dir:{folder}: .*({expected})'
            assert re.match(expected, error), errors
        assert grown < 300 and seconds < 10, f'{folder}: {grown} MiB, {seconds:.1f} s'


# -- what is not refused ----------------------------------------------------------------------------------------------

KINDS = {
    'as it is': ('resnet20_cifar_sd', {}),
    'exits and a rule': ('resnet20_cifar_sd', GOOD),
    'no exits': ('resnet20_cifar_sd', dict(exits=())),
    'another head': ('resnet20_cifar_sd', dict(exit_head='cascade', drop_rate=0.1)),
    'truncated': ('resnet20_cifar_sd', dict(truncate=1)),
    'truncated at a head that needs the earlier ones': ('resnet20_cifar_sd', dict(truncate=1, exit_head='cascade')),
    'truncated at the end': ('resnet20_cifar_sd', dict(truncate=2, exits=2)),
    'one channel': ('resnet20_cifar_sd', dict(in_chans=1)),
    'five channels': ('resnet20_cifar_sd', dict(in_chans=5)),
    'no classes': ('resnet20_cifar_sd', dict(num_classes=0)),
    'many classes': ('resnet20_cifar_sd', dict(num_classes=21_843)),
    'size of images': ('test_vit_sd', dict(img_size=96, num_classes=3)),
    'size of images, oblong': ('test_vit_sd', dict(img_size=(96, 128))),
    'other depth': ('test_vit_sd', dict(depth=20, exits=5)),
    'other widths': ('test_convnext_sd', dict(dims=(16, 24, 32, 400))),
    'masks of attention': (
        'swin_tiny_patch4_window7_224_sd', dict(embed_dim=24, depths=(1, 2, 1, 1), img_size=288, window_size=9)),
    'other arguments': ('test_vit_sd', dict(global_pool='avg', init_values=1e-5)),
}


@pytest.mark.parametrize('name, args', KINDS.values(), ids=KINDS)
def test_good_weights_are_loaded(tmp_path, name, args):
    network = timm.create_model(name, **args)
    save_model(network, tmp_path, label_names=[f'class {i}' for i in range(network.num_classes)])
    read_source(f'local-dir:{tmp_path}')
    loaded = create(tmp_path)
    assert type(loaded) is type(network)
    for (key, tensor), (other, expected) in zip(loaded.state_dict().items(), network.state_dict().items(), strict=True):
        assert key == other and torch.equal(tensor, expected)


def test_who_loads_good_weights_may_ask_for_other_classes_or_none_of_the_weights(good):
    assert timm.create_model(f'local-dir:{good}', pretrained=True, num_classes=7).num_classes == 7
    assert timm.create_model(f'local-dir:{good}').num_classes == 10


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_good_weights_may_be_of_another_precision(folder, dtype):
    change_tensors(lambda tensors: tensors.update(
        {k: v.to(dtype) for k, v in tensors.items() if v.is_floating_point()}))(folder)
    expected = load_file(folder / 'model.safetensors')[BIAS]
    assert torch.equal(create(folder).get_classifier().bias, expected.float())


def test_weights_may_be_a_link_as_in_the_cache_of_the_hub(folder, tmp_path):
    (folder / 'model.safetensors').rename(tmp_path / 'blob')
    (folder / 'model.safetensors').symlink_to('../blob')
    create(folder)


@pytest.mark.parametrize('nested', [True, False], ids=['today', 'older'])
def test_configs_of_networks_without_exits_are_read_in_both_of_timms_formats(folder, nested):
    cfg = dict(
        tag='a1_in1k', custom_load=False, input_size=[3, 224, 224], test_input_size=[3, 288, 288], crop_pct=0.95,
        fixed_input_size=False, interpolation='bicubic', crop_mode='center', mean=[0.485, 0.456, 0.406],
        std=[0.229, 0.224, 0.225], num_classes=1000, pool_size=[7, 7], first_conv='conv1', classifier='fc',
        origin_url='https://example.org', paper_ids=['arXiv:2110.00476', 'arXiv:1512.03385'], license='apache-2.0',
    )
    config = dict(architecture='resnet50', num_classes=1000, num_features=2048)
    config.update(dict(pretrained_cfg=cfg) if nested else cfg)
    (folder / 'config.json').write_text(json.dumps(config))
    read, architecture, args = read_source(f'local-dir:{folder}')
    assert architecture == 'resnet50' and args == {} and cfg.items() <= read.items()
