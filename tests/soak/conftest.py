"""What runs for minutes: `make soak`. Without its switch everything here is skipped."""

import os

import pytest

from tests.soak.served import number

FULL_REQUESTS = 20_000


def pytest_collection_modifyitems(items):
    if os.environ.get("IDLM_SOAK") == "1":
        return
    for item in items:
        if "tests/soak" in str(item.path):
            item.add_marker(pytest.mark.skip(reason="takes minutes: make soak"))


@pytest.fixture(scope="session")
def soak_requests() -> int:
    return number("SOAK_REQUESTS", FULL_REQUESTS)


@pytest.fixture(scope="session")
def soak_logs(tmp_path_factory):
    return tmp_path_factory.mktemp("soak")
