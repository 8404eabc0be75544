"""Real servers for the tests: SGLang started by its own command, spoken to over HTTP."""

import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from idlm_sglang.demo import RISD_ADAPTER_DIR, RISD_BASE_DIR
from tests.server.harness import CHECKPOINT, Server

# What a server needs to be asked for everything a request can ask for.
SERVED = ("--enable-custom-logit-processor", "--tool-call-parser", "qwen25", "--reasoning-parser", "qwen3", "--enable-response-store")


_EARLY = pytest.StashKey[dict]()
_LAST = pytest.StashKey[dict]()
_RUNNING = pytest.StashKey[dict]()
_LOGS = pytest.StashKey[tempfile.TemporaryDirectory]()
_ENOUGH = 200  # other tests, behind which a server can start unnoticed


def _asked_for(item) -> set[str]:
    """Fixtures of a test, those included that it asks for by the value of a parameter; answers stand for their server."""
    params = getattr(getattr(item, "callspec", None), "params", {}).values()
    names = {*getattr(item, "fixturenames", ()), *(value for value in params if isinstance(value, str))}
    return names | {server for answers, server in (("overlapped", "isd"), ("synchronous", "isd_sync")) if answers in names}


def _starts_its_own(item) -> bool:
    return item.path.name in _OWN and item.path.is_relative_to(Path(__file__).parent)


def pytest_collection_modifyitems(items):
    """Tests that start servers of their own come behind those of the shared ones, most of which have ended by then: all at a time are more than 24 GB hold."""
    items.sort(key=lambda item: (not _LATE.isdisjoint(_asked_for(item)), _starts_its_own(item)))


def pytest_collection_finish(session):
    """Start the shared servers, one after the other, while the tests run that need none."""
    last = {name: item for item in session.items for name in _SHARED if name in _asked_for(item)}
    session.config.stash[_LAST] = last
    others = sum("tests/server" not in str(item.path) for item in session.items)
    if others >= _ENOUGH and not session.config.option.collectonly:
        session.config.stash[_EARLY] = {}
        _start_early(session.config, set(_SHARED) - _LATE)


def pytest_runtest_setup(item):
    """The last shared servers start beside the tests that start servers of their own."""
    if _starts_its_own(item) and not _LATE & set(item.config.stash.get(_EARLY, _LATE)):
        _start_early(item.config, _LATE)


def _start_early(config, names: set[str]) -> None:
    needed = [name for name in _SHARED if name in names and name in config.stash[_LAST]]
    directory = Path(config.stash.setdefault(_LOGS, tempfile.TemporaryDirectory(prefix="idlm-servers-")).name)
    pool = ThreadPoolExecutor(1)
    config.stash[_EARLY] |= {name: pool.submit(lambda name=name: _SHARED[name](directory).started()) for name in needed}
    pool.shutdown(wait=False)


def pytest_runtest_teardown(item):
    """A server that no later test asks for ends here: each takes some 2.5 GB."""
    for name, last in item.config.stash.get(_LAST, {}).items():
        server = item.config.stash.get(_RUNNING, {}).get(name)
        if last is item and server is not None:
            server.stop()


def pytest_unconfigure(config):
    """What was started and never used ends, too."""
    for future in config.stash.get(_EARLY, {}).values():
        future.cancel()
    for future in config.stash.get(_EARLY, {}).values():
        if not future.cancelled() and future.exception() is None:
            future.result().stop()


@pytest.fixture(scope="session")
def logs(tmp_path_factory):
    return tmp_path_factory.mktemp("servers")


def _ar(logs):
    """Plain autoregressive serving of the embedded checkpoint, plugin loaded: the reference.

    Overlap is off: with it, SGLang counts tokens for penalties one step late.
    """
    return Server("ar", CHECKPOINT, logs, "--disable-overlap-schedule", *SERVED)


def _isd(logs):
    """ISD with the overlap schedule and all rows of every step, as on a GPU; requests choose their stride. SGLang poisons stale reads."""
    env = {"IDLM_MAX_STRIDE": "16", "IDLM_RAGGED_VERIFY": "off", "SGLANG_IS_IN_CI": "1"}
    return Server("isd", CHECKPOINT, logs, "--speculative-algorithm", "ISD", "--enable-metrics", *SERVED, env=env)


