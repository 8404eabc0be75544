"""Penalties: `isd.penalties.penalise` on the W rows of a step, the sampler's terms at stride 1, and the counting of committed tokens.

The alternative is SGLang's penaltylib, which counts one token per call and gives every row of a request the same penalties: those of its
history. So its rows behind the first leave out the drafts in front of them, and it is compared on the first row only. Arms that work in
place begin with a copy of the logits; "copy" is that copy alone. One penalised request in every row of the batch is the worst case.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import torch

from benchmarks.kernels.harness import FLOOR, LIBRARY, OURS, REFERENCE, Arm, Case, Options, assert_equal
from benchmarks.kernels.inputs import Size, peaked_logits, sizes
from idlm_sglang.isd.layout import drafts_in_front
from idlm_sglang.isd.penalties import penalise

PROMPT, OUTPUT, END = 30, 100, 2
VARIANTS = {
    "frequency, presence": dict(frequency_penalty=0.3, presence_penalty=0.5),
    "all four": dict(frequency_penalty=0.3, presence_penalty=0.5, repetition_penalty=1.1, min_new_tokens=OUTPUT + 2),
}


class Penalised:
    """A batch whose requests all carry the same penalties and have OUTPUT tokens out, on both sides."""

    def __init__(self, variant: str, size: Size, device: str):
        from sglang.srt.sampling.sampling_params import SamplingParams

        from idlm_sglang.engine.penalties import PenalisedRows, TokenCounts

        self.values, self.size, self.device = VARIANTS[variant], size, device
        tokenizer = SimpleNamespace(additional_stop_token_ids=None, eos_token_id=END)
        self.reqs = [
            SimpleNamespace(sampling_params=SamplingParams(**self.values), origin_input_ids=[1] * PROMPT, eos_token_ids={END}, tokenizer=tokenizer)
            for _ in range(size.batch)
        ]
        self.penalised = PenalisedRows(self.reqs, list(range(size.batch)), size.vocab, device)
        self.output = torch.randint(4, size.vocab, (size.batch, OUTPUT))
        self.slots = torch.arange(1, size.batch + 1, device=device)
        self.counts = TokenCounts(size.batch + 1, size.vocab, device)
        self.counts.restart(self.slots, self.output.tolist())
        self.drafts = torch.randint(4, size.vocab, (size.batch, size.k), device=device)
        # Where the history or an earlier draft comes again, a row's count is above one.
        self.drafts[:, :1] = self.output[:, -1:].to(device) if size.k else self.drafts
        full = torch.full((size.batch,), size.k, device=device)
        self.in_front = drafts_in_front(full, full, size.k, size.width)
        self.first = torch.full((size.batch,), OUTPUT, device=device)

    def orchestrator(self):
        """SGLang's, fed with the same output."""
        from sglang.srt.sampling.penaltylib import (
            BatchedFrequencyPenalizer,
            BatchedMinNewTokensPenalizer,
            BatchedPenalizerOrchestrator,
            BatchedPresencePenalizer,
            BatchedRepetitionPenalizer,
        )

        kinds = {BatchedFrequencyPenalizer, BatchedPresencePenalizer, BatchedRepetitionPenalizer, BatchedMinNewTokensPenalizer}

        class Batch(SimpleNamespace):
            __hash__ = object.__hash__

        self.batch = Batch(reqs=self.reqs, device=self.device)
        made = BatchedPenalizerOrchestrator(self.size.vocab, self.batch, kinds)
        for column in self.output.T.to(self.device):
            made.cumulate_output_tokens(column)
        return made

    def row_by_row(self, logits: torch.Tensor) -> torch.Tensor:
        """``(B, R, V)``: each row penalised for the tokens in front of it."""
        out = torch.empty_like(logits)
        for b in range(len(logits)):
            for i in range(logits.shape[1]):
                known = torch.cat([self.output[b].to(self.device), self.drafts[b, :i]])
                n = torch.bincount(known, minlength=logits.shape[-1])
                row = logits[b, i] - self.values["frequency_penalty"] * n - self.values["presence_penalty"] * (n > 0)
                if OUTPUT + i < self.values.get("min_new_tokens", 0):
                    row[END] = float("-inf")
                factor = torch.where(n > 0, self.values.get("repetition_penalty", 1.0), 1.0)
                out[b, i] = torch.where(row < 0, row * factor, row / factor)
        return out


