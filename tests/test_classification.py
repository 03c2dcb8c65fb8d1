"""Tasks that are classifications: losses as loops have them, and nothing trivial that gives their answers away."""

import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf
from exactness import assert_goes_on, assert_numeric, assert_replicas_begin_alike

import moco_tf
from moco_tf.command import ConfigError
from moco_tf.config import parse
from moco_tf.data import sources
from moco_tf.data.encoded import decode
from moco_tf.data.inputs.image import Preprocessing
from moco_tf.encoders import decoders, heads, patch_grid, resnet
from moco_tf.methods import cluster, exemplar, jigsaw
from moco_tf.methods.cluster import Cluster
from moco_tf.methods.exemplar import Exemplar, Triplets
from moco_tf.methods.jigsaw import Jigsaw
from moco_tf.methods.position import NEIGHBORS, Position
from moco_tf.methods.rotation import Rotation
from moco_tf.pretext import position
from moco_tf.train import main

SIZE, BATCH, RECORDS, V = 6, 8, 24, 3
KINDS = {  # settings, side of the views, their number
    Rotation: ({}, SIZE, 1),
    Position: ({}, 3 * SIZE, 1),
    Jigsaw: ({"permutations": 7}, 3 * SIZE, 1),
    Exemplar: ({"records": RECORDS, "copies": V}, SIZE, V),
    Triplets: ({"dim": 4, "copies": V}, SIZE, V),
    Cluster: ({"records": RECORDS, "clusters": 5, "components": 4}, SIZE, 1),
}


def make(kind, **more):
    keras.utils.set_random_seed(1)
    backbone = resnet.resnet10(image_size=None, width=4, stem="cifar")
    settings = KINDS[kind][0] | ({} if kind is Triplets else {"seed": 3})
    model = kind(backbone, preprocessing=Preprocessing(image_size=SIZE), **settings | {"bn_groups": 2} | more)
    if kind is Cluster:
        model.groups.assign(np.arange(RECORDS) ** 2 % 5)
        model.shares.assign(cluster.shares(model.groups.numpy(), 5))
    model.compile(moco_tf.SGD(0.05, momentum=0.9, weight_decay=1e-3))
    return model


def batches(model, steps, seed=0):
    _, side, views = KINDS[type(model)]
    images = np.random.default_rng(seed).normal(size=(views, steps * BATCH, side, side, 3))
    numbers = np.arange(steps * BATCH, dtype="int64") * 7 % RECORDS
    data = {"views": tuple(images.astype(keras.config.floatx())), "id": numbers}
    return tf.data.Dataset.from_tensor_slices(data).batch(BATCH, drop_remainder=True)


def naive_answers(model, batch):
    """(logits, answer) of each question of each image, the images being taken one by one."""
    pictures = model.pictures(batch)
    count = pictures.shape[1]
    features = model.query_encoder(tf.reshape(pictures, (-1, *pictures.shape[2:])), training=True)["features"]
    features = features.numpy().reshape(BATCH, count, -1)
    for image in range(BATCH):
        if isinstance(model, Rotation):
            asked = [(features[image, turn], turn) for turn in range(4)]
        elif isinstance(model, Position):
            asked = [
                (np.concatenate([features[image, 4], features[image, place]]), number)
                for number, place in enumerate(NEIGHBORS)
            ]
        elif isinstance(model, Jigsaw):
            drawn = tf.random.stateless_uniform((BATCH,), (3, 0), 0, 7, tf.int32, alg="philox").numpy()[image]
            asked = [(np.concatenate([features[image, place] for place in model.orders[drawn]]), drawn)]
        elif isinstance(model, Exemplar):
            asked = [(features[image, copy], int(batch["id"][image])) for copy in range(V)]
        else:
            asked = [(features[image, 0], int(model.groups.numpy()[int(batch["id"][image])]))]
        yield asked


def naive_loss(model, batch):
    questions = list(naive_answers(model, batch))
    flat = np.stack([question for asked in questions for question, _ in asked])
    logits = iter(model.classifier(flat, training=True).numpy())
    losses = []
    for image, asked in enumerate(questions):
        of_image = []
        for _, answer in asked:
            row = next(logits)
            of_image.append(-np.log(np.exp(row[answer]) / np.exp(row).sum()))
        share = 1.0
        if isinstance(model, Cluster):
            groups = model.groups.numpy()
            group = groups[int(batch["id"][image])]
            share = RECORDS / (len(set(groups.tolist())) * np.sum(groups == group))
        losses.append(share * np.mean(of_image))
    return np.mean(losses)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind is not Triplets])
