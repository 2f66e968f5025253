"""Network settings from the environment: proxies, certificates and addresses, each checked before it is used.

For an invalid value, HTTP libraries raise anything from ValueError to ImportError, and quote the value with its password. The functions of this
module raise a one-line error that names the variable and contains no secrets.
"""

from __future__ import annotations

import os
import re
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn
from urllib.parse import unquote, urlsplit, urlunsplit
from urllib.request import url2pathname

from meteora_core.errors import DownloadError, UsageError
from meteora_core.fetch.pip_settings import pip_settings
from meteora_core.reading import shown_path
from meteora_core.text import one_line, redact

if TYPE_CHECKING:
    import httpx

PROXY_VARIABLES = ("ALL_PROXY", "HTTPS_PROXY", "HTTP_PROXY")
CERTIFICATE_VARIABLES = ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")
TIMEOUT, CONNECT_TIMEOUT = 60.0, 20.0
CERTIFICATE_HINT = "set PIP_CERT (or SSL_CERT_FILE) to the certificate bundle of your network, and check the computer's clock"

_SOCKS = ("socks5", "socks5h")


def without_credentials(url: str) -> str:
    """Return ``url`` without user name, password, query and fragment, for messages and manifests."""
    try:
        parts = urlsplit(url)
        return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))
    except ValueError:
        return redact(url.partition("?")[0])


def local_path(url: str) -> Path:
    """Return the path of a file:// URL."""
    return Path(url2pathname(unquote(urlsplit(url).path)))


def problem_of_url(url: str, schemes: tuple[str, ...]) -> str | None:
    """Return why ``url`` cannot be used as the address of a server; None if it can.

    Args:
        url: The absolute URL to check.
        schemes: The allowed schemes.
    """
    if re.search(r"[\x00-\x20\x7f]", url):
        return "it contains a blank or a control character"
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        return "its host or port is malformed"
    if parts.scheme not in schemes:
        allowed = ", ".join(f"{scheme}://" for scheme in schemes)
        return f"it does not begin with one of {allowed}"
    if not host or port == 0:
        return "it names no host" if not host else "its port is malformed"
    try:
        host.encode("idna")
    except UnicodeError:
        return "its host is malformed"
    return None


def check_url(variable: str, url: str, schemes: tuple[str, ...] = ("http", "https")) -> str:
    """Return ``url`` if it can be used. Raises UsageError, which names the variable and contains no secrets of the URL."""
    if problem := problem_of_url(url, schemes):
        raise UsageError(f"{variable} is not a usable URL: {problem}", hint=f"it should look like {schemes[0]}://host:port; unset it to use none")
    return url


def proxy_url(variable: str, value: str) -> str:
    """Return the URL of a proxy from a setting, in which the scheme may be missing, as pip allows.

    Raises:
        UsageError: The URL is malformed, or its kind of proxy is not supported.
    """
    url = value.strip() if "://" in value else f"http://{value.strip()}"
    check_url(variable, url, ("http", "https", *_SOCKS))
    if urlsplit(url).scheme in _SOCKS and find_spec("socksio") is None:
        raise UsageError(f"{variable} is a SOCKS proxy, which needs the package socksio", hint="pip install socksio, or use an HTTP proxy")
    return url


def certificates(variable: str, path: str) -> ssl.SSLContext:
    """Return an SSL context with the certificates in a file or folder.

    Raises:
        UsageError: The file or folder is missing, unreadable, or contains no certificates.
    """
    location = Path(path).expanduser()
    hint = "name a file of certificates in PEM format, or unset it to use the system's"
    try:
        if location.is_dir():
            return ssl.create_default_context(capath=str(location))
        return ssl.create_default_context(cafile=str(location))
    except FileNotFoundError:
        raise UsageError(f"{variable} names {shown_path(path)}, which does not exist", hint=hint) from None
    except ssl.SSLError:
        raise UsageError(f"{variable} names {shown_path(path)}, which contains no certificates", hint=hint) from None
    except (OSError, ValueError) as error:
        raise UsageError(f"{variable} names {shown_path(path)}, which cannot be read: {one_line(str(error), limit=200)}", hint=hint) from None


