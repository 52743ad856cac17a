"""Models that read images: what goes wrong with them alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def images_must_fit(max_length: int | None) -> Iterator[None]:
    """Says that `max_length` cuts images off, where the model says that images and their tokens do not match."""
    try:
        yield
    except ValueError as error:
        if max_length is None or "Image features and image tokens do not match" not in str(error):
            raise
        raise ValueError(
            f"max_length {max_length} cuts image tokens off that have image features: set it to what the longest row "
            "takes, or leave long rows out"
        ) from error
