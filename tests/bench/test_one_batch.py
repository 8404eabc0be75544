"""Static batches: what may be asked, who takes which turn, what the figures are, and how SGLang's module is kept to what it was given."""

import inspect
import json
import types
from dataclasses import replace

import numpy as np
import pytest
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from idlm_sglang.bench import one_batch, table
from idlm_sglang.bench.load import Point
from idlm_sglang.bench.run import order, plan
from idlm_sglang.bench.store import FILE, Store
from idlm_sglang.compat import one_batch as compat
from idlm_sglang.config import SettingError
from idlm_sglang.demo import CHECKPOINT_DIR
from tests.bench.test_options import options
from tests.bench.test_store import PLAN, POINT

ARMS = ["--arm", "a=ar", "--arm", "b=isd", "--concurrency", "1", "4", "--temperature", "0", "--repeats", "2"]


@pytest.mark.parametrize(
    "request_, named",
    [
        ({"messages": [{"role": "user", "content": "Hi"}], "tools": []}, "the request field tools"),
        ({"response_format": {"type": "json_object"}}, "the request field response_format"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]}, "the message"),
        ({"messages": [{"role": "assistant", "content": "", "tool_calls": []}]}, "the message"),
    ],
)
def test_what_a_batch_of_prompts_cannot_carry_is_refused_in_one_line(request_, named):
    with pytest.raises(SettingError, match=f"--one-batch cannot send {named}.*; allowed: ") as refused:
        one_batch.refuse([request_])
    assert "\n" not in str(refused.value)


def test_sampling_and_prompts_of_a_comparison_are_carried():
    own = {"top_p": 0.95, "top_k": 50, "stop": ["."], "max_tokens": 7, "chat_template_kwargs": {"enable_thinking": False}}
    one_batch.refuse([own, {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}], **own}])


def test_without_the_flag_the_points_are_what_they_were():
    points = plan(options(*ARMS), False)
    assert order(points, False, False) == [(point, False) for point in points]


def test_arms_take_turns_at_one_measurement_and_then_at_the_other():
    jobs = order(plan(options(*ARMS), False), False, True)
    assert [(p.arm, batches) for p, batches in jobs[:8]] == [(arm, b) for arms in ("ab", "ba") for b in (False, True) for arm in arms]
    assert len(jobs) == len(set(jobs)) == 16 and len({(p.temperature, p.concurrency, p.repeat) for p, _ in jobs[:4]}) == 1


@pytest.mark.parametrize("concurrencies", [["1"], ["1", "4"]])
def test_alone_a_server_is_started_no_oftener(concurrencies):
    points = plan(options(*ARMS, "--concurrency", *concurrencies), True)
    starts = [[p.arm for p, _ in jobs if jobs] for jobs in (order(points, True, False), order(points, True, True))]
    changes = [sum(a != b for a, b in zip(arms, arms[1:])) for arms in starts]
    assert changes[0] == changes[1] and len(starts[1]) == 2 * len(starts[0])


def test_batches_and_loads_are_continued_each_for_itself(tmp_path):
    store = Store(tmp_path)
    store.begin(PLAN)
    twin, other = replace(POINT, arm="isd"), replace(POINT, concurrency=8)
    for point in (POINT, twin):
        store.add(point, {"x": 1})
    for point in (POINT, twin, other):
        store.add_batches(point, {"x": 2})
    with (tmp_path / FILE).open("a") as file:
        file.write('{"one_batch": {"arm": "isd", "tempe')
    again = Store(tmp_path)
    again.begin(PLAN)
    again.drop_incomplete(["ar", "isd"])
    assert again.results == {POINT: {"x": 1}, twin: {"x": 1}} and again.batches == {POINT: {"x": 2}, twin: {"x": 2}}
    assert [next(iter(json.loads(line))) for line in (tmp_path / FILE).read_text().splitlines()] == ["plan", "point", "point", *["one_batch"] * 3]


def result(rng, speed=1.0, batches=8, windows=8, tpf=1.0):
    """Batches whose answers go on for 0.2 to 0.4 s behind 0.05 s to the last first token, at about 400 tokens per second; full for half of that time."""
    seconds = 0.2 + 0.2 * rng.random(batches)
    rate = 400 * speed * (1 + 0.02 * rng.standard_normal(batches))
    told = {
        "latency": (0.05 + seconds).tolist(),
        "last_ttft": [0.05] * batches,
        "input_len": [20] * batches,
        "total_output_tokens": (rate * seconds).tolist(),
        "output_throughput": rate.tolist(),
        "steady_state_output_throughput": [500.0 * speed] * windows + [None] * (batches - windows),
        "steady_state_window_s": (seconds / 2)[:windows].tolist() + [None] * (batches - windows),
    }
    return {"finished": {"stop": batches}, "decoding": {"tokens_per_forward": tpf, "queries": 1}, "batches": told}


def compared(speeds, repeats=3, **kwargs):
    rng = np.random.default_rng(0)
    return one_batch.cells({Point(arm, 0.0, 4, r): result(rng, speed, **kwargs) for r in range(repeats) for arm, speed in speeds.items()}, list(speeds))


