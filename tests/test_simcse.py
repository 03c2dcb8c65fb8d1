"""SimCSE: sentences as records, words as numbers, dropout that goes on, losses as loops have them, STS as formulas."""

import json

import keras
import numpy as np
import pytest
import tensorflow as tf
from exactness import assert_goes_on, assert_numeric, assert_replicas_begin_alike

import moco_tf
from moco_tf import frozen
from moco_tf.command import ConfigError
from moco_tf.config import parse
from moco_tf.data import texts
from moco_tf.data.inputs.text import Words
from moco_tf.encoders import text
from moco_tf.evaluate import features, knn, sts
from moco_tf.methods.simcse import SimCSE
from moco_tf.pretext import simcse as task
from moco_tf.pytorch import tensor_names
from moco_tf.train import main

LENGTH, BUCKETS, BATCH, K, T = 6, 50, 8, 24, 0.2
INPUTS = Words(LENGTH, BUCKETS)


def simcse(depth=1, **settings):
    keras.utils.set_random_seed(1)
    backbone = text.transformer(INPUTS, width=8, depth=depth, heads=2, dropout=0.3)
    settings = {"queue_size": K, "momentum": 0.9, "temperature": T, "seed": 3} | settings
    model = SimCSE(backbone, preprocessing=INPUTS, **settings)
    model.compile(moco_tf.SGD(0.05, momentum=0.9, weight_decay=1e-3))
    return model


def batches(model, steps, seed=0):
    words = np.random.default_rng(seed).integers(1, BUCKETS, (steps * BATCH, LENGTH)).astype("int32")
    words[:, -2:] *= np.random.default_rng(seed).integers(0, 2, (steps * BATCH, 1)).astype("int32")  # some are shorter
    return tf.data.Dataset.from_tensor_slices({"views": (words, words)}).batch(BATCH, drop_remainder=True)


FRAMES = [{"frame": "in_batch"}, {"frame": "queue"}]
NAMES = ["in_batch", "queue"]


def test_words_are_lower_case_without_punctuation_and_of_one_length():
    found = INPUTS(tf.constant(["Zwölf  Boxkämpfer!", "zwölf boxkämpfer", "A b c d e f g", ""])).numpy()
    np.testing.assert_array_equal(found[0], found[1])
    assert found.shape == (4, LENGTH) and found.dtype == np.int32
    assert (found[0] > 0).sum() == 2 and (found[2] > 0).all() and not found[3].any()
    assert found.max() < BUCKETS and found[0, 0] == INPUTS(tf.constant(["ZWÖLF"]))[0, 0]


def test_views_can_be_read():
    views = INPUTS(tf.constant(["A cat.", "The dog"]))
    assert INPUTS.lines([b"A cat.", b"The dog"], (views, views)) == ["a cat | a cat", "the dog | the dog"]


@pytest.mark.parametrize("depth", [0, 2])
def test_a_sentence_means_the_same_whatever_stands_after_its_end(depth):
    network = text.transformer(Words(9, BUCKETS), width=8, depth=depth, heads=2)
    short = text.transformer(Words(4, BUCKETS), width=8, depth=depth, heads=2)
    for mine, other in zip(short.weights, network.weights, strict=True):
        mine.assign(other[:, :4] if "positions" in mine.path and len(other.shape) == 3 else other[: mine.shape[0]])
    words = np.array([[3, 4, 5, 0, 0, 0, 0, 0, 0], [7, 0, 0, 0, 0, 0, 0, 0, 0]], "int32")
    np.testing.assert_allclose(network(words), short(words[:, :4]), rtol=1e-4, atol=1e-5)
    assert np.isfinite(network(0 * words)).all()


def test_dropout_is_a_function_of_seed_pass_and_step_and_its_masks_differ():
    model = simcse()
    (batch,) = batches(model, 1)
    words = batch["views"][0]
    first, again = model._pass(words, True), model._pass(words, True)
    second = model._pass(words, True, second=True)
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - second).max() > 0.01
    model.step.assign(1)
    assert np.abs(first - model._pass(words, True)).max() > 0.01
    np.testing.assert_array_equal(model._pass(words, False), model._pass(words, False, second=True))


