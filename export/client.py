"""`python -m export.client` runs `python -m moco_tf.serving.export client` in a checkout."""

import sys

from moco_tf.serving import export_client


def main(arguments):
    """Runs the command; returns the process's exit status."""
    return export_client.main(arguments, "export.client")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
