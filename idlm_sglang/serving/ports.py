"""Can a server listen on this address: asked before the model loads, and by `idlm check`. And a port for one that starts by itself."""

import errno
import random
import socket
from pathlib import Path

from idlm_sglang.config import SettingError

_LOWEST = 10_000
_OUTGOING = Path("/proc/sys/net/ipv4/ip_local_port_range")


def check_port(host: str, port: int) -> None:
    """Raise :class:`SettingError`, one line, unless a server can listen on host:port now."""
    try:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise SettingError(f"--host {host} is not known ({error.strerror}); allowed: an address of this machine") from None
    family, kind, protocol, _, address = found[0]
    with socket.socket(family, kind, protocol) as probe:
        # As the server does: a port whose last connections linger is free, one that is listened on is not.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except OSError as error:
            raise SettingError(_reason(host, port, error)) from None


def _reason(host: str, port: int, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"--port {port} is in use on {host}{_holder(port)}; allowed: a free port"
    if error.errno == errno.EADDRNOTAVAIL:
        return f"--host {host} is not an address of this machine; allowed: one of its own, or 0.0.0.0 for all"
    if error.errno in (errno.EACCES, errno.EPERM):
        return f"--port {port} needs more rights than this user has; allowed: 1024 to 65535"
    return f"--port {port} cannot be listened on at {host} ({error.strerror}); allowed: a free port"


def _holder(port: int) -> str:
    """Who listens there, as " (by name, pid 1)"; empty where this user may not see it."""
    import psutil

    try:
        for connection in psutil.net_connections(kind="tcp"):
            if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port and connection.pid:
                return f" (by {psutil.Process(connection.pid).name()}, pid {connection.pid})"
    except (OSError, psutil.Error):
        pass
    return ""


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on. Below those that the system gives to outgoing connections: one of these may be
    taken before a server, which starts for half a minute, binds it.

    Raises:
        OSError: none is left.
    """
    first = int(_OUTGOING.read_text().split()[0]) if _OUTGOING.is_file() else 32_768
    # Not seeded: two processes with one seed would ask for the same ones.
    ports = list(range(min(_LOWEST, first - 1), first))
    random.SystemRandom().shuffle(ports)
    for port in ports:
        with socket.socket() as s:
            try:
                s.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise OSError(f"no free port from {_LOWEST} to {first - 1}")
