"""--dataset as a zip or a tar: the records of the folder that it was made of, and what becomes of damaged ones."""

import io
import os
import tarfile
import zipfile
import zlib

import numpy as np
import pytest
import tensorflow as tf

from moco_tf.command import ConfigError
from moco_tf.data import archive, augment, dataset, encoded, folder, manifest, pairs, sources, things
from moco_tf.data.inputs.image import Preprocessing
from moco_tf.data.manifest import check_files
from moco_tf.data.views import batches
from moco_tf.pretext import siblings

KINDS = {"stored.zip": zipfile.ZIP_STORED, "deflated.zip": zipfile.ZIP_DEFLATED, "photos.tar": None}


def image(seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)
    return tf.io.encode_png(pixels).numpy()


def put(root, files):
    """Writes {path: bytes} below a folder; returns it."""
    for path, content in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(content)
    return root


def pack(files, archive):
    """Writes {path: bytes}, in this order, as the archive; returns its path."""
    if archive.suffix == ".tar":
        with tarfile.open(archive, "w") as tar:
            for path, content in files.items():
                info = tarfile.TarInfo(path)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    else:
        with zipfile.ZipFile(archive, "w", KINDS.get(archive.name, zipfile.ZIP_STORED)) as zip:
            for path, content in files.items():
                zip.writestr(path, content)
    return archive


@pytest.fixture(scope="module")
def files():
    """A folder of splits and classes with something of everything, in no order."""
    named = {
        f"{split}/{label}/{number}.png": image(number + 100 * (split == "test"))
        for split, count in (("train", 12), ("test", 4))
        for number in range(count)
        for label in ("bus" if number % 3 else "a cat",)
    }
    return dict(reversed(named.items())) | {
        "train/bus/deep/er/13.JPG": image(13),
        "train/loose.png": image(14),
        "train/bus/cut.png": image(15)[:90],
        "train/bus/.hidden.png": image(16),
        "train/bus/notes.txt": b"none",
        "__MACOSX/train/bus/._1.png": b"none",
        "train/__MACOSX/._1.png": b"none",
        "train/café/猫.png": image(17),
    }


@pytest.fixture(scope="module")
def photos(files, tmp_path_factory):
    return put(tmp_path_factory.mktemp("folder") / "photos", files)


def opened(path, split="train", most=0.1):
    return dataset.find(str(path), "", split, most).open()


def facts(source):
    """What records are made of, but for where their files lie."""
    below = [os.path.relpath(path, os.fsencode(source.name)) for path in source.paths.numpy()]
    return below, source.labels.numpy().tolist(), source.class_names, source.good.tolist()


@pytest.fixture(scope="module")
def of_folder(photos):
    source = opened(photos)
    task = augment.cifar(8)
    return source, list(batches(source, task, 4, seed=3).take(5)), facts(opened(photos, "test"))


def as_bytes(batch):
    return [tf.io.serialize_tensor(tensor).numpy() for tensor in tf.nest.flatten(batch)]


@pytest.mark.parametrize("name", KINDS)
def test_an_archive_gives_the_records_and_views_of_the_folder_bit_for_bit(name, files, of_folder, photos, tmp_path):
    expected, steps, held_out = of_folder
    path = pack(files, tmp_path / name)
    source = opened(path)
    assert facts(source) == facts(expected) and source.size == 16 and len(source.good) == 15
    assert facts(opened(path, "test")) == held_out
    of_archive = batches(source, augment.cifar(8), 4, seed=3, step=2)  # as a run that goes on, into the second epoch
    assert [as_bytes(step) for step in of_archive.take(3)] == [as_bytes(step) for step in steps[2:]]
    said = [folder.remarks(dataset.find(str(one), "", "train", 0.1).listing) for one in (photos, path)]
    assert said[1] == [line.replace(str(photos), str(path)) for line in said[0]]
    for one, other in zip(source.in_order(), expected.in_order(), strict=True):
        assert as_bytes(one) == as_bytes(other)


def test_several_archives_and_folders_are_read_as_several_folders(tmp_path):
    some = {f"{label}/{number}.png": image(number) for number, label in enumerate(("cat", "dog", "cat"))}
    put(tmp_path / "a", some), put(tmp_path / "b", some), put(tmp_path / "c", some)
    pack(some, tmp_path / "b.zip"), pack(some, tmp_path / "c.tar")
    expected = dataset.find("a,b,c", str(tmp_path), "train", 0).open()
    source = dataset.find("a,b.zip,c.tar", str(tmp_path), "train", 0).open()
    assert source.size == 9 and source.class_names == ("cat", "dog")
    for one, other in zip(source.in_order(), expected.in_order(), strict=True):
        assert as_bytes(one) == as_bytes(other)
    with pytest.raises(ConfigError, match="would be there twice"):
        dataset.find("b.zip,b.zip/cat", str(tmp_path), "train", 0)


