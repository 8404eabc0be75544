"""The walk of a grammar over drafts, with the real xgrammar and llguidance over the embedded checkpoint's tokenizer."""

import random

import pytest
import torch
from transformers import AutoTokenizer

from idlm_sglang.demo import CHECKPOINT_DIR
from idlm_sglang.engine.grammar import Walk, _clean, allows, only_token, walk

MASK = 3


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(CHECKPOINT_DIR)


def xgrammar_object(tokenizer, regex):
    import xgrammar
    from sglang.srt.constrained.xgrammar_backend import XGrammarGrammar

    info = xgrammar.TokenizerInfo.from_huggingface(tokenizer, vocab_size=len(tokenizer))
    compiled = xgrammar.GrammarCompiler(info).compile_regex(regex)
    return XGrammarGrammar(xgrammar.GrammarMatcher(compiled, max_rollback_tokens=200), len(tokenizer), compiled, None)


def llguidance_object(tokenizer, regex):
    import llguidance
    import llguidance.hf
    from sglang.srt.constrained.llguidance_backend import GuidanceGrammar

    return GuidanceGrammar(llguidance.hf.from_tokenizer(tokenizer, len(tokenizer)), llguidance.LLMatcher.grammar_from_regex(regex))


BACKENDS = {"xgrammar": xgrammar_object, "llguidance": llguidance_object}


@pytest.fixture(params=BACKENDS)
def build(request, tokenizer):
    return lambda regex: BACKENDS[request.param](tokenizer, regex)


def walked(grammar, drafts, limit, tokenizer):
    mask = grammar.allocate_vocab_mask(vocab_size=len(tokenizer), batch_size=limit + 1, device="cpu")
    return walk(grammar, drafts, limit, mask, 0, MASK, len(tokenizer)), mask.numpy().view("uint32")


def allowed(words, row, vocab):
    return {token for token in range(vocab) if allows(words[row], token)}


def test_each_row_allows_what_the_grammar_allows_behind_its_drafts(build, tokenizer):
    """Against a fresh automaton led step by step, and with the walked one left where it stood."""
    rng = random.Random(1)
    vocab = len(tokenizer)
    for trial in range(25):
        regex = rng.choice(["[a-c]{4,9}", "(yes|no) (abc|xyz)+", "[0-9]{2}-[0-9]{2}", "a{12}"])
        grammar = build(regex)
        drafts, stepwise = [], build(regex)
        for _ in range(6):  # legal drafts, now and then an illegal one
            mask = stepwise.allocate_vocab_mask(vocab_size=vocab, batch_size=1, device="cpu")
            stepwise.fill_vocab_mask(mask, 0)
            legal = sorted(allowed(mask.numpy().view("uint32"), 0, vocab) - {2})
            if not legal or rng.random() < 0.15:
                drafts.append(5)
                break
            drafts.append(rng.choice(legal))
            stepwise.accept_token(drafts[-1])
            if stepwise.is_terminated():
                break
        limit = rng.randrange(1, 8)
        found, words = walked(grammar, drafts[:limit], limit, tokenizer)
        led = build(regex)
        for row in range(len(found.drafts) + 1):
            mask = led.allocate_vocab_mask(vocab_size=vocab, batch_size=1, device="cpu")
            led.fill_vocab_mask(mask, 0)
            assert allowed(words, row, vocab) == allowed(mask.numpy().view("uint32"), 0, vocab), (regex, drafts, row)
            if row < len(found.drafts):
                assert allows(words[row], found.drafts[row])
                led.accept_token(found.drafts[row])
        again, words_again = walked(grammar, drafts[:limit], limit, tokenizer)
        assert again == found and (words_again == words).all(), "the automaton was not left as found"


