"""Draws shuffle_bn.png and moco_v3.png from the runs' metrics: `python docs/results/plot_curves.py` (extra: docs)."""

import csv
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
LABELS = {
    "contrast_top1": "contrast_top1, share of queries",
    "knn_top1": "kNN top-1, %",
    "loss": "loss, mean of epoch",
}

# Picture: the metrics that it shows, and its lines: files by folder, their colour, their name in the legend.
PICTURES = {
    "shuffle_bn": (
        ("contrast_top1", "knn_top1"),
        (
            ("shuffle_bn/shuffle_bn-*.csv", "tab:blue", "keys shuffled, 2 seeds"),
            ("shuffle_bn/noshuffle_bn-*.csv", "tab:red", "not shuffled, 2 seeds"),
        ),
    ),
    "moco_v3": (
        ("loss", "knn_top1"),
        (
            ("moco_v3/resnet10_adamw.csv", "tab:blue", "resnet10, AdamW, batch 64"),
            ("moco_v3/resnet10.csv", "tab:gray", "resnet10, SGD, batch 128"),
            ("moco_v3/vit_tiny_16px.csv", "tab:orange", "ViT-Tiny, 16 px, batch 128"),
            ("moco_v3/vit_tiny_32px.csv", "tab:red", "ViT-Tiny, 32 px, batch 256, bfloat16"),
        ),
    ),
}


def column(path, name):
    """Epochs and values of a metric, where it was computed."""
    with open(path, newline="") as file:
        rows = [row for row in csv.DictReader(file) if row[name]]
    return [int(row["epoch"]) for row in rows], [float(row[name]) for row in rows]


def main():
    for picture, (metrics, lines) in PICTURES.items():
        figure, panels = plt.subplots(1, len(metrics), figsize=(12, 3.6), constrained_layout=True)
        for axes, metric in zip(panels, metrics, strict=True):
            for pattern, colour, name in lines:
                for number, path in enumerate(sorted(HERE.glob(pattern))):
                    axes.plot(*column(path, metric), ".-", color=colour, alpha=0.7, label=None if number else name)
            axes.set(xlabel="epoch", ylabel=LABELS[metric])
            axes.spines[["top", "right"]].set_visible(False)
            axes.xaxis.get_major_locator().set_params(integer=True)
        figure.legend(*panels[-1].get_legend_handles_labels(), loc="outside right upper", frameon=False)
        figure.savefig(HERE / f"{picture}.png", dpi=120)


if __name__ == "__main__":
    main()
