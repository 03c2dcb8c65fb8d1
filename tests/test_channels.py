"""Grey images and images of any number of channels: how they are read and viewed, and what runs and encoders make of
them.
"""

import dataclasses
import functools
import io
import json

import keras
import numpy as np
import pytest
import tensorflow as tf
from every_task import TASKS
from PIL import Image
from test_train import assert_a_run_goes_on, rows

from moco_tf import build, frozen, start_from, torch_weights
from moco_tf.command import ConfigError
from moco_tf.config import parse
from moco_tf.data import __main__ as data_command
from moco_tf.data import any_image, augment, convert, dataset, encoded, image_ops
from moco_tf.data.inputs.image import CIFAR10, IMAGENET
from moco_tf.data.manifest import check_files
from moco_tf.encoders import first_convolution, resnet, vit
from moco_tf.evaluate import features, finetune, knn, linear_probe, look
from moco_tf.search import build as search_build
from moco_tf.search import query as search_query
from moco_tf.serving import export
from moco_tf.train import main
from moco_tf.transfer import detect

TINY = [
    *("--arch=resnet10", "--width=4", "--stem=cifar", "--image_size=8", "--batch_size=8", "--queue_size=16"),
    *("--dim=8", "--augment=v2", "--lr=0.01"),
]
BANDS = 5
OF_COLORS = ("cmc", "cpc", "colorize")


