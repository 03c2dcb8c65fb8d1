"""Boxes and masks as people have them: what is read, repaired with a count, refused in a line."""

import io
import json
import logging
import zlib

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds
from PIL import Image

from moco_tf import run_folder
from moco_tf.command import ConfigError
from moco_tf.data import boxes, masks
from moco_tf.data.inputs.image import IMAGENET
from moco_tf.transfer import annotated_views, running

W, H = 40, 30


def coco(folder, annotations=(), categories=("cat", "dog"), images=3, files=True, split="train"):
    (folder / "annotations").mkdir(parents=True, exist_ok=True)
    (folder / split).mkdir(exist_ok=True)
    for number in range(images if files else 0):
        Image.new("RGB", (W, H), (number, 0, 0)).save(folder / split / f"{number}.png")
    content = {
        "images": [{"id": 10 + n, "file_name": f"{n}.png", "width": W, "height": H} for n in range(images)],
        "categories": [{"id": 7 * n + 3, "name": name} for n, name in enumerate(categories)],
        "annotations": [{"id": n, **annotation} for n, annotation in enumerate(annotations)],
    }
    (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return folder


def one(image=10, category=3, box=(5, 6, 10, 12), **more):
    return {"image_id": image, "category_id": category, "bbox": box, **more}


def find(folder, split="train"):
    return boxes.find(str(folder), "", split, 0.0)


def records(source):
    return list(source.in_order().as_numpy_iterator())


def test_coco_gives_corners_classes_and_crowds(tmp_path, caplog):
    caplog.set_level(logging.INFO, "moco_tf")
    source = find(coco(tmp_path, [one(), one(category=10, iscrowd=1), one(image=12)]))
    first, second, third = records(source)
    assert first["boxes"].tolist() == [[5, 6, 15, 18]] * 2 and first["classes"].tolist() == [0, 1]
    assert first["crowds"].tolist() == [False, True]
    assert second["boxes"].shape == (0, 4) and third["boxes"].shape == (1, 4)
    assert source.class_names == ("cat", "dog")
    assert "3 of 2 classes (cat 2, dog 1), 1 of them crowds" in caplog.text
    assert "images without a box, kept as background: 1" in caplog.text


def test_boxes_over_the_edge_are_cut_off_and_empty_ones_left_out_with_a_count(tmp_path, caplog):
    caplog.set_level(logging.INFO, "moco_tf")
    over, outside, thin = one(box=(30, 20, 100, 100)), one(box=(50, 50, 5, 5)), one(box=(1, 1, 0, 5))
    (first, *_) = records(find(coco(tmp_path, [over, outside, thin, one()])))
    assert first["boxes"].tolist() == [[30, 20, 40, 30], [5, 6, 15, 18]] and len(first["classes"]) == 2
    assert "Cut off at the image's edge: 1 boxes" in caplog.text and "Left out: 2 boxes without area" in caplog.text


@pytest.mark.parametrize(
    ("annotation", "said"),
    [
        (one(category=4), "names category_id 4, which the file does not list"),
        (one(image=99), "names image_id 99, which the file does not list"),
        (one(box=(1, 2, float("nan"), 4)), "boxes are finite numbers"),
        (one(box=(1, 2, 3)), "not enough values"),
        ({"image_id": 10, "category_id": 3}, "'bbox' is missing"),
    ],
)
def test_annotations_that_cannot_be_meant_are_refused(tmp_path, annotation, said):
    with pytest.raises(ConfigError, match=said):
        find(coco(tmp_path, [annotation]))


def test_images_of_other_sizes_than_annotations_say_are_refused(tmp_path):
    folder = coco(tmp_path, [one()])
    Image.new("RGB", (H, W)).save(folder / "train/2.png")
    with pytest.raises(ConfigError, match=r"1 have other .*train/2.png 30 x 40 pixels, not 40 x 30; it is turned"):
        find(folder)


def test_missing_images_are_named(tmp_path):
    folder = coco(tmp_path, [one()])
    (folder / "train/1.png").unlink()
    with pytest.raises(ConfigError, match=r"1 of 3 annotated images are not in .*train/1.png"):
        find(folder)


def test_files_that_are_no_annotations_are_refused(tmp_path):
    folder = coco(tmp_path, [one()])
    (folder / "annotations/instances_train.json").write_text("{")
    with pytest.raises(ConfigError, match="is not a JSON file"):
        find(folder)
    (folder / "annotations/instances_train.json").write_text("[]")
    with pytest.raises(ConfigError, match="is not as COCO has it"):
        find(folder)
    with pytest.raises(ConfigError, match="boxes come from COCO's annotation file of the split 'val'"):
        find(folder, "val")
    with pytest.raises(ConfigError, match="there is no such folder or data set"):
        find(tmp_path / "nowhere")


def voc(folder, names=("a", "b"), year=""):
    root = folder / year
    for sub in ("JPEGImages", "Annotations", "ImageSets/Main", "ImageSets/Segmentation", "SegmentationClass"):
        (root / sub).mkdir(parents=True, exist_ok=True)
    palette = Image.new("P", (W, H))
    palette.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0] + [5] * 759)
    palette.paste(2, (5, 5, 10, 10))
    for number, name in enumerate(names):
        Image.new("RGB", (W, H)).save(root / f"JPEGImages/{name}.jpg")
        (root / f"Annotations/{name}.xml").write_text(
            f"<annotation><object><name>{'dog' if number else 'cat'}</name><difficult>{number}</difficult>"
            "<bndbox><xmin>3</xmin><ymin>4</ymin><xmax>20</xmax><ymax>25</ymax></bndbox></object></annotation>"
        )
        palette.save(root / f"SegmentationClass/{name}.png")
    for kind in ("Main", "Segmentation"):
        (root / f"ImageSets/{kind}/train.txt").write_text("\n".join(names) + "\n")
    return folder


