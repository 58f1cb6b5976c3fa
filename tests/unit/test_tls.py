"""What do the libraries get of a URL's TLS options, and what is said of a server nobody trusts?"""

from __future__ import annotations

import socket
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import quote

import pytest

from pdtasks.errors import ConfigurationError
from pdtasks.links import require_trusted
from pdtasks.settings import Settings
from pdtasks.tls import amqp_arguments, celery_backend_url, valkey_url, why_untrusted
from tests.certificates import Certificate, make_certificate


def test_urls_without_tls_are_left_alone() -> None:
    for url in ("amqp://u:p@h:1/v?heartbeat=3", "valkey://h:1/0?db=2", "unix:///kv.sock?db=0"):
        assert valkey_url(url) == url
        assert amqp_arguments(url) == {"hostname": url}
        assert why_untrusted(url) == ""


def test_a_brokers_options_go_to_py_amqp_and_the_name_is_checked() -> None:
    url = "amqps://u:p%40@host:5671/pdtasks?ssl_ca_certs=/a/ca.pem&ssl_certfile=/c&ssl_keyfile=/k"

    assert amqp_arguments(url) == {
        "hostname": "amqps://u:p%40@host:5671/pdtasks",
        "ssl": {
            "ca_certs": "/a/ca.pem",
            "certfile": "/c",
            "keyfile": "/k",
            "cert_reqs": ssl.CERT_REQUIRED,
            "server_hostname": "host",
        },
    }


@pytest.mark.parametrize("said", ["ssl_check_hostname=false", "ssl_cert_reqs=none"])
def test_who_says_so_gets_no_check_of_the_name(said: str) -> None:
    assert "server_hostname" not in amqp_arguments(f"amqps://h/v?{said}")["ssl"]
    assert "ssl_check_hostname" not in valkey_url(f"valkeys://h:1/0?{said}")
    assert "ssl_check_hostname=false" in celery_backend_url(f"valkeys://h:1/0?{said}")


def test_valkey_py_and_redis_py_check_the_name_unless_told_otherwise() -> None:
    url = "valkeys://u:p@h:1/0?ssl_ca_certs=/a/ca.pem"

    assert valkey_url(url) == url + "&ssl_check_hostname=true"
    assert valkey_url("cluster+" + url) == "cluster+" + url + "&ssl_check_hostname=true"
    assert celery_backend_url(url) == (
        "rediss://u:p@h:1/0?ssl_ca_certs=/a/ca.pem&ssl_cert_reqs=required&ssl_check_hostname=true"
    )


def test_an_option_that_is_none_is_named() -> None:
    with pytest.raises(ValueError, match="ssl_ca_cert: no option"):
        amqp_arguments("amqps://h/v?ssl_ca_cert=/a")
    with pytest.raises(ValueError, match="required, optional and none"):
        amqp_arguments("amqps://h/v?ssl_cert_reqs=maybe")


# -- servers ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    return make_certificate(tmp_path_factory.mktemp("certificates"))


Serve = Callable[..., int]


@pytest.fixture
def serve(certificate: Certificate) -> Iterator[Serve]:
    """Starts servers that shake hands, each once; returns their ports."""
    threads: list[threading.Thread] = []

    def start(*, tls: bool = True, wants: Path | None = None, address: str = "127.0.0.1") -> int:
        listener = socket.create_server((address, 0))
        listener.settimeout(10)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate.file, certificate.key)
        if wants is not None:
            context.verify_mode = ssl.CERT_REQUIRED
            context.load_verify_locations(wants)

        def run() -> None:
            with listener:
                sock, _ = listener.accept()
            with sock:
                sock.settimeout(10)
                if not tls:
                    sock.sendall(b"-ERR what is this?\r\n")
                    return
                try:
                    with context.wrap_socket(sock, server_side=True) as ours:
                        ours.recv(1)
                except OSError:
                    pass  # it did not trust us, or we not it

        threads.append(threading.Thread(target=run))
        threads[-1].start()
        return int(listener.getsockname()[1])

    yield start
    for thread in threads:
        thread.join(10)


def test_nothing_is_said_of_a_server_that_is_trusted(
    serve: Serve, certificate: Certificate
) -> None:
    assert why_untrusted(f"amqps://localhost:{serve()}/v?ssl_ca_certs={certificate.file}") == ""


@pytest.mark.parametrize("option", ["ssl_ca_certs", "ssl_ca_path", "ssl_ca_data"])
def test_a_valkeys_ca_may_be_a_file_a_folder_or_a_text(
    serve: Serve, certificate: Certificate, tmp_path: Path, option: str
) -> None:
    text = certificate.file.read_text()
    hashed = subprocess.run(
        ["openssl", "x509", "-noout", "-hash", "-in", str(certificate.file)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    (tmp_path / f"{hashed}.0").write_text(text)
    values = {"ssl_ca_certs": certificate.file, "ssl_ca_path": tmp_path, "ssl_ca_data": text}

    assert (
        why_untrusted(f"valkeys://localhost:{serve()}/0?{option}={quote(str(values[option]))}")
        == ""
    )


def test_of_one_that_is_not_it_is_said_what_to_do(serve: Serve, tmp_path: Path) -> None:
    stranger = make_certificate(tmp_path, "stranger")
    url = f"valkeys://:secret@localhost:{serve()}/0?ssl_ca_certs={stranger.file}"

    with pytest.raises(ConfigurationError) as error:
        require_trusted(Settings(broker_url=None, bus_url=url, kv_urls=()))

    assert "PDTASKS_BUS_URL: the certificate of localhost:" in str(error.value)
    assert "ssl_ca_certs=/path/ca.pem" in str(error.value)
    assert "secret" not in str(error.value)


def test_a_further_bus_is_looked_at_as_the_first_one_is(serve: Serve, tmp_path: Path) -> None:
    stranger = make_certificate(tmp_path, "stranger")
    url = f"valkeys://:secret@localhost:{serve()}/0?ssl_ca_certs={stranger.file}"

    with pytest.raises(ConfigurationError, match="PDTASKS_BUS_URLS: the certificate of localhost:"):
        require_trusted(Settings(broker_url=None, bus_url=None, bus_urls=(url,), kv_urls=()))


def test_another_name_than_the_certificates_is_told(serve: Serve, certificate: Certificate) -> None:
    port = serve(address="127.0.0.2")

    why = why_untrusted(f"amqps://127.0.0.2:{port}/v?ssl_ca_certs={certificate.file}")

    assert "is not made out to 127.0.0.2" in why


def test_a_server_that_wants_a_certificate_of_ours_is_told(
    serve: Serve, certificate: Certificate
) -> None:
    url = f"amqps://localhost:{serve(wants=certificate.file)}/v?ssl_ca_certs={certificate.file}"
    ours = f"&ssl_certfile={certificate.file}&ssl_keyfile={certificate.key}"

    assert "?ssl_certfile=" in why_untrusted(url)
    port = serve(wants=certificate.file)
    assert why_untrusted(f"amqps://localhost:{port}/v?ssl_ca_certs={certificate.file}{ours}") == ""


def test_a_port_without_tls_and_a_file_that_is_none_are_told(serve: Serve, tmp_path: Path) -> None:
    assert "does not speak TLS" in why_untrusted(f"valkeys://localhost:{serve(tls=False)}/0")
    assert "cannot be used" in why_untrusted(f"amqps://h/v?ssl_ca_certs={tmp_path}/none.pem")


def test_nothing_is_said_of_one_that_is_away() -> None:
    assert why_untrusted("amqps://127.0.0.1:1/v") == ""
