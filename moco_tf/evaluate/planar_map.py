"""Maps features to places in a plane, where near means similar. Axes: N images, D numbers of each."""

import logging

import numpy as np

TSNE_UP_TO = 10_000  # images; with more, t-SNE takes many minutes, principal components take seconds

log = logging.getLogger("moco_tf")


def places(parts, seed):
    """Returns places, float32 (N, 2), of features in several parts, in their order; reads one part at a time.

    Uses t-SNE for up to 10,000 images and principal components for more. Returns zeros for fewer than three images.

    Args:
      parts: functions without arguments, each returns features (n, D).
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
        if len(features) >= 2:  # IncrementalPCA needs at least as many rows as components
            pca.partial_fit(_directions(features))
    return np.concatenate([pca.transform(_directions(part())) for part in parts]).astype(np.float32)


def tsne(features, seed, perplexity=30.0):
    """Returns t-SNE, float32 (N, 2), of the directions of features (N, D), N >= 3. perplexity: at most (N - 1) / 3."""
    from sklearn.manifold import TSNE

    # At unit length, the nearest by distance are also the nearest by cosine.
    perplexity = min(perplexity, (len(features) - 1) / 3)
    return TSNE(perplexity=perplexity, random_state=seed, init="pca").fit_transform(_directions(features))


def _directions(features):
    return features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-6)
