"""The order of a whole run, and what goes on beside it."""

from itertools import takewhile

import pytest

from tests import beside

_WAITS = "tests/server"


def _commands(item) -> list[tuple[str, ...]]:
    return [mark.args for mark in item.iter_markers("beside")]


@pytest.hookimpl(trylast=True)  # the servers' tests are in their order by then
def pytest_collection_modifyitems(items):
    """Tests of a long command come behind the first run of the servers' tests, beside which it runs."""
    marked = [item for item in items if _commands(item)]
    rest = [item for item in items if not _commands(item)]
    before = list(takewhile(lambda item: _WAITS not in str(item.path), rest))
    beside_them = list(takewhile(lambda item: _WAITS in str(item.path), rest[len(before) :]))
    if marked and beside_them:
        here = len(before) + len(beside_them)
        items[:] = [*rest[:here], *marked, *rest[here:]]


def pytest_runtest_setup(item):
    if _WAITS in str(item.path):
        beside.begin(item.config, sorted({command for other in item.session.items for command in _commands(other)}))


def pytest_unconfigure(config):
    beside.cancel(config)
