"""`python -m export.encoder` runs `python -m moco_tf.serving.export encoder` in a checkout."""

import sys

from moco_tf.serving import export_encoder


def main(arguments):
    """Runs the command; returns the process's exit status."""
    return export_encoder.main(arguments, "export.encoder")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
