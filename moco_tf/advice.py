"""What users ask most, answered when it applies: pure functions from settings and figures to sentences.

`docs/training.md` says more about each.
"""

import math


def before_training(config, size):
    """Sentences on a run that is about to start with `size` images."""
    K, N = config.queue_size, config.batch_size
    yield (
        f"Is this loss normal? It starts somewhere below ln(K + 1) = {math.log(K + 1):.2f} and first rises, "
        f"while the queue's random keys give way to real ones ({math.ceil(K / N)} steps); after that it falls."
    )
    if size - N < K:
        yield (
            f"The queue (K = {K}) reaches back further than one epoch of {size} images less a batch: an image "
            f"then meets its own earlier key as a negative. Consider --queue_size={_power_of_two_below(size - N)}."
        )
    linear = 0.03 * N / 256
    if config.lr_scaling == "none" and not linear / 4 <= config.lr <= linear * 4:
        yield (
            f"The papers' rate is 0.03 for a batch of 256; by the linear rule a batch of {N} has {linear:.3g}, "
            f"and this run has {config.lr:g}. --lr_scaling=linear scales it."
        )
    if config.shuffle_bn and config.bn_groups <= 1:
        yield (
            "Shuffling BN has no effect with one BN group: BatchNorm sees the whole batch. --bn_groups=8 stands "
            "for the papers' 8 GPUs."
        )
    if config.head == "linear" and config.hidden_dim:
        yield f"--hidden_dim={config.hidden_dim} is not used: a linear head has no hidden layer."
    if config.data_dir and config.dataset == "embedded":
        yield f"--data_dir={config.data_dir} is not used: the embedded images are inside the package."


def after_epoch(config, logs, best_knn):
    """Sentences on the figures of an epoch; `best_knn` is the highest kNN top-1 so far, or None."""
    spread = 1 / math.sqrt(config.dim)
    if logs["feature_std"] < 0.1 * spread:
        yield (
            f"The embeddings are collapsing: feature_std is {logs['feature_std']:.4f}, well spread ones have "
            f"{spread:.3f}. A lower --lr, or a --momentum nearer to 1, usually helps."
        )
    knn = logs.get("knn_top1")
    if logs["contrast_top1"] > 0.99 and knn is not None and best_knn is not None and knn < best_knn - 1:
        yield (
            f"contrast_top1 is {logs['contrast_top1']:.3f} while kNN fell from {best_knn:.1f} to {knn:.1f} %: "
            "BatchNorm is probably leaking which key belongs to which query. Use --shuffle_bn with --bn_groups=8."
        )


def _power_of_two_below(n):
    return 2 ** max(int(math.log2(max(n, 2))), 1)