def test_throughput_of_several_batches_is_their_tokens_over_their_time():
    """100 tokens in 1 s and 300 in 0.5 s behind the last first tokens: not the mean of 100 and 600."""
    told = {"latency": [1.2, 0.6], "last_ttft": [0.2, 0.1], "output_throughput": [100.0, 600.0]}
    assert one_batch.throughput({"batches": told}) == pytest.approx(400 / 1.5)


def test_a_slowdown_of_a_fifth_is_found():
    ar, slow = compared({"ar": 1.0, "slow": 0.8})
    assert ar.ratio is None and slow.ratio.low < 0.8 < slow.ratio.high < 1
    assert slow.steady == pytest.approx(400) and slow.full == pytest.approx(0.5) and slow.last_first == 0.05 and slow.batches == 24


def test_answers_that_waited_for_a_busy_machine_are_counted_and_are_no_figure():
    """Two of 8 batches: 64 tokens in 2 ms, as no decode step makes them."""
    one = result(np.random.default_rng(0))
    before = one_batch.throughput(one)
    one["batches"]["output_throughput"][2:4] = [64 / 0.002] * 2
    assert one_batch.throughput(one) == pytest.approx(before, rel=0.05)
    assert one_batch.cells({Point("ar", 0.0, 4, 0): one, Point("ar", 0.0, 4, 1): result(np.random.default_rng(1))}, ["ar"])[0].bursts == 2


@pytest.mark.parametrize("windows, known", [(4, True), (3, False), (0, False)])
def test_a_full_batch_that_was_rare_is_no_figure(windows, known):
    cell = compared({"ar": 1.0}, windows=windows)[0]
    assert np.isnan(cell.steady) != known


def test_the_report_has_a_section_of_them_only_where_they_were_measured():
    stored = {"arms": [{"name": name, "kind": "ar", "flags": [], "url": None} for name in ("ar", "slow")], "checkpoint": {"name": "x", "hash": "y"}, "body": {}, "sampling": {}}
    stored |= {"seed": 1, "requests": 8, "per_client": 1, "source": "z", "server_flags": []}
    fingerprints = [{"arm": "ar", "command": "c", "server": {}, "machine": {"device": "d", "processor": "p", "versions": {}, "commit": None}}]
    from tests.bench.test_summary import compared as under_load

    loads, batches = under_load({"ar": 1.0, "slow": 0.8}), compared({"ar": 1.0, "slow": 0.8})
    without, text = (table.report(loads, stored, fingerprints, [], some) for some in ((), batches))
    assert "One batch" not in without and set(without.splitlines()) <= set(text.splitlines())
    (row,) = [line for line in text.partition("## One batch")[2].splitlines() if "| slow" in line]
    assert [cell.strip() for cell in row.split("|")][1:] == ["0", "4", "slow", f"{batches[1].throughput:.0f}", "400", "50%", "50", "1.00", str(batches[1].ratio), "24", "0", ""]


def test_another_one_batch_module_is_refused_in_one_line():
    call = {"url": "u", "batch_size": 1}
    fields = dict.fromkeys(compat.FIGURES)
    compat._guard(types.SimpleNamespace(run_one_case=lambda url, batch_size, more=0: None, BenchOneCaseResult=types.SimpleNamespace(model_fields=fields)), call)
    for function, known in ((lambda url, size: None, fields), (lambda url, batch_size, new: None, fields), (lambda url, batch_size: None, {"latency": None})):
        with pytest.raises(SettingError, match="one_batch_server.*; allowed: "):
            compat._guard(types.SimpleNamespace(run_one_case=function, BenchOneCaseResult=types.SimpleNamespace(model_fields=known)), call)


def test_the_wrapping_says_why_and_when_it_goes():
    for word in ("What:", "Why:", "Guard:", "Goes when:"):
        assert word in inspect.getdoc(compat.serve_batch)


def test_a_prompt_begins_once_where_template_and_tokenizer_both_begin_it():
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT_DIR)
    plain = one_batch._prompt({"messages": [{"role": "user", "content": "Hi"}]}, tokenizer)
    first = tokenizer.convert_ids_to_tokens(0)
    tokenizer.bos_token, tokenizer.chat_template = first, "{{ bos_token }}" + tokenizer.chat_template
    assert one_batch._prompt({"messages": [{"role": "user", "content": "Hi"}]}, tokenizer) == first + plain
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{first} $A", special_tokens=[(first, 0)])
    text = one_batch._prompt({"messages": [{"role": "user", "content": "Hi"}]}, tokenizer)
    assert text == plain and tokenizer.encode(text)[:2] == [0, tokenizer.encode(plain, add_special_tokens=False)[0]]


def test_what_a_request_leaves_open_is_the_checkpoint_s_as_in_a_chat(tmp_path):
    (tmp_path / "generation_config.json").write_text(json.dumps({"top_p": 0.8, "top_k": 20, "eos_token_id": 2}))
    defaults = compat.chat_defaults(str(tmp_path), {"sampling_defaults": "model"})
    request = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 9, "seed": 5, "temperature": 1.0, "top_k": 3}
    found = compat.sampling_of_chat(request, defaults)
    assert (found["top_p"], found["top_k"], found["temperature"], found["max_new_tokens"], found["sampling_seed"]) == (0.8, 3, 1.0, 9, 5)
    assert compat.chat_defaults(str(tmp_path), {"sampling_defaults": "openai"}) == {}
