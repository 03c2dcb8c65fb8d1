"""`MoCo` as a Keras model: what a step does and does not change, any backbone, saving, precision."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import moco_tf
from moco_tf.encoders import BatchNorm
from moco_tf.replicas import shuffle, unshuffle

SIZE = 8


def tiny(norm=BatchNorm):
    inputs = keras.Input((SIZE, SIZE, 3))
    x = layers.Conv2D(6, 3, use_bias=False)(inputs)
    return keras.Model(inputs, layers.GlobalAveragePooling2D()(layers.ReLU()(norm()(x))))


def moco(backbone=None, **kwargs):
    keras.utils.set_random_seed(1)
    settings = {"dim": 4, "head": "linear", "queue_size": 12, "momentum": 0.9, "temperature": 0.2} | kwargs
    model = moco_tf.MoCo(backbone or tiny(), **settings)
    model.compile(moco_tf.SGD(0.1, momentum=0.9, weight_decay=1e-3))
    return model


def pairs(steps=3, batch=4, seed=0):
    rng = np.random.default_rng(seed)
    views = rng.normal(size=(2, steps * batch, SIZE, SIZE, 3)).astype("float32")
    return tf.data.Dataset.from_tensor_slices(tuple(views)).batch(batch, drop_remainder=True)


def values(model):
    return [v.numpy() for v in [*model.variables, *model.optimizer.variables]]


def assert_same(a, b):
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        np.testing.assert_array_equal(x, y)


def test_the_key_encoder_starts_as_a_copy_with_variables_of_its_own():
    model = moco()
    assert_same(model.query_encoder.get_weights(), model.key_encoder.get_weights())
    assert not {id(v) for v in model.query_encoder.weights} & {id(v) for v in model.key_encoder.weights}


def test_no_gradient_reaches_the_key_encoder():
    model = moco(momentum=1.0)  # the momentum update moves nothing, so only a gradient could
    before = [v.numpy() for v in model.key_encoder.weights if "moving" not in v.name]
    model.fit(pairs(), verbose=0)
    assert_same(before, [v.numpy() for v in model.key_encoder.weights if "moving" not in v.name])
    assert {id(v) for v in model.trainable_variables} == {id(v) for v in model.query_encoder.trainable_variables}


def test_the_first_step_moves_no_parameter_of_the_key_encoder_and_the_second_does():
    model = moco()
    before = model.key_encoder.get_weights()
    for steps in (1, 2):
        model.fit(pairs(1, seed=steps), verbose=0)
        parameters = [
            np.array_equal(v.numpy(), old)
            for v, old in zip(model.key_encoder.weights, before, strict=True)
            if "moving" not in v.name
        ]
        assert all(parameters) == (steps == 1)


def test_running_statistics_are_each_encoders_own():
    model = moco(momentum=0.0)  # all that the momentum step moves is copied whole

    def statistics(encoder):
        return [v for v in encoder.weights if "moving" in v.name]

    for variable in statistics(model.query_encoder):
        variable.assign_add(100 * tf.ones_like(variable))
    model.fit(pairs(1), verbose=0)
    assert all(np.mean(v) > 50 for v in statistics(model.query_encoder))
    assert all(np.mean(v) < 10 for v in statistics(model.key_encoder))


def test_logits_use_the_old_queue_and_the_keys_enter_it_afterwards():
    model = moco(queue_size=6)
    ((query, key),) = pairs(1)
    queue = model.queue.keys.numpy()

    def embed(encoder, images):
        x = encoder(images, training=True)["projection"].numpy()
        return x / np.linalg.norm(x, axis=1, keepdims=True)

    q, k = embed(model.query_encoder, query), embed(model.key_encoder, key)
    logits = np.concatenate([(q * k).sum(1, keepdims=True), q @ queue.T], axis=1) / 0.2
    expected = np.mean(np.log(np.exp(logits).sum(1)) - logits[:, 0])
    history = model.fit(pairs(1), verbose=0).history
    assert history["loss"][0] == pytest.approx(expected, rel=1e-5)
    np.testing.assert_allclose(model.queue.keys.numpy()[:4], k, atol=1e-6)
    np.testing.assert_array_equal(model.queue.keys.numpy()[4:], queue[4:])


def test_shuffling_is_undone_by_unshuffling():
    x = tf.range(10)
    shuffled, permutation = shuffle(x, (0, 1))
    assert shuffled.numpy().tolist() != x.numpy().tolist()
    np.testing.assert_array_equal(unshuffle(shuffled, permutation), x)
    assert shuffle(x, (0, 2))[0].numpy().tolist() != shuffled.numpy().tolist()


def test_shuffled_keys_return_in_their_own_order_having_seen_other_company():
    ((_, images),) = pairs(1, batch=8)
    model = moco(bn_groups=4)
    (keys,) = model._encode_keys([images], training=True)
    shuffled, permutation = shuffle(images, (0, 0))
    expected = np.empty_like(keys)
    for i, place in enumerate(permutation.numpy()):
        group = shuffled[i // 2 * 2 : i // 2 * 2 + 2]
        (embedding,) = moco()._encode_keys([group], training=True)  # one BN group: this pair alone
        expected[place] = embedding[i % 2]
    np.testing.assert_allclose(keys, expected, atol=1e-5)
    (unshuffled,) = moco(bn_groups=4, shuffle_bn=False)._encode_keys([images], training=True)
    assert np.abs(keys - unshuffled).max() > 1e-3


def test_evaluation_changes_neither_weights_nor_queue():
    model = moco()
    model.fit(pairs(), verbose=0)
    weights = [v for v in model.weights if v is not model.totals]
    before = [v.numpy() for v in weights]
    logs = model.evaluate(pairs(seed=5), return_dict=True, verbose=0)
    assert_same(before, [v.numpy() for v in weights])
    assert {"loss", "contrast_top1"} <= logs.keys()


def test_stock_callbacks_and_validation_data_work(tmp_path):
    history = moco().fit(
        pairs(),
        validation_data=pairs(seed=1),
        epochs=2,
        verbose=0,
        callbacks=[
            keras.callbacks.ModelCheckpoint(tmp_path / "{epoch}.keras"),
            keras.callbacks.CSVLogger(tmp_path / "log.csv"),
            keras.callbacks.EarlyStopping("val_loss", patience=5),
        ],
    )
    assert {"loss", "val_loss", "val_contrast_top1", "feature_std"} <= history.history.keys()
    assert (tmp_path / "2.keras").exists()


def test_a_step_is_the_same_by_fit_by_train_on_batch_and_without_a_graph():
    query, key = next(iter(pairs(steps=1)))
    models = [moco() for _ in range(3)]
    models[0].fit(pairs(steps=1), verbose=0)
    models[1].train_on_batch(query, key)
    models[2].compile(models[2].optimizer, run_eagerly=True)
    models[2].fit(pairs(steps=1), verbose=0)
    for other in models[1:]:
        for a, b in zip(values(models[0]), values(other), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_a_second_fit_does_not_trace_the_step_anew(monkeypatch):
    model, traced = moco(), []
    step = model.train_step
    monkeypatch.setattr(model, "train_step", lambda data: traced.append(1) or step(data))
    for _ in range(3):
        model.fit(pairs(), verbose=0)
    assert len(traced) == 1
    assert model.steps_done == 9


def test_a_keras_file_goes_on_as_if_nothing_had_happened(tmp_path):
    model = moco(head="mlp", hidden_dim=5, bn_groups=2)
    model.fit(pairs(4), verbose=0)
    model.save(tmp_path / "m.keras")
    loaded = keras.models.load_model(tmp_path / "m.keras")
    assert_same(values(model), values(loaded))
    assert int(loaded.queue.pointer) == 16 % 12
    for m in (model, loaded):
        m.fit(pairs(4, seed=1), verbose=0)
    assert_same(values(model), values(loaded))


def test_a_weights_file_holds_queue_pointer_step_and_optimizer(tmp_path):
    model, other = moco(), moco(seed=7)
    model.fit(pairs(), verbose=0)
    model.save_weights(tmp_path / "m.weights.h5")
    other.load_weights(tmp_path / "m.weights.h5")
    assert_same(values(model), values(other))
    assert int(other.step) == 3


@keras.saving.register_keras_serializable("tests")
class Subclassed(keras.Model):
    def __init__(self, channels=5, **kwargs):
        super().__init__(**kwargs)
        self.channels = channels
        self.conv = layers.Conv2D(channels, 3)

    def call(self, images):
        return self.conv(images)

    def get_config(self):
        return super().get_config() | {"channels": self.channels}


class Scale(layers.Layer):  # not registered with Keras
    def call(self, x):
        return 2 * x


def nested():
    inputs = keras.Input((None, None, 3))
    return keras.Model(inputs, Scale()(keras.Sequential([layers.Conv2D(5, 3), layers.ReLU()])(inputs)))


@pytest.mark.parametrize(
    "backbone",
    [
        lambda: keras.Sequential([keras.Input((SIZE, SIZE, 3)), layers.Conv2D(5, 3), layers.BatchNormalization()]),
        Subclassed,
        nested,
    ],
    ids=["sequential with stock BatchNorm", "subclassed", "nested, with an unregistered layer"],
)
def test_any_keras_model_is_a_backbone_and_a_4d_output_is_pooled(backbone):
    model = moco(backbone(), preprocessing=moco_tf.Preprocessing(image_size=SIZE))
    assert_same(model.query_encoder.get_weights(), model.key_encoder.get_weights())
    model.fit(pairs(), verbose=0)
    assert model.predict(np.zeros((2, 20, 30, 3), "uint8"), verbose=0).shape == (2, 5)


def test_a_registered_subclassed_backbone_survives_a_keras_file(tmp_path):
    model = moco(Subclassed(), preprocessing=moco_tf.Preprocessing(image_size=SIZE))
    model.fit(pairs(), verbose=0)
    model.save(tmp_path / "m.keras")
    assert_same(values(model), values(keras.models.load_model(tmp_path / "m.keras")))


def test_stock_batch_norm_with_groups_is_refused_with_the_way_out():
    with pytest.raises(ValueError, match=r"2 BN groups.*Keras' own.*moco_tf.encoders.BatchNorm, or leave"):
        moco(tiny(layers.BatchNormalization), bn_groups=2)


@pytest.mark.parametrize("batch", [6, 4])
def test_a_batch_that_the_groups_do_not_divide_is_refused(batch):
    with pytest.raises(ValueError, match=f"each of the 4 BN groups .* at least 2.*; got {batch}"):
        moco(bn_groups=4).fit(pairs(batch=batch), verbose=0)


def test_a_last_partial_batch_that_the_groups_do_not_divide_is_refused():
    partial = pairs(batch=8).unbatch().take(14).batch(8)
    with pytest.raises(tf.errors.InvalidArgumentError, match="each of the 4 BN groups"):
        moco(bn_groups=4).fit(partial, verbose=0)


def test_evaluation_has_no_groups_and_takes_a_partial_batch():
    partial = pairs(batch=8).unbatch().take(14).batch(8)
    assert np.isfinite(moco(bn_groups=4).evaluate(partial, verbose=0, return_dict=True)["loss"])


def test_images_without_a_second_view_are_refused():
    with pytest.raises(ValueError, match="pairs of image batches"):
        moco().fit(pairs().map(lambda query, key: query), verbose=0)


@pytest.mark.parametrize("precision", ["mixed_bfloat16", "mixed_float16", "float64"])
def test_other_precisions_train_with_queue_and_statistics_in_at_least_float32(precision):
    if precision == "float64":
        keras.config.set_floatx("float64")
    keras.config.set_dtype_policy(precision)
    model = moco()
    history = model.fit(pairs(6), verbose=0).history
    assert np.isfinite(history["loss"][0])
    assert {v.dtype for v in model.weights} <= {"float32", "float64", "int64"}
    assert int(model.step) == 6
    images = np.random.default_rng(0).integers(0, 256, (2, SIZE, SIZE, 3), "uint8")
    assert model.predict(images, verbose=0).dtype == ("float64" if precision == "float64" else "float32")


def test_momentum_rises_along_a_half_cosine():
    model = moco(momentum=0.5, momentum_rise_steps=4)
    history = model.fit(pairs(1).repeat(), epochs=5, steps_per_epoch=1, verbose=0).history
    expected = [1 - 0.5 * (1 + np.cos(np.pi * t / 4)) / 2 for t in range(5)]
    np.testing.assert_allclose(history["momentum"], expected, rtol=1e-6)


def test_predict_takes_images_as_they_are():
    model = moco()
    images = np.random.default_rng(0).integers(0, 256, (3, 20, 31, 3), "uint8")
    from_bytes, from_floats = (model.predict(x, verbose=0) for x in (images, images.astype("float32")))
    np.testing.assert_array_equal(from_bytes, from_floats)
    by_hand = model.query_encoder(model.preprocessing(images), training=False)["features"]
    np.testing.assert_allclose(from_bytes, by_hand, rtol=1e-5, atol=1e-6)
