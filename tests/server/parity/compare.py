"""Two servers' answers to one case, compared as `idlm parity` compares them."""

from idlm_sglang.parity.compare import Answer, differences, join, near, parsed
from tests.server.harness import Server
from tests.server.parity.cases import Case

__all__ = ["Answer", "ask", "differences", "near"]


def ask(server: Server, case: Case) -> Answer:
    """The server's answer to ``case``."""
    if not case.streamed:
        reply = server.post(case.path, case.body)
        return Answer(reply.status_code, parsed(reply.text))
    with server.post(case.path, case.body, stream=True) as reply:
        if reply.status_code != 200:
            return Answer(reply.status_code, parsed(reply.text))
        chunks = [parsed(line[6:].decode()) for line in reply.iter_lines() if line.startswith(b"data: ")]
    return Answer(200, join(case.path, chunks))
