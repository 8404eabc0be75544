"""KV columns that requests are given ahead of their next step: on SGLang's own allocator and page table."""

import random
from types import SimpleNamespace

import pytest
import torch
from sglang.srt.mem_cache.allocator.token import TokenToKVPoolAllocator
from sglang.srt.speculative.eagle_utils import eagle_prepare_for_decode

from idlm_sglang.compat import reserve as compat_reserve
from idlm_sglang.engine import reserve
from idlm_sglang.engine.reserve import AHEAD, to_spare
from idlm_sglang.platform.page_table import assign_req_to_token

ROW = 256


class Pool:
    """Some requests, each in the page-table row of its number, and SGLang's allocator of ``size`` slots."""

    def __init__(self, size: int, lengths: list[int], cached: int = 0):
        self.allocator = TokenToKVPoolAllocator(size, torch.float32, "cpu", None, False)
        self.table = torch.zeros(len(lengths), ROW, dtype=torch.int32)
        self.reqs = []
        for row, length in enumerate(lengths):
            self.table[row, :length] = self.allocator.alloc(length)
            kv, params = SimpleNamespace(kv_committed_len=length, kv_allocated_len=length), SimpleNamespace(max_new_tokens=1_000)
            self.reqs.append(SimpleNamespace(kv=kv, sampling_params=params, output_ids=[], decode_batch_idx=0))
        self.swa = 0
        tree = SimpleNamespace(token_to_kv_pool_allocator=self.allocator, evictable_size=lambda: cached, supports_prefix_sharing=lambda: False)
        self.batch = SimpleNamespace(
            reqs=self.reqs,
            device="cpu",
            enable_overlap=False,
            seq_lens_cpu=torch.tensor(lengths),
            req_pool_indices=torch.arange(len(lengths)),
            token_to_kv_pool_allocator=self.allocator,
            req_to_token_pool=SimpleNamespace(req_to_token=self.table),
            tree_cache=tree,
            sampling_info=SimpleNamespace(penalizer_orchestrator=SimpleNamespace(is_required=False)),
            maybe_evict_swa=self.evict,
        )

    def evict(self) -> None:
        self.swa += 1

    def given(self) -> list[int]:
        """Columns that each request has behind its committed ones."""
        return [req.kv.kv_allocated_len - req.kv.kv_committed_len for req in self.reqs]

    def state(self):
        return [vars(req.kv) | {"steps": req.decode_batch_idx} for req in self.reqs], self.table.tolist(), self.allocator.free_pages.tolist(), self.swa


@pytest.fixture
def ahead(monkeypatch):
    """The columns of the stride in use, as a list whose one value a test may change."""
    asked = [1]
    monkeypatch.setattr(compat_reserve, "is_isd", lambda: True)
    monkeypatch.setattr(compat_reserve, "columns", lambda reqs, overlap: asked[0])
    monkeypatch.setattr(compat_reserve, "_preempts", lambda: False)
    monkeypatch.setattr("sglang.srt.speculative.eagle_utils.get_alloc_reserve_per_decode", lambda: compat_reserve.reserve_in_use(lambda: 1 / 0))
    monkeypatch.setattr("sglang.srt.mem_cache.allocation.assign_req_to_token_pool_func", assign_req_to_token)
    return asked


def prepare(pool: Pool, original=eagle_prepare_for_decode) -> None:
    compat_reserve.allocate_in_use(original, pool.batch)


def nothing_to_allocate(_):
    raise AssertionError("SGLang was asked to allocate")


