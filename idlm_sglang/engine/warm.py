"""Warm first steps: MASK rows behind the prompt's last chunk, so that the first decode step has drafts to verify.

A published I-DLM server starts every answer with a cold step. Here the forward that ends a prompt carries K more rows for
each request, at the positions behind the prompt. The prompt's rows come before them and cannot see them; the drafts are
those that a cold step would draw one step later.
"""

import copy

import torch
from sglang.srt.mem_cache.allocation import alloc_for_spec_decode
from sglang.srt.mem_cache.allocation_sizing import get_alloc_reserve_per_decode, page_aligned_decode_alloc_lens

from idlm_sglang.engine.requests import STRIDED, BatchRows, last_column
from idlm_sglang.engine.reserve import columns
from idlm_sglang.engine.step_inputs import Requests
from idlm_sglang.engine.transfer import on_device

_ROWS = "idlm_masks_behind"


def _takes_masks(req) -> bool:
    """The request's prompt ends in this chunk, and the first decode step may commit a draft."""
    plan = getattr(req, "idlm_plan", None)
    ends = req.extend_end == len(req.full_untruncated_fill_ids)
    return ends and plan is not None and plan.mode == STRIDED and _useful(last_column(req), req.extend_end) > 0 and req.session is None


def _useful(end: int, length: int) -> int:
    """The most drafts that a first decode step can commit: it follows a prefill of ``length`` columns whose own token is one, adds one behind
    its drafts, and the answer has no column from ``end`` on."""
    return end - length - 2


def is_plain(batch) -> bool:
    """Rows may follow those of the prefill batch's prompts.

    Not where prompt logprobs are asked for; embeddings that replace those of single tokens are placed by row number, which
    more rows would move.
    """
    prompt_logprobs = batch.return_logprob and any(s < n for s, n in zip(batch.extend_logprob_start_lens, batch.extend_lens))
    embedded = batch.input_embeds is not None or batch.replace_embeds is not None
    return not (embedded or prompt_logprobs or any(batch.multimodal_inputs or ()))


def reserve(batch) -> None:
    """Give the requests of a prefill batch, before it runs, the KV slots that their first decode step would be given.

    Nothing happens where the pool is short of them (the first step is cold then), where prompt logprobs are asked for or a
    request brings embeddings, and to requests whose prompt goes on in a later chunk.
    """
    setattr(batch, _ROWS, [])
    rows = [i for i, req in enumerate(batch.reqs) if _takes_masks(req)] if is_plain(batch) else []
    if not rows or columns([batch.reqs[i] for i in rows], overlap=False) in (None, 1):
        return
    tree, allocator = batch.tree_cache, batch.token_to_kv_pool_allocator
    reqs = [batch.reqs[i] for i in rows]
    current, wanted, needed = page_aligned_decode_alloc_lens(reqs, reserve=get_alloc_reserve_per_decode(), page_size=allocator.page_size)
    if allocator.available_size() + tree.evictable_size() < needed + len(rows) * allocator.page_size:
        return
    current, wanted = (torch.tensor(lens, dtype=torch.int32) for lens in (current, wanted))
    index = on_device(torch.tensor(rows, dtype=torch.int64), batch.device)
    alloc_for_spec_decode(
        tree,
        batch.req_to_token_pool,
        reqs=reqs,
        req_pool_indices=batch.req_pool_indices[index],
        cur_kv_lens=on_device(current, batch.device),
        cur_kv_lens_cpu=current,
        nxt_kv_lens=on_device(wanted, batch.device),
        nxt_kv_lens_cpu=wanted,
        num_needed_tokens=needed,
        batch=batch,
    )
    setattr(batch, _ROWS, rows)


def rows_of(batch) -> list[int]:
    """The rows of a prefill batch that have room for MASK rows behind them, once."""
    rows = batch.__dict__.pop(_ROWS, [])
    return rows if batch.forward_mode.is_extend_without_speculative() and not batch.forward_mode.is_mixed() else []


def drafts_for(batch, masked: list[int], rows: BatchRows) -> int:
    """How many MASK rows stand behind each of the requests ``masked`` (host list of rows): as many as one of them may carry and can use."""
    useful = (min(rows.limits_host[i], _useful(rows.ends[i], batch.prefix_lens[i] + batch.extend_lens[i])) for i in masked)
    return max(useful, default=0)


def with_masks(batch, rows: list[int], k: int, mask_id: int, req_to_token: torch.Tensor):
    """A prefill batch with K MASK rows behind each request of ``rows``.

    Args:
        batch: SGLang's prepared prefill batch; it is left as it is.
        rows: host list, ascending.
        k: K, 0 without ``rows``; the columns behind these prompts have at least as many KV slots.
        mask_id: the MASK token id.
        req_to_token: ``(slots, columns)``, KV slot of each column.

    Returns:
        The longer batch, and the host list of its row numbers that are read: the last prompt row of each of the B requests,
        then the K MASK rows of each request of ``rows``.
    """
    masked = set(rows)
    index = on_device(torch.tensor(rows, dtype=torch.int64), batch.device)
    columns = batch.seq_lens[index][:, None] + torch.arange(k, device=batch.device)
    slots = req_to_token[batch.req_pool_indices[index][:, None], columns].to(batch.out_cache_loc.dtype)
    masks = torch.full((k,), mask_id, dtype=batch.input_ids.dtype, device=batch.device)
    tokens, places, last, proposing = [], [], [], []
    own = zip(batch.input_ids.split(batch.extend_lens), batch.out_cache_loc.split(batch.extend_lens), strict=True)
    behind, end = iter(slots), 0
    for i, (ids, locs) in enumerate(own):
        end += len(ids)
        last.append(end - 1)
        tokens.append(ids)
        places.append(locs)
        if i in masked:
            proposing.extend(range(end, end + k))
            end += k
            tokens.append(masks)
            places.append(next(behind))
    longer = copy.copy(batch)
    more = torch.tensor([k if i in masked else 0 for i in range(len(batch.reqs))], dtype=torch.int64)
    longer.input_ids, longer.out_cache_loc = torch.cat(tokens), torch.cat(places)
    longer.extend_lens = [n + m for n, m in zip(batch.extend_lens, more.tolist())]
    longer.extend_num_tokens = end
    longer.seq_lens = batch.seq_lens + on_device(more, batch.device)
    longer.seq_lens_cpu = None if batch.seq_lens_cpu is None else batch.seq_lens_cpu + more
    longer.seq_lens_sum = None
    return longer, last + proposing


def first_drafts(worker, batch, masked: list[int], rows: BatchRows, logits: torch.Tensor) -> None:
    """Draw the first drafts of the requests ``masked`` (host list of rows of the prefill batch) into the worker's slot state.

    ``logits``: ``(len(masked) * k, V)`` of their MASK rows, ``k`` of :func:`drafts_for`.
    """
    index = on_device(torch.tensor(masked, dtype=torch.int64), worker.device)
    proposing = logits.float().view(len(masked), len(logits) // len(masked), -1)
    info, lengths = batch.sampling_info, batch.seq_lens[index]
    if info.logit_bias is not None:
        proposing = proposing + info.logit_bias[index][:, None]
    requests = Requests(worker.state, batch.req_pool_indices[index], rows.numbers[index], lengths, rows.limits[index])
    worker.ops.first(proposing, requests, rows.sampling(info).at(index), worker.trims, worker.ranks.drafts)
