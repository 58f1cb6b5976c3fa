"""How do TLS options in a service's URL reach the library that connects?

The same options in all URLs (`amqps://`, `valkeys://`): `ssl_ca_certs`, `ssl_certfile` and
`ssl_keyfile` (a client's certificate), `ssl_cert_reqs`, `ssl_check_hostname`.  Each library takes
some of them and chokes on others; and py-amqp and valkey-py accept a certificate that a trusted CA
has made out to somebody else.  Here the name is checked unless the URL says
`ssl_check_hostname=false`.
"""

from __future__ import annotations

import socket
import ssl
from typing import Any, Final
from urllib.parse import SplitResult, parse_qsl, urlencode, urlsplit

_CHECK: Final = "ssl_check_hostname"
_DEFAULT_PORTS: Final = {"amqps": 5671, "valkeys": 6379, "rediss": 6379}
_VERIFY: Final = {
    "required": ssl.CERT_REQUIRED,
    "optional": ssl.CERT_OPTIONAL,
    "none": ssl.CERT_NONE,
}
#: OpenSSL's X509_V_ERR_HOSTNAME_MISMATCH and …_IP_ADDRESS_MISMATCH.
_OTHER_NAME: Final = (62, 64)
_CONNECT_S: Final = 3.0
#: Seconds in which a server says that it wants a certificate of the client's (TLS 1.3: afterwards).
_REFUSAL_S: Final = 0.2


def uses_tls(url: str) -> bool:
    """Is what goes to `url` encrypted?"""
    return _split(url).scheme in _DEFAULT_PORTS


def amqp_arguments(url: str) -> dict[str, Any]:
    """What `kombu.Connection` wants for `url`: `hostname` without options, and `ssl`.

    Raises ValueError for an option that is none.
    """
    if not uses_tls(url):
        return {"hostname": url}
    parts, options = _options(url)
    checks_name = _checks_name(options)
    arguments: dict[str, Any] = {
        "ca_certs": options.pop("ssl_ca_certs", None),
        "certfile": options.pop("ssl_certfile", None),
        "keyfile": options.pop("ssl_keyfile", None),
        "cert_reqs": _verify_mode(options),
        # py-amqp checks the name if it knows one.
        "server_hostname": parts.hostname if checks_name else None,
    }
    unknown = [name for name in options if name.startswith("ssl_")]
    if unknown:
        raise ValueError(f"{', '.join(unknown)}: no option of a broker's URL")
    plain = parts._replace(query=urlencode(options)).geturl()
    # (A name that is None kombu would replace.)
    return {"hostname": plain, "ssl": {k: v for k, v in arguments.items() if v is not None}}


def valkey_url(url: str) -> str:
    """`url` as valkey-py wants it: with the check of the name, unless it says otherwise."""
    if not uses_tls(url):
        return url
    parts, options = _options(url)
    if _checks_name(options):
        options[_CHECK] = "true"
    cluster = "cluster+" if url.startswith("cluster+") else ""
    return cluster + parts._replace(query=urlencode(options, safe="/")).geturl()


def celery_backend_url(url: str) -> str:
    """`url` of a Valkey as Celery's Redis backend spells it; redis-py has a mind of its own."""
    scheme, _, rest = url.partition("://")
    if scheme == "unix":
        rest = rest.replace("db=", "virtual_host=")
    if uses_tls(url):
        parts, options = _options(url)
        options.setdefault("ssl_cert_reqs", "required")  # Celery wants it said
        options[_CHECK] = "true" if _checks_name(options) else "false"
        rest = parts._replace(query=urlencode(options, safe="/")).geturl().partition("://")[2]
    names = {"valkey": "redis", "valkeys": "rediss", "unix": "redis+socket"}
    return f"{names.get(scheme, scheme)}://{rest}"


def why_untrusted(url: str) -> str:
    """What is wrong with the server's certificate, and what to do; empty when nothing is.

    Empty also when nobody answers at all, or `url` names no TLS.
    """
    if not uses_tls(url):
        return ""
    parts, options = _options(url)
    host, port = parts.hostname or "localhost", parts.port or _DEFAULT_PORTS[parts.scheme]
    try:
        context = _context(parts.scheme, options)
    except ValueError as exc:
        return str(exc)
    except OSError as exc:  # ssl.SSLError is one: a file that holds something else
        named = [k for k in options if k.startswith("ssl_ca") or k.endswith(("file", "password"))]
        return f"{', '.join(named)} cannot be used ({exc.strerror or exc}): name files in PEM"
    try:
        with (
            socket.create_connection((host, port), timeout=_CONNECT_S) as sock,
            context.wrap_socket(sock, server_hostname=host) as tls,
        ):
            tls.settimeout(_REFUSAL_S)
            tls.recv(1)
            return ""
    except ssl.SSLCertVerificationError as exc:
        if exc.verify_code in _OTHER_NAME:
            return (
                f"the certificate of {host}:{port} is not made out to {host}: use a name that it "
                "is made out to in the URL, or give the server a certificate for this one"
            )
        return (
            f"the certificate of {host}:{port} is not trusted here ({exc.verify_message}): name "
            "the file of the CA that has signed it in the URL, ?ssl_ca_certs=/path/ca.pem"
        )
    except ssl.SSLError as exc:
        if "CERTIFICATE_REQUIRED" in (exc.reason or ""):
            return (
                f"{host}:{port} asks for a certificate of ours: name its files in the URL, "
                "?ssl_certfile=/path/client.pem&ssl_keyfile=/path/client.key"
            )
        return (
            f"{host}:{port} does not speak TLS ({exc.reason}): use the port on which it does, or "
            f"{parts.scheme[:-1]}:// in the URL"
        )
    except OSError:
        return ""


def _context(scheme: str, options: dict[str, str]) -> ssl.SSLContext:
    """As the client of `scheme` makes it."""
    named: dict[str, Any] = {
        "cafile": options.get("ssl_ca_certs"),
        "capath": options.get("ssl_ca_path"),
        "cadata": options.get("ssl_ca_data"),
    }
    if scheme == "amqps" or not any(named.values()):
        context = ssl.create_default_context(**named)
    else:  # valkey-py trusts what the system knows as well
        context = ssl.create_default_context()
        context.load_verify_locations(**named)
    context.check_hostname = _checks_name(options)
    context.verify_mode = _verify_mode(options)
    if certificate := options.get("ssl_certfile"):
        context.load_cert_chain(
            certificate, options.get("ssl_keyfile"), options.get("ssl_password")
        )
    return context


def _verify_mode(options: dict[str, str]) -> ssl.VerifyMode:
    mode = options.pop("ssl_cert_reqs", "required").lower().removeprefix("cert_")
    if mode not in _VERIFY:
        raise ValueError("ssl_cert_reqs is one of required, optional and none")
    return _VERIFY[mode]


def _checks_name(options: dict[str, str]) -> bool:
    """Takes the option out."""
    verifies = options.get("ssl_cert_reqs", "required").lower() not in ("none", "cert_none")
    return options.pop(_CHECK, "true").lower() not in ("false", "no", "0") and verifies


def _split(url: str) -> SplitResult:
    return urlsplit(url.removeprefix("cluster+"))


def _options(url: str) -> tuple[SplitResult, dict[str, str]]:
    parts = _split(url)
    return parts, dict(parse_qsl(parts.query))
