"""The port of a server that binds it later."""

import socket

from idlm_sglang.serving import ports


def test_a_free_port_is_none_of_those_for_outgoing_connections(monkeypatch, tmp_path):
    first = int(ports._OUTGOING.read_text().split()[0]) if ports._OUTGOING.is_file() else 32_768
    assert all(port < first for port in {ports.free_port() for _ in range(20)})
    limits = tmp_path / "range"
    limits.write_text("10003\t60999\n")
    monkeypatch.setattr(ports, "_OUTGOING", limits)
    with socket.socket() as taken:
        for port in (10000, 10001, 10002):
            try:
                taken.bind(("127.0.0.1", port))
            except OSError:
                continue  # another program's
            break
        found = {ports.free_port() for _ in range(20)}
        assert found <= {10000, 10001, 10002} - {taken.getsockname()[1]}
