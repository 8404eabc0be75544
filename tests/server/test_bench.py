"""`idlm bench` against real servers: what it measures, what it refuses to measure, and going on behind a break."""

import json
import threading

import psutil
import pytest

from idlm_sglang.bench import servers
from idlm_sglang.bench.arms import parse
from idlm_sglang.bench.store import Store
from idlm_sglang.demo import CHECKPOINT_DIR
from idlm_sglang.serving import cli

PNG = b"\x89PNG\r\n\x1a\n"


def bench(*words):
    try:
        return cli.main(["bench", *map(str, words)])
    except SystemExit as end:
        print(end.code)
        return 1


@pytest.fixture(scope="module")
def arms(ar, isd):
    return ["--arm", f"ar={ar.url}", "--arm", f"isd={isd.url}", "--tokenizer", CHECKPOINT_DIR, "--requests", "6", "--max-tokens", "48"]


@pytest.fixture(scope="module")
def measured(arms, tmp_path_factory):
    out = tmp_path_factory.mktemp("bench")
    assert bench(*arms, "--concurrency", 4, "--temperature", 0, 1, "--repeats", 2, "--per-client", 2, "--out", out) == 0
    return out


def test_answers_are_the_same_and_figures_are_those_of_the_servers(measured):
    """Greedy and sampled: both arms were given the same seeds."""
    store = Store(measured)
    assert len(store.results) == 8
    for point, result in store.results.items():
        twin = store.results[type(point)("ar", point.temperature, point.concurrency, point.repeat)]
        assert result["requests"]["answer"] == twin["requests"]["answer"] and result["requests"]["tokens"] == twin["requests"]["tokens"]
        assert len(result["requests"]["tokens"]) == 8
        found = result["decoding"]
        if point.arm == "ar":
            assert found["tokens_per_forward"] == 1 and found["queries"] == 1 and found["proposed"] == []
        else:
            assert 1 < found["tokens_per_forward"] <= 4 and found["queries"] == 7 and 0 < found["introspective_acceptance"] <= 1
            assert all(0 < a <= p for a, p in zip(found["accepted"], found["proposed"], strict=True)) and len(found["accepted"]) == 3


def test_answers_end_where_the_model_ends_them(measured):
    """Not all at the length asked for: usage is read from the stream."""
    tokens = [t for r in Store(measured).results.values() for t in r["requests"]["tokens"]]
    assert min(tokens) < 48


def test_table_and_plots_are_there(measured):
    text = (measured / "report.md").read_text()
    assert "| 4   | isd   |" in text and "## T = 0" in text and "## T = 1" in text and "isd against ar, T = 1" in text and "ISD, stride 4" in text
    for name in ("throughput.png", "speedup.png", "latency.png", "acceptance.png"):
        assert (measured / name).read_bytes().startswith(PNG) and f"![{name}]({name})" in text


def test_a_broken_run_goes_on_where_it_stopped(arms, measured, tmp_path):
    """The broken load is measured again for both arms; all others are kept as they are."""
    lines = (measured / "raw.jsonl").read_text().splitlines()
    (tmp_path / "raw.jsonl").write_text("\n".join(lines[:-1]) + "\n" + lines[-1][:40])
    assert bench(*arms, "--concurrency", 4, "--temperature", 0, 1, "--repeats", 2, "--per-client", 2, "--out", tmp_path) == 0
    again = (tmp_path / "raw.jsonl").read_text().splitlines()
    added = [json.loads(line) for line in again[len(lines) - 1 :]]
    assert again[: len(lines) - 1] == lines[:-1] and len(Store(tmp_path).results) == 8
    assert sum("point" in row for row in added) == 2 and all("point" in row or "fingerprint" in row for row in added)


def test_an_arm_that_would_queue_is_not_measured(arms, isd, tmp_path, monkeypatch, capsys):
    limit = isd.info()["internal_states"][0]["effective_max_running_requests_per_dp"]
    assert bench(*arms, "--concurrency", limit + 1, "--out", tmp_path) == 1
    assert f"decodes at most {limit} requests at a time, below the concurrency {limit + 1}" in capsys.readouterr().out
    assert not Store(tmp_path).results


def test_errors_are_never_figures(arms, tmp_path, capsys):
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "Hello", "top_p": 7}\n')
    assert bench(*arms, "--concurrency", 1, "--prompts", file, "--out", tmp_path / "out") == 1
    told = capsys.readouterr().out
    assert "arm ar at concurrency 1" in told and "4 of 4 answers are errors" in told and "top_p" in told and told.count("\n") == 1
    assert not Store(tmp_path / "out").results


def test_an_error_behind_http_200_is_an_error(arms, tmp_path, capsys, isd):
    """SGLang answers a stream with 200 before it knows: here an aborted one."""
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "Count from 1 to 99.", "ignore_eos": true, "max_tokens": 2000}\n')
    done = threading.Event()

    def abort():
        while not done.wait(0.2):
            isd.post("/abort_request", {"abort_all": True})

    thread = threading.Thread(target=abort)
    thread.start()
    try:
        code = bench("--arm", f"isd={isd.url}", *arms[:2], *arms[4:], "--concurrency", 1, "--temperature", 0, "--prompts", file, "--out", tmp_path / "out")
    finally:
        done.set()
        thread.join()
    told = capsys.readouterr().out
    assert code == 1 and "arm isd at concurrency 1" in told and "abort" in told.lower(), told


def test_a_stock_arm_is_served_by_sglang_s_own_class_and_ends_with_the_comparison(tmp_path):
    with servers.Servers(CHECKPOINT_DIR, True, ("--enable-metrics", "--sleep-on-idle"), tmp_path, tmp_path, 240, True) as started:
        stock = started.served(parse("stock"))
        info = stock.get("/server_info")
        assert info["speculative_algorithm"] is None and stock.running_limit() > 0
        # Other servers of the session may be starting at this moment.
        (own,) = [child for child in psutil.Process().children() if str(tmp_path / "stock-checkpoint") in child.cmdline()]
        children = [own, *own.children(recursive=True)]
        assert len(children) > 2
    assert not [child for child in psutil.wait_procs(children, timeout=10)[1] if child.status() != psutil.STATUS_ZOMBIE]
    assert "type=Qwen3ForCausalLM" in (tmp_path / "stock.log").read_text()


def test_an_arm_that_does_not_start_ends_the_comparison_with_its_reason(tmp_path):
    with servers.Servers(CHECKPOINT_DIR, True, (), tmp_path, tmp_path, 120, False) as started, pytest.raises(servers.BenchError, match="arm a ended .*page-size"):
        started.start(parse("a=isd:4 --page-size 7"))
