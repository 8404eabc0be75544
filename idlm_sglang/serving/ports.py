"""Can a server listen on this address: asked before the model loads, and by `idlm check`."""

import errno
import socket

from idlm_sglang.config import SettingError


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
