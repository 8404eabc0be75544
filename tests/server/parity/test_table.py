"""docs/parity.md says what the tests show."""

import subprocess
import sys

import pytest

from tests.server.parity.in_tree import ALGORITHMS, IN_TREE
from tests.server.parity.table import PAGE, ROOT, ROWS


@pytest.fixture(scope="module")
def fresh():
    # A process of its own: this one has its own tests collected.
    return subprocess.run([sys.executable, "-m", "tests.server.parity.table"], cwd=ROOT, capture_output=True, text=True, check=True).stdout


def test_the_page_is_what_the_tests_say(fresh):
    assert PAGE.read_text() == fresh, "run python -m tests.server.parity.table --write"


def test_every_row_has_a_proof_and_every_algorithm_a_cell(fresh):
    assert ROWS.keys() == IN_TREE.keys()
    assert all(set(row) == set(ALGORITHMS) for row in IN_TREE.values())
    for row in ROWS.values():
        (line,) = (line for line in fresh.splitlines() if line.startswith(f"| {row.name} |"))
        assert "../tests/" in line.split("|")[-2], f"no test proves {row.name}"
