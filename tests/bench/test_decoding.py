"""Counters to figures: of the point alone, under the paper's definitions."""

import pytest

from idlm_sglang.bench.decoding import Counts, decoding


def scrape(verify, cold, tokens, accepted, proposed, rank="0", salvage=0):
    kinds = {"verify": verify, "salvage": salvage, "cold": cold}
    lines = ["# TYPE idlm:rounds counter"] + [f'idlm:rounds_total{{kind="{kind}",dp_rank="{rank}"}} {n}' for kind, n in kinds.items()]
    lines += ["# TYPE idlm:tokens_committed counter", f'idlm:tokens_committed_total{{dp_rank="{rank}"}} {tokens}']
    for name, values in (("accepted", accepted), ("proposed", proposed)):
        lines += [f"# TYPE idlm:drafts_{name} counter"] + [f'idlm:drafts_{name}_total{{dp_rank="{rank}",position="{i}"}} {v}' for i, v in enumerate(values, 1)]
    lines += ["# TYPE idlm:introspective_acceptance_sum counter", "idlm:introspective_acceptance_sum_total 45.0"]
    lines += ["# TYPE idlm:introspective_acceptance_count counter", "idlm:introspective_acceptance_count_total 50.0"]
    return "\n".join(lines) + "\n"


def test_what_came_before_the_point_does_not_count():
    before, behind = Counts(scrape(100, 0, 100, [0, 0, 0], [100, 100, 100])), Counts(scrape(180, 20, 400, [76, 70, 60], [180, 180, 180]))
    found = decoding(behind.since(before), 30, 4, "ISD", 7)
    assert found.tokens_per_forward == 300 / 100 and found.queries == 7 and found.efficiency == pytest.approx(9 / 7)
    assert found.accepted == (76, 70, 60) and found.proposed == (80, 80, 80) and found.cold == 0.2


def test_rounds_with_survivors_are_forwards_too():
    found = decoding(Counts(scrape(80, 10, 300, [76], [80], salvage=10)), 30, 2, "ISD", 3)
    assert found.tokens_per_forward == 300 / 100 and found.cold == 0.1 and found.accepted == (76,)


def test_ranks_are_added_up():
    text = scrape(10, 0, 30, [9], [10]) + scrape(30, 10, 70, [20], [30], rank="1").replace("# TYPE", "# HELP")
    found = decoding(Counts(text), 10, 2, "ISD", 3)
    assert found.tokens_per_forward == 100 / 50 and found.accepted == (29,)


def test_where_the_stride_changed_the_rows_of_a_round_are_a_mean_and_positions_those_that_were_used():
    def strided(three, six, stride):
        steps = ["# TYPE idlm:steps counter", f'idlm:steps_total{{stride="3"}} {three}', f'idlm:steps_total{{stride="6"}} {six}', 'idlm:steps_total{stride="8"} 5']
        return "\n".join([*steps, "# TYPE idlm:stride gauge", f"idlm:stride {stride}"]) + "\n"

    before = Counts(scrape(0, 0, 0, [0] * 7, [0] * 7) + strided(10, 10, 8))
    behind = Counts(scrape(80, 20, 300, [70] * 7, [80] * 7) + strided(20, 40, 3))
    found = decoding(behind.since(before), 30, 3, "ISD", 15)
    assert found.queries == (10 * 5 + 30 * 11) / 40 and len(found.proposed) == 5


def test_ar_is_one_token_per_forward_by_definition():
    assert decoding(Counts(), 10, None, None, None).tokens_per_forward == 1.0


def test_another_algorithm_is_read_from_sglang_s_counters_without_the_prefill_s_tokens_or_unknown():
    text = "# TYPE sglang:spec_verify_calls counter\nsglang:spec_verify_calls_total 50\n# TYPE sglang:generation_tokens counter\nsglang:generation_tokens_total 150\n"
    found = decoding(Counts(text), 25, None, "EAGLE3", 4)
    assert found.tokens_per_forward == 125 / 50 and found.efficiency == 2.5**2 / 4
    assert decoding(Counts(), 25, None, "EAGLE3", 4) is None and decoding(Counts(), 25, 4, "ISD", 7) is None
    assert decoding(Counts(), 25, None, "LowConfidence", None) is None


def test_counters_that_went_back_tell_nothing():
    before, behind = Counts(scrape(100, 0, 100, [0], [100])), Counts(scrape(10, 0, 30, [9], [10]))
    assert decoding(behind.since(before), 10, 2, "ISD", 3) is None
