"""What `idlm serve` prints: the choices, a request that a shell takes as it stands, the progress of a start."""

import io
import json
import shlex
import subprocess

import pytest

from idlm_sglang.serving import options, summary
from idlm_sglang.serving.progress import Display, LogReader

RESOLVED = {
    "architecture": "SDARForCausalLM, served as IDLMForCausalLM",
    "dtype": "bfloat16",
    "served_as": "it's a model",
    "mask": [151669, "config"],
    "algorithm": "ISD",
    "stride": 4,
    "auto": False,
    "max_stride": 8,
    "rule": "coupled",
    "lora": None,
    "concurrency": 64,
    "device": "NVIDIA H200, 140 GiB",
    "platform": "CudaSRTPlatform",
    "attention": "triton",
    "replicas": 1,
    "decode_graphs": "off",
    "step_ops": "torch",
    "tp": 2,
    "dp": 1,
    "metrics": True,
    "live": True,
    "host": "0.0.0.0",
    "port": 31200,
    "tls": False,
    "key": False,
}


def a_launch(**changes) -> options.Launch:
    given = {"model": "m", "argv": (), "environ": {}, "typed": {}, "host": "0.0.0.0", "port": 31200, "verbose": True, "log_file": None}
    return options.Launch(**given | changes)


@pytest.mark.parametrize("changes", [{}, {"key": True}, {"tls": True}])
def test_the_curl_line_is_valid_shell_and_its_body_valid_json(changes):
    line = summary.curl(a_launch(), RESOLVED | changes)
    assert subprocess.run(["bash", "-n", "-c", line]).returncode == 0
    words = shlex.split(line)
    body = json.loads(words[words.index("-d") + 1])
    assert body["model"] == "it's a model" and body["messages"][0]["role"] == "user"
    assert f"{'https' if changes.get('tls') else 'http'}://127.0.0.1:31200/v1/chat/completions" in words
    assert ("Authorization: Bearer $API_KEY" in words) == bool(changes.get("key"))


def test_the_summary_names_every_choice():
    text = summary.text(a_launch(), RESOLVED)
    for part in (
        "m: SDARForCausalLM, served as IDLMForCausalLM, bfloat16",
        "stride 4: up to 4 tokens per forward of 7 rows, requests may ask for up to 8; sampling rule coupled",
        "token 151669, from the config",
        "64 requests\n",
        "decode graphs off, step ops torch: AR, whose graphs are on, may be faster (docs/gpu-validation.md; --decode-graphs on)\n",
        "NVIDIA H200, 140 GiB, triton attention, TP 2, platform CudaSRTPlatform",
        "http://127.0.0.1:31200/metrics",
        "http://127.0.0.1:31200/idlm\n",
        "http://127.0.0.1:31200/v1\n",
        "curl ",
    ):
        assert part in text


def test_the_summary_of_a_server_that_chooses_its_stride_says_between_what():
    assert "stride auto: 1 to 8 tokens per forward, whichever is fastest; sampling rule coupled" in summary.text(a_launch(), RESOLVED | {"auto": True})


def test_the_summary_of_replicas_says_what_each_serves():
    assert "64 requests per replica\n" in summary.text(a_launch(), RESOLVED | {"dp": 2, "replicas": 2})
    assert "decode graphs on, step ops triton\n" in summary.text(a_launch(), RESOLVED | {"decode_graphs": "on", "step_ops": "triton"})
    assert "decode graphs" not in summary.text(a_launch(), RESOLVED | {"decode_graphs": None}), "on a CPU"


def test_the_summary_of_an_ar_server_speaks_of_no_stride():
    resolved = RESOLVED | {"algorithm": None, "stride": None, "max_stride": None, "rule": None, "mask": None, "decode_graphs": None, "metrics": False, "live": False}
    text = summary.text(a_launch(), resolved)
    assert "autoregressive" in text and "stride" not in text and "off (--no-metrics)" in text and "/idlm" not in text


LOG = (
    (b"[2026-01-01 00:00:00] server_args={'model_path': 'm'}\n", "starting the worker processes"),
    (b"[2026-01-01 00:00:01] Load weight begin. avail mem=19.93 GB\n", "loading the weights"),
    (b"Multi-thread loading shards:  50% Completed | 1/2\rMulti-thread loading shards: 1", "loading the weights 50%"),
    (b"00% Completed | 2/2\n", "loading the weights 100%"),
    (b"[2026-01-01 00:00:02] KV Cache is allocated. #tokens: 65536\n", "preparing to decode"),
    (b"[2026-01-01 00:00:03] something else\n", "preparing to decode"),
    (b"[2026-01-01 00:00:04] INFO:     Application startup complete.\n", "warming up with a first request"),
)


def test_the_stage_follows_the_log_whatever_the_pieces():
    reader = LogReader()
    assert reader.stage == "loading SGLang"
    for piece, stage in LOG:
        reader.feed(piece)
        assert reader.stage == stage
    byte_by_byte = LogReader()
    for value in b"".join(piece for piece, _ in LOG):
        byte_by_byte.feed(bytes([value]))
    assert byte_by_byte.stage == LOG[-1][1]


def test_a_server_that_answers_has_no_stages_any_more_and_still_a_reason_for_its_end():
    reader = LogReader()
    reader.feed(b"[t] Load weight begin.\n")
    reader.started()
    reader.feed(b"[t] KV Cache is allocated.\nRuntimeError: no")
    reader.feed(b" memory left\n[t] bye\n")
    assert reader.stage == "loading the weights" and reader.failure() == "RuntimeError: no memory left"


@pytest.mark.parametrize(
    ("log", "reason"),
    [
        ("[t] fine\nidlm: --page-size 3 is bad; allowed: 1\n[t] idlm: MASK token 3\nValueError: later\n", "idlm: --page-size 3 is bad; allowed: 1"),
        ("Traceback (most recent call last):\n  File x\ntorch.OutOfMemoryError: full\n[t] SIGQUIT received.\n", "torch.OutOfMemoryError: full"),
        ("[2026-01-01 00:00:00] an Error of some kind\n[t] bye\n", "an Error of some kind"),
        (
            "[t] Ignore import error when loading m: x\n[t] Subprocess scheduler_0 (pid=5) crashed with exit code -9.\n[t] SIGQUIT received.\n",
            "Subprocess scheduler_0 (pid=5) crashed with exit code -9.",
        ),
        ("[t] Ignore import error when loading m: x\nall is well\n", None),
        ("ValueError: cut off", "ValueError: cut off"),
    ],
)
def test_the_line_that_explains_a_failure_is_found(log, reason):
    reader = LogReader()
    reader.feed(log.encode())
    assert reader.failure() == reason


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_is_one_line_on_a_terminal_and_a_line_every_ten_seconds_elsewhere():
    now = [0.0]
    for out in (Terminal(), io.StringIO()):
        now[0] = 0.0
        display = Display(out, clock=lambda: now[0])
        for second in range(31):
            now[0] = float(second)
            display.update("loading the weights" if second < 15 else "warming up")
        display.say("idlm: ready")
        text = out.getvalue()
        assert text.endswith("idlm: ready\n")
        if out.isatty():
            assert text.count("\n") == 1 and "\r    30 s  warming up" in text
        else:
            assert text.splitlines() == [
                "idlm: 10 s, loading the weights",
                "idlm: 20 s, warming up",
                "idlm: 30 s, warming up",
                "idlm: ready",
            ]
