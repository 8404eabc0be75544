"""The servers of the tests, each started in the background before a test needs it and ended behind the last that does.

A start is mostly imports, some of it on one core alone: two at a time, beside other tests, cost a run less.
"""

import shutil
import tempfile
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Callable, Iterable

import psutil
import pytest

from tests.server.harness import Server

_MAKERS: dict[str, Callable[[Path], Server]] = {}
_AT_A_TIME = 2  # servers that start
_AHEAD = 4  # servers that start or wait for their tests
_EACH = 3 << 30  # bytes of memory that a server takes, about
_ROOM = 3 << 30  # bytes that are left free where servers are begun before their tests
_FLEET = pytest.StashKey["Fleet"]()


def server_fixture(make: Callable[[Path], Server], name: str | None = None):
    """A session's fixture of a server: decorates the function that makes it, which gets a directory for its log."""
    name = name or make.__name__
    assert name not in _MAKERS, name
    _MAKERS[name] = make

    def fixture(logs, pytestconfig):
        with of(pytestconfig).taken(name, logs) as server:
            yield server

    fixture.__doc__ = make.__doc__
    return pytest.fixture(scope="session", name=name)(fixture)


def of(config: pytest.Config) -> "Fleet":
    if _FLEET not in config.stash:
        config.stash[_FLEET] = Fleet()
    return config.stash[_FLEET]


def asked_for(item) -> set[str]:
    """Servers of a test, those included that it asks for by the value of a parameter; answers stand for their server."""
    params = getattr(getattr(item, "callspec", None), "params", {}).values()
    names = {*getattr(item, "fixturenames", ()), *(value for value in params if isinstance(value, str))}
    names |= {server for answers, server in (("overlapped", "isd"), ("synchronous", "isd_sync")) if answers in names}
    module, everyones = item.module.__name__, f"{__package__}.conftest"
    seen = {module, everyones} if module.startswith(__package__) else set()
    return {name for name in names & set(_MAKERS) if _MAKERS[name].__module__ in seen}


class Fleet:
    """Which servers are needed, begun and running, in one run of the tests."""

    def __init__(self):
        self._needs: list[tuple[object, set[str]]] = []
        self._last: dict[str, object] = {}
        self._begun: dict[str, Future] = {}
        self._taken: set[str] = set()
        self._over: set[str] = set()
        self._made: list[tuple[str, Server]] = []
        self._place = 0
        self._directory = Path(tempfile.mkdtemp(prefix="idlm-servers-"))
        self._pool = ThreadPoolExecutor(_AT_A_TIME)

    def plan(self, items: list) -> None:
        """The tests in their order."""
        self._needs = [(item, asked_for(item)) for item in items]
        self._last = {name: item for item, names in self._needs for name in names}

    def is_last(self, name: str, item) -> bool:
        """Whether no later test asks for the server."""
        return self._last[name] is item

    def begin(self, names: Iterable[str]) -> None:
        """Start servers that some test needs, in this order, behind those that were begun before."""
        for name in names:
            if name in self._last and name not in {*self._begun, *self._taken}:
                self._begun[name] = self._pool.submit(self._start, name, self._directory)

    def go_on(self, item) -> None:
        """This test is next: begin its servers, and the next ones of later tests as long as few wait for theirs and there is room."""
        while self._needs[self._place][0] is not item:
            self._place += 1
        here = self._needs[self._place][1]
        self.begin(sorted(here))
        starting = sum(not future.done() for future in self._begun.values())
        room = min(
            _AHEAD - len(set(self._begun) - self._taken - self._over - here),
            (psutil.virtual_memory().available - _ROOM) // _EACH - starting,  # those have not taken theirs
        )
        later = dict.fromkeys(name for _, names in self._needs[self._place :] for name in sorted(names))
        self.begin([name for name in later if name not in {*self._begun, *self._taken}][: max(room, 0)])

    @contextmanager
    def taken(self, name: str, logs: Path):
        self._taken.add(name)
        begun = self._begun.get(name)
        # A start beside everything else may have run out of time; one alone says whether the server can start.
        with begun.result() if begun and begun.exception() is None else self._start(name, logs) as server:
            yield server

    def _start(self, name: str, logs: Path) -> Server:
        server = _MAKERS[name](logs)
        self._made.append((name, server))
        return server.started()

    def end(self, item) -> None:
        """Behind this test: servers that no later one asks for, taken or not."""
        over = {name for name, last in self._last.items() if last is item}
        self._over |= over
        for name in over & set(self._begun):
            self._begun[name].cancel()
        self._stop(over)

    def end_all(self, keep_logs: bool) -> None:
        """What was begun and never used ends, too."""
        for future in self._begun.values():
            future.cancel()
        self._stop(set(_MAKERS))  # one that is just starting gives up
        self._pool.shutdown(wait=True)
        self._stop(set(_MAKERS))
        if keep_logs:
            print(f"\nlogs of the servers: {self._directory}")
        else:
            shutil.rmtree(self._directory, ignore_errors=True)

    def _stop(self, names: set[str]) -> None:
        for name, server in self._made:
            if name in names and server.process is not None:
                server.stop()
