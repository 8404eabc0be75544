"""One decode step of stride N > 1: what goes into the forward, and what its logits are turned into."""

from http import HTTPStatus

import torch
from sglang.srt.layers.logits_processor import LogitsProcessorOutput
from sglang.srt.layers.logprob_processor import compute_spec_logprobs
from sglang.srt.layers.sampler import apply_custom_logit_processor
from sglang.srt.managers.schedule_batch import FINISH_ABORT

from idlm_sglang.engine.grammar import GrammarStep
from idlm_sglang.engine.penalties import PenalisedRows
from idlm_sglang.engine.ragged import RaggedRows, trimmed
from idlm_sglang.engine.requests import BatchRows
from idlm_sglang.engine.spec_io import IsdResult, IsdVerifyInput, decode_result
from idlm_sglang.engine.state import Carried
from idlm_sglang.engine.step_inputs import Layout, Requests
from idlm_sglang.isd import BRANCH, OFF
from idlm_sglang.isd.layout import drafts_in_front
from idlm_sglang.isd.parts import parts
from idlm_sglang.isd.penalties import penalise


class StridedStep:
    """The drafts of a batch, ready to be verified.

    Args:
        worker: the ISD worker.
        batch: SGLang's decode batch of B requests, KV slots for 2N - 1 rows each behind its committed columns.
        rows: its requests.
        salvage: what rows behind a rejection look like, ``branch`` or ``chain`` or ``off``.

    Attributes:
        tokens: ``(B, W)`` int64, W = 2N - 1.
        positions: ``(B, W)`` int64. Those of rows behind the context's end, which commit nothing, are inside it, too.
        places: ``(B, W)`` int64 KV slots.
        ragged: which of these rows are computed, None: all.
        visible: ``(B, W, W)`` bool, the step's columns that its rows see on top of causality; None: all, or those that a mask leaves (``engine.masks``).
    """

    def __init__(self, worker, batch, rows: BatchRows, salvage: str):
        self._worker, self._batch, self._rows, self._salvage = worker, batch, rows, salvage
        k = rows.drafts
        self.width = 2 * k + 1
        self._grammars = GrammarStep(batch.reqs, rows.grammars, rows.limits_host, k, worker.vocab, worker.mask_id) if rows.grammars else None
        self._requests = Requests(worker.state, batch.req_pool_indices, rows.numbers, batch.seq_lens, rows.limits)
        trims, self._worth = worker.trims, None
        layout = Layout(k, salvage, batch.spec_info.bonus_tokens, worker.req_to_token, worker.mask_id, worker.last_position, trims)
        self._inputs = worker.ops.load(self._requests, layout, rows.any_rejection, self._adjusted if trims or self._grammars else None)
        self._carried = self._inputs.carried
        self.ragged = None
        if trims:
            # Also where all rows are worth it: the next step asks how sure the drafts of this one are.
            self._inputs.masks = torch.tensor([worth.masks for worth in self._worth], dtype=torch.int64)
            self.ragged = RaggedRows.of(self._carried.counts, self._inputs.masks, self.width)
        self.tokens, self.positions, self.places = self._inputs.tokens, self._inputs.positions, self._inputs.places
        hides = salvage == BRANCH and worker.masks is None
        self.visible = None
        if hides:
            tables = worker.state.tables(k)
            self.visible = tables.visible.index_select(0, tables.pair(self._carried.counts, self._inputs.forks))

    @property
    def lens(self) -> list[int]:
        """Rows of each request in the forward."""
        return [self.width] * len(self.tokens) if self.ragged is None else self.ragged.lens

    def flat(self, values: torch.Tensor) -> torch.Tensor:
        """``(R,)``: what ``(B, W)`` holds of the rows in the forward."""
        return values.view(-1) if self.ragged is None else self.ragged.pick(values)

    def spread(self, logits: torch.Tensor) -> torch.Tensor:
        """The forward's logits ``(R, V)`` as ``(B, W, V)`` float32; zeros for rows that are not in it."""
        logits = logits.float()
        return logits.view(*self.tokens.shape, -1) if self.ragged is None else self.ragged.spread(logits, self.width)

    def _adjusted(self, carried: Carried) -> Carried:
        if self._grammars is not None:
            carried, failed = self._grammars.adjust(carried)
            for row, error in failed.items():
                self._batch.reqs[row].to_finish = FINISH_ABORT(f"the grammar failed: {error}", HTTPStatus.INTERNAL_SERVER_ERROR, "InternalServerError")
        if self._worker.trims:
            carried, self._worth = trimmed(carried, self._rows, self._batch.seq_lens.tolist(), self._salvage)
        return carried

    def verify(self):
        """The step's own TARGET_VERIFY forward: SGLang's result and the logits ``(B, W, V)`` float32."""
        worker, batch = self._worker, self._batch
        batch.out_cache_loc = self.flat(self.places)
        mask = None
        if self._salvage == BRANCH and worker.masks is not None:
            mask = worker.masks.write(self._carried.counts, self._inputs.forks, batch.seq_lens, self.width, batch.idlm_columns)
        layout = None if self.ragged is None else self.ragged.layout()
        verify = IsdVerifyInput(
            self.flat(self.tokens), self.flat(self.positions), self.width, custom_mask=mask, new_visible=self.visible, ragged_verify_layout=layout
        )
        forward_batch, _ = verify.prepare_for_verify(batch, worker.target_worker, defer_metadata_init=True)
        with self.gate():
            out = worker.phases.forward(worker.target_worker.forward_batch_generation, batch=None, forward_batch=forward_batch, is_verify=True)
        return out, self.spread(out.logits_output.next_token_logits)

    def gate(self, first: int = 0, others: torch.Tensor | None = None):
        """In here an adapter acts on the step's MASK rows, the forward's rows from ``first`` on being its own, and on ``others`` (``engine.lora``)."""
        places = None if self.ragged is None else self.ragged.places
        return self._worker.gate.masks(self._carried.counts, self._rows.drafts, first, others, places)

    def finish(self, out, logits: torch.Tensor, on_publish=None) -> IsdResult:
        """Commit tokens and draw the next drafts.

        Args:
            out: what SGLang's worker returned for the forward.
            logits: ``(B, W, V)`` float32, of the rows of ``tokens``; changed in place.
        """
        worker, batch, rows, k = self._worker, self._batch, self._rows, self._rows.drafts
        logits = self._with_request_terms(logits)
        step = worker.ranks.step(worker.ops.step(logits, self._requests, self._inputs, rows.sampling(batch.sampling_info), self._salvage != OFF))
        new_seq_lens, stats = worker.ops.store(self._requests, self._inputs, step)
        if rows.penalised is not None:
            worker.count(batch, rows.penalised, step.tokens, step.accept_lens)
        output = LogitsProcessorOutput(next_token_logits=None)
        if batch.return_logprob:
            output.next_token_logits = logits[:, : k + 1].reshape(len(batch.reqs) * (k + 1), -1)
            compute_spec_logprobs(batch, output, step.tokens.view(-1), chain_stride=k + 1)
            # The overlap schedule keeps results for two iterations, and nobody reads these rows again.
            output.next_token_logits = None
        doubted = None if self._worth is None else [worth.doubted for worth in self._worth]
        figures = {"round_stats": stats, "limits": rows.limits_host, "lens": self.lens, "doubted": doubted}
        result = decode_result(out, output, new_seq_lens, step.tokens.view(-1), step.accept_lens, step.last, k + 1, **figures)
        if on_publish is not None:
            on_publish(new_seq_lens)
        return result

    def _with_request_terms(self, logits: torch.Tensor) -> torch.Tensor:
        """What the requests add to the logits, in the order of SGLang's sampler: penalties, grammar, bias, processors."""
        rows, info = self._rows, self._batch.sampling_info
        if rows.penalised is not None:
            self._penalise(logits, rows.penalised)
        if self._grammars is not None:
            self._grammars.apply(logits)
        if rows.single_grammar:
            first = logits[:, 0].clone()
            info.update_regex_vocab_mask()
            info.grammar_mask.apply(first)
            info.grammar_mask = None
            logits[:, 0] = first
        if info.logit_bias is not None:
            logits += info.logit_bias[:, None]
        if info.has_custom_logit_processor:
            first = logits[:, 0].clone()
            apply_custom_logit_processor(first, info)
            logits[:, 0] = first
        return logits

    def _penalise(self, logits: torch.Tensor, penalised: PenalisedRows) -> None:
        worker, batch, carried = self._worker, self._batch, self._carried
        for part in parts(len(penalised.index), logits.shape[1] * logits.shape[2]):
            index = penalised.index[part]
            logits[index] = penalise(
                logits[index],
                penalised.penalties.at(part),
                worker.counts.of(batch.req_pool_indices[index]),
                carried.drafts[index],
                drafts_in_front(carried.counts[index], self._inputs.forks[index], carried.drafts.shape[1], logits.shape[1]),
                batch.seq_lens[index] + 1 - penalised.prompt_lens[part],
            )
