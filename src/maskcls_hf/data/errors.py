"""What is wrong with an image or its annotation: an error of one line, in whichever process it is read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch.utils.data import get_worker_info


class DataError(ValueError):
    """Names the image that something is wrong with.

    Out of a loader worker it comes as it was raised.
    """

    def __init__(self, message: str):
        """Takes the message, also as torch's loader gives it with the traceback of a worker."""
        if message.startswith("Caught "):  # torch raises it anew with the worker's traceback, which ends in the message
            message = message.rpartition(f"\n{__name__}.{type(self).__name__}: ")[2].strip()
        super().__init__(message)


@contextmanager
def naming_image(image: str, often_named: bool = True) -> Iterator[None]:
    """Whatever fails inside names the image: ValueError and OSError as they are, where they do, else a `DataError`.

    Args:
        image: its name.
        often_named: the errors mostly say the name themselves; False: where they seem to, it is by chance.

    Examples:
        >>> with naming_image("street_7"):
        ...     raise KeyError("area")
        Traceback (most recent call last):
        maskcls_hf.data.errors.DataError: image street_7: KeyError: 'area'
    """
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        is_known = isinstance(error, (OSError, ValueError))
        message = str(error) if is_known else f"{type(error).__name__}: {error}".removesuffix(": ")
        if not often_named or image not in message:
            message = f"image {image}: {message}"
        elif is_known and get_worker_info() is None:
            raise
        raise DataError(message) from error


@contextmanager
def told_of_workers() -> Iterator[None]:
    """A loader worker that the system has ended becomes a `DataError` that says what to do."""
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        raise DataError(
            f"A process that reads the data was ended by the system: {str(error).rstrip('. ')}. Often memory runs out: "
            "read with fewer (--set training.workers=1)."
        ) from error