def test_a_folder_in_an_archive_and_a_list_of_members_can_be_named(tmp_path, monkeypatch):
    path = pack({f"photos/{label}/1.png": image(1) for label in ("cat", "dog")}, tmp_path / "a.zip")
    listing = dataset.find(str(path), "", "train", 0).listing
    assert listing.class_names == ("photos",) and listing.doubts == (
        f"All lies in one folder, which is read as the only class; --dataset={path}/photos reads the folders in it",
    )
    assert opened(path / "photos").class_names == ("cat", "dog")
    (tmp_path / "list.csv").write_text("path,label\na.zip/photos/dog/1.png,x\na.zip/photos/ox/1.png,x\n")
    source = opened(tmp_path / "list.csv", most=0.5)
    assert source.good.tolist() == [0] and source.record(0)["image"] == image(1)


@pytest.mark.parametrize("name", KINDS)
def test_a_members_bytes_are_kept_whatever_they_are(name, tmp_path):
    contents = [b"\0" * 9, b"\n\0\xff", b"x", bytes(range(256)) * 300 + b"\0", b""]
    path = pack({f"{number}.png": content for number, content in enumerate(contents)}, tmp_path / name)
    paths = [f"{path}/{number}.png" for number in range(len(contents))]
    assert [archive.read(one) for one in paths] == contents
    assert [sources.read_file(tf.constant(one)).numpy() for one in paths] == contents
    assert tf.numpy_function(archive.read_all, [paths], tf.string).numpy().tolist() == contents


def test_streamed_and_zip64_members_are_read(tmp_path):
    class Pipe(io.BytesIO):  # so that sizes come after the data, in descriptors
        def seekable(self):
            return False

    pipe = Pipe()
    with zipfile.ZipFile(pipe, "w", zipfile.ZIP_DEFLATED) as zip:
        for number in range(2):
            with zip.open(f"{number}.png", "w", force_zip64=number == 1) as member:
                member.write(image(number))
    (tmp_path / "a.zip").write_bytes(b"#!/bin/sh\n" + pipe.getvalue())  # one that unpacks itself
    assert [archive.read(tmp_path / "a.zip" / f"{number}.png") for number in range(2)] == [image(0), image(1)]


def test_names_stay_in_the_archive_and_in_their_script(tmp_path):
    path = tmp_path / "a.zip"
    names = ["/etc/1.png", "../../2.png", "cat/../dog/./3.png", "b\u202egnp.png", "mXXde.png", "mYYde.png"]
    content = pack(dict.fromkeys(names, image(0)), path).read_bytes()
    path.write_bytes(content.replace(b"mXXde", "müde".encode()).replace(b"mYYde", b"m\x81\x81de"))  # neither is marked
    files = dataset.find(str(path), "", "train", 0).listing.files
    assert files == ["2.png", "b\u202egnp.png", "dog/3.png", "etc/1.png", "müde.png", "müüde.png"]
    assert not (tmp_path.parent / "2.png").exists()
    path = pack({"caf\udce9/1.png": image(0)}, tmp_path / "a.tar")
    assert dataset.find(str(path), "", "train", 0).listing.files == ["caf\udce9/1.png"]


