"""`idlm bench` against real servers: what it measures, what it refuses to measure, and going on behind a break."""

import json
import threading
from contextlib import contextmanager

import psutil
import pytest

from benchmarks import paired
from idlm_sglang.bench import one_batch, servers
from idlm_sglang.bench.arms import parse
from idlm_sglang.bench.load import Point
from idlm_sglang.bench.store import Store
from idlm_sglang.config import SettingError
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
    assert bench(*arms, "--concurrency", 4, "--temperature", 0, 1, "--repeats", 2, "--per-client", 2, "--one-batch", "--out", out) == 0
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


def test_static_batches_are_the_requests_of_the_load(measured):
    """Prompts, seeds and ends: each batch of 4 has as many tokens as those requests had under load, sampled ones, too."""
    store = Store(measured)
    assert store.batches.keys() == store.results.keys()
    for point, result in store.batches.items():
        load, told = store.results[point]["requests"], result["batches"]
        assert told["total_output_tokens"] == [sum(load["tokens"][i : i + 4]) for i in (0, 4)]
        assert told["input_len"] == [sum(load["prompt_tokens"][i : i + 4]) // 4 for i in (0, 4)]
        assert result["finished"] == store.results[point]["finished"] and result["finished"].get("stop")
        assert all(0 < first < whole for first, whole in zip(told["last_ttft"], told["latency"], strict=True))
        assert (result["decoding"]["tokens_per_forward"] > 1) == (point.arm == "isd")


def test_answers_end_where_the_model_ends_them(measured):
    """Not all at the length asked for: usage is read from the stream."""
    tokens = [t for r in Store(measured).results.values() for t in r["requests"]["tokens"]]
    assert min(tokens) < 48


def test_table_and_plots_are_there(measured):
    text = (measured / "report.md").read_text()
    assert "| 4   | isd   |" in text and "## T = 0" in text and "## T = 1" in text and "isd against ar, T = 1" in text and "ISD, stride 4" in text
    assert "| 1   | 4   | isd   |" in text.partition("## One batch")[2]
    for name in ("throughput.png", "speedup.png", "latency.png", "acceptance.png", "one_batch.png"):
        assert (measured / name).read_bytes().startswith(PNG) and f"![{name}]({name})" in text


@pytest.mark.parametrize("lost, words, measured_again", [(1, ["--one-batch"], ["one_batch"] * 2), (3, [], ["point"] * 2)], ids=["batches", "load"])
def test_a_broken_run_goes_on_where_it_stopped(arms, measured, tmp_path, lost, words, measured_again):
    """What broke is measured again for both arms, also without the flag that it was begun with; all else is kept as it is."""
    lines = (measured / "raw.jsonl").read_text().splitlines()
    (tmp_path / "raw.jsonl").write_text("\n".join(lines[:-lost]) + "\n" + lines[-lost][:40])
    assert bench(*arms, "--concurrency", 4, "--temperature", 0, 1, "--repeats", 2, "--per-client", 2, *words, "--out", tmp_path) == 0
    again = (tmp_path / "raw.jsonl").read_text().splitlines()
    added = [next(iter(json.loads(line))) for line in again[len(lines) - lost :]]
    assert again[: len(lines) - lost] == lines[:-lost] and len(Store(tmp_path).results) == 8
    assert [kind for kind in added if kind != "fingerprint"] == measured_again


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


@contextmanager
def aborting(server):
    """All requests are aborted, five times a second."""
    done = threading.Event()

    def abort():
        while not done.wait(0.2):
            server.post("/abort_request", {"abort_all": True})

    thread = threading.Thread(target=abort)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def test_an_error_behind_http_200_is_an_error(arms, tmp_path, capsys, isd):
    """SGLang answers a stream with 200 before it knows: here an aborted one."""
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "Count from 1 to 99.", "ignore_eos": true, "max_tokens": 2000}\n')
    with aborting(isd):
        code = bench("--arm", f"isd={isd.url}", *arms[:2], *arms[4:], "--concurrency", 1, "--temperature", 0, "--prompts", file, "--out", tmp_path / "out")
    told = capsys.readouterr().out
    assert code == 1 and "arm isd at concurrency 1" in told and "abort" in told.lower(), told


@pytest.fixture
def batch(isd, tmp_path):
    """Two requests with these fields, as one static batch."""

    def measure(**fields):
        served = servers.Served(parse(f"isd={isd.url}"), isd.url, None, {})
        asked = [{"messages": [{"role": "user", "content": "Count from 1 to 99."}], "temperature": 0.0, "max_tokens": 48, "ignore_eos": True, **fields}] * 2
        return one_batch.measure(served, Point("isd", 0.0, 2, 0), asked, str(CHECKPOINT_DIR), True, tmp_path, tmp_path / "log")

    return measure


def test_a_batch_with_an_error_is_no_figure(batch, isd):
    with pytest.raises(servers.BenchError, match="^idlm: arm isd at concurrency 2.*top_p must be") as refused:
        batch(top_p=7)
    with aborting(isd), pytest.raises(servers.BenchError, match="^idlm: arm isd at concurrency 2.*abort"):
        batch(max_tokens=2000)
    with pytest.raises(servers.BenchError, match="most of 1 batches no answer went on"):
        batch(max_tokens=1)
    assert "\n" not in str(refused.value)


def test_prompts_that_are_not_ours_are_not_sent(batch, monkeypatch):
    """What SGLang's module is about to send is compared with what it was given."""
    from sglang.benchmark import one_batch_server

    def other(url, **named):
        return one_batch_server.requests.post(url + "/generate", json={"input_ids": [[1, 2], [3, 4]], "sampling_params": {}})

    monkeypatch.setattr(one_batch_server, "run_one_case", other)
    with pytest.raises(SettingError, match="sends other prompts than it was given"):
        batch()


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


def test_bursts_in_turn_time_every_arm_and_count_other_answers(ar, isd, risd):
    body = {"temperature": 1, "max_tokens": 24}
    speeds, others = paired.compared([ar.url, isd.url, risd.url], 2, range(6), 1, body)
    assert [len(found) for found in speeds] == [6, 6, 6] and min(map(min, speeds)) > 0
    assert others[:2] == [0, 0] and others[2] > 0, "the third is another model"