def _isd_rejection(logs):
    """ISD with the paper's p/q rule for sampled requests without a seed; streams carry increments, every step is logged; prompts may be embeddings.

    SGLang's own switch retracts all requests but one at every 8th forward.
    """
    env = {"IDLM_MAX_STRIDE": "8", "IDLM_SAMPLING_RULE": "rejection", "SGLANG_IS_IN_CI": "1", "SGLANG_TEST_RETRACT": "1", "SGLANG_TEST_RETRACT_INTERVAL": "8"}
    flags = ["--speculative-algorithm", "ISD", "--enable-metrics", "--incremental-streaming-output", "--decode-log-interval", "1", "--disable-radix-cache"]
    return Server("isd_rejection", CHECKPOINT, logs, *flags, env=env)


def _isd_sync(logs):
    """ISD without overlap, pages of 16, prompts in chunks of 32 whose forwards take decode steps along."""
    flags = ["--disable-overlap-schedule", "--page-size", "16", "--chunked-prefill-size", "32", "--enable-metrics", *SERVED]
    return Server("isd_sync", CHECKPOINT, logs, "--speculative-algorithm", "ISD", *flags, env={"IDLM_MAX_STRIDE": "8"})


def _isd_tight(logs):
    """ISD with overlap and mixed chunks, on a KV pool far too small for its load: requests are retracted. It chooses its stride.

    SGLang's own switch also retracts at every 40th forward, whoever has the fewest tokens: often none yet.
    """
    flags = ["--max-total-tokens", "1200", "--chunked-prefill-size", "32", "--enable-mixed-chunk", "--max-running-requests", "24"]
    # Admit as if answers were short: the pool then runs full in the middle of them.
    flags += ["--schedule-conservativeness", "0.05"]
    env = {"IDLM_STRIDE": "auto", "SGLANG_IS_IN_CI": "1", "SGLANG_TEST_RETRACT": "1", "SGLANG_TEST_RETRACT_INTERVAL": "40"}
    return Server("isd_tight", CHECKPOINT, logs, "--speculative-algorithm", "ISD", *flags, env=env)


def _risd_ar(logs):
    """The embedded AR base in SGLang's own class: the reference of R-ISD."""
    return Server("risd_ar", str(RISD_BASE_DIR), logs, "--disable-overlap-schedule")


def _risd(logs):
    """The embedded AR base with its gated adapter: prompts in chunks of 64 whose forwards take decode steps along, answers checked by the server itself."""
    env = {"IDLM_LORA": str(RISD_ADAPTER_DIR), "IDLM_MAX_STRIDE": "8", "SGLANG_IS_IN_CI": "1", "IDLM_SELFCHECK": "0.05"}
    flags = ["--enable-metrics", "--chunked-prefill-size", "64", "--disable-overlap-schedule"]
    return Server("risd", str(RISD_BASE_DIR), logs, "--speculative-algorithm", "ISD", *flags, env=env)


_SHARED = {"ar": _ar, "isd": _isd, "isd_sync": _isd_sync, "isd_rejection": _isd_rejection, "isd_tight": _isd_tight, "risd_ar": _risd_ar, "risd": _risd}
# Modules whose tests start servers of their own.
_OWN = {"test_bfloat16.py", "test_branch_triton.py", "test_bench.py", "test_mutants.py", "test_parallel.py", "test_published_config.py", "test_ragged.py", "test_selfcheck.py", "test_step_ops.py"}
# Started behind the other shared ones.
_LATE = {"risd_ar", "risd"}


def _shared(name):
    """A server for the whole session, started in the background where :func:`pytest_collection_finish` saw the need."""

    def fixture(logs, pytestconfig):
        early = pytestconfig.stash.get(_EARLY, {}).get(name)
        # A start beside everything else may have run out of time; one alone says whether the server can start.
        started = early.result() if early and early.exception() is None else _SHARED[name](logs)
        with started as server:
            pytestconfig.stash.setdefault(_RUNNING, {})[name] = server
            yield server

    fixture.__doc__ = _SHARED[name].__doc__
    return pytest.fixture(scope="session", name=name)(fixture)


ar, isd, isd_sync, isd_rejection, isd_tight, risd_ar, risd = map(_shared, _SHARED)
