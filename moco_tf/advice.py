"""Answers to users' most frequent questions, when they apply: pure functions from settings and figures to sentences.

`docs/training.md` says more about each answer.
"""

import math

from moco_tf import command

# The share of the wall time that training may wait for images before it gives advice.
WAIT = 0.1
# A gradient of this many times its usual norm is a spike. The paper's curves rise by more; usual steps do not.
SPIKE = 10


def before_training(config, size, bfloat16=False):
    """Yields sentences on a run that starts on `size` images; bfloat16: whether the training device computes in it."""
    of_loss = {
        "moco": _on_the_queue,
        "moco_v3": _on_the_pairs,
        "memory_bank": _on_the_bank,
        "end_to_end": _on_the_batch,
    }
    if config.learner in of_loss:
        yield from of_loss[config.learner](config, size)
    if config.uses("momentum") and config.momentum == 0.9 and config.optimizer == "sgd":
        yield (
            "--momentum=0.9 is the key encoder's, whose papers have 0.99 to 0.999; the optimizer's, which PyTorch's "
            "flag of that name sets, is in --optimizer=sgd already."
        )
    if config.learner in of_loss and config.method != "moco_v3" and config.optimizer == "sgd":
        yield from _on_the_rate(config)
    if config.uses("shuffle_bn") and config.shuffle_bn and config.bn_groups <= 1:
        yield (
            "Shuffling BN has no effect with one BN group: BatchNorm sees the whole batch. --bn_groups=8 stands "
            "for the papers' 8 GPUs."
        )
    if (
        bfloat16
        and config.precision == "float32"
        and (config.is_vit or config.width >= 64)
        and config.image_size >= 64
        and config.uses("image_size")
    ):
        yield (
            "This machine computes in bfloat16: --precision=bfloat16 makes large networks faster (on such a processor "
            "a step of a ResNet-50 takes about 0.6 of the time). It is another run, in a --run_dir of its own."
        )
    if config.channels != 3 and config.uses("channels"):
        yield from _on_the_channels(config)
    if config.lr_scaling == "linear":
        yield f"The rate is {config.lr:g} x {config.batch_size} / 256 = {config.base_rate:g} (--lr_scaling=linear)."
    if config.uses("head") and config.head == "linear" and config.hidden_dim:
        yield f"--hidden_dim={config.hidden_dim} is not used: a linear head has no hidden layer."
    if config.data_dir and config.dataset == "embedded":
        yield f"--data_dir={config.data_dir} is not used: the embedded images are inside the package."
    of_others = [
        f"--{field.name}={getattr(config, field.name)}"
        for field in command.fields(type(config))
        if not config.uses(field.name) and getattr(config, field.name) != field.default
    ]
    if unused := [*config.unused, *of_others]:
        yield f"Not used by {config.learner} with {config.arch}: {', '.join(unused)}."


def _on_the_queue(config, size):
    K, N = config.queue_size, config.batch_size
    keys = N * (getattr(config, "positives", 1) + config.symmetric)  # enqueued by each step
    yield (
        f"Is this loss normal? It starts somewhere below ln(K + 1) = {math.log(K + 1):.2f} and first rises, "
        f"while the queue's random keys give way to real ones ({math.ceil(K / keys)} steps); after that it falls."
    )
    images = K * N // keys  # whose keys the queue holds
    if size - N < images and not config.mask_siblings and config.positives_from == "keys":
        yield (
            f"The queue (K = {K}) reaches back further than one epoch of {size} images less a batch: an image "
            "then meets its own earlier key as a negative. "
            f"Consider --queue_size={_power_of_two_below((size - N) * keys // N)}."
        )


def _on_the_pairs(config, size):
    guess = 4 * config.temperature * math.log(config.batch_size)
    yield (
        f"Is this loss normal? It starts near 4T ln(N) = {guess:.2f}, that of guessing among the {config.batch_size} "
        "images of a batch, and falls."
    )