def test_dropout_zeroes_its_share_and_keeps_the_mean():
    layer = text.Dropout(0.3, 0)
    with text.drawing_from([layer], lambda: tf.constant([1, 2], tf.int64)):
        found = layer(tf.ones((200, 50)), training=True).numpy()
    assert np.mean(found == 0) == pytest.approx(0.3, abs=0.02)
    assert set(np.unique(found)) == {0.0, np.float32(1 / (1 - 0.3))}
    assert len({row.tobytes() for row in found}) == 200
    np.testing.assert_array_equal(layer(tf.ones((2, 5))), tf.ones((2, 5)))
    with pytest.raises(ValueError, match="this Dropout draws from what it is told"):
        layer(tf.ones((2, 5)), training=True)


def test_equal_dropout_masks_are_caught():
    def backbone(dropout):
        words = keras.Input((LENGTH,), dtype="int32")
        x = keras.layers.GlobalAveragePooling1D()(keras.layers.Embedding(BUCKETS, 8)(words))
        return keras.Model(words, dropout(x))

    with pytest.warns(UserWarning, match="Two passes of one sentence give the same features"):
        SimCSE(backbone(lambda x: x))
    SimCSE(backbone(keras.layers.Dropout(0.5)))  # Keras' own draws anew


def test_a_tuple_of_words_is_a_pair_and_texts_are_predicted():
    model = simcse()
    words = np.arange(1, 1 + BATCH * LENGTH).reshape(BATCH, LENGTH).astype("int32") % BUCKETS
    data = tf.data.Dataset.from_tensor_slices((words, words)).batch(BATCH)
    assert np.isfinite(model.fit(data, verbose=0).history["loss"][0])
    assert model.predict(["a cat", "the dog"]).shape == (2, 8) and model.predict([]).shape == (0, 8)
    with pytest.raises(ValueError, match="predict takes a list of texts"):
        model.predict("hello")


def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


@pytest.mark.parametrize("settings", FRAMES, ids=NAMES)
def test_the_loss_is_that_of_a_loop_and_its_gradient_a_numeric_one(settings, float64):
    model = simcse(**settings)
    (batch,) = batches(model, 1)
    context = model.prepare(batch)
    with tf.GradientTape() as tape:
        loss = tf.reduce_mean(model.objective(batch, context).loss)
    words = batch["views"][0]
    queries = model._pass(words, True).numpy()
    keys = model._pass(words, True, second=True).numpy()
    if model.frame == "queue":
        keys = unit(model.key_encoder(words, training=False)["projection"].numpy())
        np.testing.assert_allclose(context, keys)
        keys = np.concatenate([keys, model.queue.keys.numpy()])
    losses = []
    for row, query in enumerate(queries):
        weights = [np.exp(query @ key / T) for key in keys]
        losses.append(-np.log(weights[row] / sum(weights)))
    assert float(loss) == pytest.approx(np.mean(losses), abs=1e-9)
    gradients = tape.gradient(loss, model.trainable_variables)
    for variable, gradient in zip(model.trainable_variables, gradients, strict=True):
        value = lambda: tf.reduce_mean(model.objective(batch, context).loss)  # noqa: E731
        assert_numeric(gradient, variable, value, 1e-5, rel=1e-4, abs=1e-12)


@pytest.mark.parametrize("settings", [pytest.param(FRAMES[0], marks=pytest.mark.slow), FRAMES[1]], ids=NAMES)
def test_replicas_checkpoints_and_keras_files_go_on(settings, tmp_path):
    assert_goes_on(lambda: simcse(**settings), batches, tmp_path)
    assert_replicas_begin_alike(lambda: simcse(**settings), batches)


def test_words_are_repeated_in_their_places():
    words = tf.constant([3, 4, 5, 6, 7, 8, 9, 10, 0, 0, 0, 0], tf.int32)
    seen = set()
    for number in range(40):
        found = task.repeated(words, tf.constant((5, number), tf.int64), 0.5).numpy()
        assert found.shape == words.shape
        there = found[found > 0]
        np.testing.assert_array_equal(list(dict.fromkeys(there)), words[:8])  # in their order, each once or twice
        assert max(np.bincount(there)) <= 2
        seen.add(len(there) - 8)
    assert seen == {0, 1, 2, 3}  # below 4 = int(0.5 x 8)


