"""Describes an exported encoder in encoder.json for programs and in README.md for people, both beside the graph."""

from pathlib import Path

from moco_tf import command, files, run_folder
from moco_tf.frozen import DESCRIPTION

CARD = "README.md"


def of_run(run_dir):
    """Returns a run folder's facts on its encoder, a dict for JSON: method, architecture, recipe, data, metrics."""
    run_dir, config = Path(run_dir), run_folder.recorded(run_dir)
    names = [field.name for field in command.fields(type(config)) if config.uses(field.name)]
    recipe = {name: getattr(config, name) for name in names if name not in ("run_dir", "resume")}
    if not config.uses("arch"):
        shape = ("depth", "width", "attention_heads")
    else:
        shape = ("arch", "patch_size") if config.is_vit else ("arch", "width", "stem")
    about = {
        "method": config.learner,
        "architecture": {name: recipe[name] for name in shape if name in recipe},
        "recipe": recipe,
        "data": {"dataset": config.dataset, "split": config.train_split} | _json(run_dir / "data.json"),
    }
    if rows := run_folder.rows(run_dir):
        about["metrics"] = {name: float(text) for name, text in rows[-1].items() if text}
    if baselines := _json(run_dir / "baselines.json"):
        about["baselines"] = baselines
    if checkpoint := _json(run_dir / "torch.json").get("checkpoint"):
        about["converted_from"] = checkpoint
    return about


def _json(path):
    return command.read_json(path) if path.exists() else {}


def write(folder, description, signatures):
    """Writes encoder.json and README.md into a folder, a Path; see `card`."""
    files.write_json(folder / DESCRIPTION, description)
    files.write_text(folder / CARD, card(description, signatures))


def card(description, signatures):
    """Returns the text for people: the contents of encoder.json in words.

    Args:
      description: a dict with "input", "outputs", "parameters", and the entries of `of_run`, as far as they are known.
      signatures: {name: what its argument is}.
    """
    what = description["input"]
    of_images = "image_size" in what
    noun = "image" if of_images else "text"
    title = description.get("architecture", {}).get("arch", "encoder")
    lines = [
        f"# {title}",
        "",
        f"{'An' if of_images else 'A'} {noun} encoder of {description['parameters']:,} parameters.",
    ]
    if "recipe" in description:
        data = description["data"]
        number = f", {data['images']:,} {'images' if of_images else 'sentences'}" if "images" in data else ""
        labels = "with" if description["recipe"].get("pretext") == "labels" else "without"
        lines += [
            f"Trained {labels} labels by `{description['method']}` on `{data['dataset']}` ({data['split']}{number}), "
            f"{description['steps']:,} training steps; every setting is under `recipe` in {DESCRIPTION}."
        ]
    if "converted_from" in description:
        lines += [f"Its weights began as those of `{description['converted_from']}`."]
    knn = description.get("metrics", {}).get("knn_top1")
    if knn is not None:
        others = ", ".join(f"{name} {value:.1f} %" for name, value in description.get("baselines", {}).items())
        lines += [f"kNN accuracy on labelled {noun}s: {knn:.1f} %{f' ({others})' if others else ''}."]
    lines += [
        "",
        "## Use",
        "",
        "| signature | `images` |" if of_images else "| signature | its argument |",
        "|---|---|",
        *(f"| `{name}` | {argument} |" for name, argument in signatures.items()),
        "",
        _how_input_is_made(what) + " All return:",
        "",
        *(f"- `{name}`: {what}" for name, what in description["outputs"].items()),
        "",
    ]
    if description["on_bad_image"] == "zeros":
        lines += ["`encoded_images` also returns `valid`, bool (N); where it is false, the image could not be decoded "
                  "and its rows are zeros.", ""]  # fmt: skip
    lines += [
        f"`embedding` has unit length: two {noun}s are as similar as the product of their embeddings.",
        "",
        "## Limits",
        "",
        "Nothing is known of it beyond the figures in this folder. What it finds similar follows its training "
        f"{noun}s; other {noun}s, and bias, were not examined.",
    ]
    return "\n".join(lines) + "\n"


def _how_input_is_made(what):
    """Returns a sentence on the input's settings."""
    if "image_size" not in what:
        return (
            "`serving_default` makes lower case, splits where there is no letter, mark or digit, and takes the first "
            f"{what['length']} words, each as a hash of {what['hash_buckets']:,}."
        )
    size, crop = what["image_size"], what["crop_ratio"]
    return (
        f"All but `preprocessed` resize the shorter side to {round(size / crop)} pixels, cut the central {size} x "
        f"{size} and normalise."
    )
