"""The tests of this folder, with Triton interpreted on the host: see `conftest.py`."""

import pytest

from tests import beside

COMMAND = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "--durations=5", "-s", "tests/kernels")


@pytest.mark.beside(*COMMAND)
def test_the_kernels_pass_their_tests_interpreted(pytestconfig):
    result = beside.finished(pytestconfig, *COMMAND)
    print(result.stdout[-6000:])
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
