"""How many near-duplicates an encoder finds that a perceptual hash misses: recall at 99 % precision.

    python -m benchmarks.near_duplicates --images=photos --encoder=runs/photos

Takes --count images of the folder and plants a changed copy of some: re-encoded, resized, cropped to 80 % of each
side, colour-shifted, flipped. Orders all pairs of images by cosine, or by the distance of imagehash's pHash. The
recall is that of the longest beginning of this order in which 99 % of the pairs are planted. Folders have
near-duplicates of their own. So other pairs count neither as right nor as wrong if small grey pictures of them
correlate by 0.9 or more: of the whole images, or of one and a part of the other (80 % of each side: corners, centre),
mirrored or not. Prints a table, and what the threshold of moco_tf.search.duplicates finds. Writes
docs/results/bench/near_duplicates.json.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np

from benchmarks import results

PRECISION, OWN = 0.99, 0.9
BLOCK = 1000  # rows of hash distances, or pairs of pictures, at a time
CHANGES = ("re-encoded", "resized", "cropped", "colours", "flipped")
OUTPUT = results.file("near_duplicates")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, help="folder of real images")
    parser.add_argument("--encoder", required=True, help="run folder or SavedModel, trained on that folder")
    parser.add_argument("--on", default="features", choices=("features", "embedding"))
    parser.add_argument("--count", type=int, default=20_000, help="real images")
    parser.add_argument("--planted", type=int, default=1000, help="changed copies")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    arguments = parser.parse_args()

    from moco_tf.startup import load_tensorflow

    load_tensorflow()
    with tempfile.TemporaryDirectory() as folder:
        photos = Path(folder) / "photos"
        kinds = plant(arguments.images, photos, arguments.count, arguments.planted, arguments.seed)
        names, small = thumbnails(photos)
        cosines, threshold = by_encoder(photos, Path(folder) / "index", arguments.encoder, arguments.on)
        found = {"encoder": cosines, "pHash": by_hash(photos)}
    found = {name: judged(*pairs, names, small) for name, pairs in found.items()}
    rows = {name: recall(*pairs, kinds) for name, pairs in found.items()}
    planted, scores = found["encoder"]
    near = [name for name, score in zip(planted, scores, strict=True) if score >= threshold]
    true = len([name for name in near if name])
    chosen = {"threshold": threshold, "precision": true / max(1, len(near)), "recall": true / len(kinds)}
    print(f"{'':12}" + "".join(f"{name:>12}" for name in ("all", *CHANGES)))
    for name, row in rows.items():
        print(f"{name:12}" + "".join(f"{100 * row[kind]:11.1f}%" for kind in ("all", *CHANGES)))
    print("Threshold chosen: cosine {threshold:.4f}, precision {precision:.1%}, recall {recall:.1%}".format(**chosen))
    settings = {name: str(value) for name, value in vars(arguments).items() if name != "output"}
    results.write(arguments.output, {"settings": settings, "recall": rows, "chosen": chosen})


def plant(images, folder, count, planted, seed):
    """Writes `count` images as 00000.png, ... and changed copies as 00000-resized.jpg; returns {number: change}."""
    from PIL import Image

    rng = np.random.default_rng(seed)
    files = sorted(path for path in images.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
    if len(files) < count:
        raise SystemExit(f"--count={count} images are asked for; {images} has {len(files)}")
    folder.mkdir()
    kinds = {int(n): CHANGES[i % len(CHANGES)] for i, n in enumerate(rng.permutation(count)[:planted])}
    for number, path in enumerate(rng.permutation(np.array(files, object))[:count]):
        image = Image.open(path).convert("RGB")
        image.save(folder / f"{number:05d}.png")
        if kind := kinds.get(number):
            quality = 40 if kind == "re-encoded" else 90
            change(image, kind, rng).save(folder / f"{number:05d}-{kind}.jpg", quality=quality)
    return kinds


def change(image, kind, rng):
    """A changed copy of a Pillow image."""
    from PIL import Image, ImageEnhance, ImageOps

    width, height = image.size
    if kind == "resized":
        return image.resize((round(width * 0.7), round(height * 0.7)), Image.Resampling.BICUBIC)
    if kind == "cropped":
        w, h = round(width * 0.8), round(height * 0.8)
        left, top = int(rng.integers(0, width - w + 1)), int(rng.integers(0, height - h + 1))
        return image.crop((left, top, left + w, top + h))
    if kind == "colours":
        hue, saturation, value = image.convert("HSV").split()
        turned = hue.point(lambda x: (x + 12) % 256)
        image = Image.merge("HSV", (turned, saturation, value)).convert("RGB")
        return ImageEnhance.Color(ImageEnhance.Brightness(image).enhance(1.2)).enhance(1.3)
    return ImageOps.mirror(image) if kind == "flipped" else image


def thumbnails(photos):
    """The names of all files, sorted, and 12 grey pictures of each, float32 (12, N, 256), of length 1, mean 0.

    First the whole image, then its corners and its centre; then all of these mirrored.
    """
    from PIL import Image

    corners = ((0, 0), (0.2, 0), (0, 0.2), (0.2, 0.2), (0.1, 0.1))
    parts = [(0, 0, 1, 1), *((left, top, left + 0.8, top + 0.8) for left, top in corners)]
    names = sorted(path.name for path in photos.iterdir())
    small = np.empty((2 * len(parts), len(names), 16, 16), np.float32)
    for number, name in enumerate(names):
        image = Image.open(photos / name).convert("L")
        for place, part in enumerate(parts):
            box = [share * side for share, side in zip(part, 2 * image.size, strict=True)]
            small[place, number] = image.resize((16, 16), Image.Resampling.BICUBIC, box=box)
    small[len(parts) :] = small[: len(parts), :, :, ::-1]
    small = small.reshape(*small.shape[:2], -1)
    small -= small.mean(axis=-1, keepdims=True)
    return names, small / np.maximum(np.linalg.norm(small, axis=-1, keepdims=True), 1e-6)


def alike(pairs, small):
    """Whether the pairs (P, 2) are near-duplicates by their `thumbnails`: bool (P,)."""
    best = np.full(len(pairs), -1.0, np.float32)
    for first in range(0, len(pairs), BLOCK):
        some = slice(first, first + BLOCK)
        for one, other in (pairs[some].T, pairs[some, ::-1].T):
            best[some] = np.maximum(best[some], np.einsum("vpi,pi->vp", small[:, one], small[0, other]).max(axis=0))
    return best >= OWN


def by_encoder(photos, folder, encoder, on):
    """((pairs (P, 2), cosines (P,)), the threshold that moco_tf.search.duplicates chooses)."""
    from moco_tf.search import build, groups, index
    from moco_tf.search.neighbours import nearest_others

    if build.main([f"--encoder={encoder}", f"--images={photos}", f"--output={folder}", f"--on={on}"]):
        raise SystemExit(1)
    cosines, numbers = nearest_others(index.read(folder), 16)
    best = {}
    for one, (near, others) in enumerate(zip(cosines.tolist(), numbers.tolist(), strict=True)):
        best |= {(min(one, other), max(one, other)): cosine for cosine, other in zip(near, others, strict=True)}
    return (np.array(list(best)), np.array(list(best.values()))), groups.near_threshold(cosines[:, 0])


def by_hash(photos):
    """(pairs (P, 2) at distances below 16 of 64 bits, their distances (P,) negated)."""
    import imagehash
    from PIL import Image

    bits = [np.packbits(imagehash.phash(Image.open(file)).hash) for file in sorted(photos.iterdir())]
    hashes = np.array([part.view(np.uint64)[0] for part in bits])
    pairs, scores = [], []
    for first in range(0, len(hashes), BLOCK):
        distances = np.bitwise_count(hashes[first : first + BLOCK, None] ^ hashes[None])
        one, other = np.nonzero(distances < 16)
        keep = one + first < other
        pairs.append(np.stack([one[keep] + first, other[keep]], axis=1))
        scores.append(-distances[one[keep], other[keep]].astype(float))
    return np.concatenate(pairs), np.concatenate(scores)


def judged(pairs, scores, names, small):
    """Returns (planted, scores), highest score first; planted: the name of each pair's original, or "" if not planted.

    Leaves out the folder's own near-duplicates.
    """
    planted = np.array([names[a][:5] if names[a][:5] == names[b][:5] else "" for a, b in pairs], object)
    own = (planted == "") & alike(pairs, small)
    order = np.argsort(-scores[~own], kind="stable")
    return planted[~own][order], scores[~own][order]


def recall(planted, scores, kinds):
    """{change, or "all": recall} at the lowest score down to which 99 % of pairs are planted; ties stay together."""
    right = planted != ""
    precision = np.cumsum(right) / np.arange(1, len(right) + 1)
    ends = np.append(scores[1:] != scores[:-1], True)
    precise = np.flatnonzero(ends & (precision >= PRECISION))
    found = planted[: precise[-1] + 1] if len(precise) else []
    hits = [kinds[int(name)] for name in found if name]
    of_kind = {kind: hits.count(kind) / max(1, list(kinds.values()).count(kind)) for kind in CHANGES}
    return {"all": len(hits) / len(kinds)} | of_kind


if __name__ == "__main__":
    main()
