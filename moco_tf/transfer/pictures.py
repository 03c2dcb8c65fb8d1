"""Draws predictions beside the truth, by matplotlib."""

import numpy as np

from moco_tf.data.masks import IGNORED
from moco_tf.evaluate import plots

BLEND = 0.55  # of a mask's colour over the image


def boxes(path, images, truth, found, names):
    """Draws two rows of images, uint8 (H, W, 3): above with the true boxes, below with the found boxes.

    truth: for each image (boxes (n, 4), left, top, right, bottom; classes (n,)). found: (boxes, scores, classes), or
    None for the image alone.
    """
    plt = plots.pyplot()
    if not plt:
        return

    def draw(axes, of, classes, labels):
        for (left, top, right, bottom), one, label in zip(of, classes, labels, strict=True):
            colour = _colour(plt, one)
            axes.add_patch(
                plt.Rectangle((left, top), right - left, bottom - top, fill=False, edgecolor=colour, linewidth=1.2)
            )
            axes.text(left, top, plots.caption(label), fontsize=5, color="white", va="bottom",
                      bbox={"facecolor": colour, "edgecolor": "none", "pad": 0.5})  # fmt: skip

    figure, axes = _grid(plt, len(images))
    for column, image in enumerate(images):
        of, classes = truth[column]
        draw(axes[0][column], of, classes, [names[one] for one in classes])
        if found[column] is not None:
            of, scores, classes = found[column]
            labels = [f"{names[one]} {score:.2f}" for one, score in zip(classes, scores, strict=True)]
            draw(axes[1][column], of, classes, labels)
        for row in range(2):
            axes[row][column].imshow(image)
    _finish(plt, figure, axes, path, found)


def masks(path, images, truth, found, names):
    """Draws as `boxes` does, but masks of class numbers, (H, W); a legend names the classes that occur."""
    plt = plots.pyplot()
    if not plt:
        return
    figure, axes = _grid(plt, len(images))
    for column, image in enumerate(images):
        for row, mask in enumerate((truth[column], found[column])):
            axes[row][column].imshow(image if mask is None else _blended(plt, image, np.asarray(mask)))
    shown = [np.ravel(mask) for mask in (*truth, *found) if mask is not None]
    present = sorted(set(np.unique(np.concatenate(shown)).tolist()) - {0, IGNORED})
    patches = [plt.Rectangle((0, 0), 1, 1, color=_colour(plt, one)) for one in present[:20]]
    if patches:
        labels = [plots.caption(names[one]) for one in present[:20]]
        columns = min(10, len(labels))
        figure.legend(patches, labels, loc="outside lower center", ncols=columns, fontsize=7, frameon=False)
    _finish(plt, figure, axes, path, found)


def _grid(plt, count):
    return plt.subplots(2, count, figsize=(2.2 * count + 0.6, 4.6), constrained_layout=True, squeeze=False)


def _finish(plt, figure, axes, path, found):
    for row, word in enumerate(("there", "image" if found[0] is None else "found")):
        axes[row][0].set_ylabel(word)
        for one in axes[row]:
            one.set(xticks=[], yticks=[])
    plots.save(plt, figure, axes, path, spines=True)


def _colour(plt, number):
    return plt.get_cmap("tab20")(int(number) % 20)[:3]


def _blended(plt, image, mask):
    """Lays all classes except background and `IGNORED` over an image in their colours: uint8 (H, W, 3)."""
    table = np.array([_colour(plt, number) for number in range(IGNORED + 1)]) * 255
    shown = ((mask > 0) & (mask != IGNORED))[..., np.newaxis]
    return np.where(shown, (1 - BLEND) * image + BLEND * table[mask], image).astype(np.uint8)
