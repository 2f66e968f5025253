"""Checks of the environment variables that begin with ``METEORA_``."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable, Mapping
from difflib import get_close_matches

from meteora_core.errors import UsageError
from meteora_core.text import printable

PREFIX = "METEORA_"
OTHERS = ("METEORA_API_KEY", "METEORA_CACHE", "METEORA_DEBUG", "METEORA_KERNEL_TABLE", "METEORA_RUN_LOG")
"""Variables that are not settings: the server's key, the folder of downloads, whether errors show a traceback, the user's table of kernels, a test's log."""

_CLOSE = 0.75
_log = logging.getLogger(__name__)


def check_environment(sections: Mapping[str, Iterable[str]], environment: Mapping[str, str] | None = None) -> None:
    """Refuse variables that look like settings but are not, because they would be ignored silently.

    A variable that resembles no setting, which may belong to another program, is logged as a warning.

    Args:
        sections: The names of the settings in each section.
        environment: The environment variables to check; ``os.environ`` by default.

    Raises:
        UsageError: A variable has a single underscore after a section's name, resembles a known variable, or sets a section to null.
    """
    known = {f"{PREFIX}{section}__{name}".upper(): None for section, names in sections.items() for name in names}
    for variable, value in (os.environ if environment is None else environment).items():
        upper = variable.upper()
        section, separator, _ = upper.removeprefix(PREFIX).partition("__")
        if upper.startswith(PREFIX) and section.lower() in sections and not separator and value.strip() == "null":
            raise UsageError(f"the environment variable {printable(variable)} is null, not an object of settings", hint="unset it to use the defaults")
        if not upper.startswith(PREFIX) or upper in OTHERS or section.lower() in sections:
            continue
        shown = printable(variable)
        plain = {re.sub("_+", "_", name): name for name in (*known, *OTHERS)}
        match = plain.get(re.sub("_+", "_", upper)) or next(iter(get_close_matches(upper, (*known, *OTHERS), n=1, cutoff=_CLOSE)), None)
        if match:
            reason = " Two underscores separate a section from a setting." if "__" in match and not separator else ""
            raise UsageError(f"the environment variable {shown} is not a setting", hint=f"did you mean {match}?{reason}")
        if separator or any(upper.startswith(f"{PREFIX}{name}_".upper()) for name in sections):
            raise UsageError(
                f"the environment variable {shown} is not a setting",
                hint="write METEORA_SECTION__NAME, such as METEORA_EVAL__LIMIT; `meteora config show` lists all settings",
            )
        _log.warning("the environment variable %s is ignored: it is not a setting", shown)