def _on_the_bank(config, size):
    K = config.queue_size
    megabytes = config.bank_bytes(size) / 1e6
    yield f"The memory bank: {size} keys of {config.dim} numbers, {megabytes:.1f} MB in each replica."
    formula, guess = "ln(K + 1)", math.log(K + 1)
    if config.loss == "nce":
        formula, guess = f"{formula} + 1", guess + 1
    yield (
        f"Is this loss normal? A guess costs {formula} = {guess:.2f}. It stays above that for the first epoch, in "
        "which each image gets its first key; after that it falls."
    )


def _on_the_batch(config, size):
    N = config.batch_size
    candidates, what = (2 * N - 1, "views") if config.loss == "nt_xent" else (N, "keys")
    yield (
        f"Is this loss normal? It starts near ln({candidates}) = {math.log(candidates):.2f}, that of guessing among "
        f"the {what} of a batch, and falls. More negatives need a larger --batch_size."
    )


def _on_the_rate(config):
    N = config.batch_size
    linear = 0.03 * N / 256
    if config.lr_scaling == "none" and not linear / 4 <= config.lr <= linear * 4:
        yield (
            f"The papers' rate is 0.03 for a batch of 256; by the linear rule a batch of {N} has {linear:.3g}, "
            f"and this run has {config.lr:g}. --lr_scaling=linear scales it."
        )


def _on_the_channels(config):
    what = "Images are read as grey" if config.channels == 1 else f"Images are arrays of {config.channels} channels"
    steps = "steps that need colours"
    if getattr(config, "augment", "flip") != "flip" or getattr(config, "grey_share", 0):
        steps = "random saturation, hue and greyscale, which need colours,"
    yield f"{what} (--channels={config.channels}): {steps} are left out; brightness and contrast are not."


def after_step(config, step, first, last, usual):
    """Yields sentences on a step's gradient norms in the first and last block; `usual`: the first's median so far."""
    if 0 < SPIKE * usual < first:
        frozen = not config.is_vit or config.freeze_patch
        remedy = "" if frozen else "--freeze_patch, the paper's remedy, or "
        yield (
            f"Instability at step {step}: the gradient in the first block is {first:.3g}, {first / usual:.0f} times "
            f"its usual size (in the last block {last:.3g}). Accuracy suffers even if the loss recovers: consider "
            f"{remedy}a lower --lr{' or a longer --warmup_epochs' if frozen else ''}."
        )


def after_epoch(config, logs, best_knn, features):
    """Yields sentences on the figures of an epoch.

    best_knn: the highest kNN top-1 so far, or None.
    features: the number of features, which is also the length of embeddings without a head.
    """
    spread = 1 / math.sqrt(config.dim if config.uses("dim") else features)  # if rows have unit length
    if logs.get("feature_std", spread) < 0.1 * spread:
        remedy = "A lower --lr, or a --momentum nearer to 1," if config.uses("momentum") else "A lower --lr"
        yield (
            f"The embeddings are collapsing: feature_std is {logs['feature_std']:.4f}, well spread ones have "
            f"{spread:.3f}. {remedy} usually helps."
        )
    knn = logs.get("knn_top1")
    if (
        config.uses("shuffle_bn")
        and logs.get("contrast_top1", 0) > 0.99
        and knn is not None
        and best_knn is not None
        and knn < best_knn - 1
    ):
        yield (
            f"contrast_top1 is {logs['contrast_top1']:.3f} while kNN fell from {best_knn:.1f} to {knn:.1f} %: "
            "BatchNorm is probably leaking which key belongs to which query. Use --shuffle_bn with --bn_groups=8."
        )


def on_waiting(config, data_wait):
    """Yields a sentence if training waits for images for a large share of the time, `data_wait`."""
    if data_wait > WAIT:
        remedies = ["more or faster processor cores", "smaller files"]
        views_on = getattr(config, "views_on", "device")
        if getattr(config, "decode", "fast") == "exact" and views_on != "device":  # which decodes once, exactly
            remedies.insert(0, "--decode=fast, for photographs far larger than the views")
        if views_on == "host":
            remedies.insert(0, "--views_on=device, which crops and distorts in the training step (or both)")
        yield (
            f"Training waited for images for {100 * data_wait:.0f} % of the time (data_wait). What helps: "
            f"{', '.join(remedies)}."
        )


def _power_of_two_below(n):
    return 2 ** max(int(math.log2(max(n, 2))), 1)
