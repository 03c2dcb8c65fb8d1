"""The flag that all exports have in common. Imports nothing heavy, so that a wrong flag is answered at once."""

from moco_tf import command

REQUEST_MEGAPIXELS = 500.0  # as data/encoded_batch.py has it, which loads TensorFlow


def request_flag():
    """The flag --request_megapixels; `require_request` checks it."""
    return command.flag(
        REQUEST_MEGAPIXELS,
        "Megapixels that the images of a request to `encoded_images` may have together. More are refused by their "
        "headers, before anything is decoded.",
    )


def require_request(settings):
    """Refuses --request_megapixels that lets no image pass."""
    command.require(settings, settings.request_megapixels > 0, "request_megapixels", "is more than 0")