def test_vocs_coordinates_count_from_one_and_difficult_objects_are_crowds(tmp_path):
    source = find(voc(tmp_path))
    first, second = records(source)
    assert first["boxes"].tolist() == [[2, 3, 20, 25]] and not first["crowds"][0] and second["crowds"][0]
    assert source.class_names == ("cat", "dog") and second["classes"].tolist() == [1]


def test_parts_of_voc_are_joined(tmp_path):
    voc(voc(tmp_path, year="VOC2007"), names=("c",), year="VOC2012")
    source = find(tmp_path, "VOC2007/train+VOC2012/train")
    assert [path.decode().rpartition("/")[2] for path in source.paths.numpy()] == ["a.jpg", "b.jpg", "c.jpg"]
    with pytest.raises(ConfigError, match=r"cannot be read .*there are train"):
        find(tmp_path, "VOC2007/val")
    (tmp_path / "VOC2007/Annotations/b.xml").write_text("<annotation><object><name>x</name></object></annotation>")
    with pytest.raises(ConfigError, match=r"b.xml is not as VOC has it"):
        find(tmp_path, "VOC2007/train")


class WithBoxes(tfds.core.GeneratorBasedBuilder):
    """Three images with none, one and two boxes, and masks."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        objects = {"bbox": tfds.features.BBoxFeature(), "label": tfds.features.ClassLabel(names=("cat", "dog")),
                   "is_difficult": np.bool_}  # fmt: skip
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(None, None, 3), encoding_format="png"),
                    "objects": tfds.features.Sequence(objects),
                    "segmentation_mask": tfds.features.Image(shape=(None, None, 1), encoding_format="png"),
                }
            ),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        box = {"bbox": tfds.features.BBox(0.1, 0.25, 0.5, 1.0), "label": "dog", "is_difficult": True}
        for number in range(3):
            mask = np.full((H, W, 1), number, np.uint8)
            yield number, {
                "image": np.full((H, W, 3), number, np.uint8), "objects": [box] * number, "segmentation_mask": mask,
            }  # fmt: skip


@pytest.mark.parametrize("kind", ["tfrecord", "array_record"])
def test_sets_of_tfds_are_streams_of_boxes_and_masks(tmp_path, kind):
    WithBoxes(data_dir=tmp_path, file_format=kind).download_and_prepare()
    source = boxes.find("with_boxes", str(tmp_path), "train", 0.0)
    assert source.class_names == ("cat", "dog") and [len(record["classes"]) for record in records(source)] == [0, 1, 2]
    pixels, kept = boxes.in_pixels(records(source)[1], [H, W])
    np.testing.assert_allclose(pixels, [[0.25 * W, 0.1 * H, W, 0.5 * H]], rtol=1e-6)
    assert kept.numpy().tolist() == [True]
    assert records(source)[2]["crowds"].all() and records(source)[2]["classes"].tolist() == [1, 1]
    shuffled = [int(record["id"]) for _, record in source.shuffled(0).take(6)]
    assert sorted(shuffled[:3]) == [0, 1, 2]
    masked = masks.find("with_boxes", str(tmp_path), "train", 0.0)
    assert masked.class_names == ("0", "1", "2")
    assert [int(masks.decode(record["mask"])[0, 0, 0]) for record in records(masked)] == [0, 1, 2]


def folders(folder, values=(0, 1, 255), split="train", size=(W, H), count=2):
    (folder / "images" / split).mkdir(parents=True, exist_ok=True)
    (folder / "masks" / split).mkdir(parents=True, exist_ok=True)
    for number in range(count):
        Image.new("RGB", (W, H)).save(folder / f"images/{split}/{number}.jpg")
        mask = np.array(values, np.uint8)[np.arange(size[0] * size[1]) % len(values)].reshape(size[1], size[0])
        Image.fromarray(mask).save(folder / f"masks/{split}/{number}.png")
    return folder


def find_masks(folder, split="train"):
    return masks.find(str(folder), "", split, 0.0)


def test_masks_of_folders_are_numbers_and_classes_are_named_or_counted(tmp_path, caplog):
    caplog.set_level(logging.INFO, "moco_tf")
    source = find_masks(folders(tmp_path))
    assert source.class_names == ("0", "1") and "0 33.3 %, 1 33.3 %; ignored 33.3 %" in caplog.text
    mask = masks.decode(records(source)[0]["mask"]).numpy()
    assert mask.shape == (H, W, 1) and mask.ravel()[:3].tolist() == [0, 1, 255]
    (tmp_path / "classes.txt").write_text("ground\ntree\nroad\n")
    assert find_masks(tmp_path).class_names == ("ground", "tree", "road")
    (tmp_path / "classes.txt").write_text("ground\n")
    with pytest.raises(ConfigError, match=r"masks hold numbers of classes, 0 to 0 .*; those of 'train' hold 1"):
        find_masks(tmp_path)


def test_a_palettes_numbers_are_read_and_not_its_colours(tmp_path):
    source = find_masks(voc(tmp_path))
    mask = masks.decode(records(source)[0]["mask"]).numpy()
    assert sorted(set(mask.ravel().tolist())) == [0, 2] and mask[5, 5, 0] == 2 and len(source.class_names) == 21


def test_masks_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"image and masks/train/0.png have 40 x 30 and 39 x 30 pixels"):
        find_masks(folders(tmp_path / "size", size=(39, 30)))
    Image.new("RGB", (W, H)).save(folders(tmp_path / "colour") / "masks/train/1.png")
    with pytest.raises(ConfigError, match=r"the mask masks/train/1.png: a mask has one channel"):
        find_masks(tmp_path / "colour")
    (folders(tmp_path / "gone") / "masks/train/1.png").unlink()
    with pytest.raises(ConfigError, match=r"the mask masks/train/1.png cannot be read: No such file"):
        find_masks(tmp_path / "gone")
    (folders(tmp_path / "broken") / "masks/train/1.png").write_bytes(b"no image")
    with pytest.raises(ConfigError, match=r"the mask masks/train/1.png: it cannot be decoded"):
        find_masks(tmp_path / "broken")
    with pytest.raises(ConfigError, match="images has train; got 'val'"):
        find_masks(tmp_path / "gone", "val")
    with pytest.raises(ConfigError, match="masks come from Pascal VOC's folders"):
        find_masks(tmp_path)


def test_folders_without_splits_hold_each_fifth_image_out(tmp_path):
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
    for number in range(10):
        Image.new("RGB", (W, H)).save(tmp_path / f"images/{number}.png")
        Image.fromarray(np.eye(H, W, dtype=np.uint8)).save(tmp_path / f"masks/{number}.png")
    names = [
        [path.decode().rpartition("/")[2][0] for path in find_masks(tmp_path, split).paths.numpy()]
        for split in ("train", "test")
    ]
    assert names == [list("01235678"), list("49")]
    with pytest.raises(ConfigError, match="a split is train or test; got 'all'"):
        find_masks(tmp_path, "all")


CANVAS = annotated_views.Canvas(IMAGENET, 64, enlarge=True, scales=(0.5, 1.6))


def scene(rng):
    """A record: a white rectangle on black, its box, its mask."""
    height, width = rng.integers(30, 90, 2)
    left, top = rng.integers(2, (width // 2, height // 2))
    right, bottom = left + rng.integers(8, width // 2), top + rng.integers(8, height // 2)
    image, mask = np.zeros((height, width, 3), np.uint8), np.zeros((height, width), np.uint8)
    image[top:bottom, left:right], mask[top:bottom, left:right] = 255, 1

    def png(array):
        file = io.BytesIO()
        Image.fromarray(array).save(file, "PNG")
        return tf.constant(file.getvalue())

    return {
        "image": png(image),
        "mask": png(mask),
        "boxes": tf.constant([[left, top, right, bottom]], tf.float32),
        "classes": tf.constant([0], tf.int64),
        "crowds": tf.constant([False]),
        "id": tf.constant(0, tf.int64),
    }


@pytest.mark.parametrize("seed", range(12))
def test_boxes_and_masks_go_where_the_pixels_go(seed):
    record = scene(np.random.default_rng(seed))
    draw = tf.constant([seed, 1], tf.int64) if seed % 4 else None
    seen, also = annotated_views.boxed(CANVAS, record, draw), annotated_views.masked(CANVAS, record, draw)
    assert np.array_equal(seen["image"], also["image"])
    white = CANVAS.shown(seen["image"].numpy())[..., 0] > 200
    (box,) = seen["boxes"].numpy()[:-1] if len(seen["boxes"]) > 1 else [None]
    if box is None:
        assert white.sum() <= 2 * 64
        return
    rows, columns = np.flatnonzero(white.any(axis=1)), np.flatnonzero(white.any(axis=0))
    np.testing.assert_allclose(box, [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], atol=1.6)
    agree = (also["mask"].numpy()[..., 0] == 1) == white
    assert agree[also["mask"].numpy()[..., 0] != 255].mean() > 0.96


def test_a_view_is_a_function_of_its_seed_and_covers_the_range_of_scales():
    record = scene(np.random.default_rng(0))
    same = [annotated_views.boxed(CANVAS, record, tf.constant([3, 4], tf.int64))["image"] for _ in range(2)]
    assert np.array_equal(*same)
    scales = [int(tf.reduce_max(CANVAS.place(50, 100, tf.constant([n, 0], tf.int64))[0])) / 64 for n in range(200)]
    assert min(scales) == pytest.approx(0.5, abs=0.03) and max(scales) == pytest.approx(1.6, abs=0.03)
    mirrored = [bool(CANVAS.place(50, 100, tf.constant([n, 0], tf.int64))[2]) for n in range(200)]
    assert 70 < sum(mirrored) < 130


def test_judged_images_lie_in_the_corner_at_their_scale():
    record = scene(np.random.default_rng(1))
    extent = tf.image.decode_png(record["image"]).shape[:2]
    seen = annotated_views.boxed(CANVAS, record)
    back = annotated_views.to_image(seen["boxes"][:1], seen["size"], seen["scaled"])
    np.testing.assert_allclose(back, record["boxes"], rtol=1e-5)
    own = annotated_views.Canvas(IMAGENET, 128, enlarge=False)
    at_its_size = annotated_views.masked(own, record)
    assert at_its_size["scaled"].numpy().tolist() == list(extent)
    assert np.array_equal(at_its_size["mask"][: extent[0], : extent[1], 0], at_its_size["true_mask"][..., 0])
    assert (at_its_size["mask"].numpy()[extent[0] :] == 255).all()


@pytest.mark.parametrize("mirrored", [False, True])
def test_boxes_are_moved_to_the_pixel(mirrored):
    place = tf.constant([64, 128]), tf.constant([0, 32]), tf.constant(mirrored)  # twice as large, 32 columns cut off
    moved, there = CANVAS.boxes(tf.constant([[20.0, 5, 40, 25], [50, 0, 64, 32]]), place, [32, 64])
    left, right = (128 - 80, 128 - 40) if mirrored else (40, 80)
    assert moved[0].numpy().tolist() == [left - 32, 10, min(right - 32, 64), 50]
    assert there.numpy().tolist() == [True, False]  # the second: columns 100 to 128, mirrored 0 to 28


def test_an_image_that_cannot_be_decoded_is_left_out_with_its_boxes(tmp_path, caplog):
    caplog.set_level(logging.INFO, "moco_tf")
    folder = coco(tmp_path, [one(image=10 + n, box=(n, n, 5, 5)) for n in range(3)])
    (folder / "train/1.png").write_bytes(b"no image")
    source = boxes.find(str(folder), "", "train", 0.5)
    assert [record["boxes"][0, 0] for record in records(source)] == [0, 2]
    assert "cannot be decoded: 1 images, train/1.png" in caplog.text
    (folders(tmp_path / "masks") / "images/train/0.jpg").write_bytes(b"")
    assert masks.find(str(tmp_path / "masks"), "", "train", 0.5).size == 1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: c["images"].append(c["images"][0]), "image ids are different ones; 1 of 4 occur twice"),
        (lambda c: c["categories"].append({"id": 99, "name": "cat"}), "category names are different ones"),
        (lambda c: c["categories"].append({"id": 3, "name": "x"}), "category ids are different ones"),
        (lambda c: c["images"][0].update(file_name=5), "is not as COCO has it"),
        (lambda c: c["annotations"][0].update(bbox=[10**400, 1, 1, 1]), "is not as COCO has it"),
    ],
)
def test_a_file_of_coco_that_says_a_thing_twice_or_no_thing_is_refused(tmp_path, change, said):
    file = coco(tmp_path, [one()]) / "annotations/instances_train.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=said):
        find(tmp_path)


def test_grey_masks_of_few_bits_hold_their_numbers(tmp_path):
    from moco_tf.data.masks import values

    row = bytes([0]) + bytes([0b00011011])  # no filter; the four values of two bits
    chunk = lambda kind, data: (  # noqa: E731
        len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")
    )
    header = (4).to_bytes(4, "big") + (1).to_bytes(4, "big") + bytes([2, 0, 0, 0, 0])
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(row)) + chunk(b"IEND", b"")
    assert values(png).tolist() == [[0, 1, 2, 3]]


def test_crowds_are_not_learnt(tmp_path):
    record = scene(np.random.default_rng(2)) | {"crowds": tf.constant([True])}
    seen = annotated_views.boxed(CANVAS, record)
    assert seen["classes"].numpy().tolist() == [annotated_views.CROWD, annotated_views.NOTHING]
    assert seen["crowds"].numpy().tolist() == [True]


def test_batches_from_a_step_on_are_those_of_a_run_without_a_stop(tmp_path):
    source = find(coco(tmp_path, [one(image=10 + n % 3) for n in range(7)]))

    def batches(step, count):
        view = lambda record, seed: annotated_views.boxed(CANVAS, record, seed)  # noqa: E731
        return list(annotated_views.batches(source, view, 2, 5, step).take(count).as_numpy_iterator())

    for whole, later in zip(batches(0, 6)[2:], batches(2, 4), strict=True):
        assert all(np.array_equal(whole[name], later[name]) for name in whole)


def test_masks_of_one_number_beside_what_is_ignored_are_refused(tmp_path):
    for number in range(6):
        write_pair(tmp_path, number, np.where(np.arange(20).reshape(4, 5) < 7, 255, 0).astype(np.uint8))
    with pytest.raises(ConfigError, match=r"hold the number 0 alone \(255 is ignored\): write objects as 1, not 255"):
        find_masks(tmp_path)
    write_pair(tmp_path, 0, np.eye(4, 5, dtype=np.uint8))
    (tmp_path / "images/._1.jpg").write_bytes(b"an AppleDouble file")
    assert find_masks(tmp_path).size == 5  # of six, every fifth is held out


def write_pair(folder, number, mask):
    for kind, pixels in (("images", np.full((*mask.shape, 3), number, np.uint8)), ("masks", mask)):
        (folder / kind).mkdir(exist_ok=True)
        Image.fromarray(pixels).save(folder / kind / f"{number}.png")


def test_transfer_goes_on_with_its_images_in_their_order_alone(tmp_path):
    (tmp_path / "data").mkdir()
    for number in range(6):
        write_pair(tmp_path / "data", number, np.eye(4, 5, dtype=np.uint8))
    before = running._order(find_masks(tmp_path / "data"))
    folder = (tmp_path / "data").rename(tmp_path / "moved")
    assert running._order(find_masks(folder)) == before
    for kind in ("images", "masks"):
        (folder / kind / "0.png").rename(folder / kind / "9.png")
    run = run_folder.RunFolder.__new__(run_folder.RunFolder)
    run.path, run._flag = tmp_path, "--output"
    (run.path / "data.json").write_text(json.dumps({"images": 5, "order": before}))
    run.check_images(5, before)
    with pytest.raises(ConfigError, match=r"has as many as .* had, but others, or in another order"):
        run.check_images(5, running._order(find_masks(folder)))
