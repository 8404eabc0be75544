"""A decode step of stride 1: SGLang's ordinary decode, its sampler included."""

import copy

import torch
from sglang.srt.layers.logits_processor import LogitsProcessorOutput
from sglang.srt.model_executor.forward_batch_info import ForwardMode

from idlm_sglang.engine.requests import BatchRows
from idlm_sglang.engine.spec_io import IsdResult, decode_result


class SingleStep:
    """One token for each request of a batch.

    Args:
        worker: the ISD worker.
        batch: SGLang's decode batch of B requests, a KV slot for one row each behind its committed columns.
        rows: its requests.

    Attributes:
        tokens: ``(B, 1)`` int64.
        places: ``(B, 1)`` int64 KV slots.
    """

    width = 1

    def __init__(self, worker, batch, rows: BatchRows):
        self._worker, self._batch, self._rows = worker, batch, rows
        self._pending = batch.spec_info.bonus_tokens
        self._slots = worker.req_to_token[batch.req_pool_indices, batch.seq_lens].to(torch.int64)
        self._lengths = batch.seq_lens + 1

    @property
    def tokens(self) -> torch.Tensor:
        return self._pending[:, None]

    @property
    def lens(self) -> list[int]:
        """Rows of each request."""
        return [1] * len(self._pending)

    @staticmethod
    def flat(values: torch.Tensor) -> torch.Tensor:
        """``(B, 1)`` to ``(B,)``."""
        return values.view(-1)

    @property
    def places(self) -> torch.Tensor:
        return self._slots[:, None]

    def run(self, on_publish=None) -> IsdResult:
        """The step's own DECODE forward."""
        batch, penalised = self._batch, self._rows.penalised
        batch.forward_mode, batch.spec_info = ForwardMode.DECODE, None
        batch.input_ids, batch.out_cache_loc, batch.seq_lens = self._pending, self._slots, self._lengths
        if batch.seq_lens_cpu is not None:
            batch.seq_lens_cpu = self._lengths if self._lengths.is_cpu else batch.seq_lens_cpu + 1
        batch.seq_lens_sum = None
        self._rows.give_seeds(batch.sampling_info)
        if penalised is not None:
            self._worker.give_penalties(batch, penalised, batch.seq_lens)
        out = self._worker.phases.forward(self._worker.target_worker.forward_batch_generation, batch)
        result = self._result(out, out.logits_output, out.next_token_ids)
        if on_publish is not None:
            on_publish(result.new_seq_lens)
        return result

    def sample(self, out, logits: torch.Tensor, forward_batch) -> IsdResult:
        """The step as part of another batch's forward.

        Args:
            out: what SGLang's worker returned for that forward; ``forward_batch``: its batch.
            logits: ``(B, 1, V)`` of the rows of ``tokens``.
        """
        worker, penalised = self._worker, self._rows.penalised
        # The batch is the scheduler's, and this is not its turn: nothing of it may change.
        batch, own = copy.copy(self._batch), copy.copy(forward_batch)
        batch.sampling_info = info = batch.sampling_info.copy_for_forward()
        info.grammars = [req.grammar for req in batch.reqs] if batch.has_grammar else None
        own.sampling_info, own.req_pool_indices = info, batch.req_pool_indices
        own.seq_lens, own.seq_lens_cpu = self._lengths, batch.seq_lens_cpu + 1
        own.return_logprob, own.top_logprobs_nums, own.token_ids_logprobs = batch.return_logprob, batch.top_logprobs_nums, batch.token_ids_logprobs
        self._rows.give_seeds(info)
        if penalised is not None:
            worker.give_penalties(batch, penalised, own.seq_lens)
        output = LogitsProcessorOutput(next_token_logits=logits[:, 0])
        return self._result(out, output, worker.model_runner.sample(output, own))

    def _result(self, out, logits_output, next_token_ids) -> IsdResult:
        batch, penalised, ones = self._batch, self._rows.penalised, self._rows.ones
        tokens = next_token_ids.to(torch.int64)
        if penalised is not None:
            self._worker.count(batch, penalised, tokens.view(-1, 1), ones)
        if batch.return_logprob:
            # The sampler's are flat; speculative results have the shape (B, 1).
            logits_output.next_token_logprobs = logits_output.next_token_logprobs.view(len(batch.reqs), 1)
        return decode_result(out, logits_output, self._lengths, tokens, ones, tokens, 1)