def test_the_loss_is_that_of_a_loop_and_its_gradient_a_numeric_one(kind, float64):
    model = make(kind)
    (batch,) = batches(model, 1)
    with tf.GradientTape() as tape:
        loss = tf.reduce_mean(model.objective(batch, None).loss)
    assert float(loss) == pytest.approx(naive_loss(model, batch), abs=1e-9)
    variables = [*model.classifier.trainable_variables, model.query_encoder.trainable_variables[0]]
    for variable, gradient in zip(variables, tape.gradient(loss, variables), strict=True):
        value = lambda: tf.reduce_mean(model.objective(batch, None).loss)  # noqa: E731
        assert_numeric(gradient, variable, value, 1e-7, rel=1e-4, abs=1e-13)  # ReLUs have kinks


@pytest.mark.parametrize(
    "kind", [Triplets, *(pytest.param(kind, marks=pytest.mark.slow) for kind in (Jigsaw, Cluster))]
)
def test_replicas_checkpoints_and_keras_files_go_on(kind, tmp_path):
    assert_goes_on(lambda: make(kind), batches, tmp_path)
    assert_replicas_begin_alike(lambda: make(kind), batches)


def test_turns_move_pixels_and_mix_none():
    model = make(Rotation)
    (batch,) = batches(model, 1)
    images, turned = batch["views"][0].numpy(), model.pictures(batch).numpy()
    for turn in range(4):
        np.testing.assert_array_equal(np.rot90(turned[:, turn], -turn, axes=(1, 2)), images)


def tiles(image, side, gap, seed=0):
    drawn = tf.random.stateless_uniform((2, 3, 3), (seed, 0))
    return position.cut(tf.constant(image), drawn, side, gap).numpy()


