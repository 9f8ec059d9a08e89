"""What transformers says, off for a while and then as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars
from transformers.utils import logging


@contextmanager
def _verbosity_kept() -> Iterator[None]:
    """Afterwards transformers' verbosity is as before, whoever changes it inside."""
    verbosity = logging.get_verbosity()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' reports of loading: what matters in them is raised as an error."""
    with _verbosity_kept():
        logging.set_verbosity(logging.CRITICAL)
        yield


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Without the bars of transformers and huggingface_hub (of loading, saving and downloading weights).

    The verbosity is afterwards as before too: Trainer sets it in all processes but the main one.
    """
    shown, hub_shown = logging.is_progress_bar_enabled(), not are_progress_bars_disabled()
    if shown:
        logging.disable_progress_bar()
    try:
        with _verbosity_kept():
            yield
    finally:
        if shown:
            logging.enable_progress_bar()
            if not hub_shown:
                disable_progress_bars()
