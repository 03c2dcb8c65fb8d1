"""What people call the splits of a data set: folders on a disk, or splits of TFDS."""

import re

TRAIN, VALIDATION, TEST = "train", "validation", "test"
HELD_OUT = (VALIDATION, TEST)  # splits that are not trained on
# What people call the splits, in lower case and without separators between words.
_NAMES = {
    **dict.fromkeys(("train", "training", "trn", "trainval"), TRAIN),
    **dict.fromkeys(("val", "valid", "validation", "dev", "devel", "development", "eval", "evaluation"), VALIDATION),
    **dict.fromkeys(("holdout", "heldout"), VALIDATION),
    **dict.fromkeys(("test", "tests", "testing", "tst"), TEST),
}
_OF_IMAGES = "(?:images?|imgs?|pictures?|pics?|photos?|data|dataset|set|split|samples|files?|folder|dir)"
_SPLIT = re.compile(  # test, test_images, testset, test2017, images_test, ILSVRC2012_img_test
    rf"(?:ilsvrc\d*[ _.-])?(?:{_OF_IMAGES}[ _.-])?(?P<name>.+?)(?:[ _.-]?{_OF_IMAGES})?(?:[ _.-]?\d+)?"
)


def split_of(name):
    """Returns the split that a name looks like: TRAIN, VALIDATION or TEST; None if it is a name like any other."""
    match = _SPLIT.fullmatch(name.lower())
    return match and _NAMES.get(folded(match["name"]))


def folded(name):
    """A name without capitals and separators: Train and train are one split of a list."""
    return re.sub("[ _.-]", "", name.lower())


def meant_by(wanted, names):
    """Returns the `names` that the split `wanted` can mean: itself, else those of its kind, else any held-out ones."""
    if wanted in names:
        return [wanted]
    kind = split_of(wanted)
    alike = [name for name in names if kind and split_of(name) == kind]
    if alike or kind not in HELD_OUT:
        return alike
    return [name for name in names if split_of(name) in HELD_OUT]