@pytest.mark.parametrize(("side", "gap"), [(4, 2), (6, 2), (8, 2), (5, 4)])
def test_a_tile_lies_anywhere_in_its_cell_and_apart_from_its_neighbors(side, gap):
    rows, columns = np.mgrid[:30, :30].astype("float32")
    image = np.stack([rows, columns, rows], axis=-1)
    begins = set()
    for seed in range(60):
        found = tiles(image, side, gap, seed)
        corners = found[:, :, 0, 0, :2].astype(int)
        ends = corners + side
        for row, column in itertools.product(range(3), range(3)):
            begins.add(tuple(corners[row, column] - (10 * row, 10 * column)))
            np.testing.assert_array_equal(found[row, column, :, 0, 0], corners[row, column, 0] + np.arange(side))
        assert (corners[1:, :, 0] - ends[:-1, :, 0]).min() >= gap
        assert (corners[:, 1:, 1] - ends[:, :-1, 1]).min() >= gap
    room = range(gap // 2, 10 - side - gap // 2 + 1)
    assert begins == set(itertools.product(room, room))


def test_gaps_take_more_than_half_of_its_lead_from_a_solver_by_edges():
    """Where does a tile adjoin the middle one? It compares the pixels along their common border."""
    source = sources.embedded("test")
    images = [tf.image.resize(decode(source.record(number)["image"]), (30, 30)) / 64 for number in range(60)]

    def alike(one, other):
        one, other = ((x - x.mean(axis=0)) / (x.std(axis=0) + 1e-3) for x in (one, other))
        return np.mean(one * other)

    def solved(side, gap):
        right = 0
        for number, image in enumerate(images):
            found = position.standardized(tf.constant(tiles(image, side, gap, number))).numpy()
            middle = found[1, 1]
            borders = {  # of the middle tile, and of one that would stand there
                (0, 1): (middle[0], lambda tile: tile[-1]),
                (2, 1): (middle[-1], lambda tile: tile[0]),
                (1, 0): (middle[:, 0], lambda tile: tile[:, -1]),
                (1, 2): (middle[:, -1], lambda tile: tile[:, 0]),
            }
            for place in borders:
                scores = {at: alike(own, side_of(found[place])) for at, (own, side_of) in borders.items()}
                right += max(scores, key=scores.get) == place
        return right / (4 * len(images))

    assert solved(10, 0) > 0.75
    assert solved(7, 2) < 0.5  # what --image_size=30 has; chance is a quarter


def test_tiles_are_standardized_apart_and_two_thirds_of_the_images_grey():
    config = parse(["--pretext=position", "--image_size=30"])
    options = config.options(position.Options)
    record, grey = sources.embedded("train").record(5), 0
    for seed in range(60):
        (view,) = position.views(record, tf.constant([0, seed], tf.int64), Preprocessing(image_size=30), options)
        found = patch_grid.apart(view[None], 3)
        assert found.shape == (9, 7, 7, 3)
        np.testing.assert_allclose(tf.reduce_mean(found, axis=(1, 2)), np.zeros((9, 3)), atol=1e-4)
        np.testing.assert_allclose(tf.math.reduce_std(found, axis=(1, 2)), np.ones((9, 3)), atol=1e-2)
        grey += np.allclose(found[..., 0], found[..., 2], atol=1e-3)
    assert 30 < grey < 50  # 40 on average


def test_orders_are_as_far_apart_as_a_greedy_choice_by_hand():
    everything = list(itertools.permutations(range(4)))
    distance = lambda a, b: sum(x != y for x, y in zip(a, b, strict=True))  # noqa: E731
    chosen = [everything[5]]
    while len(chosen) < 8:
        scores = [(min(distance(o, c) for c in chosen), sum(distance(o, c) for c in chosen)) for o in everything]
        chosen.append(everything[scores.index(max(scores))])
    assert jigsaw.far_apart(4, 8, seed=5).tolist() == [list(order) for order in chosen]
    hundred = jigsaw.far_apart(9, 100)
    distances = (hundred[:, None] != hundred[None]).sum(axis=2)[np.triu_indices(100, 1)]
    assert distances.min() >= 6 and distances.mean() > 8  # the authors' hundred have 2 and 8.08


def test_triplets_are_those_of_loops():
    rng = np.random.default_rng(0)
    everyone = rng.normal(size=(5, V, 4))
    everyone /= np.linalg.norm(everyone, axis=-1, keepdims=True)
    rows, losses, rights = np.array([1, 2, 4]), [], []
    for row in rows:
        others = [x for number, image in enumerate(everyone) if number != row for x in image]
        own, of_image, right = everyone[row], [], []
        for a, p in itertools.permutations(range(V), 2):
            d = lambda x, a=own[a]: np.sum((a - x) ** 2)  # noqa: E731
            further = [d(x) for x in others if d(x) > d(own[p])]
            negative = min(further) if further else max(d(x) for x in others)
            of_image.append(max(0, d(own[p]) - negative + 0.5))
            right.append(d(own[p]) < min(d(x) for x in others))
        losses.append(np.mean(of_image))
        rights.append(np.mean(right))
    embeddings = tf.constant(everyone)
    loss, right = exemplar.semi_hard_triplets(tf.gather(embeddings, rows), embeddings, tf.constant(rows), 0.5)
    np.testing.assert_allclose(loss, losses, atol=1e-9)
    np.testing.assert_allclose(right, rights)


def test_groups_are_found_anew_and_the_classifier_and_what_the_optimizer_keeps_of_it_begin_anew():
    model = make(Cluster)
    model.fit(batches(model, 2), verbose=0)
    layer = model.classifier.get_layer("logits")
    place = model.optimizer._get_variable_index(layer.kernel)
    assert np.any(model.optimizer.velocities[place].numpy())
    source = sources.embedded("test").only(np.arange(RECORDS))
    before, encoder = layer.kernel.numpy(), [v.numpy() for v in model.query_encoder.variables]
    model.before_epoch(1, source)
    assert not np.any(model.optimizer.velocities[place].numpy())
    assert not np.any(layer.bias.numpy()) and not np.allclose(layer.kernel, before)
    assert np.std(layer.kernel.numpy()) == pytest.approx(0.01, rel=0.2)
    assert all(np.array_equal(v, kept) for v, kept in zip(model.query_encoder.variables, encoder, strict=True))
    features = model.features_of(source)
    groups = cluster.k_means(cluster.whitened(features, 4), 5, 3 + 1)
    np.testing.assert_array_equal(model.groups, groups)
    assert np.mean(model.shares.numpy()[groups]) == pytest.approx(1)
    kept = layer.kernel.numpy()
    model.before_epoch(1, source)
    np.testing.assert_array_equal(layer.kernel, kept)  # a function of seed and epoch


def test_a_layer_begins_anew_under_a_loss_scale_and_not_with_adamw():
    model = make(Cluster)
    scaled = keras.optimizers.LossScaleOptimizer(moco_tf.SGD(0.1, momentum=0.9))
    model.compile(scaled)
    model.fit(batches(model, 1), verbose=0)
    layer = model.classifier.get_layer("logits")
    cluster.begin_anew(layer, scaled, (0, 1))
    velocities = scaled.inner_optimizer.velocities
    assert not np.any(velocities[scaled.inner_optimizer._get_variable_index(layer.kernel)].numpy())
    with pytest.raises(ValueError, match="SGD or LARS"):
        cluster.begin_anew(layer, moco_tf.AdamW(0.1), (0, 1))


def test_k_means_finds_what_lies_apart_and_an_image_counts_by_its_groups_size():
    rng = np.random.default_rng(0)
    truth = np.repeat(np.arange(3), [5, 10, 30])
    points = 10 * np.eye(3)[truth] + 0.1 * rng.normal(size=(45, 3))
    found = cluster.k_means(cluster.whitened(points, 2), 3, 0)
    assert len({(a, b) for a, b in zip(truth.tolist(), found.tolist(), strict=True)}) == 3
    np.testing.assert_allclose(cluster.shares(truth, 4), [45 / 3 / 5, 45 / 3 / 10, 45 / 3 / 30, 0])
    white = cluster.whitened(rng.normal(size=(100, 6)) * np.arange(1, 7), 4)
    np.testing.assert_allclose(np.linalg.norm(white, axis=1), np.ones(100))


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--pretext=position", "--image_size=12"], "tiles of 4 to 1 pixels"),
        (["--pretext=jigsaw", "--image_size=30", "--tile_size=9"], "got 9"),
        (["--pretext=jigsaw", "--image_size=30", "--gap=3"], "an even number"),
        (["--pretext=jigsaw", "--image_size=30", "--permutations=1"], "from 2 to 10000"),
        (["--pretext=position", "--image_size=32", "--arch=vit_tiny", "--patch_size=4"], "by one ResNet"),
        (["--pretext=exemplar", "--loss=triplet", "--copies=1"], "at least 2"),
        (["--pretext=cluster", "--clusters=1"], "2 or more"),
        (["--pretext=cluster", "--optimizer=adamw"], "begin anew"),
        (["--pretext=rotation", "--method=moco_v3"], "--method"),
    ],
)
def test_flags_that_do_not_fit_are_refused(flags, said):
    with pytest.raises(ConfigError, match=said):
        parse(flags)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--pretext=cluster", "--clusters=10000"], "found among more images than that"),
        (["--pretext=exemplar"], "take --loss=triplet"),
    ],
)
def test_sources_that_do_not_fit_are_refused_in_a_line(flags, said, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("moco_tf.pretext.exemplar.LIMIT", 9_999)
    assert main([*flags, "--dataset=embedded", f"--run_dir={tmp_path}"]) == 2
    assert said in capsys.readouterr().err.splitlines()[-1]


def test_exemplars_have_a_projection_with_triplets_alone():
    assert not parse(["--pretext=exemplar"]).uses("dim")
    assert parse(["--pretext=exemplar", "--loss=triplet"]).uses("dim")


def test_answers_are_float32_where_the_encoder_computes_in_16_bits():
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        assert heads.classifier(8, 5, hidden_dim=4)(np.ones((2, 8), np.float32)).dtype == "float32"
        assert decoders.of_maps((2, 2, 8), 4, 3)(np.ones((2, 2, 2, 8), np.float32)).dtype == "float32"
    finally:
        keras.config.set_dtype_policy("float32")


def test_maps_of_features_are_averaged_and_what_is_no_features_is_refused():
    maps = keras.Sequential([keras.Input((8, 8, 3)), keras.layers.Conv2D(4, 3)])
    assert Rotation(maps).query_encoder.output["features"].shape == (None, 4)
    with pytest.raises(ValueError, match=r"a backbone gives \(N, C\) or \(N, H, W, C\)"):
        Rotation(keras.Sequential([keras.Input((8, 8, 3)), keras.layers.Reshape((64, 3))]))
