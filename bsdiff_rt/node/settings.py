"""What a DICOM node was asked for: addresses, permissions, limits and TLS. Needs neither torch nor pynetdicom."""

from __future__ import annotations

import re
import socket
import ssl
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from bsdiff_rt.errors import SettingsError
from bsdiff_rt.node.rules import Rules

_PACKAGES = {"pynetdicom": "pynetdicom", "prometheus_client": "prometheus-client"}
_AE_TITLE = r"[A-Za-z0-9_.#+\- ]{1,16}"  # PS3.5 6.2, AE, without what a shell or a log line would trip over
_TLS = "/tls"
_HANDSHAKE_S = 60.0
GB = 10**9


@dataclass(frozen=True)
class Destination:
    """A DICOM node that results are sent to.

    Attributes:
        aet: its application entity title.
        host: name or address.
        port: TCP port.
        tls: whether it is spoken to through TLS.
    """

    aet: str
    host: str
    port: int
    tls: bool = False

    def __str__(self) -> str:
        """Return the text that `parse_destination` takes."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.aet}@{host}:{self.port}{_TLS if self.tls else ''}"


@dataclass(frozen=True)
class Sender:
    """A DICOM node that may send X-rays: its application entity title, and its IP address if that matters."""

    aet: str
    address: str | None = None


class _ServerContext(ssl.SSLContext):
    """Leaves the handshake to the thread of each connection. A client that is silent would hold up all others."""

    def wrap_socket(self, sock: socket.socket, *arguments: Any, **options: Any) -> ssl.SSLSocket:
        """Return the socket with TLS, whose handshake takes place when it is first read."""
        sock.settimeout(_HANDSHAKE_S)
        return super().wrap_socket(sock, *arguments, **options | {"do_handshake_on_connect": False})


@dataclass(frozen=True)
class Tls:
    """Files of TLS, in PEM format.

    Attributes:
        certificate: certificate of this node, with the chain up to the authority.
        key: private key of the certificate.
        authority: certificates of the authorities that the other side's certificate must come from.
    """

    certificate: Path
    key: Path
    authority: Path

    def make_context(self, *, server: bool) -> ssl.SSLContext:
        """Return a context that asks the other side for a certificate, as a server and as a client.

        Raises:
            SettingsError: a file cannot be used.
        """
        try:
            context = _ServerContext(ssl.PROTOCOL_TLS_SERVER) if server else ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            context.load_verify_locations(self.authority)
            context.load_cert_chain(self.certificate, self.key, password=_refuse_password)
        except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
            reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or type(error).__name__
            raise SettingsError(
                f"{self.certificate}, {self.key}, {self.authority}: certificate, key and authorities cannot be used "
                f"({reason}). Give files in PEM format, and a key without a password.",
                setting="tls_cert",
            ) from error
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.verify_mode = ssl.CERT_REQUIRED
        return context


@dataclass(frozen=True, kw_only=True)
class NodeSettings:
    """What `serve` was asked for, without the model's settings.

    Attributes:
        folder: the node's own folder, with its journal, received X-rays and results.
        destinations: where results are sent.
        aet: application entity title of this node, for receiving and for sending.
        host: address that X-rays are received at.
        port: TCP port of it; 0 for any free one.
        senders: who may send; empty for everybody.
        associations: how many senders may be connected at once.
        pdu_bytes: largest PDU that is accepted; 0 for no limit.
        quota_bytes: how much of the disk X-rays and results may take.
        keep_days: how long files of finished objects are kept.
        http_port: port of the status page on 127.0.0.1; 0 for any free one, None for no page.
        tls: files of TLS; None to receive without it.
        rules: which X-rays are processed.
    """

    folder: Path
    destinations: tuple[Destination, ...]
    aet: str = "BSDIFF"
    host: str = "127.0.0.1"
    port: int = 11112
    senders: tuple[Sender, ...] = ()
    associations: int = 10
    pdu_bytes: int = 131072
    quota_bytes: int = 20 * GB
    keep_days: float = 1.0
    http_port: int | None = 8080
    tls: Tls | None = None
    rules: Rules = Rules()  # noqa: RUF009  # frozen

    @property
    def received(self) -> Path:
        """Return the folder of X-rays as they were received."""
        return self.folder / "received"

    @property
    def results(self) -> Path:
        """Return the folder of results."""
        return self.folder / "results"

    def check(self) -> None:
        """Check what a single value does not show.

        Raises:
            SettingsError: the settings do not fit together, or a value cannot be used.
        """
        check_destinations(self.destinations, self.aet, self.tls)
        if not self.senders and not is_loopback(self.host):
            raise SettingsError(
                f"{self.host} can be reached from other machines. Name who may send, as AET or AET@address.",
                setting="allow",
            )


def check_destinations(destinations: Sequence[Destination], aet: str, tls: Tls | None) -> None:
    """Check where results are sent.

    Args:
        destinations: where.
        aet: application entity title of the sender.
        tls: its files of TLS.

    Raises:
        SettingsError: there is no destination, one is named twice, or one wants TLS and there is none.
    """
    check_aet(aet, "aet")
    if not destinations:
        raise SettingsError("name at least one node that results are sent to, as AET@host:port.", setting="to")
    if len(set(destinations)) < len(destinations):
        raise SettingsError("a destination is named twice. Name each once.", setting="to")
    if tls is None and any(destination.tls for destination in destinations):
        raise SettingsError("a destination wants TLS. Give certificate, key and authorities.", setting="tls_cert")


def parse_destination(text: str, setting: str = "to") -> Destination:
    """Return the destination that `AET@host:port` or `AET@host:port/tls` names, given as `setting`.

    Raises:
        SettingsError: the text has another form.
    """
    found = re.fullmatch(rf"([^@]+)@(\[[0-9a-fA-F:.]+\]|[^\s@:/\[\]]+):(\d{{1,9}})({_TLS})?", text)
    if not found:
        raise SettingsError(
            f"{text!r} is not AET@host:port, such as PACS@10.0.0.5:104. Append {_TLS} for TLS.", setting=setting
        )
    if not 0 < int(found[3]) < 65536:
        raise SettingsError(f"{text!r}: {found[3]} is no TCP port. Use 1 to 65535.", setting=setting)
    return Destination(check_aet(found[1], setting), found[2].strip("[]"), int(found[3]), found[4] is not None)


def parse_sender(text: str) -> Sender:
    """Return the sender that `AET` or `AET@address` names.

    Raises:
        SettingsError: the text has another form.
    """
    aet, at, address = text.partition("@")
    try:
        return Sender(check_aet(aet, "allow"), str(ip_address(address.strip("[]"))) if at else None)
    except ValueError:
        raise SettingsError(
            f"{text!r} is not AET or AET@address with an IP address, such as XRAY1@10.0.0.7.", setting="allow"
        ) from None


def parse_listen(text: str) -> tuple[str, int]:
    """Return address and port of `ADDRESS:PORT`.

    Raises:
        SettingsError: the text has another form.
    """
    host, _, port = text.rpartition(":")
    try:
        address = str(ip_address(host.strip("[]")))
    except ValueError:
        address = ""
    if not address or not re.fullmatch(r"\d{1,5}", port) or int(port) > 65535:
        raise SettingsError(
            f"{text!r} is not ADDRESS:PORT with an IP address, such as 0.0.0.0:11112.", setting="listen"
        )
    return address, int(port)


def make_tls(certificate: Path | None, key: Path | None, authority: Path | None) -> Tls | None:
    """Return the files of TLS, or None if none is given.

    Raises:
        SettingsError: some are given and some not.
    """
    if certificate is None and key is None and authority is None:
        return None
    if certificate is None or key is None or authority is None:
        raise SettingsError("TLS needs three files: certificate, private key and authorities.", setting="tls_cert")
    return Tls(certificate, key, authority)


def check_aet(aet: str, setting: str) -> str:
    """Return an application entity title as it is.

    Raises:
        SettingsError: it is not one.
    """
    if not re.fullmatch(_AE_TITLE, aet) or aet != aet.strip():
        raise SettingsError(
            f"{aet!r} is not an AE title: 1 to 16 letters, digits, spaces or _ . # + - without spaces around them.",
            setting=setting,
        )
    return aet


def is_loopback(host: str) -> bool:
    """Return whether only this machine can reach an IP address."""
    return ip_address(host).is_loopback


def check_packages() -> None:
    """Check that the packages of the extra `serve` are installed.

    Raises:
        SettingsError: one is missing.
    """
    for module, name in _PACKAGES.items():
        if find_spec(module) is None:
            raise SettingsError(f"the package {name} is not installed. Run: pip install 'bsdiff-rt[serve]'")


_refuse_password = partial(str)  # an empty password, instead of a question on the terminal
