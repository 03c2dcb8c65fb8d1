"""Features as a map: places in a plane, where near is similar. Axes: N images, D numbers of each."""

import logging

import numpy as np

TSNE_UP_TO = 10_000  # images; t-SNE of more takes many minutes, principal components seconds

log = logging.getLogger("moco_tf")


def places(parts, seed):
    """Places of the features in several parts, which are read one at a time: float32 (N, 2), parts in order.

    By t-SNE up to 10,000 images, by principal components beyond; zeros for fewer than three images.

    Args:
      parts: functions without arguments, each gives features (n, D).
    """
    count = sum(len(part()) for part in parts)
    if count < 3:
        return np.zeros((count, 2), np.float32)
    if count <= TSNE_UP_TO:
        return tsne(np.concatenate([part() for part in parts]), seed)
    log.info(f"The map of {count} images shows principal components; t-SNE draws up to {TSNE_UP_TO}.")
    from sklearn.decomposition import IncrementalPCA

    pca = IncrementalPCA(2)
    for part in parts:
        features = part()
        if len(features) >= 2:  # it asks for as many as there are components
            pca.partial_fit(_directions(features))
    return np.concatenate([pca.transform(_directions(part())) for part in parts]).astype(np.float32)


def tsne(features, seed, perplexity=30.0):
    """t-SNE of the directions of features (N, D), three or more: float32 (N, 2). perplexity: at most (N - 1) / 3."""
    from sklearn.manifold import TSNE

    # Of unit length, the nearest by distance are the nearest by cosine.
    perplexity = min(perplexity, (len(features) - 1) / 3)
    return TSNE(perplexity=perplexity, random_state=seed, init="pca").fit_transform(_directions(features))


def _directions(features):
    return features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-6)
