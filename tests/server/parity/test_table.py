"""docs/parity.md says what the tests show."""

import pytest

from tests import beside
from tests.server.parity.in_tree import ALGORITHMS, IN_TREE
from tests.server.parity.table import PAGE, ROWS


# A process of its own: this one has its own tests collected.
COMMAND = ("-m", "tests.server.parity.table")


@pytest.fixture(scope="module")
def fresh(pytestconfig):
    done = beside.finished(pytestconfig, *COMMAND)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.beside(*COMMAND)
def test_the_page_is_what_the_tests_say(fresh):
    assert PAGE.read_text() == fresh, "run python -m tests.server.parity.table --write"


@pytest.mark.beside(*COMMAND)
def test_every_row_has_a_proof_and_every_algorithm_a_cell(fresh):
    assert ROWS.keys() == IN_TREE.keys()
    assert all(set(row) == set(ALGORITHMS) for row in IN_TREE.values())
    for row in ROWS.values():
        (line,) = (line for line in fresh.splitlines() if line.startswith(f"| {row.name} |"))
        assert "../tests/" in line.split("|")[-2], f"no test proves {row.name}"
