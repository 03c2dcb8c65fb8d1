"""Search: an index of a folder, look-alikes, near-duplicates, odd ones. The encoder is a few pooled pixels."""

import csv
import dataclasses
import errno
import functools
import html.parser
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import faiss
import keras
import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from benchmarks import near_duplicates
from moco_tf import frozen
from moco_tf.command import ConfigError
from moco_tf.data import archive, check
from moco_tf.data.inputs.image import Preprocessing
from moco_tf.search import build, duplicates, groups, index, merge, neighbours, odd, parts, query, vector_index
from moco_tf.search.copies import copies
from moco_tf.serving import saved_model

SIDE = 16
COMMANDS = {
    "build": build.main,
    "query": query.main,
    "duplicates": duplicates.main,
    "odd": odd.main,
    "merge": merge.main,
}
HOSTILE = [
    os.fsdecode(b"k\xf6ln.png"),
    "new\nline.png",
    '"quoted", <img src=x onerror=alert(1)>.png',
    "\u202egnp.exe.png",
    "שלום.png",
    "-rf.png",
    "~.png",
    "a" * 240 + ".png",
]


def model(seed):
    keras.utils.set_random_seed(seed)
    images = keras.Input((SIDE, SIDE, 3))
    pooled = keras.layers.Flatten()(keras.layers.AveragePooling2D(4)(images))
    return keras.Model(images, keras.layers.Dense(24)(pooled))


