import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread():
    """The figures below are for one thread; the setting is given back for the tests of other folders."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