def photograph(height, width, channels, seed=0):
    """uint8 (height, width, channels), smooth, with a little noise."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:height, :width]
    waves = [np.sin(rows / (3 + c + seed % 5)) + np.cos(columns / (4 + 2 * c)) for c in range(channels)]
    return np.clip(127 + 50 * np.stack(waves, -1) + rng.normal(0, 9, (height, width, channels)), 0, 255).astype(
        np.uint8
    )


def npy(values, **settings):
    file = io.BytesIO()
    np.save(file, values, **settings)
    return file.getvalue()


def png(pixels):
    return tf.io.encode_png(pixels).numpy()


def write(folder, channels, number=12):
    """Images in two classes and two splits: PNGs in colour, or .npy files of so many channels."""
    for split in ("train", "test"):
        for place in range(number):
            path = folder / split / f"class-{place % 2}" / f"{place}.{'png' if channels == 3 else 'npy'}"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = photograph(12, 10, channels, seed=place + 100 * (split == "test"))
            path.write_bytes(png(pixels) if channels == 3 else npy(pixels))
    return folder


# Reading.


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "grey"])
def test_a_grey_image_is_pillows_mode_l(kind):
    pixels = photograph(40, 30, 3)
    image = Image.fromarray(pixels[..., 0] if kind == "grey" else pixels)
    file = io.BytesIO()
    image.save(file, "PNG" if kind == "grey" else kind)
    decoded = encoded.decode(tf.constant(file.getvalue()), 1)
    np.testing.assert_array_equal(decoded[..., 0], np.asarray(Image.open(file).convert("L")))
    np.testing.assert_array_equal(encoded.decode_safely(tf.constant(file.getvalue()), 1), decoded)


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
def test_an_array_is_what_numpy_saved(version):
    pixels, file = photograph(7, 5, BANDS), io.BytesIO()
    np.lib.format.write_array(file, pixels, version=version)
    np.testing.assert_array_equal(encoded.decode(tf.constant(file.getvalue()), BANDS), pixels)
    np.testing.assert_array_equal(encoded.decode_file(file.getvalue()), pixels)


BAD = {
    "three channels": (npy(photograph(7, 5, 3)), "an array of shape (7, 5, 3), not (height, width, 5)"),
    "one plane": (npy(photograph(7, 5, 1)[..., 0]), "an array of shape (7, 5), not (height, width, 5)"),
    "nothing in it": (npy(np.zeros((0, 5, BANDS), np.uint8)), "an array of shape (0, 5, 5), not (height, width, 5)"),
    "uint16": (npy(photograph(7, 5, BANDS).astype(np.uint16)), "values of the type <u2, not uint8: moco_tf.data.conv"),
    "objects": (npy(np.array([None, {}], object)), "values of the type |O, not uint8"),
    "fields": (npy(np.zeros((3, 3, BANDS), [("a", "u1")])), "values of the type a|u1, not uint8"),
    "Fortran": (npy(np.asfortranarray(photograph(7, 5, BANDS))), "in Fortran order: save np.ascontiguousarray of it"),
    "cut": (npy(photograph(7, 5, BANDS))[:-3], "cut short: 172 of 175 bytes"),
    "cut in its header": (npy(photograph(7, 5, BANDS))[:40], "a .npy file without a header"),
    "too large": (
        npy(photograph(1, 1, BANDS)).replace(b"(1, 1, 5)", b"(999999999, 999999999, 5)"),
        "more than 89478485 pixels",
    ),
    "empty": (b"", "no .npy file"),
    "a picture": (png(photograph(7, 5, 3)), "no .npy file"),
}


def test_files_that_are_no_arrays_of_so_many_channels_are_named_each_with_its_reason(tmp_path):
    folder = write(tmp_path / "bands", BANDS)
    for name, (content, _) in BAD.items():
        (folder / "train" / "class-0" / f"{name}.npy").write_bytes(content)
    (folder / "train" / "class-0" / "beside.png").write_bytes(BAD["a picture"][0])
    split = dataset.find(str(folder), "", "train", 0.9, channels=BANDS)
    assert split.size == 12 + len(BAD) and split.listing.besides.endings == {".png": 1}
    checked = check_files(split.listing, tmp_path / "manifest.csv")
    problems = {file.split("/")[-1].removesuffix(".npy"): problem for file, problem in checked.bad}
    assert problems.keys() == BAD.keys()
    for name, (_, reason) in BAD.items():
        assert problems[name].startswith(reason), name
    good = [verdict for verdict in checked.verdicts if not verdict.problem]
    assert {tuple(verdict[1:4]) for verdict in good} == {("npy", 12, 10)}
    source = checked.source().read_as(BANDS)
    np.testing.assert_array_equal(source.record(0)["image"], photograph(12, 10, BANDS))
    # What was found out for so many channels is not believed for another number.
    of_three = dataset.find(str(folder), "", "train", 0.9, channels=6).listing
    of_three = dataclasses.replace(
        of_three, files=["class-0/0.npy"], sizes=of_three.sizes[:1], times=of_three.times[:1]
    )
    ((_, problem),) = check_files(of_three, tmp_path / "manifest.csv").bad
    assert problem == "an array of shape (12, 10, 5), not (height, width, 6)"


def test_arrays_are_found_for_other_channels_than_1_or_3_alone(tmp_path):
    folder = write(tmp_path / "bands", BANDS)
    write(tmp_path / "bands", 3, number=4)
    for channels, count in ((1, 4), (3, 4), (BANDS, 12)):
        assert dataset.find(str(folder), "", "train", 0.05, channels=channels).size == count
    listed = tmp_path / "list.txt"
    listed.write_text("bands/train/class-0/0.npy\nbands/train/class-1/1.npy\n")
    assert dataset.find(str(listed), "", "train", 0.05, channels=BANDS).open().size == 2
    both = f"{folder}/train/class-0,{folder}/train/class-1"
    assert dataset.find(both, "", ".", 0.05, channels=BANDS).size == 12
    with pytest.raises(ConfigError, match=r"--channels=5 reads \.npy files in a folder"):
        dataset.find("embedded", "", "train", 0.05, channels=BANDS)
    with pytest.raises(ConfigError, match=r"There are no images \(.npy\) in .*, but .png 4"):
        dataset.find(str(write(tmp_path / "photos", 3, number=4) / "train"), "", ".", 0.05, channels=BANDS)


# Views.


SEEDS = np.array([(3, number) for number in range(16)])


def both_ways(image, task):
    """Views of an image (H, W, C), de-normalised, (2, N, 16, 16, C): one by one, and as a batch."""
    views, preprocessing = (task.query, task.key), task.preprocessing
    record = {"image": tf.constant(image)}

    def crops(seed):
        return tuple(augment.random_crops(record, seed, views, 16))

    spec = (augment.Unfinished(tf.TensorSpec((16, 16, image.shape[2])), tf.TensorSpec((augment.UNIFORMS,))),) * 2

    @tf.function(autograph=False)
    def made():
        batch = tf.map_fn(crops, tf.constant(SEEDS), fn_output_signature=spec)
        one = lambda crops: tuple(augment.distorted(crops, views, preprocessing))  # noqa: E731
        alone = tf.map_fn(one, batch, fn_output_signature=(tf.TensorSpec((16, 16, image.shape[2])),) * 2)
        return alone, augment.distorted(batch, views, preprocessing)

    return [preprocessing.denormalize(np.stack(views)).numpy() for views in made()]


@pytest.mark.parametrize("name", ["v1", "v3"])  # whose steps are all there are, in two orders
def test_views_of_a_grey_image_are_those_of_the_same_image_in_red_green_and_blue(name):
    """Saturation, hue and greyscale leave grey alone, so that nothing but those is missing."""
    grey, task = photograph(20, 24, 1), augment.RECIPES[name](size=16)
    of_grey = dataclasses.replace(task, preprocessing=task.preprocessing.of_channels(1))
    colored, in_batch = both_ways(np.repeat(grey, 3, axis=-1), task)
    for views in both_ways(grey, of_grey):
        assert views.shape == (2, len(SEEDS), 16, 16, 1)
        np.testing.assert_allclose(np.repeat(views, 3, axis=-1), colored, atol=0.02)
    np.testing.assert_allclose(in_batch, colored, atol=0.02)


@pytest.mark.parametrize("channels", [1, BANDS])
def test_views_of_any_number_of_channels_equal_a_loop_in_numpy(channels):
    image, task = photograph(20, 24, channels), augment.v3(size=16)
    task = dataclasses.replace(task, preprocessing=task.preprocessing.of_channels(channels))
    alone, at_once = both_ways(image, task)
    for place, seed in enumerate(SEEDS):
        uniforms = augment.draw(tf.constant(seed, tf.int64), 2)
        for which, view in enumerate((task.query, task.key)):
            draws = augment.draws_of(uniforms[which])
            expected = _view(image, view, draws)
            np.testing.assert_allclose(alone[which, place], expected, atol=0.02)
            np.testing.assert_allclose(at_once[which, place], expected, atol=0.02)


def _view(image, view, draws):
    """One view, (16, 16, C), channel by channel."""
    top, left, rows, columns = augment.random_resized_crop_box(*image.shape[:2], view.crop_scale, draws.crop).numpy()
    planes = [
        np.repeat(image[top : top + rows, left : left + columns, c : c + 1], 3, -1) for c in range(image.shape[2])
    ]
    planes = [tf.image.resize(plane, (16, 16), antialias=True).numpy()[..., 0].astype(np.float64) for plane in planes]
    if draws.jitter < view.jitter_probability:
        factors = [
            1 + strength * (2 * float(draw) - 1) for strength, draw in zip(view.jitter, draws.factors, strict=True)
        ]
        for operation in sorted((0, 1), key=lambda number: float(draws.order[number])):
            mean = np.floor(np.mean([plane.mean() for plane in planes]) + 0.5) if operation else 0
            planes = [
                np.clip(factors[operation] * plane + (1 - factors[operation]) * mean, 0, 255) for plane in planes
            ]
    if draws.blur < view.blur_probability:
        low, high = view.blur_sigma
        sigma = low + (high - low) * float(draws.sigma)
        in_three = [tf.constant(np.repeat(plane[..., None], 3, axis=-1), tf.float32) for plane in planes]
        planes = [image_ops.gaussian_blur(plane, sigma).numpy()[..., 0] for plane in in_three]
    if draws.solarize < view.solarize_probability:
        planes = [np.where(plane < 128, plane, 255 - plane) for plane in planes]
    if draws.flip < view.flip_probability:
        planes = [plane[:, ::-1] for plane in planes]
    return np.stack(planes, -1)


def test_one_channel_is_normalised_by_the_mean_of_the_figures_of_three_and_so_is_each_of_many():
    assert (IMAGENET.of_channels(1).mean, IMAGENET.of_channels(1).std) == ((0.449,), (0.226,))
    assert CIFAR10.of_channels(2).mean == (0.473367, 0.473367) and CIFAR10.of_channels(2).std == (0.2009, 0.2009)
    assert IMAGENET.of_channels(3) is IMAGENET
    grey = photograph(20, 20, 1)[None]
    wanted = (grey / 255.0 - 0.449) / 0.226
    small = IMAGENET.of_channels(1)
    np.testing.assert_allclose(small.normalize(grey), wanted, atol=1e-5)
    with pytest.raises(ValueError, match="Images have 1 channels"):
        small(np.repeat(grey, 3, axis=-1))


# Weights.


@pytest.mark.parametrize("channels", [1, BANDS])
def test_an_encoder_with_its_first_convolution_summed_gives_what_the_one_in_colour_gives(channels):
    """On the grey image in every channel, normalised alike."""
    keras.utils.set_random_seed(1)
    grey = np.random.default_rng(0).normal(size=(3, 16, 16, 1)).astype(np.float32)
    small = functools.partial(resnet.resnet, (1, 0, 0, 0), False, width=8)
    for make in (small, functools.partial(vit.vit, 16, 1, 2, patch_size=8)):
        colored, other = make(image_size=16), make(image_size=16, channels=channels)
        taken = start_from.copy_by_name(colored, other)
        assert not taken.left and len(taken.adapted) == 1
        wanted = colored(np.repeat(grey, 3, axis=-1)).numpy()
        np.testing.assert_allclose(
            other(np.repeat(grey, channels, axis=-1)).numpy(), wanted, atol=1e-5 * np.abs(wanted).max()
        )
        back = make(image_size=16)
        start_from.copy_by_name(other, back)
        np.testing.assert_allclose(back(np.repeat(grey, 3, axis=-1)).numpy(), wanted, atol=1e-5 * np.abs(wanted).max())


def test_a_kernel_for_n_channels_is_3_nths_of_its_mean_over_red_green_and_blue_in_its_own_type():
    kernel = np.random.default_rng(0).normal(size=(4, 3, 7, 7)).astype(np.float16)
    for channels in (1, 2, 7):
        adapted = first_convolution.of_channels(kernel, channels, axis=1)
        assert adapted.shape == (4, channels, 7, 7) and adapted.dtype == np.float16
        wanted = 3 / channels * kernel.astype(np.float64).mean(axis=1)
        for place in range(channels):
            np.testing.assert_allclose(adapted[:, place], wanted, atol=2e-3)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """(a file under torchvision's names, of an encoder in colour; that encoder)."""
    folder = tmp_path_factory.mktemp("weights")
    keras.utils.set_random_seed(3)
    colored = resnet.resnet10(image_size=16, width=4, stem="cifar")
    colored.save(folder / "encoder.keras")
    file = folder / "resnet10.safetensors"
    assert torch_weights.main([f"--encoder={folder / 'encoder.keras'}", f"--output={file}"]) == 0
    return file, colored


@pytest.mark.parametrize(
    ("channels", "said"), [(1, "the sum over the 3 channels"), (BANDS, "3/5 of the mean over the 3")]
)
def test_torch_weights_go_in_for_other_channels_and_come_out_with_them(weights, channels, said, tmp_path, capsys):
    file, colored = weights
    new = tmp_path / "new"
    assert (
        torch_weights.main([f"--checkpoint={file}", f"--output={new}", f"--channels={channels}", "--image_size=16"])
        == 0
    )
    assert f"Adapted: conv1 is {said}" in capsys.readouterr().out
    grey = np.random.default_rng(0).normal(size=(2, 16, 16, 1)).astype(np.float32)
    wanted = colored(np.repeat(grey, 3, axis=-1)).numpy()
    got = keras.models.load_model(new / "encoder.keras")(np.repeat(grey, channels, axis=-1))["features"]
    np.testing.assert_allclose(got, wanted, atol=1e-5 * np.abs(wanted).max())
    again = tmp_path / "again.safetensors"
    assert torch_weights.main([f"--encoder={new}", f"--output={again}"]) == 0
    kernel = torch_weights.checkpoint_files.read(again)["conv1.weight"]
    assert kernel.shape == (4, channels, 3, 3)
    assert torch_weights.main([f"--checkpoint={again}", f"--output={tmp_path / 'as it is'}"]) == 0
    shown = capsys.readouterr().out
    assert f"cifar stem, {channels} channel" in shown and "Adapted" not in shown
    assert torch_weights.main([f"--checkpoint={file}", f"--output={tmp_path / 'none'}", "--channels=0"]) == 2
    assert "--channels is more than 0; got 0" in capsys.readouterr().err


def test_the_authors_checkpoint_becomes_a_run_of_grey_images(tmp_path, capsys):
    from test_torch_weights import V2

    run = tmp_path / "run"
    assert torch_weights.main([f"--checkpoint={V2}", f"--output={run}", "--channels=1"]) == 0
    assert "Adapted: conv1 is the sum over the 3 channels there." in capsys.readouterr().out
    assert "--channels=1\n" in (run / "config.flags").read_text()
    tensors, model = torch_weights.checkpoint_files.read(V2), build.trained(run)
    for name, encoder in (("encoder_q", model.query_encoder), ("encoder_k", model.key_encoder)):
        (kernel,) = [
            weight for weight in encoder.weights if weight.path.endswith("conv1/kernel") and "layer" not in weight.path
        ]
        wanted = tensors[f"module.{name}.conv1.weight"].sum(axis=1, keepdims=True)
        np.testing.assert_allclose(kernel, wanted.transpose(2, 3, 1, 0), atol=1e-6)


# Runs.


@pytest.fixture(scope="module")
def bands(tmp_path_factory):
    """A folder of arrays, the flags of a run on it, and that run, of a step."""
    folder = tmp_path_factory.mktemp("bands")
    write(folder / "images", BANDS)
    flags = [*TINY, f"--dataset={folder / 'images'}", f"--channels={BANDS}", "--epochs=2"]
    assert main([*flags, "--max_steps=1", "--knn_every=0", f"--run_dir={folder / 'run'}"]) == 0
    return folder, flags


@pytest.fixture(scope="module")
def grey(tmp_path_factory, weights):
    """A run of one step on photographs as grey, from weights of an encoder in colour."""
    folder = tmp_path_factory.mktemp("grey")
    write(folder / "images", 3)
    flags = [*TINY, f"--dataset={folder / 'images'}", "--channels=1", "--knn_every=0", f"--start_from={weights[0]}"]
    assert main([*flags, "--max_steps=1", f"--run_dir={folder / 'run'}"]) == 0
    return folder


@pytest.mark.slow
def test_a_run_of_many_channels_goes_on_bit_for_bit_with_knn(bands, tmp_path):
    _, flags = bands
    whole = assert_a_run_goes_on(tmp_path, flags, at=1, steps=2)
    assert 0 <= float(rows(whole)[-1]["knn_top1"]) <= 100


def test_a_run_of_many_channels_says_what_is_left_out_and_shows_its_views_in_grey(bands):
    run = bands[0] / "run"
    picture = tf.io.decode_png((run / "views.png").read_bytes())
    assert picture.shape[-1] == 3 and bool(tf.reduce_all(picture == picture[..., :1]))
    said = (
        "arrays of 5 channels (--channels=5): random saturation, hue and greyscale, which need colours, are left out"
    )
    assert said in (run / "train.log").read_text()


@pytest.mark.slow
def test_all_that_comes_after_a_run_of_many_channels_reads_its_files(bands, tmp_path, capsys):
    folder, _ = bands
    run = f"--encoder={folder / 'run'}"
    for command, *more in (
        (knn, "--k=3"),
        (linear_probe, "--epochs=2"),
        (linear_probe, "--epochs=2", "--lr=1"),
        (finetune, "--epochs=1"),
        (features,),
        (look, "--perplexity=2"),
    ):
        assert command.main([run, *more, f"--output={tmp_path / command.__name__}"]) == 0
    assert "data:image/png" in (tmp_path / "moco_tf.evaluate.look/report.html").read_text()
    images, index = folder / "images/train", f"{tmp_path / 'index'}"
    assert search_build.main([run, f"--images={images}", f"--output={index}"]) == 0
    page = tmp_path / "page.html"
    capsys.readouterr()
    asked = images / "class-0/0.npy"
    assert search_query.main([f"--index={index}", f"--image={asked}", f"--html={page}"]) == 0
    assert capsys.readouterr().out.startswith(f"1.0000  {asked}\n")
    assert "cannot be read" not in page.read_text() and page.read_text().count("data:image/jpeg") == 13
    assert data_command.main([*bands[1], f"--run_dir={tmp_path / 'looked at'}"]) == 0
    assert "Formats: npy 12" in capsys.readouterr().out


def test_a_served_encoder_of_many_channels_takes_arrays_and_has_no_signature_for_files(bands, tmp_path, capsys):
    folder, _ = bands
    assert export.main(["encoder", f"--run_dir={folder / 'run'}", f"--output={tmp_path}"]) == 0
    assert "has no signature encoded_images: files have no 5 channels" in capsys.readouterr().out
    served = tf.saved_model.load(str(tmp_path / "1"))
    assert set(served.signatures) == {"serving_default", "preprocessed"}
    images = np.stack([photograph(12, 10, BANDS, seed) for seed in (0, 1)])
    answer = served.signatures["serving_default"](images=tf.constant(images))
    model = build.trained(folder / "run")
    np.testing.assert_allclose(answer["features"], model.predict(images, verbose=0), atol=1e-5)
    encoder = frozen.read(tmp_path)
    assert encoder.preprocessing == model.preprocessing and encoder.identity == frozen.of_model(model).identity
    source = encoder.preprocessing.records_of(
        dataset.find(str(folder / "images"), "", "train", 0, channels=BANDS).open()
    )
    view = encoder.preprocessing.of_record(source.record(0))[None]
    np.testing.assert_allclose(encoder.encode(view)["features"][0], answer["features"][0], atol=1e-5)
    card = (tmp_path / "1/README.md").read_text()
    assert "uint8 (N, H, W, 5)" in card and "encoded_images" not in card
    assert json.loads((tmp_path / "1/encoder.json").read_text())["input"]["mean"] == [0.449] * BANDS


def test_a_grey_run_starts_from_weights_in_colour_and_is_served_files_and_arrays(grey, tmp_path):
    log = (grey / "run/train.log").read_text()
    assert "- conv1 is the sum over the 3 channels there." in log and "Not taken" not in log
    assert "Images are read as grey (--channels=1)" in log
    assert export.main(["encoder", f"--run_dir={grey / 'run'}", f"--output={tmp_path}"]) == 0
    served = tf.saved_model.load(str(tmp_path / "1")).signatures
    photos = [photograph(12, 10, 3, seed) for seed in (0, 1)]
    files = tf.constant([png(photos[0]), tf.io.encode_jpeg(photos[1][..., :1]).numpy(), png(photos[1])])
    by_files = served["encoded_images"](images=files)["features"]
    arrays = np.stack([np.asarray(Image.fromarray(photo).convert("L")) for photo in photos])[..., None]
    by_arrays = served["serving_default"](images=tf.constant(arrays))["features"]
    np.testing.assert_allclose(by_files.numpy()[[0, 2]], by_arrays, atol=1e-5)
    source = build.inputs(parse([*TINY, "--channels=1"])).records_of(
        dataset.find(str(grey / "images"), "", "train", 0).open()
    )
    np.testing.assert_array_equal(source.record(0)["image"], arrays[0])


@pytest.mark.slow
@pytest.mark.parametrize("task", [task for task in TASKS if task not in (*OF_COLORS, "simcse")])
def test_every_other_task_learns_from_other_channels(task, tmp_path, monkeypatch):
    monkeypatch.setattr(vit, "vit_tiny", functools.partial(vit.vit, 8, 2, 2))
    write(tmp_path / "images", BANDS)
    wanted = parse([f"--pretext={task}"])
    more = ["--image_size=18"] if hasattr(wanted, "tile_size") else []
    more += ["--clusters=4"] if hasattr(wanted, "clusters") else []
    more += ["--arch=vit_tiny", "--patch_size=4", "--hidden_dim=16"] if wanted.is_vit else []
    more += ["--views_on=device"] if hasattr(wanted, "views_on") and task != "siblings" else []
    flags = [*TINY, f"--dataset={tmp_path / 'images'}", f"--channels={BANDS}", "--knn_every=0", *more]
    flags = [flag for flag in flags if "augment" not in flag or hasattr(wanted, "augment")]
    size = 8 if task != "siblings" else 2  # classes are its things
    assert (
        main([*flags, f"--pretext={task}", f"--batch_size={size}", "--max_steps=2", f"--run_dir={tmp_path / 'run'}"])
        == 0
    )
    assert np.isfinite(float(rows(tmp_path / "run")[-1]["loss"]))


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        *((["--channels=1", f"--pretext={task}"], f"--pretext={task} learns from red, green and blue, --channels=3")
          for task in OF_COLORS),
        (["--channels=0"], "--channels is more than 0; got 0"),
        (["--channels=grey"], "--channels"),
    ],
)  # fmt: skip
def test_other_channels_are_refused_in_one_line_where_colours_are_learnt_from(flags, said):
    with pytest.raises(ConfigError) as refusal:
        parse(flags)
    assert said in str(refusal.value) and "\n" not in str(refusal.value)


