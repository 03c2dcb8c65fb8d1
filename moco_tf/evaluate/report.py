"""Writes a report of an encoder as one HTML file: it contains its pictures and needs no network."""

from pathlib import Path

import tensorflow as tf

from moco_tf import command, run_folder
from moco_tf.evaluate import page, plots


def write(path, settings, source, names, labels, pictures, neighbours):
    """Writes the report; expects map.png beside it.

    Args:
      source: the name of the images that are shown; names: a text for each image; labels: int (N,), -1 unknown;
        pictures: uint8 (N, T, T, 3).
      neighbours: for each query image, its number and a list of (number, cosine), the nearest first.
    """
    run = Path(settings.encoder)
    parts = [f"<p>{len(names)} images of {page.text(source)}.</p>"]
    if results := _results(run):
        parts += ["<h2>Accuracies, top-1 in percent</h2>", page.table(("evaluation", "images", "", "top-1"), results)]
    curves = _curves(run, path.parent)
    if curves:
        parts += ["<h2>Training</h2>", *curves]
    parts += [
        "<h2>Map</h2>",
        '<p class="note">t-SNE of the features: near is similar, distances between groups mean little.</p>',
        _file(path.parent / "map.png", "map of the features", "wide"),
        "<h2>Nearest neighbours</h2>",
        '<p class="note">By cosine, the nearest first. '
        + ("Green: of the same class, which it was never told.</p>" if (labels >= 0).any() else "</p>"),
    ]
    for query, others in neighbours:
        figures = [_figure(pictures[query], names[query], "query")]
        for number, cosine in others:
            kind = _kind(labels[query], labels[number])
            figures.append(_figure(pictures[number], f"{names[number]} {cosine:.2f}", kind))
        parts.append(f'<div class="row">{"".join(figures)}</div>')
    page.write(path, f"What {run.absolute().name} has learnt", parts)


def _kind(label, other):
    """Returns the style class of a neighbour's frame: whether its class is the query's, if both are known."""
    return "" if min(label, other) < 0 else "same" if label == other else "other"


def _results(run):
    """Returns rows of the evaluations with a summary in the run folder: evaluation, images, judged on, top-1."""
    rows = []
    for file in sorted(run.glob("*/summary.json")):
        summary = command.read_json(file)
        if "top1" in summary:
            settings = summary["settings"]
            on = f"{settings['dataset']} {settings['eval_split']}"
            rows.append((file.parent.name, summary["eval_images"], on, f"{summary['top1']:.1f}"))
        for row in summary.get("rows", ()):
            for kind in ("knn", "probe"):
                if row[f"{kind}_top1"] != "":
                    rows.append((f"{file.parent.name}: {row['encoder']}", "", kind, f"{row[f'{kind}_top1']:.1f}"))
    return rows


def _curves(run, folder):
    """Returns pictures of the training's loss and kNN accuracy, if the run folder has them."""
    rows = [{name: float(value) if value else "" for name, value in row.items()} for row in run_folder.rows(run)]
    pictures = []
    for name, unit in (("loss", ""), ("knn_top1", "%")):
        if any(row[name] != "" for row in rows):
            plots.curves(folder / f"{name}.png", rows, "epoch", name, unit=unit)
            pictures.append(_file(folder / f"{name}.png", name, "half"))
    return pictures


def _file(path, alternative, kind):
    return page.image(path.read_bytes(), alternative, f' class="{kind}"')


def _figure(picture, caption, kind):
    text = page.text(caption)
    return page.figure(page.image(tf.io.encode_png(picture).numpy(), text), text, kind, text)
