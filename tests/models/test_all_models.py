"""Every name of timm gets exits. One model of every class is run for real, all others on the meta device."""
import csv
import re
import runpy
import subprocess
import sys
import tempfile

import pytest
import timm
import torch
from helpers import PAPER
from torch.overrides import TorchFunctionMode

from timm_selfdistill.hub.networks import save_model
from timm_selfdistill.models.probe import meta_copy
from timm_selfdistill.tasks import SelfDistillationModule

TABLE = {row['name']: row for row in csv.DictReader(open(PAPER / 'results' / 'timm_sweep.csv', newline=''))}

SWEEP = runpy.run_path(str(PAPER / 'sweep_early_exit.py'))
smallest_of_each_class = SWEEP['smallest_of_each_class']

# Branches that run side by side feed each other: a cut leaves layers that run although the exit needs them not. And
# EfficientViM keeps the four weights of its heads in the network itself.
SPARE_PARAMETERS = {'CrossVit', 'EfficientViM', 'EfficientViMDistilled', 'HighResolutionNet'}


class CheapRandom(TorchFunctionMode):
    """Leaves out the draws of weights that a test replaces anyway; they take minutes for hundreds of millions."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (torch.Tensor.normal_, torch.Tensor.uniform_, torch.Tensor.erfinv_):
            return args[0].zero_()
        return func(*args, **(kwargs or {}))


def create(name):
    """Create a network of seven classes whose every weight matters."""
    with CheapRandom():
        model = timm.create_model(name, num_classes=7)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            fan_in = max(1, p[0].numel()) if p.ndim else 1
            noise = torch.empty_like(p).normal_(generator=generator)
            # weights that keep the size of what they multiply, anything else, such as a scale of 1, moved a little
            p.copy_(noise.div_(fan_in ** 0.5)) if p.ndim > 1 else p.add_(noise.mul_(0.02))
    return model.eval()


def small_images(model):
    """Return an image of the smallest size that the network takes."""
    probe = meta_copy(model)
    channels, *own = model.pretrained_cfg['input_size']
    for size in (96, 112, 128, 160, 192):
        try:
            probe.forward_exits(torch.empty(1, channels, size, size, device='meta'))
        except (AssertionError, RuntimeError, ValueError):
            continue
        return torch.randn(1, channels, size, size)
    return torch.randn(1, channels, *own)


def test_the_table_has_every_name():
    names = [name for name in timm.list_models() if name.endswith('_sd')]
    assert len(names) >= 1371
    assert len(smallest_of_each_class()) >= 97
    assert set(TABLE) <= set(names)
    assert all(row['exits'] or 'no auxiliary exits' in row['problem'] for row in TABLE.values())
    assert sum(not row['exits'] for row in TABLE.values()) <= 2


@pytest.mark.models
@pytest.mark.parametrize('name', smallest_of_each_class())
def test_one_model_of_every_class(name):
    model = create(name)
    x = small_images(model)
    module = SelfDistillationModule(model).eval()
    logits, hints, deepest_features = module(x)

    assert len(logits) == model.num_exits
    assert all(z.shape == (1, 7) and z.isfinite().all() for z in logits)
    with torch.no_grad():
        assert not any(torch.equal(a, b) for a, b in zip(model.forward_exits(torch.randn_like(x)), logits))
    plain = model.backbone
    assert torch.equal(logits[-1], model(x))
    if model.head is None:
        assert torch.equal(logits[-1], plain(x))

    torch.stack([z.square().mean() for z in (*logits, *hints)]).sum().backward()
    assert deepest_features is None or deepest_features.shape == (1, model.head_hidden_size)
    assert [n for n, p in module.named_parameters() if p.grad is None] == []

    for k in range(model.num_exits - 1):
        network = model.truncate(k)
        cut = network(x)
        assert torch.equal(cut, logits[k])
        network.zero_grad()
        cut.square().mean().backward()
        spare = [n for n, p in network.named_parameters() if p.grad is None]
        assert not spare or type(plain).__name__ in SPARE_PARAMETERS, spare
    assert torch.equal(model.truncate(model.num_exits - 1)(x), logits[-1])

    with tempfile.TemporaryDirectory() as folder, torch.no_grad():  # pytest would keep gigabytes
        save_model(model, folder)
        with CheapRandom():
            loaded = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
        assert loaded.exits == model.exits
        assert all(torch.equal(a, b) for a, b in zip(loaded.forward_exits(x), model.forward_exits(x)))


EARLY_EXIT = {
    row['name']: row for row in csv.DictReader(open(PAPER / 'results' / 'early_exit_sweep.csv', newline=''))}


def test_the_table_of_early_exit_has_every_class():
    assert set(EARLY_EXIT) == set(smallest_of_each_class())
    assert sum(row['kind'] == 'whole' for row in EARLY_EXIT.values()) <= 2
    assert all(float(row['largest_difference']) < 1e-4 for row in EARLY_EXIT.values())


@pytest.mark.parametrize('name', [
    *(pytest.param(name, marks=pytest.mark.models) for name in smallest_of_each_class()[4::16]),
    *(pytest.param(name, marks=pytest.mark.sweep) for name in smallest_of_each_class()),
])
def test_images_leave_as_the_table_says(name):
    row = SWEEP['probe'](name)
    assert (row['kind'], row['how']) == (EARLY_EXIT[name]['kind'], EARLY_EXIT[name]['how'])
    assert float(row['largest_difference']) < 1e-4


def sweep(tmp_path, *arguments):
    """Run the recipe; return the table that it wrote and what it said."""
    path = tmp_path / 'sweep.csv'
    command = [sys.executable, str(PAPER / 'sweep.py'), '--output', str(path), *arguments]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    return list(csv.DictReader(open(path, newline=''))), run.stdout


def check(rows):
    for row in rows:
        committed = TABLE.get(row['name'])
        if committed is not None:
            assert (row['exits'], row['params_added']) == (committed['exits'], committed['params_added']), row['name']


@pytest.mark.models
def test_a_spread_of_the_sweep(tmp_path):
    rows, said = sweep(tmp_path, '--every', '90')
    assert len(rows) >= 16
    assert re.search(rf'{len(rows)} models, {len(rows)} built and run', said)
    check(rows)


@pytest.mark.sweep
def test_the_whole_sweep(tmp_path):
    rows, said = sweep(tmp_path)
    assert len(rows) >= 1371
    assert re.search(rf'{len(rows)} models, {len(rows)} built and run', said)
    check(rows)
