import random
from collections import Counter
from collections.abc import Sized

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from helpers.images import noise_images
from PIL import Image

from timm_selfdistill.data.source import DataSource, Shard
from timm_selfdistill.data.streamed_loader import create_streamed_eval_loader, create_streamed_train_loader
from timm_selfdistill.data.streaming import StreamedSplit, load_streamed_data
from timm_selfdistill.errors import DataError, StreamError, UnreadableImageError

FEATURES = datasets.Features(img=datasets.Image(), label=datasets.ClassLabel(names=['ant', 'bee', 'cat']))
FEW, MANY = (7, 30, 13, 10), (3, 6, 5, 4, 9, 5, 8, 3, 6, 4, 2, 5)  # rows of the shards, both 60 together


def number_image(number):
    return Image.new('RGB', (4, 4), (number // 256, number % 256, 7))


def number_and_draws(image):
    """A transform that shows which image it was given, and draws from every generator that transforms draw from."""
    red, green, _ = image.getpixel((0, 0))
    draws = [torch.rand(()).item(), random.random(), np.random.rand()]  # noqa: NPY002
    return torch.tensor([[[red * 256 + green, *draws]]], dtype=torch.float64)


def write_shards(folder, sizes, part='train', label=lambda number: number % 3, features=FEATURES):
    folder.mkdir(parents=True, exist_ok=True)
    number = 0
    for i, size in enumerate(sizes):
        numbers = range(number, number + size)
        rows = dict(img=[number_image(n) for n in numbers], label=[label(n) for n in numbers])
        datasets.Dataset.from_dict(rows, features=features).to_parquet(
            folder / f'{part}-{i:05d}-of-{len(sizes):05d}.parquet')
        number += size
    return str(folder)


@pytest.fixture(scope='module')
def parts(tmp_path_factory):
    folders = {sizes: tmp_path_factory.mktemp('shards') for sizes in (FEW, MANY)}
    return {
        sizes: load_streamed_data(DataSource(data_dir=write_shards(folder, sizes))).train
        for sizes, folder in folders.items()
    }


def batches(part, epoch=0, start=0, batch_size=12, **kwargs):
    loader = create_streamed_train_loader(part, number_and_draws, batch_size, shuffle_buffer=8, **kwargs)
    loader.batch_sampler.set_epoch(epoch, start)
    found = list(loader)
    assert len(found) == len(loader)
    return found


def all_ranks(part, world_size, **kwargs):
    return [batches(part, shard=Shard(rank, world_size), **kwargs) for rank in range(world_size)]


def numbers(found):
    return [int(n) for images, labels in found for n in images[:, 0, 0, 0]]


def same(some, others):
    return len(some) == len(others) and all(
        torch.equal(a, b) for batch, other in zip(some, others) for a, b in zip(batch, other))


@pytest.mark.parametrize('ranks, workers, accumulate', [(1, 0, 1), (1, 2, 1), (2, 0, 2), (2, 3, 1)])
def test_few_shards_give_the_same_steps_whoever_reads_them(parts, ranks, workers, accumulate):
    alone = batches(parts[FEW])
    shares = all_ranks(parts[FEW], ranks, workers=workers, accumulate=accumulate)
    assert {len(share) for share in shares} == {5 * accumulate}
    for step, (images, labels) in enumerate(alone):
        slices = [batch for share in shares for batch in share[step * accumulate:(step + 1) * accumulate]]
        assert {len(batch[1]) for batch in slices} == {12 // ranks // accumulate}
        assert torch.equal(torch.cat([batch[0] for batch in slices]), images)
        assert torch.equal(torch.cat([batch[1] for batch in slices]), labels)
    assert sorted(numbers(alone)) == list(range(60))
    assert all(int(n) % 3 == label for images, labels in alone for n, label in zip(images[:, 0, 0, 0], labels))


@pytest.mark.parametrize('ranks, workers', [(2, 0), (2, 2), (4, 0), (2, 3), (3, 2)])
def test_processes_have_shards_of_their_own_and_as_many_batches(parts, ranks, workers):
    owners = np.repeat(np.arange(len(MANY)), MANY)
    dealt = []
    for epoch in (0, 1):
        shares = all_ranks(parts[MANY], ranks, workers=workers, epoch=epoch)
        assert {len(share) for share in shares} == {5}
        assert {len(labels) for share in shares for _, labels in share} == {12 // ranks}
        shards = [{owners[n] for n in numbers(share)} for share in shares]
        assert sum(map(len, shards)) == len(set.union(*shards)) >= len(MANY) - 2  # none on two processes
        dealt.append(shards)
    assert dealt[0] != dealt[1]


@pytest.mark.parametrize('ranks, workers, batch_size', [(1, 2, 10), (2, 2, 10), (4, 0, 20)])
def test_shards_of_a_size_are_read_to_the_end_once(tmp_path, ranks, workers, batch_size):
    part = load_streamed_data(DataSource(data_dir=write_shards(tmp_path, (5,) * 12))).train
    shares = all_ranks(part, ranks, workers=workers, batch_size=batch_size)
    assert sorted(sum(map(numbers, shares), [])) == list(range(60))


def test_workers_that_share_the_shards_of_a_process_share_its_examples(parts):
    # twelve shards are enough for two processes, but not for six workers
    for rank in range(2):
        without = batches(parts[MANY], shard=Shard(rank, 2))
        assert same(batches(parts[MANY], shard=Shard(rank, 2), workers=3), without)
    with_own_shards = batches(parts[MANY], shard=Shard(1, 2), workers=2)
    assert not same(with_own_shards, without)


def test_whoever_comes_to_the_end_begins_again_in_another_order(tmp_path):
    folder = write_shards(tmp_path, (5, 5))
    part = load_streamed_data(DataSource(data_dir=folder, images_per_epoch=30)).train
    assert len(part) == 30
    found = numbers(batches(part, batch_size=10))
    passes = [found[:10], found[10:20], found[20:]]
    assert [sorted(p) for p in passes] == [list(range(10))] * 3
    assert passes[0] != passes[1] != passes[2]
    draws = torch.cat([images[:, 0, 0, 1] for images, _ in batches(part, batch_size=10)])
    assert len(draws.unique()) == 30


def test_part_of_the_images_can_count_as_an_epoch(tmp_path):
    folder = write_shards(tmp_path, FEW)
    part = load_streamed_data(DataSource(data_dir=folder, images_per_epoch=24)).train
    epochs = [numbers(batches(part, epoch=epoch)) for epoch in range(6)]
    assert all(len(set(epoch)) == len(epoch) == 24 for epoch in epochs)
    assert len(set().union(*epochs)) > 36


def test_order_and_draws_are_functions_of_seed_and_epoch(parts):
    for part in parts.values():
        first = batches(part, epoch=3, seed=5)
        torch.rand(3), random.random(), np.random.rand()  # noqa: NPY002
        assert same(batches(part, epoch=3, seed=5), first)
        for other in (batches(part, epoch=4, seed=5), batches(part, epoch=3, seed=6)):
            assert numbers(other) != numbers(first)
            draws = torch.cat([images[:, 0, 0, 1] for images, _ in first + other])
            assert len(draws.unique()) == 120
    assert numbers(first) != sorted(numbers(first))


def test_loading_leaves_the_generators_alone(parts):
    torch.manual_seed(3), random.seed(3), np.random.seed(3)  # noqa: NPY002
    expected = torch.rand(1).item(), random.random(), np.random.rand()  # noqa: NPY002
    torch.manual_seed(3), random.seed(3), np.random.seed(3)  # noqa: NPY002
    batches(parts[FEW])
    list(create_streamed_eval_loader(parts[FEW], lambda image: torch.zeros(1), 8))
    assert (torch.rand(1).item(), random.random(), np.random.rand()) == expected  # noqa: NPY002


@pytest.mark.parametrize('sizes, kwargs', [
    (FEW, dict(workers=3)),
    (FEW, dict(shard=Shard(1, 2), accumulate=3, workers=2)),
    (MANY, dict(shard=Shard(1, 2), accumulate=3, workers=2)),
    (MANY, dict(workers=4)),
    (MANY, dict(shard=Shard(0, 2), workers=3)),
])
def test_a_start_amid_the_epoch_gives_the_same_rest(parts, sizes, kwargs):
    accumulate = kwargs.get('accumulate', 1)
    whole = batches(parts[sizes], epoch=2, **kwargs)
    for start in (1, 2, 4):
        rest = batches(parts[sizes], epoch=2, start=start, **kwargs)
        assert same(rest, whole[start * accumulate:])


def test_what_is_skipped_is_not_decoded(parts, monkeypatch):
    decoded = Counter()
    decode = StreamedSplit.image

    def image(self, example):
        decoded['images'] += 1
        return decode(self, example)

    monkeypatch.setattr(StreamedSplit, 'image', image)
    batches(parts[FEW], start=3, shard=Shard(1, 2))
    assert decoded['images'] == 2 * 6


@pytest.mark.parametrize('sizes', [FEW, MANY])
@pytest.mark.parametrize('ranks, workers', [(1, 0), (2, 0), (3, 2), (2, 3)])
def test_evaluation_sees_every_example_once(parts, sizes, ranks, workers):
    found = []
    for rank in range(ranks):
        loader = create_streamed_eval_loader(
            parts[sizes], number_and_draws, 8, workers=workers, shard=Shard(rank, ranks))
        share = list(loader)
        assert all(0 < len(labels) <= 8 for _, labels in share)
        found += share
    assert sorted(numbers(found)) == list(range(60))
    assert all(int(n) % 3 == label for images, labels in found for n, label in zip(images[:, 0, 0, 0], labels))


@pytest.mark.parametrize('kwargs, message', [
    (dict(batch_size=64), '`batch_size=64` is more than the 60 training images'),
    (dict(batch_size=9, shard=Shard(0, 2)), '`batch_size=9`: expected a multiple of the number of processes, 2'),
])
def test_batches_that_cannot_be_are_refused(parts, kwargs, message):
    with pytest.raises(DataError, match=message):
        create_streamed_train_loader(parts[FEW], number_and_draws, **kwargs)


# -- opening -----------------------------------------------------------------------------------------------------------


def test_parquet_files_tell_their_length_and_classes(tmp_path):
    write_shards(tmp_path / 'set', FEW)
    folder = write_shards(tmp_path / 'set', (4, 5), part='test')
    data = load_streamed_data(DataSource(data_dir=folder, in_chans=1))
    assert {name: len(part) for name, part in data.splits().items()} == dict(train=60, test=9)  # nothing is held out
    assert (data.name, data.num_classes, data.label_names) == ('set', 3, ['ant', 'bee', 'cat'])
    assert data.image_size == (4, 4)
    assert data.mirrored
    assert data.train.image(next(data.train.examples([1]))).mode == 'L'


def test_a_description_tells_the_length(tmp_path):
    folder = write_shards(tmp_path, (4, 5))
    (tmp_path / 'README.md').write_text(
        '---\ndataset_info:\n  splits:\n  - name: train\n    num_bytes: 1\n    num_examples: 1234\n---\n')
    assert len(load_streamed_data(DataSource(dataset=folder)).train) == 1234


def test_arrow_files_do_not_tell_their_length(tmp_path):
    for part in ('train', 'validation'):
        rows = dict(img=[number_image(n) for n in range(20)], label=[n % 3 for n in range(20)])
        with datasets.arrow_writer.ArrowWriter(path=str(tmp_path / f'{part}.arrow'), features=FEATURES) as writer:
            for img, label in zip(rows['img'], rows['label']):
                writer.write(FEATURES.encode_example(dict(img=img, label=label)))
            writer.finalize()
    with pytest.raises(DataError, match='`images_per_epoch`: how many training images .* is not known'):
        load_streamed_data(DataSource(data_dir=str(tmp_path)))
    data = load_streamed_data(DataSource(data_dir=str(tmp_path), images_per_epoch=16))
    assert len(data.train) == 16
    assert not isinstance(data.validation, Sized)
    assert data.validation  # and still a part like any other
    found = list(create_streamed_eval_loader(data.validation, number_and_draws, 8))
    assert sorted(numbers(found)) == list(range(20))


def test_image_folders_are_not_read_class_by_class(tmp_path):
    for name in ('ant', 'bee', 'cat'):
        (tmp_path / 'train' / name).mkdir(parents=True)
        for i in range(20):
            number_image(i).save(tmp_path / 'train' / name / f'{i}.png')
    data = load_streamed_data(DataSource(data_dir=str(tmp_path)))
    assert (len(data.train), data.label_names) == (60, ['ant', 'bee', 'cat'])
    [(_, labels)] = create_streamed_eval_loader(data.train, number_and_draws, 60)
    assert torch.bincount(labels).tolist() == [20, 20, 20]
    assert len(labels[:12].unique()) == 3
    path = tmp_path / 'train' / 'bee' / '3.png'
    path.write_bytes(b'no image')
    with pytest.raises(UnreadableImageError, match=r'Cannot read the image in example \d+ of shard 0 .*bee/3.png\)'):
        batches(data.train)


def test_saved_data_sets_and_digits(tmp_path):
    rows = dict(img=noise_images(20), label=[0, 1] * 10)
    datasets.DatasetDict(train=datasets.Dataset.from_dict(rows, features=FEATURES)).save_to_disk(tmp_path / 'saved')
    assert len(load_streamed_data(DataSource(data_dir=str(tmp_path / 'saved'))).train) == 20
    data = load_streamed_data()
    assert {name: len(part) for name, part in data.splits().items()} == dict(train=1250, validation=183, test=364)
    assert not data.mirrored


INTEGERS = datasets.Features(img=datasets.Image(), label=datasets.Value('int64'))


def test_whole_numbers_need_the_number_of_classes(tmp_path):
    folder = write_shards(tmp_path / 'set', (12, 12), features=INTEGERS)
    table = datasets.Dataset.from_parquet(f'{folder}/train-00000-of-00002.parquet')
    (tmp_path / 'arrow').mkdir()
    with datasets.arrow_writer.ArrowWriter(
            path=str(tmp_path / 'arrow' / 'train.arrow'), features=table.features) as writer:
        writer.write_table(table.data.table)
        writer.finalize()
    with pytest.raises(DataError, match='`num_classes`: column label of arrow holds whole numbers'):
        load_streamed_data(DataSource(data_dir=str(tmp_path / 'arrow')))
    data = load_streamed_data(DataSource(data_dir=str(tmp_path / 'arrow'), num_classes=3, images_per_epoch=12))
    assert (data.num_classes, data.label_names) == (3, None)
    data = load_streamed_data(DataSource(data_dir=folder))  # parquet files tell which labels there are
    assert (data.num_classes, data.label_names) == (3, None)


def test_texts_and_labels_of_another_order_are_matched_by_name(tmp_path):
    texts = datasets.Features(img=datasets.Image(), label=datasets.Value('string'))
    folder = write_shards(tmp_path, (9, 9), label=lambda n: 'cat ant bee'.split()[n % 3], features=texts)
    turned = datasets.Features(img=datasets.Image(), label=datasets.ClassLabel(names=['cat', 'bee', 'ant']))
    write_shards(tmp_path, (6,), part='test', features=turned)
    data = load_streamed_data(DataSource(data_dir=folder))
    assert data.label_names == ['ant', 'bee', 'cat']
    assert labels_met(data.train) == {0: 2, 1: 0, 2: 1}
    assert labels_met(data.test) == {0: 2, 1: 1, 2: 0}
    known = load_streamed_data(DataSource(data_dir=folder, class_names=['bee', 'cat', 'dog', 'ant']))
    assert labels_met(known.train) == {0: 1, 1: 3, 2: 0}
    few = load_streamed_data(DataSource(data_dir=folder, class_names=['bee', 'cat']))
    with pytest.raises(StreamError, match='Label ant in example 1 of shard 0 of the train split.*one of bee, cat'):
        labels_met(few.train)


def labels_met(part):
    """Return the labels that images get, by the remainder of their number by three."""
    items = (part.item(example, number_and_draws) for example in part.examples(range(part.shards)))
    return {int(image[0, 0, 0]) % 3: label for image, label in items}


@pytest.mark.slow
@pytest.mark.parametrize('bad, workers, message', [
    (3, 0, 'Label 3 in example 2 of shard 1 of the train split is out of range: expected 0 to 2'),
    (-1, 1, 'Label -1 in example 2 of shard 1 of the train split'),
    (None, 0, 'There is no label in example 2 of shard 1 of the train split'),
])
def test_bad_labels_are_named_where_they_are_met(tmp_path, bad, message, workers):
    folder = write_shards(tmp_path, (12, 12), label=lambda n: bad if n == 14 else n % 3, features=INTEGERS)
    part = load_streamed_data(DataSource(data_dir=folder, num_classes=3)).train
    with pytest.raises(StreamError, match=message) as caught:
        batches(part, workers=workers)
    assert caught.value.local  # the other processes do not know
    with pytest.raises(StreamError, match=message):
        list(create_streamed_eval_loader(part, number_and_draws, 8))


def test_a_test_part_without_labels_is_left_out(tmp_path):
    write_shards(tmp_path, (12,), features=INTEGERS)
    folder = write_shards(tmp_path, (12,), part='test', label=lambda number: -1, features=INTEGERS)
    assert load_streamed_data(DataSource(data_dir=folder, num_classes=3)).test is None


def test_unreadable_and_missing_images_are_named(tmp_path):
    table = datasets.Dataset.from_dict(dict(img=noise_images(12), label=[0, 1, 2] * 4), features=FEATURES)
    table = table.cast_column('img', datasets.Image(decode=False))
    for shard, bad in enumerate([None, dict(bytes=b'no image', path=None)]):
        rows = table.to_dict()
        rows['img'][5] = bad
        damaged = datasets.Dataset.from_dict(rows, features=table.features).cast_column('img', datasets.Image())
        damaged.to_parquet(tmp_path / f'train-{shard}.parquet')
    part = load_streamed_data(DataSource(data_dir=str(tmp_path))).train
    for start, message in enumerate(['There is no image in', 'Cannot read the image in']):
        one = StreamedSplit(part.stream.shard(2, start), 'train', 'img', 'label', part.classes)
        with pytest.raises(UnreadableImageError, match=f'{message} example 5 of shard 0 of the train split'):
            list(create_streamed_eval_loader(one, number_and_draws, 4))


def test_a_stream_that_breaks_off_says_where(tmp_path):
    folder = write_shards(tmp_path, (12, 12))
    part = load_streamed_data(DataSource(data_dir=folder)).train
    (tmp_path / 'train-00001-of-00002.parquet').write_bytes(b'PAR1 and nothing more')
    with pytest.raises(StreamError, match='Cannot read on in shard 1 of the train split: .*arquet'):
        batches(part)


def test_what_cannot_be_opened_is_refused(tmp_path):
    with pytest.raises(DataError, match='`dataset=uoft-cs/cifar100`: .*Hub'):
        load_streamed_data(DataSource(dataset='uoft-cs/cifar100'))
    with pytest.raises(DataError, match='`data_dir=.*nowhere`: no such folder'):
        load_streamed_data(DataSource(data_dir=str(tmp_path / 'nowhere')))
    folder = write_shards(tmp_path / 'a', (5,), part='test')
    with pytest.raises(DataError, match='a has no split named train; its splits are: test'):
        load_streamed_data(DataSource(data_dir=folder))
    with pytest.raises(DataError, match='`label_column=fine`: b has no label column of that name'):
        load_streamed_data(DataSource(data_dir=write_shards(tmp_path / 'b', (5,)), label_column='fine'))
    folder = write_shards(tmp_path / 'c', (5,))
    [file] = (tmp_path / 'c').iterdir()
    pq.ParquetWriter(file, pq.read_schema(file)).close()
    with pytest.raises(DataError, match='The train split of .*c is empty'):
        load_streamed_data(DataSource(data_dir=folder, images_per_epoch=5))
    (tmp_path / 'd').mkdir()
    (tmp_path / 'd' / 'train.parquet').write_bytes(b'PAR1 and nothing more')
    with pytest.raises(DataError, match=r'`data_dir=.*/d` \(read as parquet\): '):
        load_streamed_data(DataSource(data_dir=str(tmp_path / 'd')))
