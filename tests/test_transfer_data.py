"""The data of the transfer study: tree crowns cut from a wheel, and synthetic composite scenes."""

import io
import json
import zipfile

import numpy as np
import pytest
from PIL import Image

from benchmarks import composite_scenes, tree_crowns


def annotations(folder, split):
    """(file name -> its boxes (B, 4), file name -> their categories), and the names of the categories."""
    content = json.loads((folder / f"annotations/instances_{split}.json").read_text())
    found = {image["id"]: [] for image in content["images"]}
    for annotation in content["annotations"]:
        found[annotation["image_id"]].append(annotation)
    boxes = {i["file_name"]: np.array([a["bbox"] for a in found[i["id"]]]).reshape(-1, 4) for i in content["images"]}
    labels = {i["file_name"]: [a["category_id"] for a in found[i["id"]]] for i in content["images"]}
    return boxes, labels, {category["id"]: category["name"] for category in content["categories"]}


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# Tree crowns.


def wheel(path, missing=0):
    """A zip file as the wheel is one, its photographs 290 x 300 pixels of a colour each; the last lacks boxes."""
    photographs = tree_crowns.PHOTOGRAPHS["train"] | tree_crowns.PHOTOGRAPHS["test"]
    with zipfile.ZipFile(path, "w") as file:
        for number, (name, boxes) in enumerate(photographs.items()):
            picture = io.BytesIO()
            Image.new("RGB", (290, 300), (number, 0, 0)).save(picture, "PNG")
            file.writestr(f"deepforest/data/{name}.png", picture.getvalue())
            corners = np.random.default_rng(number).integers(0, 250, (boxes - missing * (number == 3), 2))
            text = "".join(
                f"<bndbox><xmin>{x}</xmin><ymin>{y}</ymin><xmax>{x + 40}</xmax><ymax>{y + 40}</ymax></bndbox>"
                for x, y in corners
            )
            file.writestr(f"deepforest/data/{name}.xml", f"<annotation>{text}</annotation>")
    return path


