"""Sets of TFDS are streams of encoded bytes, read from disk alone, entered anywhere."""

import dataclasses
import io
import re
import shlex
import subprocess
import sys
import tarfile

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds

from moco_tf.data import augment, errors, sources
from moco_tf.data import tfds as prepared
from moco_tf.data.views import batches

IMAGES = [
    (record["image"], int(record["label"])) for record in sources.embedded("test").in_order(200).as_numpy_iterator()
]
BAD = (3, 64, 65, 149)


class Small(tfds.core.GeneratorBasedBuilder):
    """150 and 50 real JPEGs of the embedded set."""

    VERSION = tfds.core.Version("1.0.0")
    spoilt = ()

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(None, None, 3), encoding_format="jpeg"),
                    "label": tfds.features.ClassLabel(names=sources.CIFAR10_CLASSES),
                    "file_name": tfds.features.Text(),
                }
            ),
            supervised_keys=("image", "label"),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(0, 150), "test": self._generate_examples(150, 200)}

    def _generate_examples(self, start, end):
        for number in range(start, end):
            image, label = IMAGES[number]
            image = image[:400] if number in self.spoilt else image
            yield number, {"image": io.BytesIO(image), "label": label, "file_name": f"{number}.jpg"}


class Spoilt(Small):
    spoilt = BAD


@pytest.fixture(scope="module", params=["tfrecord", "array_record"])
def home(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    for builder in (Small, Spoilt):
        config = tfds.download.DownloadConfig(num_shards=4)
        builder(data_dir=folder, file_format=request.param).download_and_prepare(download_config=config)
    return folder


def order(source, count, **where):
    return [(int(epoch), int(record["id"])) for epoch, record in source.shuffled(**where).take(count)]


def test_records_are_the_encoded_bytes_with_label_and_place_in_the_split(home):
    source = prepared.find("small", home)
    assert (source.size, source.labelled, source.class_names) == (150, True, sources.CIFAR10_CLASSES)
    records = list(source.in_order().as_numpy_iterator())
    assert [record["id"] for record in records] == list(range(150))
    assert [(record["image"], record["label"]) for record in records] == IMAGES[:150]


@pytest.mark.parametrize("home", ["tfrecord"], indirect=True)
def test_each_block_of_a_stream_is_mixed_in_an_order_of_its_own(home, monkeypatch):
    source = prepared.find("small", home)
    found = []
    for records in (1, 30):  # a block; blocks of one are not mixed
        monkeypatch.setattr(prepared, "SHUFFLE_BYTES", source.bytes * records / 150 + 1)
        found.append([record for _, record in order(source, 150, seed=0)])
    unmixed, mixed = found
    assert sorted(mixed) == list(range(150))
    blocks = range(0, 150, 30)
    orders = {tuple(unmixed.index(record) - start for record in mixed[start : start + 30]) for start in blocks}
    assert len(orders) == 5 and all(sorted(order) == list(range(30)) for order in orders)
    assert [record for _, record in order(source, 30, seed=0, start=70)] == mixed[70:100]


def test_every_epoch_has_each_record_once_in_an_order_of_its_own(home):
    source = prepared.find("small", home)
    places = order(source, 300, seed=3)
    epochs = [[number for epoch, number in places if epoch == wanted] for wanted in range(2)]
    assert all(sorted(epoch) == list(range(150)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 2
    assert order(source, 30, seed=3) == places[:30] != order(source, 30, seed=4)


@pytest.mark.parametrize("start", [pytest.param(63, marks=pytest.mark.slow), 141])
def test_entering_anywhere_is_skipping_up_to_it(home, start):
    source = prepared.find("spoilt", home)
    whole = [(int(e), int(r["id"]), r["image"].numpy()) for e, r in source.shuffled(3, per_epoch=140).take(420)]
    rest = source.shuffled(3, start, per_epoch=140).take(420 - start)
    assert [(int(e), int(r["id"]), r["image"].numpy()) for e, r in rest] == whole[start:]


def test_a_part_of_a_split_has_its_share_of_the_bytes(home):
    whole, half, some = (prepared.find("small", home, split).bytes for split in ("train", "train[:50%]", "train[:10]"))
    assert half == pytest.approx(whole / 2, rel=0.1) and some == pytest.approx(whole / 15, rel=0.1)


def test_only_a_file_format_that_cannot_be_sought_costs_something_to_enter(home):
    source = prepared.find("small", home)
    cost = source.cost_of_entering(50)
    assert cost is None if source.seekable else "reads 50 records" in cost
    assert source.cost_of_entering(0) is None


def test_a_bad_record_is_replaced_by_the_next_good_one_and_named(home):
    source = prepared.find("spoilt", home)
    plain = prepared.find("small", home)
    mended, clean = order(source, 128, seed=0), order(plain, 128, seed=0)
    for window in (slice(0, 64), slice(64, 128)):
        numbers = [number for _, number in clean[window]]
        for place, (_, got) in enumerate(mended[window]):
            following = [numbers[(place + i) % len(numbers)] for i in range(len(numbers))]
            assert got == next(number for number in following if number not in BAD)
    met = {number for _, number in clean} & set(BAD)
    assert met and met <= set(source.bad) <= set(BAD)  # the stream is read ahead
    assert [int(r["id"]) for r in source.in_order()] == [number for number in range(150) if number not in BAD]


def test_more_bad_records_than_allowed_end_the_stream_with_one_line(home):
    source = prepared.find("spoilt", home, max_bad_fraction=0.01)
    with pytest.raises(tf.errors.OpError) as error:
        order(source, 150, seed=0)
    line = errors.reason(error.value)
    assert "--max_bad_fraction=0.01" in line and "150 in spoilt train" in line and "\n" not in line


def test_views_of_a_stream_go_on_bit_for_bit(home):
    source, flips = prepared.find("spoilt", home), augment.View(steps=("flip",))
    task = dataclasses.replace(augment.cifar(16), query=flips, key=flips)
    whole = list(batches(source, task, 20, seed=1).take(10))
    rest = list(batches(source, task, 20, seed=1, step=5).take(5))
    for a, b in zip(whole[5:], rest, strict=True):
        np.testing.assert_array_equal(a["views"], b["views"])


def test_splits_speak_the_language_of_tfds(home):
    assert prepared.find("small", home, "train[:10%]+test[40:]").size == 25
    ids = [int(record["id"]) for record in prepared.find("small", home, "train[20:]+test").in_order()]
    assert ids == list(range(180))
    assert prepared.find("small", home, "validation").size == 50  # the only held-out split there is
    for split in ("bogus", "train[", "train[200%:]"):
        with pytest.raises(ValueError, match=r"has the splits train, test, and TFDS' language") as error:
            prepared.find("small", home, split)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="holds no images"):
        prepared.find("small", home, "train[:0]")


def test_a_limit_is_spread_over_the_split(home):
    ids = [int(record["id"]) for record in prepared.find("small", home).in_order(12)]
    assert len(ids) == 12 and all(sum(low <= i < low + 50 for i in ids) >= 3 for low in (0, 50, 100))


def test_records_that_are_wanted_come_alone(home):
    source = prepared.find("small", home)
    wanted = np.arange(source.size) % 7 == 3
    assert [int(record["id"]) for record in source.in_order(wanted=wanted)] == np.flatnonzero(wanted).tolist()


def test_imagenet_unprepared_says_what_to_fetch_where_to_put_it_and_the_command(tmp_path):
    with pytest.raises(ValueError) as error:
        prepared.find("imagenet2012", tmp_path)
    line = str(error.value)
    assert "ILSVRC2012_img_train.tar" in line and "ILSVRC2012_img_val.tar" in line and "\n" not in line
    assert f"into {tmp_path}/downloads/manual" in line
    assert f"tfds.builder('imagenet2012', data_dir='{tmp_path}', file_format='array_record')" in line


def test_an_unprepared_set_that_downloads_itself_says_the_command(tmp_path):
    with pytest.raises(ValueError, match=f"prepare it with: python .*'cifar10', data_dir='{tmp_path}'"):
        prepared.find("cifar10", tmp_path)


def test_a_name_of_nothing_says_what_names_there_are(tmp_path):
    for name in ("no_such_set", "/no/such/folder", "Photos"):
        with pytest.raises(ValueError, match=r"'embedded', a folder of images, or the name of a data set of TFDS"):
            prepared.find(name, tmp_path)


def add(archive, name, data):
    member = tarfile.TarInfo(name)
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))