def test_a_forced_token_becomes_the_draft(build, tokenizer):
    """Where one token only is allowed it is drafted, in place of another or of none."""
    grammar = build("[0-9]")
    grammar.accept_token(tokenizer.encode("7", add_special_tokens=False)[0])
    found, words = walked(grammar, [], 3, tokenizer)
    assert only_token(words[0]) == 2 and found.drafts == [], "the end token is forced, and completes the grammar: the row decides it"
    unused = next(c for c in "qzjxkvwyQZJXK" if len([t for t in tokenizer.get_vocab() if t.startswith(c)]) == 1)
    found, _ = walked(build(f"{unused}{{8}}"), [9, 9], 4, tokenizer)
    only = tokenizer.convert_tokens_to_ids(unused)
    assert found.drafts == [only] * 4 and found.forced == [True] * 4


def test_a_forbidden_draft_ends_the_drafts(build, tokenizer):
    a, comma = (tokenizer.encode(x, add_special_tokens=False)[0] for x in "a,")
    found, words = walked(build("[ab]{3,9}"), [a, comma, a], 3, tokenizer)
    assert found.drafts == [a] and not any(found.forced) and not allows(words[1], comma)


def test_behind_the_end_there_are_no_drafts(build, tokenizer):
    grammar = build("a")
    grammar.accept_token(tokenizer.encode("a", add_special_tokens=False)[0])
    grammar.accept_token(2)
    assert grammar.is_terminated()
    found, words = walked(grammar, [9, 9], 2, tokenizer)
    assert found.drafts == [] and (words == 0xFFFFFFFF).all()


def test_a_failing_library_fails_the_request_only(build, tokenizer):
    grammar = build("[ab]{3,9}")
    grammar.fill_vocab_mask = lambda *_: (_ for _ in ()).throw(ValueError("broken"))
    found, _ = walked(grammar, [9], 2, tokenizer)
    assert str(found.failed) == "broken" and found.drafts == []


def test_packed_masks_are_read_right():
    words = torch.zeros(4, dtype=torch.int32)
    assert only_token(words.numpy().view("uint32")) is None
    for token in (0, 31, 32, 63, 127):
        words.zero_()
        words[token // 32] = torch.tensor(1 << (token % 32), dtype=torch.int64).to(torch.int32)
        view = words.numpy().view("uint32")
        assert only_token(view) == token and allows(view, token) and not allows(view, (token + 1) % 128) and not allows(view, 128)
    words.fill_(-1)
    assert only_token(words.numpy().view("uint32")) is None


def test_a_grammar_held_back_until_thinking_ends_is_walked_and_restored(build, tokenizer):
    """SGLang's wrapper for reasoning: nothing is constrained up to the end sequence, everything behind it."""
    from sglang.srt.constrained.reasoner_grammar_backend import ReasonerGrammarObject

    a, dash, comma = (tokenizer.encode(x, add_special_tokens=False)[0] for x in "a-,")

    def wrapped():
        outer = ReasonerGrammarObject(build("[ab]{3,9}"), [dash, dash])
        outer.maybe_init_reasoning(True)
        return outer

    grammar = wrapped()
    found, words = walked(grammar, [comma, dash, dash, a, comma], 5, tokenizer)
    assert found.drafts == [comma, dash, dash, a], "thinking is free, and the answer's comma is forbidden"
    assert all(allows(words[row], comma) for row in range(3)) and not any(allows(words[row], comma) for row in (3, 4))
    again, words_again = walked(grammar, [comma, dash, dash, a, comma], 5, tokenizer)
    assert again == found and (words == words_again).all(), "the automaton was not left as found"
    for token in (comma, dash, dash):
        grammar.accept_token(token)
    found, words = walked(grammar, [a, comma], 5, tokenizer)
    assert found.drafts == [a] and not allows(words[0], comma)


def test_survivors_that_the_grammar_forces_are_none_any_more():
    """(drafts, forced, count before, clean before) to what the MASK rows may build on."""
    assert _clean(Walk([5, 6], [False, False]), 3, 3) == 2, "a cut linear round stays linear"
    assert _clean(Walk([5, 6, 7], [True, True, False]), 0, 0) == 3, "forced drafts in a cold step"
    assert _clean(Walk([5, 6, 7], [False, True, True]), 3, 0) == 0, "behind a survivor nothing is certain"
    assert _clean(Walk([5, 6, 7], [True, True, False]), 3, 0) == 2
    assert _clean(Walk([], []), 3, 0) == 0