def test_every_step_finds_its_columns_and_no_slot_has_two_owners(ahead):
    rng = random.Random(1)
    pool = Pool(6_000, [rng.randrange(1, 60) for _ in range(5)])
    for step in range(60):
        ahead[0] = rng.choice((1, 7, 31))
        before = pool.table.clone(), [req.kv.kv_allocated_len for req in pool.reqs]
        prepare(pool)
        assert min(pool.given()) >= ahead[0] and [req.decode_batch_idx for req in pool.reqs] == [step + 1] * 5
        for row, length in enumerate(before[1]):
            assert torch.equal(pool.table[row, :length], before[0][row, :length])
        taken = torch.cat([pool.table[row, : req.kv.kv_allocated_len] for row, req in enumerate(pool.reqs)]).tolist()
        assert len(set(taken)) == len(taken) == 6_000 - pool.allocator.available_size() and 0 not in taken
        for req in pool.reqs:
            req.kv.kv_committed_len += rng.randrange(1, (ahead[0] + 1) // 2 + 1)
            req.kv.kv_committed_len = min(req.kv.kv_committed_len, ROW - 31)


def test_a_plentiful_pool_allocates_once_for_many_steps(ahead):
    pool = Pool(10_000, [20, 30])
    prepare(pool)
    assert pool.given() == [1 + AHEAD] * 2
    for _ in range(AHEAD):
        for req in pool.reqs:
            req.kv.kv_committed_len += 1
        prepare(pool, nothing_to_allocate)
    assert pool.given() == [1, 1] and pool.swa == 1 + AHEAD


@pytest.mark.parametrize("cached", [0, 2_000])
def test_a_short_pool_is_given_out_as_sglang_gives_it(ahead, cached):
    """What the prefix cache could give back is not short."""
    ours, sglangs = Pool(300, [40, 50], cached), Pool(300, [40, 50], cached)
    for commits in ((1, 1), (3, 1), (1, 4)):
        ahead[0] = 7
        prepare(ours)
        compat_reserve._reserving(7, eagle_prepare_for_decode, sglangs.batch)
        assert (ours.state() == sglangs.state()) == (cached == 0)
        for pool in (ours, sglangs):
            for req, more in zip(pool.reqs, commits):
                req.kv.kv_committed_len += more


@pytest.mark.parametrize("host_knows_lengths", [True, False])
def test_a_step_that_allocates_nothing_is_prepared_as_sglang_prepares_it(ahead, host_knows_lengths):
    ours, sglangs = Pool(300, [40, 50]), Pool(300, [40, 50])
    ahead[0] = 7
    for pool in (ours, sglangs):
        if not host_knows_lengths:
            pool.batch.seq_lens_cpu = None
        compat_reserve._reserving(7, eagle_prepare_for_decode, pool.batch)
        vars(pool.batch).pop("max_seq_len_host", None)
    prepare(ours, nothing_to_allocate)
    compat_reserve._reserving(7, eagle_prepare_for_decode, sglangs.batch)
    assert ours.state() == sglangs.state() and vars(ours.batch).keys() == vars(sglangs.batch).keys()
    assert host_knows_lengths or ours.batch.max_seq_len_host == sglangs.batch.max_seq_len_host == 57


def test_penalties_are_left_to_sglang_which_counts_tokens_for_them_there(ahead):
    pool, asked = Pool(10_000, [20, 30]), []
    prepare(pool)
    pool.batch.sampling_info.penalizer_orchestrator.is_required = True
    prepare(pool, asked.append)
    assert asked == [pool.batch]


def test_nothing_is_given_ahead_under_priority_preemption(ahead, monkeypatch):
    monkeypatch.setattr(compat_reserve, "_preempts", lambda: True)
    pool = Pool(10_000, [20, 30])
    prepare(pool)
    assert pool.given() == [1, 1]


def test_nothing_is_given_ahead_that_no_answer_can_take(ahead):
    pool = Pool(10_000, [20, 30])
    for req, left in zip(pool.reqs, (3, 11)):
        req.sampling_params.max_new_tokens, req.output_ids = left + 5, [0] * 5
    prepare(pool)
    assert pool.given() == [12, 12]


@pytest.mark.parametrize("page", [1, 16])
@pytest.mark.parametrize("length", [10, ROW - 60, ROW - 32, ROW - 17, ROW - 7])
def test_no_request_is_given_columns_beyond_its_row(length, page):
    pool = Pool(10_000, [5, length])
    pool.allocator.page_size = page
    spare = to_spare(pool.batch, 7)
    assert 0 <= spare <= AHEAD and (spare == 0 or -(-(length + 7 + spare) // page) * page <= ROW)
    assert spare == AHEAD if length <= ROW - 60 else spare < AHEAD


@pytest.mark.parametrize("page", [1, 16])
@pytest.mark.parametrize("evictable", [0, 5])
def test_the_last_request_narrows_its_steps_as_far_as_the_pool_needs(monkeypatch, page, evictable):
    def columns(reqs, overlap):
        room = reserve.room_of(reqs)
        return 2 * (7 if room is None else min(7, room)) + 1

    monkeypatch.setattr(reserve, "columns", columns)
    rng, narrowed = random.Random(4), set()
    for _ in range(400):
        held = rng.randrange(1, 6) * 16
        req = SimpleNamespace(kv=SimpleNamespace(kv_allocated_len=held, kv_committed_len=held - rng.randrange(16)))
        free = rng.randrange(0, 20) // page * page
        batch = SimpleNamespace(
            enable_overlap=False,
            token_to_kv_pool_allocator=SimpleNamespace(available_size=lambda: free),
            tree_cache=SimpleNamespace(evictable_size=lambda: evictable // page * page),
        )
        room = free + evictable // page * page
        need = reserve.need_alone(batch, req, page)
        drafts = (columns([req], False) - 1) // 2
        narrowed.add(drafts)
        # The slots that SGLang will take for it, and the widest step that they are enough for.
        whole = -(-(req.kv.kv_committed_len + 2 * drafts + 1) // page) * page
        assert need == max(whole - req.kv.kv_allocated_len, 0)
        assert need <= room or drafts == 0
        if drafts < 7:
            wider = -(-(req.kv.kv_committed_len + 2 * drafts + 3) // page) * page
            assert wider - req.kv.kv_allocated_len > room
        reserve.widen([req])
        assert columns([req], False) == 15
    assert 7 in narrowed and len(narrowed) > 1
