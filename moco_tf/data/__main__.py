"""`python -m moco_tf.data --dataset=photos --flagfile=...`: shows what a data set holds and how a recipe sees it.

Takes the flags of `moco_tf.train`. Checks every image, prints counts, classes, formats, sizes and bad files, and
writes a picture of views. Trains nothing and writes nothing else.
"""

import collections
import sys
from pathlib import Path

from moco_tf import command, files
from moco_tf import config as config_lib
from moco_tf.command import ConfigError
from moco_tf.startup import load_tensorflow

SHOWN = 10  # classes, bad files and pairs of views


def main(arguments):
    """Runs the command; returns the process's exit status: 2 if a run would be refused."""
    command.log_to_screen()
    return command.run("moco_tf.data", __doc__, lambda words: look(config_lib.parse(words)), arguments)


def look(config):
    """Prints what the config's data set holds; returns the process's exit status."""
    load_tensorflow()
    import tensorflow as tf

    from moco_tf import build
    from moco_tf.data import check, dataset, errors, folder
    from moco_tf.data.manifest import check_files, too_many_bad
    from moco_tf.data.views import first

    where = config.dataset, config.data_dir, config.train_split
    channels = build.inputs(config).channels_of_files
    split = dataset.find(*where, config.max_bad_fraction, exif=config.exif, channels=channels)
    if split.source and split.source.unit == "sentences":
        return _look_at_sentences(config, split.source)
    file = Path(config.run_dir) / "data.png"
    try:  # before a check that may take long
        files.make_folder(file.parent)
    except OSError as error:
        raise ConfigError(f"--run_dir names a folder for the picture; {file.parent}: {error.strerror}") from None
    if listing := split.listing:
        place = listing.title
        print("\n".join(folder.remarks(listing)), flush=True)  # before a check that may take long
        checked = check_files(listing)
        bad, verdicts = checked.bad, checked.verdicts
        source = checked.source(config.exif) if len(bad) < split.size else None
    else:
        place, source = split.source.name, split.source
        records = source.unchecked()
        verdicts = check.verdicts(records, lambda record: record["image"], split.size)
        bad = [(f"record {i}", verdict.problem) for i, verdict in enumerate(verdicts) if verdict.problem]
        labels = [int(label) for label in records.map(lambda record: record["label"]).as_numpy_iterator()]
        print("\n".join(folder.class_counts(source.class_names, labels)))

    good = [verdict for verdict in verdicts if not verdict.problem]
    print(f"{folder.printable(place)}: {split.size} images, {len(bad)} of them undecodable")
    formats = collections.Counter(verdict.format for verdict in good).most_common()
    print("Formats: " + (", ".join(f"{format} {count}" for format, count in formats) or "none"))
    for name, sides in (("Width", [v.width for v in good]), ("Height", [v.height for v in good])):
        if sides:
            sides.sort()
            print(f"{name}: {sides[0]} to {sides[-1]} pixels, median {sides[len(sides) // 2]}")
    for sentence in check.remarks(verdicts, config.exif):
        print(sentence)
    for name, problem in bad[:SHOWN]:
        print(f"Undecodable: {folder.printable(name)} ({problem})")
    if len(bad) > SHOWN:
        print(f"Undecodable: {len(bad) - SHOWN} more; train.log of a run names all")

    if good:
        try:
            records = build.records(config, build.read(config, source))
            build.at_once(config, records)  # refuses what a run would refuse
            task, on_device = build.task(config), build.on_device(config)
            views = first(records, task, min(SHOWN, records.size), config.seed, on_device)
        except errors.ERRORS as error:  # a stream with more bad records than a run accepts
            raise ConfigError(errors.reason(error)) from None
        files.write_bytes(file, tf.io.encode_png(build.picture(config, views)).numpy())
        print(f"Views of --pretext={config.pretext}, queries above: {files.printable(file)}")
    refusal = too_many_bad(bad, split.size, config.max_bad_fraction)
    if refusal or not good:
        raise ConfigError(refusal or "none of the images can be decoded")
    build.steps_per_epoch(config, split.size)
    return 0


def _look_at_sentences(config, source):
    """Prints how many sentences and words there are, and what a recipe makes of the first; returns the exit status."""
    from moco_tf import build
    from moco_tf.data import folder
    from moco_tf.data.inputs import text
    from moco_tf.data.views import first

    records = build.records(config, build.read(config, source))  # refuses what a run would refuse
    words = sorted(text.split(source.contents).row_lengths().numpy().tolist())
    print("\n".join(folder.class_counts(source.class_names, source.labels.numpy().tolist())))
    print(f"{folder.printable(source.name)}: {source.size} sentences")
    print(f"Words: {words[0]} to {words[-1]}, median {words[len(words) // 2]}")
    number = min(SHOWN, source.size)
    shown = [record["text"].numpy() for _, record in source.shuffled(config.seed).take(number)]
    views = first(records, build.task(config), number, config.seed)
    print(f"Views of --pretext={config.pretext}:", *build.inputs(config).lines(shown, views), sep="\n  ")
    build.steps_per_epoch(config, source.size)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
