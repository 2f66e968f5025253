"""Escapes, shortens and redacts text of unknown origin for messages."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from urllib.parse import unquote

# Code points that can control a terminal or mislead a reader: C0, DEL and C1; line and paragraph separators; the format characters (Unicode's Cf)
# except the Arabic, Syriac and Kaithi number signs, which are visible; lone surrogates.
_FORMAT = (
    "\u00ad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\U00013430-\U0001343f\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0001\U000e0020-\U000e007f\ud800-\udfff"
)
_JOINERS = "\u200c\u200d"
_ALWAYS = re.compile(f"[\x00-\x1f\x7f-\x9f{_FORMAT}]")
_IN_TEXT = re.compile(f"[\x00-\x08\x0b-\x1f\x7f-\x9f]|(?![{_JOINERS}])[{_FORMAT}]|(?<=[\x00-\x9f{_FORMAT}])[{_JOINERS}]|[{_JOINERS}](?=[\x00-\x9f{_FORMAT}])")


_LONG_LIMIT = re.compile(r"(?:\d+\.\d{10,}|\d{15,}(?:\.\d+)?)$")


def validation_message(message: str) -> str:
    """A message of pydantic for users: without the prefix of validators, and with limits of many digits in short form.

    Args:
        message: The entry ``msg`` of one of a ``ValidationError``'s problems.

    Example:
        >>> validation_message("Input should be greater than or equal to 0.000000000000000000000000000000000000011754943508222875")
        'Input should be greater than or equal to 1.18e-38'
    """
    if not message.startswith("Input should be "):
        return message.removeprefix("Value error, ")
    return _LONG_LIMIT.sub(lambda limit: f"{float(limit[0]):.3g}", message)


def printable(text: str, *, multiline: bool = False) -> str:
    r"""Return ``text`` with every character escaped that could control a terminal or mislead a reader.

    Control characters (C0, DEL, C1), bidirectional overrides, zero-width and other format characters, line and paragraph separators, and lone
    surrogates become Python's escapes, such as ``\x1b`` and ``\u202e``. Other characters, backslashes included, stay: the result is for display only.

    Args:
        text: Any string, such as a name from a file or a model's answer.
        multiline: Whether ``text`` is running text: line feeds and tabs stay, ``\r\n`` becomes ``\n``, and the zero-width joiners stay where
            scripts and emoji need them, between characters beyond ASCII. By default ``text`` is shown within one line, and all of these are escaped.

    Returns:
        A string that is safe to print.
    """
    if text.isascii() and text.isprintable():
        return text
    if multiline:
        text = text.replace("\r\n", "\n")
    return (_IN_TEXT if multiline else _ALWAYS).sub(_escaped, text)


def _escaped(match: re.Match[str]) -> str:
    return match[0].encode("unicode_escape").decode("ascii")


def json_printable(document: str) -> str:
    """Return an equivalent JSON document in which control and format characters, except line feeds, are written as JSON escapes."""
    return (
        _ALWAYS.sub(lambda match: match[0] if match[0] == "\n" else json.dumps(match[0])[1:-1], document)
        if not document.isascii() or "\x7f" in document
        else document
    )


def one_line(text: str, *, limit: int = 4000) -> str:
    """Return ``text`` as one line that is safe to print: line breaks with the blanks around them become one space, the rest is :func:`printable`.

    Args:
        text: Any string, such as the message of another library's error.
        limit: The largest number of characters; longer texts are cut.
    """
    joined = printable(" ".join(part.strip() for part in re.split(r"[\r\n\v\f\x85\u2028\u2029]+", text) if part.strip()))
    return joined if len(joined) <= limit else f"{joined[: limit - 2]} …"


def shown(value: object, *, limit: int = 60) -> str:
    """Return ``repr(value)`` for a message: printable, and cut after ``limit`` characters.

    Args:
        value: A value from a file, such as a key or a number. A long list or object is described by its length only.
        limit: The largest number of characters.
    """
    if isinstance(value, dict | list) and len(value) > 8:
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)} entries"
    try:
        text = ascii(value) if isinstance(value, str) and not value.isprintable() else repr(value)
    except (RecursionError, ValueError):  # deeply nested, or an integer of thousands of digits
        return f"a {type(value).__name__}"
    return shortened(text, limit)


def shortened(text: str, limit: int) -> str:
    """Return ``text``, cut after ``limit`` characters and marked by an ellipsis if it is longer."""
    return text if len(text) <= limit else f"{text[:limit]}…"


def listed(names: Iterable[object], most: int = 5) -> str:
    """Return the first ``most`` names, separated by commas, and the number of the others: ``a, b and 3 more``."""
    texts = [str(name) for name in names]
    return ", ".join(texts[:most]) + (f" and {len(texts) - most} more" if len(texts) > most else "")


_SECRET_VARIABLES = re.compile(r"(^|_)(TOKEN|PASSWORD|PASSWD|SECRET|API_?KEY)$|_(TOKEN|PASSWORD|SECRET)_")
_URL_VARIABLES = re.compile(r"(^PIP_|^UV_|PROXY$|^HF_ENDPOINT$|INDEX|URL$|LINKS$)")
_SHORTEST = 4
"""The length in characters below which a secret is recognised only by its position in a URL, not wherever the same letters occur."""

_LOGIN = re.compile(r"(?<=://)[^\s/?#'\"]*@")
_BARE_LOGIN = re.compile(r"(?<![\w/@.%:+-])[\w.%+~!$*-]+:[^\s@/'\"]+@(?=[\w\[])")
_QUERY = re.compile(r"(?i)(?<=[?&;])([\w.-]*(?:token|key|auth|pass|secret|sig|credential|policy)[\w.-]*=)[^\s&;#'\"]+")
_HEADER = re.compile(r"((?i:authorization)['\"]?\s*[:=]\s*['\"]?)(?:(?i:basic|bearer|token)\s+)?[^\s'\",]+|\b(?:Bearer|Basic)\s+[\w.~+/=-]{20,}")
_HUB_TOKEN = re.compile(r"\bhf_\w{8,}")


def redact(text: str, environment: Mapping[str, str] | None = None) -> str:
    """Return ``text`` with passwords and tokens replaced by ``***``.

    This covers logins in URLs and in addresses without a scheme (``user:password@host``), secret query parameters, authorization headers, tokens of
    the hub, and every secret in an environment variable such as ``HF_TOKEN`` or in the URL of an index or a proxy, also percent-decoded.

    Args:
        text: The message to redact.
        environment: The environment variables that may hold secrets; ``os.environ`` by default.
    """
    for secret in _secrets(os.environ if environment is None else environment):
        if secret in text:
            text = text.replace(secret, "***")
    if "@" in text:
        text = _BARE_LOGIN.sub("***@", _LOGIN.sub("***@", text))
    if "=" in text:
        text = _QUERY.sub(r"\1***", text)
    text = _HEADER.sub(lambda match: f"{match[1] or ''}***", text)
    return _HUB_TOKEN.sub("***", text) if "hf_" in text else text


def _secrets(environment: Mapping[str, str]) -> list[str]:
    """Return the secrets in the environment, longest first, so that a secret that contains another is replaced as a whole."""
    secrets: set[str] = set()
    for name, value in environment.items():
        upper = name.upper()
        if _SECRET_VARIABLES.search(upper):
            secrets.add(value.strip())
        elif "@" in value and _URL_VARIABLES.search(upper):
            for part in value.split():
                secrets.update(_logins(part))
    return sorted((each for each in secrets if len(each) >= _SHORTEST), key=lambda each: (-len(each), each))


def _logins(url: str) -> Iterable[str]:
    """Return the login and the password in a URL (or the user name alone, which may be a token), as written and percent-decoded."""
    login = url.partition("://")[2] or url
    login = login.rpartition("@")[0]
    user, colon, password = login.partition(":")
    for secret in (login, password if colon else user):
        if secret:
            yield secret
            yield unquote(secret)