@pytest.fixture(scope="module")
def trees(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trees")
    assert tree_crowns.main([f"--wheel={wheel(folder / 'a.whl')}", f"--output={folder / 'set'}"]) == 0
    return folder / "set"


def test_a_box_is_cut_to_its_tile_and_left_out_below_half():
    boxes = np.array([[10, 20, 50, 40], [-20, 0, 20, 10], [-21, 0, 19, 10], [120, 120, 136, 130], [200, 0, 220, 10]])
    cut = tree_crowns.boxes_in(boxes, 0, 0, 128)
    np.testing.assert_array_equal(cut, [[10, 20, 40, 20], [0, 0, 20, 10]])
    assert len(tree_crowns.boxes_in(boxes + 128, 128, 128, 128)) == 2  # tiles are alike wherever they lie


def test_test_photographs_give_no_tile_for_training_or_pre_training(trees):
    tiles = {"train": 4, "test": 12}  # 2 x 2 of 128 pixels in 290 x 300
    for split in tiles:
        boxes, _, categories = annotations(trees, split)
        names = {name.rsplit("_", 2)[0] for name in boxes}
        assert (
            len(boxes) == tiles[split] and names == set(tree_crowns.PHOTOGRAPHS[split]) and categories == {1: "tree"}
        )
        assert {path.name for path in (trees / "images" / split).iterdir()} == set(boxes)
    unlabelled = [Image.open(path) for path in (trees / "unlabelled").iterdir()]
    assert len(unlabelled) == 3 * 3 and {image.size for image in unlabelled} == {(128, 128)}  # one each 64 pixels
    assert {image.getpixel((0, 0)) for image in unlabelled} == {(0, 0, 0)}  # the colour of the first photograph


def test_boxes_of_trees_lie_in_their_tiles_and_have_an_area(trees):
    for split in tree_crowns.PHOTOGRAPHS:
        boxes = np.concatenate(list(annotations(trees, split)[0].values()))
        assert len(boxes) and boxes[:, :2].min() >= 0 and (boxes[:, :2] + boxes[:, 2:]).max() <= 128
        assert boxes[:, 2:].min() > 0


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda folder: [f"--wheel={wheel(folder / 'b.whl', missing=1)}"], "SOAP_061 has 37 boxes"),
        (lambda folder: [f"--wheel={folder}/none.whl"], "--wheel names a file; got"),
        (lambda folder: [f"--wheel={__file__}"], "is not the wheel of deepforest 2.1.0: File is not a zip file"),
        (lambda folder: [f"--wheel={__file__}", f"--output={folder}"], "--output names a folder that"),
        (lambda folder: [f"--wheel={__file__}", "--tile=401"], "--tile is more than 0 and at most 400"),
    ],
)  # fmt: skip
def test_a_wrong_wheel_or_flag_is_refused_in_one_line(tmp_path, capsys, change, message):
    assert tree_crowns.main([f"--output={tmp_path / 'set'}", *change(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not (tmp_path / "set").exists()


# Composite scenes.

SCENES = {"train": 12, "test": 6}


def write_scenes(folder, **numbers):
    flags = [f"--{name}={value}" for name, value in (SCENES | numbers).items()]
    assert composite_scenes.main([f"--output={folder}", *flags]) == 0
    return folder


@pytest.fixture(scope="module")
def composite(tmp_path_factory):
    return write_scenes(tmp_path_factory.mktemp("composite") / "set")


@pytest.fixture(scope="module")
def many():
    """60 scenes of the training split."""
    return list(composite_scenes.scenes(composite_scenes.Settings(output="none", train=60), "train")[1])


def test_a_set_has_as_many_scenes_as_asked_of_the_classes_of_cifar(composite):
    from moco_tf.data.sources import CIFAR10_CLASSES

    for split, number in SCENES.items():
        boxes, labels, categories = annotations(composite, split)
        assert categories == dict(enumerate(CIFAR10_CLASSES, 1)) and len(boxes) == number
        assert all(1 <= len(of_scene) <= 3 for of_scene in boxes.values())
        every = np.concatenate(list(boxes.values()))
        assert every[:, :2].min() >= 0 and (every[:, :2] + every[:, 2:]).max() <= 96
        assert (every[:, 2] == every[:, 3]).all() and 24 <= every[:, 2].min() <= every[:, 2].max() <= 40
        assert set(np.concatenate(list(labels.values()))) <= set(categories)


def test_masks_agree_with_boxes(composite):
    for split in SCENES:
        boxes, labels, _ = annotations(composite, split)
        for name in boxes:
            image, mask = (Image.open(composite / kind / split / name) for kind in ("images", "masks"))
            assert image.size == mask.size == (96, 96) and image.mode == "RGB" and mask.mode == "L"
            mask, outside = np.asarray(mask), np.ones((96, 96), bool)
            for (x, y, w, h), label in zip(boxes[name], labels[name], strict=True):
                outside[y : y + h, x : x + w] = False
                shown = (mask[y : y + h, x : x + w] == label).mean()
                assert (1 - 5 * composite_scenes.HIDDEN) * ((w - 4) / w) ** 2 < shown  # five others at most
            assert not mask[outside].any()


def test_the_same_seed_gives_the_same_bytes_and_more_scenes_change_none(composite, tmp_path):
    expected = contents(composite)
    assert contents(write_scenes(tmp_path / "again")) == expected
    more = contents(write_scenes(tmp_path / "more", test=7))
    assert all(more[path] == expected[path] for path in expected if path.suffix == ".png")
    other = contents(write_scenes(tmp_path / "other", seed=1))
    assert not any(other[path] == expected[path] for path in expected if path.parts[0] == "images")


def test_no_photograph_is_in_both_splits():
    train, test = ({name for _, name in composite_scenes.PHOTOGRAPHS[split]} for split in SCENES)
    assert train and test and not train & test


def test_each_object_has_a_distractor_and_hides_little(many):
    for scene in many:
        assert (scene.labels == 0).sum() == (scene.labels > 0).sum()
        for place, square in enumerate(scene.squares):
            others = np.delete(scene.squares, place, axis=0)
            assert (composite_scenes.hidden(others, square[None, :2], square[2]) <= composite_scenes.HIDDEN).all()


def test_size_place_order_and_seam_do_not_tell_objects_from_distractors(many):
    """Means of objects and distractors differ by less than three standard errors."""
    rows = [
        [*square, order / len(scene.squares), seam(scene.image, *square), label > 0]
        for scene in many
        for order, (square, label) in enumerate(zip(scene.squares, scene.labels, strict=True))
    ]
    *statistics, objects = np.array(rows).T
    for values in statistics:
        first, second = values[objects == 1], values[objects == 0]
        error = np.sqrt(first.var() / len(first) + second.var() / len(second))
        assert abs(first.mean() - second.mean()) < 3 * error


def seam(image, left, top, side):
    """The mean step from pixel to pixel within the rim, at the left and the right edge."""
    square = image[top : top + side, left : left + side].astype(float).mean(axis=2)
    steps, rim = np.abs(np.diff(square, axis=1)), composite_scenes.RIM
    return np.mean([steps[:, :rim], steps[:, -rim:]])


def test_a_rim_fades_alike_at_all_edges_and_half_of_it_is_in_the_mask():
    alpha = composite_scenes.opacity(24)
    np.testing.assert_array_equal(alpha, alpha.T)
    np.testing.assert_array_equal(alpha, alpha[::-1, ::-1])
    np.testing.assert_array_equal(alpha[12, :5], [0.125, 0.375, 0.625, 0.875, 1])


def test_cifar_is_read_from_folders_of_classes(tmp_path, capsys):
    for split in SCENES:
        for name in ("ant", "bee"):
            (tmp_path / "cifar" / split / name).mkdir(parents=True)
            Image.new("RGB", (32, 32), (255, 0, 0)).save(tmp_path / "cifar" / split / name / "0.png")
    folder = write_scenes(tmp_path / "set", cifar=tmp_path / "cifar")
    _, labels, categories = annotations(folder, "train")
    assert categories == {1: "ant", 2: "bee"} and {label for found in labels.values() for label in found} == {1, 2}
    assert composite_scenes.main([f"--output={tmp_path}/b", f"--cifar={tmp_path}/none"]) == 2
    assert "has no images in train/<class>" in capsys.readouterr().err