@pytest.mark.parametrize("file_format", [pytest.param("tfrecord", marks=pytest.mark.slow), "array_record"])
def test_the_command_drives_imagenets_own_builder_and_what_it_makes_is_read(tmp_path, file_format):
    manual = tmp_path / "downloads/manual"
    manual.mkdir(parents=True)
    with tarfile.open(manual / "ILSVRC2012_img_train.tar", "w") as train:
        for place, synset in enumerate(("n01440764", "n02099601")):  # tench, golden retriever
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as archive:
                for number in range(6):
                    add(archive, f"{synset}_{number}.JPEG", IMAGES[6 * place + number][0])
            add(train, f"{synset}.tar", inner.getvalue())
    with tarfile.open(manual / "ILSVRC2012_img_val.tar", "w") as validation:
        for number in range(1, 6):
            add(validation, f"ILSVRC2012_val_{number:08d}.JPEG", IMAGES[number][0])
    with pytest.raises(ValueError, match="is not prepared") as error:
        prepared.find("imagenet2012", tmp_path)
    command = str(error.value).partition("prepared with: python ")[2].replace("array_record", file_format)
    subprocess.run([sys.executable, *shlex.split(command)], check=True, capture_output=True)

    source = prepared.find("imagenet2012", tmp_path)
    assert (source.size, len(source.class_names), source.labelled) == (12, 1000, True)
    found = {(record["image"], int(record["label"])) for record in source.in_order().as_numpy_iterator()}
    names = [source.class_names[label] for _, label in found]
    assert {image for image, _ in found} == {image for image, _ in IMAGES[:12]}
    assert sorted(set(names)) == ["n01440764", "n02099601"]
    assert prepared.find("imagenet2012:5.1.0", tmp_path, "test").size == 5  # the archive's validation images
    assert re.fullmatch(r"\d+", str(next(iter(source.in_order()))["id"].numpy()))