def test_a_detector_takes_encoders_of_colours(grey, tmp_path, capsys):
    assert detect.main([f"--encoder={grey / 'run'}", "--dataset=any", f"--output={tmp_path}"]) == 2
    assert "is of images in colour here, --channels=3; the run has 1" in capsys.readouterr().err


def test_moco_and_views_in_keras_take_the_channels_of_a_tasks_preprocessing():
    import moco_tf

    task = augment.v2(size=16)
    task = dataclasses.replace(task, preprocessing=task.preprocessing.of_channels(2))
    images = np.stack([photograph(20, 20, 2, seed) for seed in range(4)])
    query, key = next(iter(moco_tf.views(images, task, 4)))
    assert query.shape == key.shape == (4, 16, 16, 2)
    encoded_ones = tf.data.Dataset.from_tensor_slices([npy(image) for image in images])
    np.testing.assert_array_equal(next(iter(moco_tf.views(encoded_ones, task, 4)))[0], query)
    with pytest.raises(ValueError, match=r"Images have the shape \(H, W, 2\)"):
        moco_tf.views(images[..., :1], task, 4)
    backbone = resnet.resnet(((1, 0, 0, 0)), False, image_size=16, width=4, channels=2)
    model = moco_tf.MoCo(backbone, dim=4, queue_size=8, preprocessing=task)
    assert model.predict(images, verbose=0).shape == (4, 4)
    with pytest.raises(ValueError, match="a backbone takes images in colour"):
        moco_tf.MoCo(backbone, dim=4, queue_size=8)


