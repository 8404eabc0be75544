"""docs/parity.md says what the tests show."""

import subprocess
import sys

from tests.server.parity.in_tree import ALGORITHMS, IN_TREE
from tests.server.parity.table import PAGE, ROOT, ROWS, proofs


def test_the_page_is_what_the_tests_say():
    # A process of its own: collecting twice in one would leave pytest's plugins confused.
    fresh = subprocess.run([sys.executable, "-m", "tests.server.parity.table"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert PAGE.read_text() == fresh, "run python -m tests.server.parity.table --write"


def test_every_row_has_a_proof_and_every_algorithm_a_cell():
    found = proofs()
    assert found.keys() == ROWS.keys() == IN_TREE.keys()
    assert all(found[key] for key in ROWS)
    assert all(set(row) == set(ALGORITHMS) for row in IN_TREE.values())
