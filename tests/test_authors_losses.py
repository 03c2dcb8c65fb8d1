"""Losses of several positives, CMC, SimCSE and MAE are what others' programs compute; pretext_losses.json has it.

Of the first three these are the authors' own.
"""

import json
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

from moco_tf.encoders import decoders, heads
from moco_tf.methods import losses, mae
from moco_tf.methods.bank import Bank

GOLDEN = json.loads(Path(__file__).with_name("pretext_losses.json").read_text())
EPSILON = 1e-5  # CMC's code adds 1e-7 to each denominator


@pytest.mark.parametrize("temperature", [0.07, 0.5])
def test_supcon_over_batch_and_queue_is_that_of_its_authors(temperature):
    """Views of six images: the first are queries, the second their keys, the third stand in the queue."""
    golden = GOLDEN["supcon"]
    queries, keys, queue = tf.unstack(tf.constant(golden["features"], tf.float64), axis=1)
    labels = np.array(golden["labels"])
    others, things, images = tf.concat([queries, keys], axis=0), np.tile(labels, 2), np.tile(np.arange(6), 2)
    mine = images[None, :] == np.arange(6)[:, None]  # itself and its own key
    equal = things[None, :] == labels[:, None]
    found = losses.of_groups(
        *("supcon", queries, keys[:, None], others, tf.constant(equal & ~mine), tf.constant(~equal), queue),
        *(temperature, (tf.constant(labels), tf.constant(labels)), True),
    )
    assert float(tf.reduce_mean(found.loss)) == pytest.approx(golden["losses"][str(temperature)], abs=1e-9)


@pytest.mark.parametrize("kind", ["nce", "softmax"])
def test_losses_against_a_bank_are_those_of_cmcs_authors(kind):
    golden, expected = GOLDEN["cmc"], GOLDEN[f"cmc_{kind}"]
    temperature, numbers = golden["temperature"], golden["records"]
    for place, (own, other) in enumerate((("l", "ab"), ("ab", "l"))):
        queries = tf.Variable(golden[own], dtype=tf.float64)
        bank = tf.constant(golden[f"memory_{other}"], tf.float64)
        keys, noise = tf.gather(bank, numbers), tf.gather(bank, golden["noise"])
        with tf.GradientTape() as tape:
            if kind == "nce":
                found = losses.nce(queries, keys, noise, temperature, np.log(golden["z"][place]), len(bank))
            else:
                found = losses.info_nce(queries, keys, noise, temperature)
            loss = tf.reduce_mean(found.loss)
        assert float(loss) == pytest.approx(expected["losses"][place], abs=EPSILON)
        np.testing.assert_allclose(tape.gradient(loss, queries), expected[f"gradient_{own}"], atol=EPSILON)


def test_cmcs_banks_move_as_its_authors_do():
    golden, expected = GOLDEN["cmc"], GOLDEN["cmc_nce"]
    for name in ("l", "ab"):
        bank = Bank(len(golden[f"memory_{name}"]), 4, dtype="float64")
        bank.keys.assign(golden[f"memory_{name}"])
        bank.update(tf.constant(golden["records"]), tf.constant(golden[name], tf.float64), 0.5)
        np.testing.assert_allclose(bank.keys, expected[f"memory_{name}"], atol=1e-9)


def test_simcse_is_that_of_its_authors_head_and_gradient_included(float64):
    golden = GOLDEN["simcse"]
    features = tf.Variable(golden["features"], dtype=tf.float64)  # N x 2 x D
    width = features.shape[-1]
    words = keras.Sequential([keras.layers.Embedding(2, width), keras.layers.GlobalAveragePooling1D()])
    encoder = heads.encoder_of_text(words, (3,))
    encoder.get_layer("fc").set_weights([np.array(golden["kernel"]), np.array(golden["bias"])])
    with tf.GradientTape() as tape:
        projections = tf.reshape(heads.projection(encoder)(tf.reshape(features, (-1, width))), features.shape)
        one, other = (losses.unit_length(half) for half in tf.unstack(projections, axis=1))
        found = losses.batch_info_nce(one, other, tf.range(len(one)), golden["temperature"])
        loss = tf.reduce_mean(found.loss)
    assert float(loss) == pytest.approx(golden["loss"], abs=1e-9)
    np.testing.assert_allclose(tape.gradient(loss, features), golden["gradient"], atol=1e-9)


@pytest.mark.parametrize("normalised", [True, False])
def test_maes_error_at_hidden_patches_is_that_of_mmselfsup(normalised):
    golden = GOLDEN["mae"]
    expected = golden["normalised" if normalised else "plain"]
    predicted = tf.Variable(golden["predicted"], dtype=tf.float64)
    _, hidden = decoders.places(tf.constant(golden["kept"]), predicted.shape[1])
    with tf.GradientTape() as tape:
        wanted = mae.targets(tf.constant(golden["images"], tf.float64), golden["patch_size"], normalised)
        loss = tf.reduce_mean(mae.masked_error(predicted, wanted, hidden))
    assert float(loss) == pytest.approx(expected["loss"], abs=1e-9)
    np.testing.assert_allclose(tape.gradient(loss, predicted), expected["gradient"], atol=1e-9)