# Converting.


def converted(contents, tmp_path, *flags):
    """{name: array} of files that --format=npy makes, and what is unreadable."""
    for name, content in contents.items():
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / name).write_bytes(content)
    assert convert.main([f"--images={tmp_path / 'in'}", f"--output={tmp_path / 'out'}", "--format=npy", *flags]) == 0
    return {path.stem: np.load(path) for path in (tmp_path / "out").glob("*.npy")}


def read(content, **settings):
    return any_image.read_channels(io.BytesIO(content), **settings)


def tiff(values, **settings):
    tifffile = pytest.importorskip("tifffile", reason="tifffile is not installed: pip install 'moco_tf[convert]'")
    file = io.BytesIO()
    tifffile.imwrite(file, values, **settings)
    return file.getvalue()


def test_all_channels_of_a_tiff_become_an_array_however_they_lie_in_it():
    pixels = photograph(20, 30, BANDS)
    planes = np.moveaxis(pixels, -1, 0)
    kinds = {
        "pages": tiff(planes, photometric="minisblack"),
        "samples": tiff(pixels, photometric="minisblack", planarconfig="contig"),
        "planes": tiff(planes, photometric="minisblack", planarconfig="separate"),
        "ImageJ": tiff(planes, imagej=True, metadata={"axes": "CYX"}),
        "npy": npy(pixels),
    }
    for kind, content in kinds.items():
        np.testing.assert_array_equal(read(content), pixels, err_msg=kind)
    np.testing.assert_array_equal(read(tiff(pixels[..., 0])), pixels[..., :1])
    np.testing.assert_array_equal(read(npy(pixels[..., 0])), pixels[..., :1])
    np.testing.assert_array_equal(read(png(pixels[..., :3])), pixels[..., :3])
    with pytest.raises(any_image.Unreadable, match=r"a TIFF of TZYX, .* more axes than height, width, channels"):
        read(tiff(np.zeros((2, 3, 8, 9), np.uint8), imagej=True, metadata={"axes": "TZYX"}))
    with pytest.raises(any_image.Unreadable, match="Object arrays cannot be loaded"):
        read(npy(np.array([None]), allow_pickle=True))
    with pytest.raises(any_image.Unreadable, match="not numbers"):
        read(npy(np.zeros(7, np.uint8)))


