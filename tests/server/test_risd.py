"""R-ISD on real servers: the base model's own answers, token for token, drafted by an adapter on the MASK rows (fp32, embedded pair)."""

import peft
import pytest
import torch
from transformers import AutoTokenizer, Qwen3ForCausalLM

from idlm_sglang.demo import RISD_ADAPTER_DIR, RISD_BASE_DIR
from idlm_sglang.isd import BRANCH, OFF
from idlm_sglang.isd.decode import decode, one_row
from tests.server.harness import differing, held_out_prompts, ids, prompts
from tests.server.test_identity import per_forward
from tests.server.test_stride_switch import switch

MASK, ENDS = 3, frozenset({0, 2})
GREEDY = {"temperature": 0, "max_new_tokens": 40}


def calls():
    """Greedy and seeded requests of many kinds, prompts with the MASK token itself among them; some prompts take several chunks."""
    found = [{"prompt": p, **GREEDY} for p in prompts(50, seed=301) + held_out_prompts(30, seed=302)]
    found += [{"prompt": f"<|MASK|><|MASK|> {p}<|MASK|>", **GREEDY} for p in prompts(20, seed=303)]
    found += [{"prompt": p, **GREEDY, "presence_penalty": 0.7, "frequency_penalty": 0.3} for p in prompts(10, seed=304)]
    terms = [{"temperature": 1.0}, {"temperature": 0.7, "top_p": 0.8}, {"temperature": 1.5, "top_k": 5, "min_p": 0.05}]
    found += [{"prompt": p, "sampling_seed": i, "max_new_tokens": 32, **terms[i % 3]} for i, p in enumerate(prompts(40, seed=305))]
    return found


@pytest.fixture(scope="module")
def answers(risd_ar):
    """The base model's answers, from SGLang's own class for it."""
    assert "type=Qwen3ForCausalLM" in risd_ar.log.read_text(errors="replace")
    return risd_ar.many(calls(), 16)


@pytest.mark.parametrize("stride", [1, 2, 4, 8])
def test_answers_are_the_base_model_s_at_every_stride(risd, answers, stride):
    """In forwards of prompt chunks that take decode steps along, behind rejections with a branch or a chain."""
    assert "type=IDLMForCausalLM" in risd.log.read_text(errors="replace")
    assert switch(risd, stride) == [True]
    try:
        got = risd.many(calls(), 16)
    finally:
        switch(risd, 4)
    assert not differing(answers, got)
    assert risd.metrics()["idlm:mixed_steps_total"] > 0
    print(f"stride {stride}: {len(got)}/{len(got)} identical to the base model's AR")


def test_the_adapter_drafts_well(risd):
    """Tokens per forward at N = 4 on prompts that neither training saw; without the adapter the base's MASK rows give next to none."""
    got = risd.many([{"prompt": p, **GREEDY} for p in held_out_prompts(40, seed=306)], 1)
    print(f"tokens per forward: {per_forward(got):.2f}")
    assert per_forward(got) > 1.8


def test_logprobs_are_the_base_model_s(risd_ar, risd):
    asked = [{"prompt": p, **GREEDY, "return_logprob": True, "top_logprobs_num": 3} for p in held_out_prompts(12, seed=307)]
    for want, got in zip(risd_ar.many(asked, 4), risd.many(asked, 4), strict=True):
        assert ids(want) == ids(got)
        for name in ("output_token_logprobs", "output_top_logprobs"):
            left, right = ([row if isinstance(row[0], list) else [row] for row in answer["meta_info"][name]] for answer in (want, got))
            assert [[token for _, token, *_ in row] for row in left] == [[token for _, token, *_ in row] for row in right]
            values = [torch.tensor([logprob for row in rows for logprob, *_ in row]) for rows in (left, right)]
            torch.testing.assert_close(*values, atol=1e-4, rtol=1e-4)


@torch.inference_mode()
def test_mask_rows_are_peft_s_through_the_whole_model(risd):
    """The rounds of each answer are those of PEFT's own model, its adapter switched on at the MASK rows alone, in the plain decoding loop."""
    tokenizer = AutoTokenizer.from_pretrained(RISD_BASE_DIR)
    base = Qwen3ForCausalLM.from_pretrained(RISD_BASE_DIR, dtype=torch.float32)
    with pytest.warns(UserWarning, match="mask_token_id"):
        model = peft.PeftModel.from_pretrained(base, RISD_ADAPTER_DIR).eval()
    at_mask = {"on": True}
    for module in model.modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            whole, plain = module.forward, module.base_layer
            module.forward = lambda x, whole=whole, plain=plain: torch.where(at_mask["rows"][..., None], whole(x), plain(x))

    def logits(tokens, positions, visible=None):
        at_mask["rows"] = (tokens == MASK) & at_mask["on"]
        seen = torch.ones(1, *[tokens.shape[1]] * 2, dtype=torch.bool).tril() if visible is None else visible.tril()
        return model(input_ids=tokens, position_ids=positions, attention_mask=torch.where(seen, 0.0, -torch.inf)[:, None]).logits

    def plain_loop(salvage):
        found = [decode(logits, p, 4, MASK, one_row(), GREEDY["max_new_tokens"], ENDS, salvage) for p in asked]
        return [(d.tokens, d.forwards) for d in found]

    asked = [tokenizer(p)["input_ids"] for p in held_out_prompts(8, seed=308)]
    assert not any(MASK in p for p in asked)
    # With prompt logprobs the prefill carries no MASK rows, as in the plain loop.
    replies = [risd.post("/generate", {"input_ids": p, "sampling_params": GREEDY, "return_logprob": True, "logprob_start_len": 0}).json() for p in asked]
    served = [(ids(reply), reply["meta_info"]["spec_verify_ct"]) for reply in replies]
    branch, off = plain_loop(BRANCH), plain_loop(OFF)
    at_mask["on"] = False
    base = plain_loop(OFF)
    tokens = sum(len(t) - 1 for t, _ in served)
    shown = {name: f"{tokens / sum(n for _, n in of):.2f}" for name, of in (("served", served), ("branch", branch), ("off", off), ("no adapter", base))}
    print(f"tokens per forward, cold first steps: {shown}")
    assert served == branch
    assert [t for t, _ in base] == [t for t, _ in served], "the adapter changed an answer"
    assert sum(n for _, n in base) > 1.5 * sum(n for _, n in served), "the base drafts by itself: the adapter shows nothing"


def test_the_self_check_finds_nothing(risd):
    """A share of all answers above was asked again at one token per step, where the adapter is out of play."""
    import time

    deadline = time.monotonic() + 60
    while risd.metrics().get("idlm:selfcheck_total", 0) < 5 and time.monotonic() < deadline:
        risd.many([{"prompt": p, **GREEDY} for p in prompts(8, seed=309)], 1)
        time.sleep(2)
    found = risd.metrics()
    print({name: value for name, value in found.items() if "selfcheck" in name})
    assert found["idlm:selfcheck_total"] >= 5 and found.get("idlm:selfcheck_mismatch_total", 0) == 0
