"""Translates failures of the system and of other libraries that no other module handles into one-line errors."""

from __future__ import annotations

import errno
import ssl
import sys

from meteora_core.errors import DataError, DownloadError, MeteoraError, StorageError
from meteora_core.reading import describe
from meteora_core.text import one_line, redact

_LONGEST = 500


def known_failure(error: BaseException) -> MeteoraError | None:
    """Translate an error that can end any command.

    Args:
        error: The error that a command ended with.

    Returns:
        The error to report, or None for an unexpected error: a bug, whose traceback should be shown.
    """
    if isinstance(error, ssl.SSLError):
        return DownloadError(f"a secure connection failed: {_text(error)}", hint="check PIP_CERT, SSL_CERT_FILE, REQUESTS_CA_BUNDLE and the proxy")
    if isinstance(error, TimeoutError | ConnectionError) and error.filename is None:
        return DownloadError(f"a connection failed: {_text(error)}", hint="check the network connection and the proxy")
    if isinstance(error, OSError):
        return _system(error)
    if isinstance(error, RuntimeError) and "home directory" in str(error):
        return StorageError("the home directory cannot be determined", hint="set HOME, or use an absolute path")
    if isinstance(error, RuntimeError) and str(error).startswith("Symlink loop"):
        return StorageError(f"a link leads back to itself: {_text(error)}", hint="check the path")
    if isinstance(error, ValueError) and str(error).startswith("embedded null"):
        return DataError("a path contains a NUL character, which no path can", hint="METEORA_DEBUG=1 shows where")
    if isinstance(error, MemoryError):
        return MeteoraError("there is not enough memory", hint="use a smaller batch or model, or end other programs")
    if isinstance(error, RecursionError):
        return DataError("the input is nested too deeply to be read", hint="METEORA_DEBUG=1 shows where")
    if isinstance(error, UnicodeError):
        return DataError(f"a text cannot be read or written: {_text(error)}", hint="METEORA_DEBUG=1 shows where")
    if _is(error, "torch", "OutOfMemoryError"):
        return MeteoraError(f"the GPU's memory is full: {_text(error).partition('. ')[0]}", hint="use a smaller batch, or --load-in-4bit if the command has it")
    if _is(error, "safetensors", "SafetensorError"):
        return DataError(f"a safetensors file cannot be used: {_text(error)}", hint="`meteora ckpt inspect PATH` says what a file holds")
    if _is(error, "httpx", "HTTPError") or _is(error, "httpx", "InvalidURL"):
        return DownloadError(f"a download failed: {_text(error)}", hint="check the network connection and the proxy")
    return None


def _is(error: BaseException, module: str, name: str) -> bool:
    """Whether ``error`` has a type of another library; the library is not imported for this check."""
    kind = getattr(sys.modules.get(module), name, None)
    return isinstance(kind, type) and isinstance(error, kind)


def _system(error: OSError) -> MeteoraError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StorageError("no space left on the disk", hint="free some space, or set METEORA_CACHE to a folder on a larger disk")
    if error.errno == errno.EMFILE:
        return StorageError("too many files are open", hint="raise the limit with `ulimit -n`")
    if isinstance(error, FileNotFoundError) and error.filename is None:
        return StorageError("the working directory does not exist any more", hint="change to another one")
    if error.errno is None or error.filename is None:
        return StorageError(_text(error), hint="METEORA_DEBUG=1 shows where")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return StorageError(f"no permission for {one_line(str(error.filename), limit=300)}", hint="check the owner and the mode of the file and its folder")
    return StorageError(describe(error, error.filename), hint="check the path")


def _text(error: BaseException) -> str:
    return one_line(redact(str(error)), limit=_LONGEST) or type(error).__name__