@pytest.mark.parametrize("make", [npy, functools.partial(tiff, photometric="minisblack", planarconfig="contig")])
def test_more_than_eight_bits_are_scaled_or_stretched_channel_by_channel(make):
    deep = photograph(20, 30, BANDS).astype(np.uint16) * 5 + 300
    np.testing.assert_array_equal(read(make(deep)), np.rint(deep / 257).astype(np.uint8))
    low, high = deep.min((0, 1)).astype(float), deep.max((0, 1)).astype(float)
    stretched = np.rint((deep - low) * (255 / (high - low)))
    assert np.abs(read(make(deep), stretch=True) - stretched).max() <= 1  # halves, in float32
    with pytest.raises(any_image.Unreadable, match="give --stretch"):
        read(make(deep.astype(np.float32)))
    assert np.abs(read(make(deep.astype(np.float32)), stretch=True) - stretched).max() <= 1


def test_converted_arrays_are_small_and_what_training_reads(tmp_path, capsys):
    pixels = photograph(40, 60, BANDS)
    contents = {"a.tif": tiff(np.moveaxis(pixels, -1, 0), photometric="minisblack"), "b.npy": npy(pixels[:, :30]),
                "bad.npy": npy(pixels)[:-5], "c.png": png(pixels[..., :3])}  # fmt: skip
    arrays = converted(contents, tmp_path, "--size=20")
    assert {name: array.shape for name, array in arrays.items()} == {
        "a": (20, 30, BANDS), "b": (27, 20, BANDS), "c": (20, 30, 3)}  # fmt: skip
    for place in range(BANDS):
        channel = Image.fromarray(pixels[..., place]).resize((30, 20), Image.Resampling.BICUBIC)
        np.testing.assert_array_equal(arrays["a"][..., place], np.asarray(channel))
    assert "Unreadable: bad.npy" in capsys.readouterr().out
    source = dataset.find(str(tmp_path / "out"), "", "train", 0.5, channels=BANDS).open().read_as(BANDS)
    np.testing.assert_array_equal(source.record(0)["image"], arrays["a"])
    np.testing.assert_array_equal(source.record(2)["image"], arrays["a"])  # the first stands in for the last
    assert source.good.tolist() == [0, 1]
