import types

import numpy as np
import pytest

from moco_tf import advice, callbacks
from moco_tf.config import make, parse

SETTINGS = {"batch_size": 128, "lr": 0.03, "bn_groups": 8, "dim": 128, "epochs": 20}
REFERENCE = make(**SETTINGS, queue_size=4096)
FIGURES = {"feature_std": 0.08, "contrast_top1": 0.5}


def before(config, size=10_000):
    return list(advice.before_training(config, size))


def test_sound_settings_get_the_words_on_the_loss_alone():
    (sentence,) = before(REFERENCE)
    assert "ln(K + 1) = 8.32" in sentence and "32 steps" in sentence


@pytest.mark.parametrize(
    "method, words",
    [
        ({"method": "memory_bank", "queue_size": 4096}, ["10000 keys of 128 numbers, 5.1 MB", "ln(K + 1) = 8.32"]),
        ({"method": "memory_bank", "queue_size": 4096, "loss": "nce"}, ["5.1 MB", "ln(K + 1) + 1 = 9.32"]),
        ({"method": "end_to_end"}, ["ln(128) = 4.85"]),
        ({"method": "end_to_end", "loss": "nt_xent"}, ["ln(255) = 5.54"]),
    ],
)
def test_each_method_has_its_words_on_the_loss(method, words):
    sentences = before(make(**SETTINGS | method))
    assert len(sentences) == len(words)
    assert all(word in sentence for word, sentence in zip(words, sentences, strict=True))


def test_bfloat16_is_named_where_the_machine_computes_in_it_and_the_network_is_large_enough():
    large = {"queue_size": 4096, "image_size": 224, "width": 64}
    (_, sentence) = advice.before_training(make(**SETTINGS | large), 10_000, bfloat16=True)
    assert "--precision=bfloat16" in sentence
    for changed, machine in (({}, False), ({"precision": "bfloat16"}, True), ({"image_size": 32}, True)):
        assert len(list(advice.before_training(make(**SETTINGS | large | changed), 10_000, machine))) == 1


def test_what_a_method_does_not_use_is_named():
    flags = ["--method=end_to_end", "--shared=trunk", "--queue_size=4096", "--momentum=0.9", "--patch_size=8"]
    *_, sentence = before(parse(flags))
    assert sentence == "Not used by end_to_end with resnet50: --queue_size=4096, --momentum=0.9, --patch_size=8."


@pytest.mark.parametrize(
    "flags, unused",
    [
        (["--method=end_to_end", "--queue_size=160"], "--queue_size=160"),  # simcse's own default
        (["--pretext=rotation", "--loss=nce"], "--loss=nce"),  # a choice of other tasks
        (["--pretext=cpc", "--temperature=0.2", "--momentum=0.9"], "--momentum=0.9, --temperature=0.2"),
        (["--pretext=cmc", "--queue_size=100", "--noshuffle_bn"], "--shuffle_bn=False, --queue_size=100"),
        (["--pretext=cmc", "--frame=memory_bank", "--queue_size=100", "--momentum=0.9"], "--momentum=0.9"),
        (["--pretext=cmc", "--frame=queue", "--queue_size=100", "--bank_momentum=0.9"], "--bank_momentum=0.9"),
        (["--pretext=simcse", "--momentum=0.9"], "--momentum=0.9"),
    ],
)
def test_what_another_frame_or_task_uses_is_named(flags, unused):
    *_, sentence = before(parse(flags))
    named = sentence.partition(": ")[2].rstrip(".").split(", ")
    assert sentence.startswith("Not used by") and sorted(named) == sorted(unused.split(", "))


@pytest.mark.parametrize("frame, knows", [("in_batch", False), ("queue", True)])
def test_a_frame_without_momentum_is_not_advised_to_raise_it(frame, knows):
    config = make(pretext="cpc", frame=frame)
    (sentence,) = advice.after_epoch(config, {"feature_std": 1e-4}, None, 64)
    assert ("--momentum" in sentence) == knows


