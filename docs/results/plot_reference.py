"""Draws embedded_reference.png from the runs' metrics: `python docs/results/plot_reference.py` (extra: docs)."""

import csv
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
FOLDER = HERE / "embedded_reference"


def column(path, name):
    with open(path, newline="") as file:
        rows = [row for row in csv.DictReader(file) if row[name]]
    return [int(row["epoch"]) for row in rows], [float(row[name]) for row in rows]


def main():
    seeds = sorted(FOLDER.glob("seed*.csv"))
    _, (knn, loss) = plt.subplots(1, 2, figsize=(10, 3.6), constrained_layout=True)
    for number, path in enumerate(seeds):
        for axes, name in ((knn, "knn_top1"), (loss, "loss")):
            axes.plot(
                *column(path, name), color="tab:blue", alpha=0.6, label=f"{len(seeds)} seeds" if not number else None
            )
    knn.plot(*column(FOLDER / "authors.csv", "knn_top1"), "k--", label="authors' PyTorch code, one seed")
    knn.axhline(35.3, color="grey", linewidth=0.8, label="raw pixels")
    knn.set(xlabel="epoch", ylabel="kNN top-1, %")
    knn.legend(frameon=False)
    loss.plot(*column(FOLDER / "authors.csv", "loss"), "k--o", markersize=3)
    loss.set(xlabel="epoch", ylabel="InfoNCE loss, mean of the epoch")
    for axes in (knn, loss):
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xticks(range(0, 21, 5))
    plt.savefig(HERE / "embedded_reference.png", dpi=120)


if __name__ == "__main__":
    main()
