"""Grammars: the walk over a request's drafts on the host (`engine.grammar.GrammarStep.adjust`) and the masking of logits (`.apply`).

A real xgrammar matcher of a JSON schema per request, every request of the batch with a grammar; the vocabulary of V = 151,936 is made up
of random strings. The walk's alternative is SGLang's own traversal of a linear chain, which fills masks but forces no tokens. The mask's is
xgrammar's kernel in place on the whole logits, with the mask laid out over all rows. Arms of `apply` work in place: masking what is masked
costs the same.
"""

import random
from collections.abc import Iterator
from functools import cache, partial
from types import SimpleNamespace

import numpy as np
import torch

from benchmarks.kernels.harness import LIBRARY, OURS, REFERENCE, Arm, Case, Options, assert_equal
from benchmarks.kernels.inputs import MASK, Size, embedded_vocab, peaked_logits, sizes
from idlm_sglang.demo import CHECKPOINT_DIR

SCHEMA = '{"type": "object", "properties": {"name": {"type": "string"}, "age": {"type": "integer"}}, "required": ["name", "age"]}'


@cache
def compiled(vocab: int):
    """The schema's grammar over the embedded tokenizer, or over random strings of 1 to 8 letters behind the bytes."""
    import xgrammar

    if vocab == embedded_vocab():
        from transformers import AutoTokenizer

        info = xgrammar.TokenizerInfo.from_huggingface(AutoTokenizer.from_pretrained(CHECKPOINT_DIR), vocab_size=vocab)
    else:
        draw = random.Random(0)
        letters = 'abcdefghijklmnopqrstuvwxyz0123456789 ":,{}'
        words = ["".join(draw.choices(letters, k=draw.randint(1, 8))) for _ in range(vocab - 260)]
        pieces = ["<pad>", "<unk>", "<eos>", "<mask>", *(chr(i) for i in range(256)), *words]
        info = xgrammar.TokenizerInfo(pieces, vocab_size=vocab, stop_token_ids=[2])
    return xgrammar.GrammarCompiler(info).compile_json_schema(SCHEMA)


def grammar_object(vocab: int):
    """SGLang's grammar object at the start of the schema."""
    import xgrammar
    from sglang.srt.constrained.xgrammar_backend import XGrammarGrammar

    return XGrammarGrammar(xgrammar.GrammarMatcher(compiled(vocab), max_rollback_tokens=200), vocab, compiled(vocab), None)


def unpacked(mask: torch.Tensor, vocab: int) -> torch.Tensor:
    """Packed int32 ``(R, V / 32)`` to ``(R, V)`` bool."""
    bits = np.unpackbits(mask.contiguous().numpy().view(np.uint8), axis=1, bitorder="little")
    return torch.from_numpy(bits[:, :vocab].astype(bool))


class Constrained:
    """A batch of requests with a grammar, drafts that the grammar allows, and the masks of their rows the slow way."""

    def __init__(self, size: Size, device: str):
        from idlm_sglang.engine.grammar import GrammarStep
        from idlm_sglang.engine.state import Carried

        k, self.size = size.k, size
        draw = random.Random(0)
        self.reqs = [SimpleNamespace(grammar=grammar_object(size.vocab), finished=lambda: False) for _ in range(size.batch)]
        self.drafts = [self._draft(req.grammar, draw) for req in self.reqs]
        drafts = torch.tensor(self.drafts, device=device)
        counts = torch.full((size.batch,), k, device=device)
        self.carried = Carried(drafts, counts, torch.zeros(size.batch, k, device=device), None, counts)
        self.chain = torch.cat([torch.zeros(size.batch, 1, dtype=torch.int64, device=device), drafts], dim=1)
        self.new_step = lambda: GrammarStep(self.reqs, list(range(size.batch)), [k] * size.batch, k, size.vocab, MASK)

    def _draft(self, grammar, draw: random.Random) -> list[int]:
        drafts = []
        mask = grammar.allocate_vocab_mask(vocab_size=self.size.vocab, batch_size=1, device="cpu")
        for _ in range(self.size.k):
            grammar.fill_vocab_mask(mask, 0)
            token = draw.choice([t for t in unpacked(mask, self.size.vocab)[0].nonzero().flatten().tolist() if t > MASK])
            grammar.accept_token(token)
            drafts.append(token)
        grammar.rollback(self.size.k)
        return drafts

    def masks(self) -> torch.Tensor:
        """Packed ``(B * N, V / 32)``: a fresh matcher per request, fed draft by draft."""
        rows = self.reqs[0].grammar.allocate_vocab_mask(vocab_size=self.size.vocab, batch_size=self.size.batch * self.size.stride, device="cpu")
        for b, drafts in enumerate(self.drafts):
            grammar = grammar_object(self.size.vocab)
            for i, token in enumerate([None, *drafts]):
                if token is not None:
                    grammar.accept_token(token)
                grammar.fill_vocab_mask(rows, b * self.size.stride + i)
        return rows

    def by_sglang(self) -> torch.Tensor:
        from sglang.srt.speculative.spec_utils import GrammarTree, generate_token_bitmask

        return generate_token_bitmask(self.reqs, *GrammarTree.from_linear_chain(self.chain).resolve(), self.size.vocab)[0]


