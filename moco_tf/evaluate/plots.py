"""Pictures of results by matplotlib. Without matplotlib (extra: eval) there are no pictures; the log says so."""

import logging

import numpy as np

from moco_tf import files

LONGEST = 40  # characters of a name
MOST_CLASSES = 100  # in a picture of confusions: cells of more classes would be smaller than a pixel

log = logging.getLogger("moco_tf")


def pyplot():
    """Returns matplotlib's pyplot; if it is missing, returns None and logs a line the first time."""
    try:
        import matplotlib
    except ImportError:
        if not getattr(pyplot, "said", False):
            pyplot.said = True
            log.info("No pictures: they need matplotlib, which `pip install 'moco_tf[eval]'` brings.")
        return None
    matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot


def curves(path, rows, x, *columns, logarithmic=False, unit="%"):
    """Plots columns of rows (dicts) over the column `x`; skips blank values."""
    plt = pyplot()
    if not plt:
        return
    figure, axes = plt.subplots(figsize=(5, 3.4), constrained_layout=True)
    for column in columns:
        points = [(row[x], row[column]) for row in rows if row[column] not in ("", None)]
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=_words(column))
    if logarithmic:
        axes.set_xscale("log")
    else:
        axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set(xlabel=_words(x), ylabel=unit)
    axes.legend(frameon=False)
    save(plt, figure, axes, path)


def bars(path, groups, series):
    """Plots bars in percent: `series` maps a name to a list with one value for each name in `groups`."""
    plt = pyplot()
    if not plt:
        return
    figure, axes = plt.subplots(figsize=(1.5 + 1.6 * len(groups), 3.4), constrained_layout=True)
    width = 0.8 / len(series)
    for number, (name, values) in enumerate(series.items()):
        places = np.arange(len(groups)) + (number - (len(series) - 1) / 2) * width
        axes.bar_label(axes.bar(places, values, width, label=name), fmt="%.1f", fontsize=8)
    axes.set(xticks=range(len(groups)), xticklabels=groups, ylabel="%")
    axes.legend(frameon=False)
    save(plt, figure, axes, path)


def confusion(path, confusions, counts, class_names):
    """Plots the confusion matrix, each row as shares of its images; of many classes only the least accurate ones."""
    plt = pyplot()
    if not plt:
        return
    shown = np.flatnonzero(counts)
    title = ""
    if len(shown) > MOST_CLASSES:
        right = np.zeros(len(counts))
        same = confusions[:, 0] == confusions[:, 1]
        right[confusions[same, 0]] = confusions[same, 2]
        order = np.argsort(right[shown] / counts[shown], kind="stable")
        title = f"The {MOST_CLASSES} least recognised of {len(shown)} classes"
        shown = np.sort(shown[order[:MOST_CLASSES]])
    place = np.full(len(counts) + 1, -1)  # the last one stands for no class
    place[shown] = np.arange(len(shown))
    matrix = np.zeros((len(shown), len(shown)))
    rows, columns = place[confusions[:, 0]], place[confusions[:, 1]]
    inside = (rows >= 0) & (columns >= 0)
    matrix[rows[inside], columns[inside]] = confusions[inside, 2]
    matrix /= counts[shown][:, None]
    size = 2.5 + 0.16 * min(len(shown), 60) + (0.1 * len(shown) if len(shown) <= 20 else 0)
    figure, axes = plt.subplots(figsize=(size + 0.8, size), constrained_layout=True)
    image = axes.imshow(100 * matrix, cmap="Blues", vmin=0, vmax=100)
    figure.colorbar(image, ax=axes, label="% of the class", shrink=0.8)
    axes.set(xlabel="taken for", ylabel="class", title=title)
    if len(shown) <= 60:
        names = [caption(class_names[number]) for number in shown]
        axes.set_xticks(range(len(shown)), names, rotation=90, fontsize=7)
        axes.set_yticks(range(len(shown)), names, fontsize=7)
    if len(shown) <= 20:
        for (row, column), value in np.ndenumerate(matrix):
            if value >= 0.005:
                colour = "white" if value > 0.6 else "black"
                axes.text(column, row, f"{100 * value:.0f}", ha="center", va="center", fontsize=6, color=colour)
    save(plt, figure, axes, path, spines=True)


def points(path, places, labels, class_names):
    """Plots a map: places (N, 2), coloured by labels (N,), -1 in grey."""
    plt = pyplot()
    if not plt:
        return
    figure, axes = plt.subplots(figsize=(8, 6.2), constrained_layout=True)
    present = np.unique(labels)
    colours = plt.get_cmap("tab10" if len(present) <= 10 else "tab20" if len(present) <= 20 else "nipy_spectral")
    for number, label in enumerate(present):
        mine = labels == label
        colour = "lightgrey" if label < 0 else colours(number if len(present) <= 20 else number / len(present))
        name = "no label" if label < 0 else caption(class_names[label])
        axes.scatter(*places[mine].T, s=9, color=colour, label=name, linewidths=0)
    axes.set(xticks=[], yticks=[])
    if len(present) <= 20:
        axes.legend(frameon=False, fontsize=8, markerscale=2, loc="center left", bbox_to_anchor=(1, 0.5))
    save(plt, figure, axes, path, spines=True)


def caption(name):
    """Returns a name as pictures show it; cuts a long name, which would leave no room for anything else.

    Escapes dollars: matplotlib reads text between dollars as a formula, and fails if it is not a formula.
    """
    return (name if len(name) <= LONGEST else f"{name[: LONGEST - 3]}...").replace("$", r"\$")


def _words(column):
    return column.replace("knn", "kNN").replace("_", " ").replace("top1", "top-1").replace("top5", "top-5")


def save(plt, figure, axes, path, spines=False):
    if not spines:
        axes.spines[["top", "right"]].set_visible(False)
    with files.aside(path) as writing:
        figure.savefig(writing, dpi=120, format="png")
    plt.close(figure)
