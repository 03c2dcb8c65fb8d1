"""`python -m export.classifier` runs `python -m moco_tf.serving.export classifier` in a checkout."""

import sys

from moco_tf.serving import export_classifier


def main(arguments):
    """Runs the command; returns the process's exit status."""
    return export_classifier.main(arguments, "export.classifier")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
