"""The flag that all exports share. The module imports nothing heavy, so a wrong flag is rejected at once."""

from moco_tf import command

REQUEST_MEGAPIXELS = 500.0  # as in data/encoded_batch.py, which loads TensorFlow


def request_flag():
    """Makes the flag --request_megapixels; `require_request` checks it."""
    return command.flag(
        REQUEST_MEGAPIXELS,
        "Megapixels that the images of a request to `encoded_images` may have together. More are refused by their "
        "headers, before anything is decoded.",
    )


def require_request(settings):
    """Refuses a --request_megapixels that allows no image."""
    command.require(settings, settings.request_megapixels > 0, "request_megapixels", "is more than 0")