PREPROCESSING = Preprocessing(SIDE, 1.0, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoders") / "one"
    saved_model.export_encoder(model(1), folder / "1", PREPROCESSING)
    return folder


@pytest.fixture(scope="module")
def other_encoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoders") / "other"
    saved_model.export_encoder(model(2), folder / "1", PREPROCESSING)
    return folder


def picture(seed, height=20, width=24):
    """Coloured blocks: uint8 (height, width, 3)."""
    blocks = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    return np.asarray(Image.fromarray(blocks).resize((width, height), Image.Resampling.NEAREST))


def write(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


@pytest.fixture(autouse=True, scope="module")
def _encoders_are_loaded_once():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(frozen, "load", functools.cache(frozen.load))
        yield


@pytest.fixture(scope="module")
def built(encoder, tmp_path_factory):
    """A folder with twenty images in two folders, and their index."""
    folder = tmp_path_factory.mktemp("built")
    for number in range(20):
        write(folder / f"photos/{'ab'[number % 2]}/{number:02d}.png", picture(number))
    assert make(encoder, folder / "photos", folder / "index") == 0
    return folder


@pytest.fixture
def photos(built, tmp_path):
    """A copy of the twenty images."""
    return shutil.copytree(built / "photos", tmp_path / "photos")


@pytest.fixture
def indexed(built, photos, tmp_path):
    """A copy of their index, as of `photos`."""
    folder = shutil.copytree(built / "index", tmp_path / "index")
    index.describe(folder, dataclasses.replace(index.about(folder), images=photos))
    return folder


def make(encoder, photos, output, *more):
    return build.main([f"--encoder={encoder}", f"--images={photos}", f"--output={output}", *more])


def vectors_of(encoder, paths):
    """Unit vectors of files, one at a time."""
    opened = frozen.read(encoder)
    rows = []
    for path in paths:
        view = opened.preprocessing.of_encoded(tf.constant(Path(path).read_bytes()))
        rows.append(opened.encode(view[None])["features"][0].numpy())
    return np.array([row / np.linalg.norm(row) for row in rows])


def rows(path):
    with open(path, newline="", encoding="utf-8", errors="surrogateescape") as file:
        return list(csv.DictReader(file))


def encoded_files(monkeypatch):
    """The names of the files that builds encode from now on."""
    from moco_tf.search import encode

    names, encode_listing = [], encode.encode_listing

    def noting(function, preprocessing, listing):
        names.extend(listing.files)
        return encode_listing(function, preprocessing, listing)

    monkeypatch.setattr(encode, "encode_listing", noting)
    return names


# Building.


def test_an_index_holds_the_unit_vector_of_each_image_in_16_bits_and_what_is_known_of_the_file(
    encoder, photos, tmp_path
):
    write(photos / "a/dark.png", np.full((10, 40, 3), 12, np.uint8))
    assert make(encoder, photos, tmp_path / "index") == 0
    part = index.read(tmp_path / "index").part
    files_there = sorted(str(path.relative_to(photos)) for path in photos.rglob("*.png"))
    assert [image.path for image in part.images] == files_there and part.vectors.dtype == np.float16
    expected = vectors_of(encoder, [photos / file for file in files_there])
    np.testing.assert_allclose(part.vectors, expected, atol=1e-3)
    (dark,) = (image for image in part.images if image.path == "a/dark.png")
    status = (photos / "a/dark.png").stat()
    assert dark[1:] == (status.st_size, status.st_mtime_ns, 10, 40, 12.0, 0.0)


def test_the_nearest_are_those_of_a_loop_over_all_images(indexed):
    opened = index.read(indexed)
    vectors = np.asarray(opened.part.vectors, np.float64)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    cosines, numbers = neighbours.nearest_others(opened, 5)
    for one in range(20):
        pairs = sorted(((vectors[one] @ vectors[other], other) for other in range(20) if other != one), reverse=True)
        assert numbers[one].tolist() == [other for _, other in pairs[:5]]
        np.testing.assert_allclose(cosines[one], [cosine for cosine, _ in pairs[:5]], atol=1e-5)


def test_broken_files_are_named_and_not_read_again_until_they_change(encoder, photos, tmp_path, capsys, monkeypatch):
    (photos / "a/cut.png").write_bytes((photos / "a/00.png").read_bytes()[:60])
    (photos / "empty.jpg").write_bytes(b"")
    assert make(encoder, photos, tmp_path / "index") == 0
    output = capsys.readouterr().out
    assert "empty.jpg (empty)" in output and "a/cut.png" in output
    assert [row["path"] for row in rows(tmp_path / "index/built-1/broken.csv")] == ["a/cut.png", "empty.jpg"]
    encoded = encoded_files(monkeypatch)
    assert make(encoder, photos, tmp_path / "index") == 0 and encoded == []
    write(photos / "a/cut.png", picture(77))
    assert make(encoder, photos, tmp_path / "index") == 0 and encoded == ["a/cut.png"]
    assert [file.path for file in index.read(tmp_path / "index").part.broken] == ["empty.jpg"]


def test_a_build_that_was_killed_between_two_savings_goes_on_after_the_last(
    encoder, built, photos, tmp_path, monkeypatch
):
    save, saved = index.save, []

    def save_one(folder, *part):
        if saved:
            raise KeyboardInterrupt
        saved.append(part)
        return save(folder, *part)

    monkeypatch.setattr(index, "save", save_one)
    assert make(encoder, photos, tmp_path / "index", "--shard_size=8") == 130
    with pytest.raises(ConfigError, match="not finished"):
        index.read(tmp_path / "index")
    monkeypatch.undo()
    encoded = encoded_files(monkeypatch)
    assert make(encoder, photos, tmp_path / "index", "--shard_size=12") == 0
    assert len(encoded) == 12
    assert_same(tmp_path / "index", built / "index")
    assert sorted(path.name for path in (tmp_path / "index").iterdir()) == [
        ".lock",
        "built-1",
        "index.json",
        "log.txt",
    ]


def assert_same(one, other):
    a, b = (index.read(folder).part for folder in (one, other))
    assert a.images == b.images and a.broken == b.broken
    np.testing.assert_allclose(a.vectors, b.vectors, atol=1e-3)


def test_a_second_start_encodes_what_is_new_or_changed_and_drops_what_is_gone(
    encoder, photos, tmp_path, monkeypatch, indexed
):
    (photos / "a/00.png").unlink()
    write(photos / "a/02.png", picture(102))
    write(photos / "c/new.png", picture(103))
    encoded = encoded_files(monkeypatch)
    assert make(encoder, photos, indexed) == 0
    assert encoded == ["a/02.png", "c/new.png"]
    assert make(encoder, photos, tmp_path / "fresh") == 0
    assert_same(indexed, tmp_path / "fresh")
    encoded.clear()
    before = (indexed / "index.json").read_text()
    assert make(encoder, photos, indexed) == 0
    assert encoded == [] and (indexed / "index.json").read_text() == before


def test_a_folder_that_has_moved_is_the_same_and_one_of_other_images_is_refused(
    encoder, photos, tmp_path, capsys, monkeypatch, indexed
):
    encoded = encoded_files(monkeypatch)
    photos.rename(tmp_path / "moved")
    assert make(encoder, tmp_path / "moved", indexed) == 0 and encoded == []
    assert index.read(indexed).path(0) == tmp_path / "moved/a/00.png"
    write(tmp_path / "others/1.png", picture(1))
    assert make(encoder, tmp_path / "others", indexed) == 2
    assert "none of the 20 images" in capsys.readouterr().err
    assert len(index.read(indexed).part.images) == 20


def test_an_index_of_another_encoder_is_neither_gone_on_with_nor_asked(
    encoder, other_encoder, photos, capsys, indexed
):
    assert make(other_encoder, photos, indexed) == 2
    assert "of another encoder" in capsys.readouterr().err
    arguments = [f"--index={indexed}", f"--image={photos / 'a/00.png'}"]
    assert query.main([*arguments, f"--encoder={other_encoder}"]) == 2
    assert "of another encoder" in capsys.readouterr().err
    assert query.main(arguments) == 0
    assert make(encoder, photos, indexed, "--on=embedding") == 2
    assert "--on=features" in capsys.readouterr().err


def test_an_encoder_is_told_by_its_weights_and_preprocessing_and_not_by_where_it_lies(encoder, other_encoder):
    read = frozen.read(encoder)
    assert frozen.of_model(model(1), PREPROCESSING).identity == read.identity != frozen.read(other_encoder).identity
    changed = model(1)
    changed.layers[-1].bias.assign(changed.layers[-1].bias + 1e-6)
    assert frozen.of_model(changed, PREPROCESSING).identity != read.identity
    other = dataclasses.replace(PREPROCESSING, crop_ratio=0.9)
    assert frozen.of_model(model(1), other).identity != read.identity


def test_an_encoder_whose_weights_are_constants_is_told_by_its_graph(tmp_path):
    identities = set()
    for factor in (1.0, 2.0):
        spec = tf.TensorSpec((None, SIDE, SIDE, 3), tf.float32, "images")
        module = tf.Module()
        module.call = tf.function(lambda images, by=factor: {"features": by * images}, input_signature=[spec])
        tf.saved_model.save(module, str(tmp_path / str(factor)), signatures={"preprocessed": module.call})
        identities.add(frozen.read(tmp_path / str(factor)).identity)
    assert len(identities) == 2


def test_a_corrupt_index_is_named_in_a_line_and_made_anew_without_encoding(
    encoder, photos, capsys, monkeypatch, indexed
):
    arguments = [f"--index={indexed}", f"--image={photos / 'a/00.png'}"]
    file = indexed / "built-1/vectors.faiss"
    whole = file.read_bytes()
    encoded = encoded_files(monkeypatch)
    for content in (b"", whole[: len(whole) // 2], b"nonsense" * 100, None):
        file = indexed / index.about(indexed).built / "vectors.faiss"
        file.write_bytes(content) if content is not None else file.unlink()
        capsys.readouterr()
        assert query.main(arguments) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and "vectors.faiss is damaged" in error
        assert make(encoder, photos, indexed) == 0
        assert query.main(arguments) == 0
    assert set(encoded) == {"00.png"}  # the queries


@pytest.mark.parametrize("name", ["index.json", "built-1/images.csv", "built-1/vectors.npy"])
def test_other_damage_ends_in_a_line_that_says_how_to_go_on(encoder, photos, capsys, name, indexed):
    (indexed / name).write_bytes(b"\x00 nonsense")
    for command in (query.main, lambda _: make(encoder, photos, indexed)):
        capsys.readouterr()
        assert command([f"--index={indexed}", f"--image={photos / 'a/00.png'}"]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and f"{name} is" in error and "damaged" in error and "move the folder" in error


def test_a_full_disk_ends_in_a_line_and_the_index_before_it_is_whole(encoder, photos, capsys, monkeypatch, indexed):
    write(photos / "c/new.png", picture(103))

    monkeypatch.setattr(vector_index, "write", lambda i, path, write=vector_index.write: write(i, "/dev/full"))
    assert make(encoder, photos, indexed) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"{indexed}/built-2: No space left on device" in error
    monkeypatch.undo()
    assert len(index.read(indexed).part.images) == 20
    encoded = encoded_files(monkeypatch)
    assert make(encoder, photos, indexed) == 0 and encoded == []
    assert len(index.read(indexed).part.images) == 21


def test_shards_have_each_image_once_and_merged_they_equal_one_build(
    encoder, built, photos, tmp_path, capsys, monkeypatch
):
    assert make(encoder, photos, tmp_path / "index", "--shard=1/2") == 0
    assert merge.main([f"--index={tmp_path / 'index'}"]) == 2
    assert "lacks shard-2-of-2: build it with --shard=2/2" in capsys.readouterr().err
    assert make(encoder, photos, tmp_path / "index", "--shard=2/2") == 0
    assert 0 < len(index.read(tmp_path / "index/shard-1-of-2").part.images) < 20
    assert merge.main([f"--index={tmp_path / 'index'}"]) == 0
    assert_same(tmp_path / "index", built / "index")
    encoded = encoded_files(monkeypatch)
    assert make(encoder, photos, tmp_path / "index") == 0 and encoded == []


def test_shards_of_different_encoders_are_not_merged(encoder, other_encoder, photos, tmp_path, capsys):
    for number, one in ((1, encoder), (2, other_encoder)):
        assert make(one, photos, tmp_path / "index", f"--shard={number}/2") == 0
    assert merge.main([f"--index={tmp_path / 'index'}"]) == 2
    assert "is of another encoder than the first shard" in capsys.readouterr().err


# Kinds of index.


def test_the_kind_of_index_follows_from_the_number_and_the_width_of_vectors():
    assert vector_index.choose(200_000, 2048) == "flat"
    assert vector_index.choose(200_001, 2048) == "hnsw"
    most = 8 * 2**30 // (2 * 512 + 256)
    assert vector_index.choose(most, 512) == "hnsw" and vector_index.choose(most + 1, 512) == "ivfpq"


@pytest.mark.parametrize("kind, recall", [("flat", 1.0), ("hnsw", 0.99), ("ivfpq", 0.95)])
def test_each_kind_finds_the_nearest_and_their_cosines_before_and_after_it_is_written(kind, recall, tmp_path):
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(50, 32))
    vectors = centres[rng.integers(0, 50, 1000)] + 0.4 * rng.normal(size=(1000, 32))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)
    queries = vectors[::40].astype(np.float32)
    products = queries.astype(np.float64) @ vectors.astype(np.float64).T
    exact = np.argsort(-products, axis=1)[:, :10]
    built = vector_index.build(kind, vectors)
    vector_index.write(built, tmp_path / os.fsdecode(b"\xfc.faiss"))
    for one in (built, vector_index.read(tmp_path / os.fsdecode(b"\xfc.faiss"), vectors.shape)):
        cosines, numbers = vector_index.search(one, kind, vectors, queries, 10)
        hits = [len(set(a) & set(b)) / 10 for a, b in zip(exact.tolist(), numbers.tolist(), strict=True)]
        assert np.mean(hits) >= recall
        np.testing.assert_allclose(cosines, np.take_along_axis(products, numbers, 1), atol=2e-3)
        assert (np.diff(cosines, axis=1) <= 0).all()


def test_another_kind_is_built_of_what_is_encoded(encoder, photos, monkeypatch, indexed, capsys):
    encoded = encoded_files(monkeypatch)
    assert make(encoder, photos, indexed, "--index_type=hnsw") == 0
    opened = index.read(indexed)
    assert encoded == [] and opened.about.index_type == "hnsw" and isinstance(opened.vectors, faiss.IndexHNSW)
    assert make(encoder, photos, indexed, "--index_type=ivfpq") == 2
    assert "learns 256 codes of as many images; got 20" in capsys.readouterr().err
    assert index.read(indexed).about.index_type == "hnsw"


# Looking.


def test_a_query_prints_the_nearest_with_their_cosines(encoder, photos, capsys, indexed):
    capsys.readouterr()
    assert query.main([f"--index={indexed}", f"--image={photos / 'a/04.png'}", "--k=3"]) == 0
    lines = [line.split("  ") for line in capsys.readouterr().out.splitlines()]
    assert lines[0][1] == str(photos / "a/04.png") and len(lines) == 3
    names = sorted(photos.rglob("*.png"))
    vectors = vectors_of(encoder, names)
    cosines = vectors @ vectors[names.index(photos / "a/04.png")]
    assert [name for _, name in lines] == [str(names[n]) for n in np.argsort(-cosines)[:3]]
    np.testing.assert_allclose([float(c) for c, _ in lines], np.sort(cosines)[::-1][:3], atol=1e-3)


def test_a_folder_of_queries_gives_a_csv_and_broken_ones_are_named(photos, capsys, indexed):
    (photos / "a/cut.png").write_bytes(b"\x89PNG")
    arguments = [f"--index={indexed}", f"--image={photos / 'a'}", "--k=2"]
    assert query.main(arguments) == 0
    assert "Cannot be decoded: " in capsys.readouterr().out
    found = rows(indexed / "neighbours.csv")
    assert list(found[0]) == ["query", "rank", "path", "cosine"] and len(found) == 20
    assert all(row["query"] == row["path"] for row in found if row["rank"] == "1")


def test_a_query_that_cannot_be_decoded_or_is_not_there_is_refused_in_a_line(tmp_path, capsys, indexed):
    (tmp_path / "text.jpg").write_text("no image")
    (tmp_path / "empty").mkdir()
    for name, said in (
        ("text.jpg", "no image that can be decoded"),
        ("none", "neither a file nor a folder"),
        ("empty", "no images"),
    ):
        capsys.readouterr()
        assert query.main([f"--index={indexed}", f"--image={tmp_path / name}"]) == 2
        error = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("Encoder: ")]
        assert len(error) == 1 and said in error[0]


# Near-duplicates.


def test_groups_are_the_connected_components_of_a_naive_search():
    rng = np.random.default_rng(0)
    for edges in (0, 1, 20, 60):
        pairs = rng.integers(0, 50, (edges, 2)).tolist()
        pairs = [(a, b) for a, b in pairs if a != b]
        left, expected = {n for pair in pairs for n in pair}, []
        while left:
            group = {min(left)}
            while True:
                wider = group | {n for pair in pairs if set(pair) & group for n in pair}
                if wider == group:
                    break
                group = wider
            expected.append(sorted(group))
            left -= group
        assert groups.connected(pairs) == expected


def test_the_threshold_lies_four_spreads_above_the_median_and_planted_duplicates_do_not_move_it():
    rng = np.random.default_rng(0)
    z = rng.normal(2.0, 0.25, 20_000)
    cosines = 1 - np.exp(-z)
    assert groups.near_threshold(cosines) == pytest.approx(1 - np.exp(-(2.0 + 4 * 0.25)), abs=2e-3)
    assert groups.far_threshold(cosines) == pytest.approx(1 - np.exp(-(2.0 - 3 * 0.25)), abs=1e-2)
    assert (cosines >= groups.near_threshold(cosines)).sum() < 5
    planted = np.concatenate([cosines, 1 - np.exp(-rng.uniform(5, 9, 2000))])
    assert (planted >= groups.near_threshold(planted)).sum() == pytest.approx(2000, abs=5)


def test_exact_copies_are_found_where_most_images_have_one():
    assert groups.near_threshold([1.0] * 80 + [0.7] * 20) == 0.999


def test_duplicates_are_grouped_and_exact_copies_named_as_such(encoder, photos, tmp_path, capsys):
    shutil.copy(photos / "a/00.png", photos / "copy.png")
    write(photos / "pixels.bmp", picture(0))
    Image.fromarray(picture(1)).save(photos / "re-encoded.jpg", quality=95, subsampling=0)
    before = {path: path.read_bytes() for path in photos.rglob("*.*")}
    assert make(encoder, photos, tmp_path / "index") == 0
    arguments = [f"--index={tmp_path / 'index'}", f"--output={tmp_path / 'out'}"]
    assert duplicates.main([*arguments, "--threshold=0.995"]) == 0
    found = rows(tmp_path / "out/duplicates.csv")
    assert list(found[0]) == ["group", "path", "cosine", "same_bytes_as", "same_pixels_as"]
    named = {Path(row["path"]).relative_to(photos).as_posix(): row for row in found}
    assert sorted(named) == ["a/00.png", "b/01.png", "copy.png", "pixels.bmp", "re-encoded.jpg"]
    first = str(photos / "a/00.png")
    assert (named["copy.png"]["same_bytes_as"], named["copy.png"]["same_pixels_as"]) == (first, "")
    assert (named["pixels.bmp"]["same_bytes_as"], named["pixels.bmp"]["same_pixels_as"]) == ("", first)
    assert named["re-encoded.jpg"]["same_bytes_as"] == named["re-encoded.jpg"]["same_pixels_as"] == ""
    assert {named[name]["group"] for name in ("a/00.png", "copy.png", "pixels.bmp")} == {"1"}
    assert named["b/01.png"]["group"] == named["re-encoded.jpg"]["group"] == "2"
    page = (tmp_path / "out/duplicates.html").read_text(encoding="utf-8")
    assert "same bytes as a/00.png" in page and "same pixels as a/00.png" in page and "24 x 20" in page
    assert {path: path.read_bytes() for path in photos.rglob("*.*")} == before
    capsys.readouterr()
    assert duplicates.main(arguments) == 0
    assert "chosen from the cosines of nearest images" in capsys.readouterr().out


def test_an_archive_is_searched_as_the_folder_that_it_was_made_of(encoder, built, tmp_path, capsys):
    archive = shutil.make_archive(tmp_path / "photos", "zip", built / "photos")
    assert make(encoder, archive, tmp_path / "index") == 0
    of_archive, of_folder = index.read(tmp_path / "index"), index.read(built / "index")
    assert [image.path for image in of_archive.part.images] == [image.path for image in of_folder.part.images]
    np.testing.assert_array_equal(of_archive.part.vectors, of_folder.part.vectors)
    capsys.readouterr()
    page = tmp_path / "page.html"
    asked = [f"--index={tmp_path / 'index'}", f"--image={archive}/a/04.png", "--k=2", f"--html={page}"]
    assert query.main(asked) == 0
    assert capsys.readouterr().out.splitlines()[0].endswith(f"  {archive}/a/04.png")
    assert "cannot be read" not in page.read_text(encoding="utf-8")
    assert copies([f"{archive}/a/04.png", built / "photos/a/04.png", f"{archive}/none.png"])[1:] == [
        (0, None), (None, None)
    ]  # fmt: skip


def test_more_copies_than_neighbours_are_one_group(encoder, photos, tmp_path):
    for number in range(duplicates.NEIGHBOURS * 3):
        shutil.copy(photos / "a/00.png", photos / f"copy{number:02d}.png")
    assert make(encoder, photos, tmp_path / "index") == 0
    assert duplicates.main([f"--index={tmp_path / 'index'}", f"--output={tmp_path / 'out'}", "--threshold=1"]) == 0
    found = rows(tmp_path / "out/duplicates.csv")
    assert len(found) == duplicates.NEIGHBOURS * 3 + 1 and {row["group"] for row in found} == {"1"}


# Odd ones.


def test_odd_images_are_found_with_the_reason(encoder, photos, tmp_path):
    for number in range(60):  # all others have look-alikes
        noise = np.random.default_rng(1000 + number).integers(-60, 60, (20, 24, 3))
        write(photos / f"c/{number}.png", np.clip(picture(number % 20) + noise, 0, 255).astype(np.uint8))
    write(photos / "plain.png", np.full((20, 24, 3), 128, np.uint8))
    write(photos / "dark.png", picture(3) // 16)
    write(photos / "small.png", picture(4, 4, 24))
    assert make(encoder, photos, tmp_path / "index") == 0
    assert odd.main([f"--index={tmp_path / 'index'}", f"--output={tmp_path / 'out'}"]) == 0
    found = rows(tmp_path / "out/odd.csv")
    reasons = {reason: {Path(row["path"]).name for row in found if row["reason"] == reason} for reason in
               ("far", "uniform", "dark", "small")}  # fmt: skip
    assert reasons["uniform"] == {"plain.png", "dark.png"} and reasons["dark"] == {"dark.png"}
    assert reasons["small"] == {"small.png"}
    opened = index.read(tmp_path / "index")
    nearest = neighbours.nearest_others(opened, 1)[0][:, 0]
    limit = groups.far_threshold(nearest)
    assert reasons["far"] == {Path(i.path).name for i, c in zip(opened.part.images, nearest, strict=True) if c < limit}
    page = (tmp_path / "out/odd.html").read_text(encoding="utf-8")
    assert page.count("<figure") == len(found)


# Names and pages.


class Tags(html.parser.HTMLParser):
    """Counts the tags of a page and keeps what it would load."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.sources = [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.sources += [value for name, value in attributes if name in ("src", "href")]
        assert not any(name.startswith("on") for name, _ in attributes)


def test_hostile_names_survive_in_every_file_and_are_escaped_on_pages(encoder, tmp_path, capsys):
    place = tmp_path / os.fsdecode(b"\xe4 <b>")
    for number, name in enumerate(HOSTILE):
        write(place / "photos" / name, picture(number % 4))
    folder = place / os.fsdecode(b"\xfcndex")
    assert make(encoder, place / "photos", folder) == 0
    assert make(encoder, place / "photos", folder) == 0
    assert "new: 0, changed: 0, gone: 0" in capsys.readouterr().out
    image = f"--image={place / 'photos' / HOSTILE[0]}"
    assert query.main([f"--index={folder}", image, "--k=8", f"--html={place / 'page.html'}"]) == 0
    assert query.main([f"--index={folder}", f"--image={place / 'photos'}", "--k=2"]) == 0
    assert duplicates.main([f"--index={folder}", f"--output={place / 'out'}"]) == 0
    assert odd.main([f"--index={folder}", f"--output={place / 'out'}", "--uniform=255"]) == 0
    everything = {os.path.join(place, "photos", name) for name in HOSTILE}
    for file, column in (
        (folder / "neighbours.csv", "query"),
        (place / "out/duplicates.csv", "path"),
        (place / "out/odd.csv", "path"),
    ):
        assert {row[column] for row in rows(file)} == everything, file
    for page in (place / "page.html", place / "out/duplicates.html", place / "out/odd.html"):
        tags = Tags(page.read_text(encoding="utf-8"))
        assert "\u202e" not in page.read_text(encoding="utf-8")
        assert tags.tags.count("img") >= len(HOSTILE) and "b" not in tags.tags
        assert all(source.startswith("data:image/") for source in tags.sources)
    json.dumps(json.loads((folder / "index.json").read_bytes()), ensure_ascii=False).encode()


def test_an_image_that_is_gone_since_has_an_empty_place_on_the_page(photos, tmp_path, indexed):
    shutil.copy(photos / "a/00.png", tmp_path / "query.png")
    (photos / "a/00.png").unlink()
    arguments = [f"--index={indexed}", f"--image={tmp_path / 'query.png'}", f"--html={tmp_path / 'p.html'}"]
    assert query.main(arguments) == 0
    assert (tmp_path / "p.html").read_text().count("cannot be read") == 1


# What the README and the benchmarks say.


def test_the_commands_of_the_readme_run(encoder, photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(photos / "a/00.png", "photo.jpg")  # what a file is, its bytes say
    text = (Path(__file__).parent.parent / "README.md").read_text()
    commands = re.findall(r"^python -m moco_tf\.search\.(\w+) (.*)$", text, re.MULTILINE)
    assert [name for name, _ in commands] == ["build", "query", "duplicates", "odd"]
    for name, arguments in commands:
        assert COMMANDS[name](arguments.replace("runs/v2", str(encoder)).split()) == 0
    made = ("page.html", "duplicates/duplicates.csv", "duplicates/duplicates.html", "odd/odd.csv", "odd/odd.html")
    assert all((tmp_path / name).exists() for name in made)


def test_the_benchmark_counts_the_longest_beginning_that_is_precise_enough():
    kinds = {n: near_duplicates.CHANGES[n % 5] for n in range(200)}
    planted = [f"{n:05d}" for n in range(100)] + [""] + [f"{n:05d}" for n in range(100, 150)] + [""] * 50
    scores = np.sort(np.random.default_rng(0).random(201))[::-1]
    found = near_duplicates.recall(np.array(planted, object), scores, kinds)
    assert found["all"] == 150 / 200 and found["resized"] == 30 / 40
    scores[:105] = 1.0  # ties are in or out together: 1 of 105 is wrong, 1 of 151 at the end
    assert near_duplicates.recall(np.array(planted, object), scores, kinds)["all"] == 150 / 200
    scores[:] = 1.0
    assert near_duplicates.recall(np.array(planted, object), scores, kinds)["all"] == 0


def test_the_benchmark_leaves_out_pairs_that_are_mirrored_or_cropped_copies_of_the_folders_own(tmp_path):
    image = Image.fromarray(picture(1, 40, 40)).resize((80, 80), Image.Resampling.BICUBIC)
    for name, kept in {
        "a": image,
        "b": image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        "c": image.crop((16, 0, 80, 64)),
        "d": Image.fromarray(picture(2, 80, 80)),
    }.items():
        kept.save(tmp_path / f"{name}.png")
    names, small = near_duplicates.thumbnails(tmp_path)
    assert names == ["a.png", "b.png", "c.png", "d.png"]
    pairs = np.array(list(itertools.combinations(range(4), 2)))
    alike = near_duplicates.alike(pairs, small).tolist()
    assert dict(zip(map(tuple, pairs.tolist()), alike, strict=True)) == {
        (0, 1): True, (0, 2): True, (0, 3): False, (1, 2): True, (1, 3): False, (2, 3): False
    }  # fmt: skip


# Bad input.


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["build", "--images=."], "give --encoder=DIR"),
        (["build", "--encoder=none", "--images=.", "--output=o"], "neither a run folder"),
        (
            ["build", "--encoder={encoder}", "--images=none", "--output=o"],
            "--images names a folder or an archive that is there; got none",
        ),
        (["build", "--encoder={encoder}", "--images=empty", "--output=o"], "There are no images"),
        (["build", "--encoder={encoder}", "--images=.", "--output=o", "--shard=0/3"], "--shard=3/16 is the third"),
        (["build", "--encoder={encoder}", "--images=.", "--output=file"], "names a folder"),
        (["query", "--index=none", "--image=."], "--index=none holds no index"),
        (["query", "--image=."], "--index=DIR names an index"),
        (["duplicates", "--index=none", "--output=o", "--threshold=2"], "--threshold is a cosine"),
        (["duplicates", "--index=none", "--output=o"], "--index=none holds no index"),
        (["odd", "--index=none", "--output=o", "--dark=300"], "--dark is 0 to 255"),
        (["merge", "--index=empty"], "it has none"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(encoder, tmp_path, capsys, monkeypatch, arguments, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    name, *flags = (argument.format(encoder=encoder) for argument in arguments)
    assert COMMANDS[name](flags) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith(f"moco_tf.search.{name}: ") and said in error


def test_without_faiss_a_line_says_how_to_get_it(encoder, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    assert make(encoder, tmp_path, tmp_path / "index") == 2
    assert capsys.readouterr().err == "moco_tf.search.build: search needs faiss: pip install 'moco_tf[search]'\n"


def test_help_and_wrong_flags_load_neither_faiss_nor_tensorflow():
    code = (
        "import sys\nfrom moco_tf.search import build, query, duplicates, odd, merge\n"
        "for command in (build, query, duplicates, odd, merge):\n"
        "    assert command.main(['--help']) == 0 and command.main(['--nonsense']) == 2\n"
        "sys.exit(bool({'faiss', 'tensorflow'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_two_builds_do_not_write_to_one_index_at_once(encoder, photos, tmp_path, capsys):
    with index.held(tmp_path / "index"):
        assert make(encoder, photos, tmp_path / "index") == 2
    assert "another process writes to" in capsys.readouterr().err


def test_parts_give_the_last_of_each_path_and_only_what_is_wanted(tmp_path):
    def part(name, *paths, broken=()):
        (tmp_path / name).mkdir()
        images = [parts.Image(path, 1, len(name), 2, 2, 0.0, 0.0) for path in paths]
        vectors = np.full((len(paths), 3), len(name), np.float16) + np.arange(len(paths))[:, None] / 4
        parts.write(tmp_path / name, images, [parts.Broken(b, 1, len(name), "x") for b in broken], [vectors], 3)
        return parts.read(tmp_path / name)

    pieces = [part("1", "b", "a", "c", broken="z"), part("22", "c", "z", "d", broken="a")]
    images, broken, blocks = parts.merged(pieces)
    assert [image.path for image in images] == ["b", "c", "d", "z"] and [file.path for file in broken] == ["a"]
    np.testing.assert_array_equal(np.concatenate(list(blocks))[:, 0], [1.0, 2.0, 2.5, 2.25])
    images, broken, blocks = parts.merged(pieces, {"c": (1, 2), "b": (1, 99), "a": (1, 2)})
    assert [image.path for image in images] == ["c"] and [file.path for file in broken] == ["a"]
    assert next(itertools.chain(*blocks)).tolist() == [2.0, 2.0, 2.0]


def test_an_index_that_names_an_encoder_inside_of_itself_runs_it_only_where_that_is_asked_for(
    encoder, photos, indexed, capsys
):
    shutil.copytree(encoder, indexed / "inside")
    description = indexed / "index.json"
    description.write_text(description.read_text().replace(encoder.as_uri(), (indexed / "inside").as_uri()))
    asked = [f"--index={indexed}", f"--image={photos / 'a/00.png'}"]
    assert query.main(asked) == 2
    assert "names an encoder inside of itself" in capsys.readouterr().err
    assert query.main([*asked, f"--encoder={encoder}"]) == 0


@pytest.mark.parametrize("place", ["../..", "built-1/..", "/etc"])
def test_an_index_is_built_in_its_own_folder(indexed, place):
    description = indexed / "index.json"
    description.write_text(description.read_text().replace('"built-1"', json.dumps(place)))
    with pytest.raises(ConfigError, match=r"index.json is damaged"):
        index.read(indexed)


@pytest.mark.parametrize("place", ["/dev/zero", "../outside.png", "a/../../outside.png"])
def test_the_images_of_an_index_lie_in_its_folder_of_images(indexed, place):
    file = indexed / "built-1/images.csv"
    file.write_text(file.read_text().replace("a/00.png", place, 1))
    with pytest.raises(ConfigError, match=r"images.csv is missing or damaged"):
        index.read(indexed)


def test_a_pipe_in_the_place_of_an_image_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    with pytest.raises(ValueError, match="is not a file"):
        archive.read(tmp_path / "pipe.jpg")


def test_a_file_that_the_system_refused_is_named_and_read_anew_at_the_next_start(
    encoder, photos, tmp_path, monkeypatch
):
    verdicts = check.verdicts
    refused = check.Verdict(f"{photos / 'a/00.png'}: Permission denied")
    with monkeypatch.context() as patch:
        patch.setattr(check, "verdicts", lambda *args: [refused, *verdicts(*args)[1:]])
        assert make(encoder, photos, tmp_path / "index") == 0
    assert [file.path for file in index.read(tmp_path / "index").part.broken] == ["a/00.png"]
    encoded = encoded_files(monkeypatch)
    assert make(encoder, photos, tmp_path / "index") == 0 and encoded == ["a/00.png"]
    assert make(encoder, photos, tmp_path / "fresh") == 0
    assert_same(tmp_path / "index", tmp_path / "fresh")


def test_parts_of_an_index_are_not_kept_open_and_a_full_table_of_files_is_no_damage(
    encoder, photos, tmp_path, monkeypatch
):
    output = tmp_path / "small"
    assert make(encoder, photos, output, "--shard_size=2") == 0
    found = index.pieces(output, index.about(output))
    saved = index.save(tmp_path / "other", found[0].images[:1], [], np.ones((1, 3), np.float16))
    assert all(isinstance(part.vectors, parts.Closed) for part in (*found, saved))
    np.testing.assert_array_equal(found[0].vectors[[1, 0]], parts.vectors(found[0].vectors.folder)[[1, 0]])

    def full(folder):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), str(folder))

    monkeypatch.setattr(parts, "vectors", full)
    with pytest.raises(OSError, match="Too many open files"):
        index.pieces(output, index.about(output))


def test_a_kill_while_encoded_parts_are_removed_leaves_none_with_some_of_its_files(
    encoder, photos, tmp_path, monkeypatch
):
    removed = []
    monkeypatch.setattr(index.shutil, "rmtree", lambda path, **how: removed.append(Path(path).name))  # killed before
    output = tmp_path / "killed"
    assert make(encoder, photos, output, "--shard_size=2") == 0
    assert f".writing-{index.PENDING}" in removed and not (output / index.PENDING).exists()
    monkeypatch.undo()
    assert make(encoder, photos, output) == 0 and not (output / f".writing-{index.PENDING}").exists()
