"""Real servers for the tests: SGLang started by its own command, spoken to over HTTP."""

from pathlib import Path

import pytest

from idlm_sglang.demo import RISD_ADAPTER_DIR, RISD_BASE_DIR
from tests.server import fleet
from tests.server.fleet import server_fixture
from tests.server.harness import CHECKPOINT, IdlmServe, Server

# What a server needs to be asked for everything a request can ask for.
SERVED = ("--enable-custom-logit-processor", "--tool-call-parser", "qwen25", "--reasoning-parser", "qwen3", "--enable-response-store")

# Servers of many tests; those of fewer, whose memory others can have when their tests have run; and those that come behind the others.
_SHARED = ("ar", "isd", "isd_sync", "isd_rejection", "isd_tight")
_FIRST = ("isd_sync", "isd_rejection", "isd_tight")
_LATE = ("risd_ar", "risd")
# Modules whose tests start servers in their midst: last of all, beside the few servers that they ask for.
_STARTING = {"test_bench.py", "test_published_config.py"}
_ENOUGH = 200  # other tests, behind which a server can start unnoticed


def _in_its_midst(item) -> bool:
    return item.path.name in _STARTING and item.path.is_relative_to(Path(__file__).parent)


def pytest_collection_modifyitems(items):
    """Tests with a server of their own come behind those of the shared ones, most of which have ended by then, and behind one another
    where they share it: all servers at a time are more than 24 GB hold.
    """
    first: dict[str, int] = {}

    def place(item) -> tuple[bool, bool, bool, int]:
        asked = fleet.asked_for(item)
        own = asked - {*_SHARED, *_LATE}
        if own:
            group = min(first.setdefault(name, len(first)) for name in sorted(own))
        else:
            group = next((i for i, name in enumerate(_FIRST) if name in asked), len(_FIRST))
        return _in_its_midst(item), not asked.isdisjoint(_LATE), bool(own), group

    items.sort(key=place)


def pytest_collection_finish(session):
    """Start the shared servers while the tests run that need none."""
    fleet.of(session.config).plan(session.items)
    others = sum("tests/server" not in str(item.path) for item in session.items)
    if others >= _ENOUGH and not session.config.option.collectonly:
        fleet.of(session.config).begin(_SHARED)


def pytest_runtest_setup(item):
    """Servers start ahead of their tests, the shared ones first."""
    if fleet.asked_for(item):
        fleet.of(item.config).begin(_SHARED)
        fleet.of(item.config).go_on(item)


def pytest_runtest_teardown(item):
    fleet.of(item.config).end(item)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session):
    fleet.of(session.config).end_all(keep_logs=bool(session.testsfailed))


@pytest.fixture(scope="session")
def logs(tmp_path_factory):
    return tmp_path_factory.mktemp("servers")


@server_fixture
def ar(logs):
    """Plain autoregressive serving of the embedded checkpoint, plugin loaded: the reference.

    Overlap is off: with it, SGLang counts tokens for penalties one step late.
    """
    return Server("ar", CHECKPOINT, logs, "--disable-overlap-schedule", *SERVED)


@server_fixture
def isd(logs):
    """ISD with the overlap schedule and all rows of every step, as on a GPU; requests choose their stride. SGLang poisons stale reads."""
    env = {"IDLM_MAX_STRIDE": "16", "IDLM_RAGGED_VERIFY": "off", "SGLANG_IS_IN_CI": "1"}
    return Server("isd", CHECKPOINT, logs, "--speculative-algorithm", "ISD", "--enable-metrics", *SERVED, env=env)


@server_fixture
def isd_rejection(logs):
    """ISD with the paper's p/q rule for sampled requests without a seed; streams carry increments, every step is logged; prompts may be embeddings.

    SGLang's own switch retracts all requests but one at every 8th forward.
    """
    env = {"IDLM_MAX_STRIDE": "8", "IDLM_SAMPLING_RULE": "rejection", "SGLANG_IS_IN_CI": "1", "SGLANG_TEST_RETRACT": "1", "SGLANG_TEST_RETRACT_INTERVAL": "8"}
    flags = ["--speculative-algorithm", "ISD", "--enable-metrics", "--incremental-streaming-output", "--decode-log-interval", "1", "--disable-radix-cache"]
    return Server("isd_rejection", CHECKPOINT, logs, *flags, env=env)


@server_fixture
def isd_sync(logs):
    """ISD without overlap, pages of 16, prompts in chunks of 32 whose forwards take decode steps along."""
    flags = ["--disable-overlap-schedule", "--page-size", "16", "--chunked-prefill-size", "32", "--enable-metrics", *SERVED]
    return Server("isd_sync", CHECKPOINT, logs, "--speculative-algorithm", "ISD", *flags, env={"IDLM_MAX_STRIDE": "8"})


@server_fixture
def isd_tight(logs):
    """ISD with overlap and mixed chunks, on a KV pool far too small for its load: requests are retracted. It chooses its stride.

    SGLang's own switch also retracts at every 40th forward, whoever has the fewest tokens: often none yet.
    """
    flags = ["--max-total-tokens", "1200", "--chunked-prefill-size", "32", "--enable-mixed-chunk", "--max-running-requests", "24"]
    # Admit as if answers were short: the pool then runs full in the middle of them.
    flags += ["--schedule-conservativeness", "0.05"]
    env = {"IDLM_STRIDE": "auto", "SGLANG_IS_IN_CI": "1", "SGLANG_TEST_RETRACT": "1", "SGLANG_TEST_RETRACT_INTERVAL": "40"}
    return Server("isd_tight", CHECKPOINT, logs, "--speculative-algorithm", "ISD", *flags, env=env)


@server_fixture
def small_1(logs):
    """A context of 96 tokens, without a tokenizer: what it gets are token ids."""
    return _small(logs, 1)


@server_fixture
def small_64(logs):
    """The same with pages of 64; streams carry increments."""
    return _small(logs, 64, "--incremental-streaming-output")


def _small(logs, page: int, *flags: str) -> Server:
    flags = ["--context-length", "96", "--page-size", str(page), "--speculative-algorithm", "ISD", "--skip-tokenizer-init", *flags]
    return Server(f"small_{page}", CHECKPOINT, logs, *flags, env={"IDLM_STRIDE": "16"})


@server_fixture
def idlm_serve(logs):
    """What ``idlm serve`` starts, with a key. Its last test ends it."""
    return IdlmServe("idlm_serve", logs)


@server_fixture
def risd_ar(logs):
    """The embedded AR base in SGLang's own class: the reference of R-ISD."""
    return Server("risd_ar", str(RISD_BASE_DIR), logs, "--disable-overlap-schedule")


@server_fixture
def risd(logs):
    """The embedded AR base with its gated adapter: prompts in chunks of 64 whose forwards take decode steps along, answers checked by the server itself."""
    env = {"IDLM_LORA": str(RISD_ADAPTER_DIR), "IDLM_MAX_STRIDE": "8", "SGLANG_IS_IN_CI": "1", "IDLM_SELFCHECK": "0.05"}
    flags = ["--enable-metrics", "--chunked-prefill-size", "64", "--disable-overlap-schedule"]
    return Server("risd", str(RISD_BASE_DIR), logs, "--speculative-algorithm", "ISD", *flags, env=env)
