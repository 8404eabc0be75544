"""The answers of every server to one list of cases, asked for once per session."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.server.parity.cases import cases
from tests.server.parity.compare import Answer, ask

COUNT, SEED, CLIENTS = 600, 20, 16


def answers(server, some_cases, clients=CLIENTS) -> list[Answer]:
    """The server's answers, in order; ``clients`` cases at a time share its batches."""
    with ThreadPoolExecutor(clients) as pool:
        return list(pool.map(lambda case: ask(server, case), some_cases))


@pytest.fixture(scope="session")
def mix():
    return cases(COUNT, SEED)


@pytest.fixture(scope="session")
def expected(ar, mix):
    """Plain AR's answers."""
    return answers(ar, mix)


@pytest.fixture(scope="session")
def overlapped(isd, mix):
    """ISD's answers under the overlap schedule."""
    return answers(isd, mix)


@pytest.fixture(scope="session")
def synchronous(isd_sync, mix):
    """ISD's answers without overlap, on pages of 16, prefill chunks mixed with decoding."""
    return answers(isd_sync, mix)