def check_network_environment() -> None:
    """Check the proxies and certificates that HTTP libraries read from the environment. Raises UsageError."""
    for variable in PROXY_VARIABLES:
        for name in (variable, variable.lower()):
            if value := os.environ.get(name):
                proxy_url(name, value)
    if path := os.environ.get("SSL_CERT_FILE"):
        certificates("SSL_CERT_FILE", path)


def check_hub_environment(endpoint: str) -> None:
    """Check the variables that huggingface_hub reads: HF_ENDPOINT, HF_TOKEN, proxies and certificates. Raises UsageError."""
    check_url("HF_ENDPOINT", endpoint)
    token = os.environ.get("HF_TOKEN", "").strip()
    if token and not re.fullmatch(r"[\x21-\x7e]+", token):
        raise UsageError("HF_TOKEN contains blanks, control characters or letters beyond ASCII", hint="copy the token again, or unset HF_TOKEN")
    check_network_environment()


@contextmanager
def http_client() -> Iterator[httpx.Client]:
    """Yield a client with the certificates and the proxy of pip, or with those of the environment if pip has none.

    Raises:
        UsageError: One of these settings is invalid.
    """
    import httpx

    settings = pip_settings()
    verify: ssl.SSLContext | bool = True
    if settings.cert:
        verify = certificates("PIP_CERT", settings.cert)
    else:
        for variable in CERTIFICATE_VARIABLES:
            if path := os.environ.get(variable):
                verify = certificates(variable, path)
                break
    proxy = proxy_url("the proxy of pip (PIP_PROXY)", settings.proxy) if settings.proxy else None
    check_network_environment()
    timeout = httpx.Timeout(TIMEOUT, connect=CONNECT_TIMEOUT)
    try:
        client = httpx.Client(verify=verify, proxy=proxy, timeout=timeout, follow_redirects=True, headers={"User-Agent": "meteora"})
    except (ValueError, TypeError, ImportError, OSError, httpx.InvalidURL) as error:  # raised also for a malformed NO_PROXY
        raise UsageError(
            f"the network settings cannot be used: {one_line(redact(str(error)), limit=200)}", hint="check HTTP_PROXY, HTTPS_PROXY, ALL_PROXY and NO_PROXY"
        ) from None
    with client:
        yield client


def final_failure(error: Exception, name: str) -> DownloadError | None:
    """Return the error to raise for a failed connection if another attempt cannot succeed; None if it may.

    Args:
        error: The error of the HTTP library.
        name: The address that was requested, without its secrets.
    """
    import httpx

    text = one_line(redact(str(error)), limit=200) or type(error).__name__
    if isinstance(error, httpx.ProxyError):
        return DownloadError(f"cannot reach {name}: the proxy refused: {text}", hint="check the proxy's address and login (PIP_PROXY, HTTPS_PROXY)")
    if isinstance(error, httpx.UnsupportedProtocol | httpx.InvalidURL | httpx.TooManyRedirects | httpx.LocalProtocolError):
        return DownloadError(f"cannot reach {name}: {text}", hint="check the address; `pip config list` shows the index in use")
    if "CERTIFICATE_VERIFY_FAILED" in str(error) or "WRONG_VERSION_NUMBER" in str(error):
        return DownloadError(f"cannot reach {name}: its certificate is not trusted ({text})", hint=CERTIFICATE_HINT)
    return None


def refuse(name: str, status: int) -> NoReturn:
    """Raise the DownloadError for a response with a status of 400 or more."""
    hints = {401: "this address needs a login", 403: "this address needs a login", 407: "the proxy needs a login", 429: "wait a while, then try again"}
    hint = hints.get(status, "try again later" if status >= 500 else "check the address; `pip config list` shows the index in use")
    raise DownloadError(f"cannot reach {name}: the server answered {status}", hint=hint)
