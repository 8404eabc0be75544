"""A decode step in a prefill's forward.

SGLang runs prompts before the requests that are being answered, each in a forward of its own. A stride makes answers short in
forwards, so that prompts come between them more often than in AR. Where the overlap schedule is off, the rows of both
go through one forward: the decode step's follow the prompts' as so many more requests that extend their own columns.
"""

from contextlib import contextmanager

import torch
from sglang.srt.model_executor.forward_batch_info import ForwardBatch

from idlm_sglang.engine.requests import BatchRows
from idlm_sglang.engine.single import SingleStep
from idlm_sglang.engine.strided import StridedStep
from idlm_sglang.engine.transfer import on_device
from idlm_sglang.engine.warm import drafts_for, first_drafts, is_plain, with_masks
from idlm_sglang.isd import CHAIN


def takes_decode(batch) -> bool:
    """A prefill batch that other requests' rows can follow: tokens alone, and logits of its last rows alone, from which tokens are sampled."""
    return not batch.is_prefill_only and batch.forward_mode.is_extend_without_speculative() and not batch.forward_mode.is_mixed() and is_plain(batch)


def can_join(batch, rows: BatchRows) -> bool:
    """A prepared decode batch whose step can be part of a prefill: its logits are changed by nothing that the batch holds but once."""
    return not (rows.drafts and (rows.single_grammar or batch.sampling_info.has_custom_logit_processor))


def with_step(batch, step: StridedStep | SingleStep, partner):
    """``batch``, a prefill batch that may be changed, with the rows of a decode step behind its own. ``partner``: the step's batch."""
    lengths, lengths_cpu, slots = partner.seq_lens, partner.seq_lens_cpu, partner.req_pool_indices
    lens = step.lens
    rows = torch.tensor(lens, dtype=torch.int64)
    ends, ends_cpu = lengths + on_device(rows, lengths.device), lengths_cpu + rows
    batch.input_ids = torch.cat((batch.input_ids, step.flat(step.tokens).to(batch.input_ids.dtype)))
    batch.out_cache_loc = torch.cat((batch.out_cache_loc, step.flat(step.places).to(batch.out_cache_loc.dtype)))
    batch.req_pool_indices = torch.cat((batch.req_pool_indices, slots))
    if batch.req_pool_indices_cpu is not None:
        batch.req_pool_indices_cpu = torch.cat((batch.req_pool_indices_cpu, partner.req_pool_indices_cpu.to(batch.req_pool_indices_cpu.dtype)))
    batch.seq_lens = torch.cat((batch.seq_lens, ends.to(batch.seq_lens.dtype)))
    if batch.seq_lens_cpu is not None:
        batch.seq_lens_cpu = torch.cat((batch.seq_lens_cpu, ends_cpu.to(batch.seq_lens_cpu.dtype)))
    batch.orig_seq_lens = torch.cat((batch.orig_seq_lens, ends.to(batch.orig_seq_lens.dtype)))
    batch.extend_lens = [*batch.extend_lens, *lens]
    batch.prefix_lens = [*batch.prefix_lens, *lengths_cpu.tolist()]
    batch.extend_logprob_start_lens = [*batch.extend_logprob_start_lens, *[0] * len(lens)]
    batch.extend_num_tokens += sum(lens)
    batch.seq_lens_sum = None
    batch.multimodal_inputs = None
    return batch


def _step(worker, batch) -> StridedStep | SingleStep:
    rows = worker.rows_of(batch)
    # SGLang's Triton attention takes a mask in a verify forward only: survivors are a chain here.
    salvage = worker.settings.salvage if worker.masks is None else CHAIN
    return StridedStep(worker, batch, rows, salvage) if rows.drafts else SingleStep(worker, batch, rows)


@contextmanager
def _as_laid_out(worker, forward_batch, first: int, step: StridedStep | SingleStep | None):
    """In here the forward's rows from ``first`` on have the positions of the step, and see what it lets them see."""
    if not isinstance(step, StridedStep):
        yield
        return
    positions = step.flat(step.positions).to(forward_batch.positions.dtype)
    forward_batch.positions = torch.cat((forward_batch.positions[:first], positions))
    if step.visible is None and step.ragged is None:
        yield
        return
    with worker.model_runner.attn_backend.with_step(len(step.lens), step.visible):
        yield


def prefill(worker, batch, masked: list[int], rows: BatchRows | None, partner=None):
    """A prefill whose forward also draws the first drafts of the requests ``masked``, and takes the decode step of ``partner``.

    Args:
        batch: SGLang's prepared prefill batch.
        masked: host list of rows; ``rows``: the batch's, where there are such.
        partner: a prepared decode batch, or None.

    Returns:
        SGLang's result of the prefill, its next tokens sampled, and that of the decode step, None without one.
    """
    count, drafts, first = len(batch.reqs), drafts_for(batch, masked, rows), 0
    masked = masked if drafts else []
    longer, read = with_masks(batch, masked, drafts, worker.mask_id, worker.req_to_token)
    proposing, step = len(read) - count, None
    if partner is not None:
        step = _step(worker, partner)
        first = longer.extend_num_tokens
        longer = with_step(longer, step, partner)
        read = [*read, *range(first, longer.extend_num_tokens)]
    worker.target_worker.set_hicache_consumer(batch.hicache_consumer_index)
    forward_batch = ForwardBatch.init_new(longer, worker.model_runner, return_hidden_states_before_norm=False)
    index = on_device(torch.tensor(read, dtype=torch.int64), worker.device)
    behind = index[count : count + proposing]
    gate = step.gate(first, behind) if isinstance(step, StridedStep) else worker.gate.on(behind)
    laid_out = _as_laid_out(worker, forward_batch, first, step)
    with worker.model_runner.model.logits_processor.reading(index), gate, laid_out:
        out = worker.target_worker.forward_batch_generation(batch=None, forward_batch=forward_batch, is_verify=True)
    logits = out.logits_output.next_token_logits
    beside, others = None, logits[count + proposing :]
    if isinstance(step, StridedStep):
        beside = step.finish(out, step.spread(others))
    elif step is not None:
        beside = step.sample(out, others.view(*step.tokens.shape, -1), forward_batch)
    if masked:
        first_drafts(worker, batch, masked, rows, logits[count : count + proposing])

    # The sampler takes its positions from the lengths: those of the prompts.
    forward_batch.seq_lens, forward_batch.seq_lens_cpu = batch.seq_lens, batch.seq_lens_cpu
    forward_batch.req_pool_indices = batch.req_pool_indices
    out.logits_output.next_token_logits = logits[:count]
    out.next_token_ids = worker.model_runner.sample(out.logits_output, forward_batch)
    return out, beside