def check_first_row(got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got.view_as(want)[:, 0], want[:, 0])


def step_arms(size: Size, variant: str, options: Options) -> list[Arm]:
    batch = Penalised(variant, size, options.device)
    logits = peaked_logits((size.batch, size.width), size.vocab, options.device)
    work = torch.empty_like(logits)
    index, orchestrator = batch.penalised.index, batch.orchestrator()

    def ours() -> torch.Tensor:
        work.copy_(logits)
        counts = batch.counts.of(batch.slots[index])
        work[index] = penalise(work[index], batch.penalised.penalties, counts, batch.drafts[index], batch.in_front[index], batch.first[index])
        return work

    def by_sglang() -> torch.Tensor:
        work.copy_(logits)
        orchestrator.apply(work.view(-1, size.vocab), repeat=size.width)
        return work

    return [
        Arm("ours", OURS, ours, lambda got, want: torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)),
        Arm("loop over rows", REFERENCE, lambda: batch.row_by_row(logits)),
        Arm("SGLang penaltylib", LIBRARY, by_sglang, check_first_row, note="history only: wrong behind drafts"),
        Arm("copy", FLOOR, lambda: work.copy_(logits)),
    ]


def terms_arms(size: Size, variant: str, options: Options) -> list[Arm]:
    """Stride 1: what is added to the logits of the batch, and what scales them."""
    from idlm_sglang.engine.penalties import sampler_terms

    batch = Penalised(variant, size, options.device)
    orchestrator = batch.orchestrator()
    logits = peaked_logits((size.batch,), size.vocab, options.device)
    work = torch.empty_like(logits)

    def applied(additive: torch.Tensor, scaling: torch.Tensor | None) -> torch.Tensor:
        torch.add(logits, additive, out=work)
        return work if scaling is None else torch.where(work < 0, work * scaling, work / scaling)

    def ours() -> torch.Tensor:
        return applied(*sampler_terms(batch.penalised, batch.counts.of(batch.slots), batch.first, size.batch))

    def by_sglang() -> torch.Tensor:
        additive = torch.zeros(size.batch, size.vocab, device=options.device)
        orchestrator.accumulate_additive_penalties(additive)
        return applied(additive, orchestrator.accumulate_scaling_penalties())

    def check(got: torch.Tensor, want: torch.Tensor) -> None:
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)

    return [
        Arm("ours", OURS, ours, check),
        Arm("loop over rows", REFERENCE, lambda: batch.row_by_row(logits[:, None])[:, 0]),
        Arm("SGLang penaltylib", LIBRARY, by_sglang, check),
    ]


def count_arms(size: Size, options: Options) -> list[Arm]:
    """N committed tokens per request. SGLang's calls, one per token, update every penalty's own table."""
    batch = Penalised("all four", size, options.device)
    orchestrator = batch.orchestrator()
    tokens = torch.randint(4, size.vocab, (size.batch, size.stride), device=options.device)
    lens = torch.full((size.batch,), size.stride, dtype=torch.int32, device=options.device)
    columns = list(tokens.T.contiguous())

    def in_loops() -> torch.Tensor:
        added = torch.zeros(size.batch, size.vocab, dtype=torch.int32)
        for request, row in enumerate(tokens.tolist()):
            for token in row:
                added[request, token] += 1
        return added

    def check(got, want: torch.Tensor) -> None:
        before = batch.counts.of(batch.slots).clone()
        batch.counts.add(batch.slots, tokens, lens)
        assert_equal((batch.counts.of(batch.slots) - before).cpu(), want)

    def by_sglang() -> None:
        for column in columns:
            orchestrator.cumulate_output_tokens(column)

    return [
        Arm("ours", OURS, lambda: batch.counts.add(batch.slots, tokens, lens), check),
        Arm("loop over rows", REFERENCE, in_loops),
        Arm("SGLang penaltylib", LIBRARY, by_sglang, lambda got, want: None, note="four tables"),
    ]


def cases(options: Options) -> Iterator[Case]:
    for size in sizes(options):
        for variant in VARIANTS:
            yield Case(variant, size.dims(), partial(step_arms, size, variant, options), size.cells)
        yield Case("count", size.dims(), partial(count_arms, size, options), size.batch * size.vocab)
        if size.stride == 4:
            one = replace(size, stride=1)
            for variant in VARIANTS:
                yield Case(f"{variant}, one token", one.dims(), partial(terms_arms, one, variant, options), one.cells)
