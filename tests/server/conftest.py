"""Real servers for the tests: SGLang started by its own command, spoken to over HTTP."""

import pytest

from tests.server.harness import CHECKPOINT, Server

# What a server needs to be asked for everything a request can ask for.
SERVED = ("--enable-custom-logit-processor", "--tool-call-parser", "qwen25", "--reasoning-parser", "qwen3", "--enable-response-store")


@pytest.fixture(scope="session")
def logs(tmp_path_factory):
    return tmp_path_factory.mktemp("servers")


@pytest.fixture(scope="session")
def ar(logs):
    """Plain autoregressive serving of the embedded checkpoint, plugin loaded: the reference.

    Overlap is off: with it, SGLang counts tokens for penalties one step late.
    """
    with Server("ar", CHECKPOINT, logs, "--disable-overlap-schedule", *SERVED) as server:
        yield server


@pytest.fixture(scope="session")
def isd(logs):
    """ISD with the overlap schedule; requests choose their stride. SGLang poisons stale reads."""
    env = {"IDLM_MAX_STRIDE": "16", "SGLANG_IS_IN_CI": "1"}
    with Server("isd", CHECKPOINT, logs, "--speculative-algorithm", "ISD", "--enable-metrics", *SERVED, env=env) as server:
        yield server


@pytest.fixture(scope="session")
def isd_rejection(logs):
    """ISD with the paper's p/q rule for sampled requests without a seed; streams carry increments, every step is logged."""
    env = {"IDLM_MAX_STRIDE": "8", "IDLM_SAMPLING_RULE": "rejection", "SGLANG_IS_IN_CI": "1"}
    flags = ["--speculative-algorithm", "ISD", "--enable-metrics", "--incremental-streaming-output", "--decode-log-interval", "1"]
    with Server("isd_rejection", CHECKPOINT, logs, *flags, env=env) as server:
        yield server


@pytest.fixture(scope="session")
def isd_sync(logs):
    """ISD without overlap, pages of 16, chunked prefill of 32 mixed with decoding."""
    flags = ["--disable-overlap-schedule", "--page-size", "16", "--chunked-prefill-size", "32", "--enable-mixed-chunk", *SERVED]
    with Server("isd_sync", CHECKPOINT, logs, "--speculative-algorithm", "ISD", *flags, env={"IDLM_MAX_STRIDE": "8"}) as server:
        yield server


@pytest.fixture(scope="session")
def isd_tight(logs):
    """ISD with overlap and mixed chunks, on a KV pool far too small for its load: requests are retracted."""
    flags = ["--max-total-tokens", "1200", "--chunked-prefill-size", "32", "--enable-mixed-chunk", "--max-running-requests", "24"]
    # Admit as if answers were short: the pool then runs full in the middle of them.
    flags += ["--schedule-conservativeness", "0.05"]
    env = {"IDLM_MAX_STRIDE": "8", "SGLANG_IS_IN_CI": "1"}
    with Server("isd_tight", CHECKPOINT, logs, "--speculative-algorithm", "ISD", *flags, env=env) as server:
        yield server