def test_the_last_of_members_of_one_name_counts(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as zip, tarfile.open(tmp_path / "a.tar", "w") as tar:
        for number in range(2):
            with pytest.warns(UserWarning) if number else io.BytesIO():
                zip.writestr("1.png", image(number))
            info = tarfile.TarInfo("1.png")
            info.size = len(image(number))
            tar.addfile(info, io.BytesIO(image(number)))
    for path in (tmp_path / "a.zip", tmp_path / "a.tar"):
        assert archive.read(path / "1.png") == image(1)
        listing = dataset.find(str(path), "", "train", 0).listing
        assert listing.size == 1
        assert "Members that a later one of the same name takes the place of: 1" in folder.remarks(listing)


def problems(path):
    return dict(check_files(dataset.find(str(path), "", "train", 1).listing).bad)


def test_a_member_that_cannot_be_read_is_a_bad_image_with_the_reason(tmp_path):
    spoilt = [  # where in the member's entry of the directory, what is written there, what is said
        (8, b"\1", "encrypted, and so not read"),
        (24, (2**31).to_bytes(4, "little"), "more than 536870910 bytes"),  # a bomb, as it says itself
        (24, b"\x08\0\0\0", "size or checksum is another"),  # inflated no further than it says
        (16, b"\0\0\0\0", "size or checksum is another"),
        (10, b"\x0e", "compressed by lzma; what is stored or deflated is read"),
        (42, b"\1", "no member where its directory says"),
        (20, b"\0\0\1\0", "ends inside the member"),
        (41, b"\xa1", "a link, which is not followed"),
    ]
    some = {f"{number}.png": b"\0" * 5000 for number in range(len(spoilt))} | {"good.png": image(1)}
    content = bytearray(pack(some, tmp_path / "deflated.zip").read_bytes())
    entries = [at for at in range(len(content)) if content.startswith(b"PK\1\2", at)]
    for entry, (at, value, _) in zip(entries, spoilt, strict=False):
        content[entry + at : entry + at + len(value)] = value
    (tmp_path / "deflated.zip").write_bytes(content)
    bad = problems(tmp_path / "deflated.zip")
    assert len(bad) == len(spoilt)
    for number, (_, _, said) in enumerate(spoilt):
        assert said in bad[f"{number}.png"]


def test_no_member_is_inflated_beyond_what_the_archive_says(tmp_path, monkeypatch):
    path, inflated = pack({"0.png": b"\0" * 10**7}, tmp_path / "deflated.zip"), []
    content = bytearray(path.read_bytes())
    entry = content.index(b"PK\1\2")
    content[entry + 24 : entry + 28] = (9).to_bytes(4, "little")
    path.write_bytes(content)
    inflate = zlib.decompressobj

    class Watched:
        def __init__(self, bits):
            self.inflater = inflate(bits)

        def decompress(self, data, most):
            inflated.append(self.inflater.decompress(data, most))
            return inflated[-1]

    monkeypatch.setattr(archive.zlib, "decompressobj", Watched)
    with pytest.raises(ValueError, match="size or checksum is another"):
        archive.read(path / "0.png")
    assert [len(one) for one in inflated] == [10]
    assert archive.MAX_BYTES == 6 * encoded.MAX_PIXELS


def test_links_of_a_tar_are_other_names_or_bad_and_sparse_files_are_bad(tmp_path):
    path = pack({"cat/1.png": image(1)}, tmp_path / "a.tar")
    with tarfile.open(path, "a") as tar:
        for name, kind, target in (("2.png", tarfile.LNKTYPE, "cat/1.png"), ("3.png", tarfile.SYMTYPE, "cat/1.png"),
                                   ("4.png", tarfile.LNKTYPE, "cat"), ("5.png", tarfile.FIFOTYPE, "")):  # fmt: skip
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, target
            tar.addfile(info)
        info = tarfile.TarInfo("6.png")
        info.pax_headers = {"GNU.sparse.major": "0", "GNU.sparse.map": "0,512", "GNU.sparse.size": "4096"}
        info.size = 512
        tar.addfile(info, io.BytesIO(bytes(512)))
    assert archive.read(path / "2.png") == image(1)
    assert problems(path) == {"3.png": archive.LINK, "4.png": archive.LINK, "6.png": "a sparse file of a tar"}


def damaged():
    """(name, bytes, what the refusal says)."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for number in range(3):
            info = tarfile.TarInfo(f"{number}.png")
            info.size = 700
            tar.addfile(info, io.BytesIO(bytes(700)))
    tar = buffer.getvalue()
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as zip:
        zip.writestr("1.png", bytes(700))
    whole = buffer.getvalue()
    negative = bytearray(tar)
    negative[1536 + 124 : 1536 + 136] = b"\xff" * 10 + b"\xf8\x00"  # -2048: back to before this member
    negative[1536 + 148 : 1536 + 156] = b" " * 8
    negative[1536 + 148 : 1536 + 156] = b"%06o\0 " % sum(negative[1536 : 1536 + 512])
    header = bytearray(tar)
    header[1536] ^= 1
    return [
        ("a.zip", whole[:-30], "is no zip that can be read, or a damaged one (File is not a zip file)"),
        ("a.zip", b"", "is no zip that can be read"),
        ("a.zip", tar, "is no zip that can be read"),
        ("a.tar", whole, "is no tar that can be read"),
        ("a.tar", b"", "is no tar that can be read"),
        ("a.tar", tar[:1600], "is no tar that can be read"),
        ("a.tar", tar[:1700], "is no tar that can be read"),
        ("a.tar", tar[: 2 * 1536], "neither a member nor an end at byte 3072"),
        ("a.tar", bytes(header), "neither a member nor an end at byte 1536"),
        ("a.tar", bytes(negative), "it ends inside of 1.png"),
        ("a.tar.gz", tar, "compressed as a whole, so that no image in it can be had without all before it"),
        ("a.tgz", tar, "Uncompress it to a .tar, which is read in place"),
        ("a.rar", tar, "of a kind that is not read; .zip and .tar are"),
        ("a.bin", tar, "is a file. Give the folder, or the .zip or .tar"),
        ("a.tar", bytes(10240), "There are no images"),
    ]


@pytest.mark.parametrize(("name", "content", "said"), damaged())
def test_what_is_no_archive_or_a_damaged_one_is_refused_in_a_line(name, content, said, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError) as error:
        dataset.find(str(tmp_path / name), "", "train", 0)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_a_member_below_too_many_folders_is_refused(tmp_path):
    path = pack({"a/" * 101 + "1.png": image(1)}, tmp_path / "a.zip")
    with pytest.raises(ConfigError, match="a member lies in more than 100 folders"):
        dataset.find(str(path), "", "train", 0)


def test_an_archive_that_changes_between_two_starts_is_treated_as_a_folder(tmp_path, monkeypatch):
    some = {f"cat/{number}.png": image(number) for number in range(4)}
    manifest, path = tmp_path / "train_images.csv", pack(some, tmp_path / "a.zip")

    def start():
        split = dataset.find(str(path), "", "train", 1, begun=manifest.exists())
        checked = check_files(split.listing, manifest, begun=manifest.exists())
        return checked, checked.source()

    _, first = start()
    before = [record["image"].numpy() for record in first.in_order()]
    with monkeypatch.context() as patched:
        patched.setattr("moco_tf.data.check.verdicts", lambda *_: pytest.fail("read again"))
        start()
    changed = dict(reversed(some.items())) | {"cat/1.png": image(9), "cat/9.png": image(9)}
    assert len(image(9)) == len(image(1))  # the checksum tells
    del changed["cat/2.png"]
    pack(changed, path)
    checked, source = start()
    assert checked.added == 1 and checked.bad == [("cat/2.png", "no such file")]
    assert [record["image"].numpy() for record in source.in_order()] == [before[0], image(9), before[3]]
    assert first.record(1)["image"] == image(9)  # the name decides, as in a folder
    with pytest.raises(tf.errors.OpError, match=r"cat/2\.png: no such file"):
        list(first.in_order())
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ConfigError, match="is no zip that can be read"):
        start()


def test_things_and_depth_maps_in_an_archive_are_those_of_the_folder(tmp_path, monkeypatch):
    depth = tf.io.encode_png(np.arange(64, dtype=np.uint8).reshape(8, 8, 1) * 4).numpy()
    some = {f"{thing}/{number}{end}": content
            for thing in ("mug", "pot") for number in range(3)
            for end, content in ((".png", image(number + len(thing))), (".depth.png", depth))}  # fmt: skip
    both = put(tmp_path / "photos", some), pack(some, tmp_path / "photos.tar")
    monkeypatch.setattr(siblings.crops, "host_part", lambda picture, *_: (picture["image"],))
    views = [
        as_bytes(siblings.views(things.of_images(opened(path)).record(1), tf.constant([1, 2], tf.int64),
                                Preprocessing(8), siblings.Options()))
        for path in both
    ]  # fmt: skip
    assert views[0] == views[1]
    records = [[as_bytes(record) for record in pairs.of_images(opened(path), 0).in_order()] for path in both]
    assert records[0] == records[1] and len(records[0]) == 6


def test_few_members_are_read_at_once_if_they_are_large(tmp_path, monkeypatch):
    pack({f"a/{number}.png": image(number) for number in range(3)}, tmp_path / "a.zip")
    several = dataset.find(str(tmp_path / "a.zip"), "", "train", 0).open()
    monkeypatch.setattr(manifest, "BYTES_AT_ONCE", 2 * len(image(0)))
    few = dataset.find(str(tmp_path / "a.zip"), "", "train", 0).open()
    assert several.at_once == 32 and few.at_once in (1, 2)
    wanted = [record["image"] for record in several.in_order().as_numpy_iterator()]
    assert [record["image"] for record in few.in_order().as_numpy_iterator()] == wanted


def test_a_system_that_cannot_read_at_a_place_reads_the_same_bytes(tmp_path, monkeypatch):
    pack({f"a/{number}.png": image(number) for number in range(3)}, tmp_path / "a.tar")
    monkeypatch.delattr(os, "pread")
    assert archive.read(tmp_path / "a.tar/a/2.png") == image(2)