def test_the_optimizers_momentum_given_as_the_key_encoders_is_named():
    sentences = before(make(**SETTINGS, queue_size=4096, momentum=0.9))
    assert any("--momentum=0.9 is the key encoder's" in sentence for sentence in sentences)
    assert not any(
        "key encoder's" in sentence for sentence in before(make(**SETTINGS, queue_size=4096, momentum=0.99))
    )


@pytest.mark.parametrize(
    "changed, size, words",
    [
        ({"queue_size": 4096}, 4000, "Consider --queue_size=2048"),
        ({"queue_size": 4096, "lr": 1.0}, 10_000, "a batch of 128 has 0.015, and this run has 1"),
        ({"queue_size": 4096, "bn_groups": 1}, 10_000, "no effect with one BN group"),
        ({"queue_size": 4096, "head": "linear", "hidden_dim": 64}, 10_000, "--hidden_dim=64 is not used"),
        ({"queue_size": 4096, "data_dir": "x"}, 10_000, "--data_dir=x is not used"),
    ],
)
def test_a_doubtful_setting_is_named(changed, size, words):
    sentences = before(make(**SETTINGS | changed), size)
    assert len(sentences) == 2 and words in sentences[1]


def test_all_keys_of_a_step_count_and_masked_siblings_are_no_negatives():
    guess, queue = before(make(**SETTINGS, queue_size=16384, symmetric=True), 6000)
    assert "(64 steps)" in guess and "Consider --queue_size=8192" in queue
    (guess,) = before(make(**SETTINGS, queue_size=16384, symmetric=True, positives=2), 6000)
    assert "(43 steps)" in guess
    assert len(before(make(**SETTINGS, queue_size=16384, mask_siblings=True), 6000)) == 1


def test_collapse_is_named():
    assert not list(advice.after_epoch(REFERENCE, FIGURES, None, 512))
    (sentence,) = advice.after_epoch(REFERENCE, FIGURES | {"feature_std": 0.008}, None, 512)
    assert "collapsing" in sentence and "0.088" in sentence


def test_a_leak_is_named_only_while_knn_falls():
    leaking = FIGURES | {"contrast_top1": 0.995}
    assert not list(advice.after_epoch(REFERENCE, leaking | {"knn_top1": 40.0}, 40.5, 512))
    (sentence,) = advice.after_epoch(REFERENCE, leaking | {"knn_top1": 38.0}, 40.5, 512)
    assert "leaking" in sentence and "40.5 to 38.0" in sentence


def test_waiting_is_named_with_what_helps_in_this_run():
    assert not list(advice.on_waiting(REFERENCE, 0.1))
    (sentence,) = advice.on_waiting(REFERENCE, 0.24)
    assert "24 % of the time" in sentence and "--views_on=device" in sentence and "--decode=fast" in sentence
    (sentence,) = advice.on_waiting(make(views_on="both", decode="fast"), 0.24)
    assert "--" not in sentence and "smaller files" in sentence
    (sentence,) = advice.on_waiting(make(views_on="device"), 0.24)
    assert "--decode" not in sentence  # refused there


def test_waiting_is_named_once_in_a_run(tmp_path, caplog):
    run = types.SimpleNamespace(tensorboard=tmp_path / "tensorboard", rows=list, add_row=lambda row: None)
    recorder = callbacks.Recorder(run, REFERENCE)
    encoder = types.SimpleNamespace(output={"features": np.zeros((1, 512))})
    recorder._model = types.SimpleNamespace(steps_done=1, query_encoder=encoder, METRICS={})
    with caplog.at_level("WARNING", "moco_tf"):
        for epoch, wait in enumerate((0.0, 0.3, 0.3)):
            recorder.on_epoch_end(epoch, FIGURES | {"loss": 1.0, "data_wait": wait})
    recorder.close()
    assert len([record for record in caplog.records if "waited for images" in record.getMessage()]) == 1
