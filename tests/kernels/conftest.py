"""The kernels run compiled where a GPU is, and interpreted on the host elsewhere.

Triton decides that when it is first imported, and other tests import it. So without a GPU the tests of this folder run in a process of their own
(`test_interpreted.py` starts it); in any other process they are left out.
"""

import os

import pytest
import torch

# Attention of SGLang's is compared with its definition in float32, not in TF32. Triton reads it when it compiles.
os.environ.setdefault("TRITON_F32_DEFAULT", "ieee")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
STARTER = "test_interpreted.py"

if torch.cuda.is_available() or INTERPRETED:
    collect_ignore = [STARTER]
else:
    collect_ignore = [name for name in os.listdir(os.path.dirname(__file__)) if name.startswith("test_") and name != STARTER]


@pytest.fixture(scope="session")
def device() -> str:
    return "cpu" if INTERPRETED else "cuda"


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def pytest_configure(config):
    # Rows of -inf, on purpose; on a GPU the same operations are silent.
    config.addinivalue_line("filterwarnings", "ignore::RuntimeWarning:triton.runtime.interpreter")