def walk_arms(size: Size, options: Options) -> list[Arm]:
    batch = Constrained(size, options.device)

    def ours():
        step = batch.new_step()
        return step, *step.adjust(batch.carried)

    def check(got, want: torch.Tensor) -> None:
        step, carried, failed = got
        assert not failed, f"grammars failed: {failed}"
        assert_equal(carried.drafts, batch.carried.drafts)
        assert_equal(carried.counts, batch.carried.counts)
        logits = torch.zeros(size.batch, size.width, size.vocab, device=options.device)
        step.apply(logits)
        assert_equal(logits[:, : size.stride].reshape(-1, size.vocab).cpu() == 0, unpacked(want, size.vocab))

    return [
        Arm("ours", OURS, ours, check),
        Arm("fresh matchers", REFERENCE, batch.masks),
        Arm("SGLang, chain", LIBRARY, batch.by_sglang, note="forces no tokens"),
    ]


def apply_arms(size: Size, options: Options) -> list[Arm]:
    import xgrammar

    batch = Constrained(size, options.device)
    logits = peaked_logits((size.batch, size.width), size.vocab, options.device)
    packed = batch.masks()
    blocked = ~unpacked(packed, size.vocab).view(size.batch, size.stride, size.vocab).to(options.device)
    step = batch.new_step()
    step.adjust(batch.carried)
    verifying = [b * size.width + i for b in range(size.batch) for i in range(size.stride)]
    laid_out = torch.full((size.batch * size.width, packed.shape[1]), -1, dtype=torch.int32)
    laid_out[verifying] = packed
    work = {name: logits.clone() for name in ("ours", "xgrammar", "filled")}

    def ours() -> torch.Tensor:
        step.apply(work["ours"])
        return work["ours"]

    def by_xgrammar() -> torch.Tensor:
        mask = laid_out.to(options.device, non_blocking=True)
        xgrammar.apply_token_bitmask_inplace(work["xgrammar"].view(-1, size.vocab), mask, vocab_size=size.vocab, indices=verifying)
        return work["xgrammar"]

    def by_fill() -> torch.Tensor:
        work["filled"][:, : size.stride].masked_fill_(blocked, float("-inf"))
        return work["filled"]

    def want() -> torch.Tensor:
        shifts = torch.arange(32, dtype=torch.int32)
        allowed = (packed[..., None] >> shifts & 1).bool().flatten(1)[:, : size.vocab].view(size.batch, size.stride, size.vocab)
        out = logits.clone()
        out[:, : size.stride] = torch.where(allowed.to(options.device), out[:, : size.stride], float("-inf"))
        return out

    return [
        Arm("ours", OURS, ours),
        Arm("unpack and where", REFERENCE, want),
        Arm("xgrammar in place", LIBRARY, by_xgrammar),
        Arm("torch masked_fill_", LIBRARY, by_fill, note="mask given as bool"),
    ]


def cases(options: Options) -> Iterator[Case]:
    for size in sizes(options):
        yield Case("walk", size.dims(), partial(walk_arms, size, options), size.cells)
        yield Case("apply", size.dims(), partial(apply_arms, size, options), size.cells)
