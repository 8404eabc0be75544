"""Steps whose requests bring different numbers of rows: where they are served, and which rows they are."""

from types import SimpleNamespace

import pytest
import torch
from sglang.srt.speculative.ragged_verify import RaggedVerifyLayout

from idlm_sglang.config import AUTO, OFF, ON, REJECTION, TORCH, TRITON, Settings, SettingError
from idlm_sglang.engine import ragged
from idlm_sglang.engine.lora import Gate
from idlm_sglang.engine.ragged import RaggedRows, resolve_ragged, trimmed
from idlm_sglang.engine.requests import STRIDED, BatchRows, RequestPlan, stop_tokens
from idlm_sglang.engine.state import Carried
from idlm_sglang.isd import BRANCH
from idlm_sglang.isd.layout import mask_rows
from idlm_sglang.isd.trim import Record


@pytest.mark.parametrize(
    "backend, graphs, step_ops, ranks, accelerator, served",
    [
        ("torch_native", OFF, TORCH, 1, False, ON),
        ("triton", OFF, TORCH, 1, False, OFF),
        ("torch_native", ON, TORCH, 1, False, OFF),
        ("torch_native", OFF, TRITON, 1, False, OFF),
        ("torch_native", OFF, TORCH, 2, False, OFF),
        ("torch_native", OFF, TORCH, 1, True, OFF),
    ],
)
def test_rows_are_left_out_where_the_host_knows_the_drafts(backend, graphs, step_ops, ranks, accelerator, served, monkeypatch):
    monkeypatch.setattr(ragged, "accelerator_available", lambda: accelerator)
    assert resolve_ragged(AUTO, backend, graphs, step_ops, ranks) == served and resolve_ragged(OFF, backend, graphs, step_ops, ranks) == OFF
    if served == ON:
        assert resolve_ragged(ON, backend, graphs, step_ops, ranks) == ON
        return
    with pytest.raises(SettingError, match="IDLM_RAGGED_VERIFY=on cannot be served here, where a step has a fixed width; allowed: auto, off, or a CPU"):
        resolve_ragged(ON, backend, graphs, step_ops, ranks)


def request(stop_token_ids=None, ignore_eos=False, top_k=1, tokenizer=SimpleNamespace(eos_token_id=2, additional_stop_token_ids={9}), grammar=None):
    params = SimpleNamespace(stop_token_ids=stop_token_ids, ignore_eos=ignore_eos, top_k=top_k, top_p=1.0, min_p=0.0, max_new_tokens=20)
    return SimpleNamespace(sampling_params=params, eos_token_ids={1}, tokenizer=tokenizer, origin_input_ids=[0] * 10, grammar=grammar)


def test_stops_are_sglangs():
    assert stop_tokens(request()) == {1, 2, 9} and stop_tokens(request({5})) == {1, 2, 5, 9}
    assert stop_tokens(request({5}, ignore_eos=True)) == set(), "SGLang looks for no token then, asked for or not"
    assert stop_tokens(request({5}, tokenizer=None)) == {1, 5}
    assert stop_tokens(request(tokenizer=SimpleNamespace(eos_token_id=None, additional_stop_token_ids=None))) == {1}


def test_the_rejection_rule_and_grammars_know_no_stops(monkeypatch):
    monkeypatch.setattr("idlm_sglang.engine.requests.penalised_rows", lambda *_: None)
    reqs = [request(top_k=50), request(top_k=50), request(), request(grammar=object())]
    plans = [RequestPlan(i, STRIDED, "default", None, 0, coupled) for i, coupled in enumerate((False, True, False, True))]
    rows = BatchRows(reqs, plans, Settings(stride=4, max_stride=4, auto=False, sampling_rule=REJECTION), 4, 50, "cpu")
    assert rows.stops == [frozenset(), {1, 2, 9}, {1, 2, 9}, frozenset()] and rows.ends == [30] * 4


def test_a_steps_drafts_are_trimmed_by_stop_doubt_and_length():
    k = 3
    drafts = torch.tensor([[5, 2, 6], [5, 6, 7], [5, 6, 7], [5, 6, 7]])
    sure = torch.zeros(4, k)
    sure[1, 1] = -9.0
    carried = Carried(drafts, torch.tensor([3, 3, 3, 2]), torch.zeros(4, k), None, torch.tensor([3, 3, 0, 2]), sure)
    rows = SimpleNamespace(ends=[100, 100, 13, 100], stops=[{2}] * 4, limits_host=[3, 3, 3, 2], records=[Record()] * 4)
    kept, found = trimmed(carried, rows, [10] * 4, BRANCH)
    assert kept.counts.tolist() == [2, 1, 1, 2] and kept.clean.tolist() == [2, 1, 0, 2]
    assert [one.masks for one in found] == [0, 3, 0, 2] and [one.doubted for one in found] == [False, True, False, False]


def test_rows_go_into_the_forward_and_their_logits_come_back_to_their_places():
    width = 7
    rows = RaggedRows.of(torch.tensor([3, 1, 0, 2]), torch.tensor([3, 0, 3, 1]), width)
    assert rows.lens == [7, 2, 4, 4]
    values = torch.arange(4 * width).view(4, width)
    picked = rows.pick(values)
    assert picked.tolist() == [*range(7), 7, 8, *range(14, 18), *range(21, 25)]
    back = rows.spread(picked[:, None].float(), width)[..., 0]
    live = torch.arange(width) < torch.tensor(rows.lens)[:, None]
    assert torch.equal(back[live], values[live].float()) and not back[~live].any()
    three = torch.tensor([3, 3])
    assert RaggedRows.of(torch.tensor([3, 2]), three, width).lens == [7, 6] and RaggedRows.of(three, three, width) is None


def test_the_layout_is_one_that_sglang_accepts():
    layout = RaggedRows.of(torch.tensor([3, 1]), torch.tensor([3, 0]), 7).layout()
    assert isinstance(layout, RaggedVerifyLayout) and layout.bs == 2 and layout.total_verify_tokens == 9
    assert layout.verify_lens.tolist() == layout.verify_lens_cpu == [7, 2] and layout.qo_indptr_device.tolist() == [0, 7, 9] and layout.extend_start_loc.tolist() == [0, 7]


def test_an_adapter_acts_on_the_mask_rows_that_are_computed_and_no_other():
    k, counts, masks = 3, torch.tensor([3, 1, 0, 2]), [3, 0, 3, 1]
    rows = RaggedRows.of(counts, torch.tensor(masks), 2 * k + 1)
    gate = Gate(adapted=True)
    gate.reserve(32, "cpu")
    starts = [0, 7, 9, 13]
    expected = [start + 1 + int(count) + j for start, count, m in zip(starts, counts, masks) for j in range(m)]
    with gate.masks(counts, k, places=rows.places):
        assert gate.rows.tolist() == expected
    with gate.masks(counts, k, 100, torch.tensor([4, 5]), rows.places):
        assert gate.rows.tolist() == [4, 5, *(100 + row for row in expected)]
    whole = mask_rows(counts, k) + torch.arange(4)[:, None] * 7
    with gate.masks(counts, k):
        assert gate.rows.tolist() == whole.flatten().tolist()
