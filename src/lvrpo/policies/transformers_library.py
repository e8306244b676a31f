"""The optional package transformers: imported on demand, and silent while it loads a model."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lvrpo.errors import optional_package


def transformers_library(what: str) -> Any:
    """The package; raises InputError that names ``what`` needs it. Any: it is optional."""
    return optional_package("transformers", f"{what} needs transformers", "external")


@contextmanager
def quiet_loading(library: Any) -> Iterator[None]:
    """Suppresses progress bars, logs below errors, and warnings. Any: transformers, or diffusers."""
    log = library.utils.logging
    level, bar = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.set_verbosity(level)
        if bar:
            log.enable_progress_bar()