@pytest.fixture
def corpus(tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    animals, cars = ["cat", "dog", "horse", "cow"], ["car", "lorry", "bus", "tram"]
    for split, verbs in (("train", ["sees", "hears", "wants", "follows"]), ("test", ["meets", "likes"])):
        lines = [
            f"{label}\tthe {one} {verb} the {other}"
            for label, names in (("animal", animals), ("car", cars))
            for verb in verbs
            for one in names
            for other in names
        ]
        (folder / f"{split}.txt").write_text("\n".join(lines) + "\n")
    return folder


FLAGS = [
    *("--pretext=simcse", "--width=8", "--attention_heads=2", "--max_words=6", "--hash_buckets=97", "--batch_size=16"),
    *("--epochs=2", "--optimizer=adamw", "--lr=1e-2", "--lr_scaling=none", "--temperature=0.05", "--queue_size=32"),
]


@pytest.mark.slow  # every day, test_every_task.py has a run of sentences go on
@pytest.mark.parametrize("more", [[], ["--frame=queue", "--word_repetition=0.5"]], ids=NAMES)
def test_a_run_of_the_command_is_judged_and_served(corpus, tmp_path, more, capsys):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    flags = [*FLAGS, *more, f"--dataset={corpus}", "--depth=1"]
    assert main([*flags, f"--run_dir={whole}"]) == 0
    said = capsys.readouterr().out
    assert "transformer, 128 sentences" in said and "bag of words" in said and "kNN top-1" in said
    for steps in (7, 16):
        assert main([*flags, f"--run_dir={parts}", f"--max_steps={steps}"]) == 0
    lines = [(run / "metrics.csv").read_text().splitlines() for run in (whole, parts)]
    assert [line.split(",")[2:6] for line in lines[0]] == [line.split(",")[2:6] for line in lines[1]]
    assert len((whole / "views.txt").read_text().splitlines()) == 8
    pairs = tmp_path / "pairs.tsv"
    pairs.write_text(
        "5\tthe cat sees the dog\tthe cat sees the dog\n0\tthe car wants the bus\ta dog\n2\ta cat\tthe cat\n"
    )
    moco_tf.export_encoder(build_trained(whole), tmp_path / "served/1")
    for encoder in (whole, tmp_path / "served"):
        assert sts.main([f"--encoder={encoder}", f"--pairs={pairs}", f"--output={tmp_path / 'sts'}"]) == 0
        summary = json.loads((tmp_path / "sts/summary.json").read_text())
        assert summary["pairs"] == 3 and summary["spearman"]["words in common"] == 100
    pairs.write_text("5\tcat\tdog\n0\tcar\tbus\n2\ta\tthe\n")  # no words in common
    assert sts.main([f"--encoder={whole}", f"--pairs={pairs}", f"--output={tmp_path / 'sts'}"]) == 0
    summary = json.loads((tmp_path / "sts/summary.json").read_text())
    assert list(summary["spearman"]) == ["encoder", "encoder, less the mean"]
    served = frozen.load(tmp_path / "served").signatures["serving_default"]
    sentences = ["the cat sees the dog", ""]
    found = served(texts=tf.constant(sentences))
    np.testing.assert_allclose(found["features"], build_trained(whole).predict(sentences), rtol=1e-4, atol=1e-6)
    assert served(texts=tf.constant([], tf.string))["features"].shape == (0, 8)
    for command in (features, knn):  # judge it on images
        assert command.main([f"--encoder={whole}", "--dataset=embedded", f"--output={tmp_path / 'images'}"]) == 2
        assert "holds images, and --encoder is of sentences" in capsys.readouterr().err
    with pytest.raises(tensor_names.Mismatch, match="have no Embedding, as word_vectors is one"):
        list(tensor_names.names(build_trained(whole).query_encoder))


def build_trained(run):
    from moco_tf import build

    return build.trained(run)


def test_correlations_are_those_of_the_formulas(tmp_path):
    rng = np.random.default_rng(0)
    one, other = rng.normal(size=(2, 5, 3))
    np.testing.assert_allclose(
        sts.cosine(one, other), [a @ b / np.sqrt(a @ a) / np.sqrt(b @ b) for a, b in zip(one, other, strict=True)]
    )
    assert sts.words(["B, c d e!", ""]) == [[b"b", b"c", b"d", b"e"], []]
    assert sts.overlap([["a", "b", "c"]], [["b", "c", "d", "e"]]) == [2 / 5]
    firsts, seconds = [["a", "b"], ["a", "c"]], [["a", "d"], ["e"]]
    documents = [{"a", "b"}, {"a", "c"}, {"a", "d"}, {"e"}]
    idf = {w: np.log((1 + 4) / (1 + sum(w in d for d in documents))) + 1 for w in "abcde"}
    norms = [np.sqrt(sum(idf[w] ** 2 for w in d)) for d in documents]
    np.testing.assert_allclose(sts.tf_idf(firsts, seconds), [idf["a"] ** 2 / norms[0] / norms[2], 0], rtol=1e-6)


def refused(path, split="train"):
    with pytest.raises(ValueError) as error:
        texts.read(path, split)
    return str(error.value)


def test_what_holds_no_sentences_is_refused_in_a_line(tmp_path, capsys):
    file = tmp_path / "few.txt"
    file.write_text("\n\n \n")
    assert "holds no sentence" in refused(file)
    file.write_bytes(b"good\nbad \xff\n")
    assert f"line 2 of {file} is not UTF-8" in refused(file)
    file.write_text("animal\ta cat\na dog\n")
    assert "line 2" in refused(file) and "label<TAB>sentence, as the first one is" in refused(file)
    assert "no split 'test'" in refused(tmp_path, "test") and "has few" in refused(tmp_path, "test")
    file.write_text("score\ta cat\ta dog\n")
    assert "line 1" in refused(file)
    file.write_text("a cat\u2028here\n\n...\na dog\n")
    source = texts.read(file, "train")
    assert source.size == 2 and not source.labelled and source.contents[0].numpy() == "a cat\u2028here".encode()
    (tmp_path / ".git").mkdir()
    assert texts.are_at(file) and texts.are_at(tmp_path)
    (tmp_path / "photo.PNG").touch()
    assert not texts.are_at(tmp_path)  # a folder of images with a text beside them
    assert main(["--pretext=simcse", f"--dataset={file}", "--batch_size=4", f"--run_dir={tmp_path / 'run'}"]) == 2
    assert "2 images are fewer than --batch_size=4" in capsys.readouterr().err.replace("sentences", "images")
    assert main([f"--dataset={file}", f"--run_dir={tmp_path / 'run'}"]) == 2
    assert "--pretext=crops learns from images" in capsys.readouterr().err
    assert main(["--pretext=simcse", f"--run_dir={tmp_path / 'run'}"]) == 2
    assert "--pretext=simcse learns from sentences; embedded train holds images" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flag", "line"),
    [
        ("--dropout=0", "got 0, with which each would find itself"),
        ("--attention_heads=5", "it is a multiple of --attention_heads; got 5"),
        ("--dropout=1", "--dropout is a share"),
        ("--hash_buckets=1", "--hash_buckets is more than 1"),
    ],
)
def test_wrong_flags_are_refused(flag, line):
    with pytest.raises(ConfigError, match=line):
        parse(["--pretext=simcse", flag])


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ("", "at least two different scores"),
        ("x\ta\tb\n", "line 1 of .* is not score<TAB>sentence<TAB>sentence"),
        ("1\ta\n", "line 1"),
        ("1\ta\tb\n1\tc\td\n", "at least two different scores"),
    ],
)
def test_what_are_no_pairs_is_refused(tmp_path, lines, said):
    (tmp_path / "pairs.tsv").write_text(lines)
    with pytest.raises(ConfigError, match=said):
        sts.read(tmp_path / "pairs.tsv")
    with pytest.raises(ConfigError, match="cannot be read"):
        sts.read(tmp_path / "none.tsv")
