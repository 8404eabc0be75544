"""The adapter contributes at the rows that play the MASK role, and nowhere else."""

import random

import pytest
import torch
from transformers import Qwen3ForCausalLM

from idlm_sglang.convert import base as bases
from idlm_sglang.convert import chats
from idlm_sglang.convert.rows import build_batch
from idlm_sglang.convert.train import Trainer

MASK = 3


@pytest.fixture
def trainer(plan, base):
    """A trainer whose adapter is no longer zero."""
    config = bases.load_config(str(base))
    chosen = plan()
    stream = chats.Stream(chats.read(chosen.data), chats.Encoder(bases.load_tokenizer(str(base))), chosen.length, 0)
    made = Trainer(chosen, bases.load_model(str(base), config, torch.device("cpu"), torch.float32), MASK, stream, torch.float32)
    with torch.no_grad():
        for p in made.trained.values():
            p.normal_(std=0.2)
    return made


def _base_logits(base, batch):
    from idlm_sglang.convert import attention
    model = Qwen3ForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation=attention.NAME)
    with torch.no_grad():
        return model(input_ids=batch.input_ids, position_ids=batch.positions, attention_mask=batch.unseen(torch.float32), use_cache=False).logits


def test_clean_rows_are_the_bases_bit_for_bit_and_without_the_gate_they_are_not(trainer, base):
    batch = build_batch(iter(trainer.stream), MASK, random.Random(0), 2, 96, 3)
    # By role: a MASK token in the text is text.
    batch.input_ids[:, 10:13] = MASK
    reference = _base_logits(base, batch)
    c = batch.clean
    gated = trainer.logits(batch)
    assert torch.equal(gated[:, :c], reference[:, :c])
    assert not torch.equal(gated[:, c:], reference[:, c:]), "the MASK rows are adapted"
    hook = trainer._gate._gated
    for layer in trainer.model.modules():
        layer._forward_hooks = {key: f for key, f in layer._forward_hooks.items() if f != hook}
    stock = trainer.logits(batch)
    moved = (stock[:, :c] - reference[:, :c]).abs().max()
    print(f"stock PEFT moves the clean rows' logits by up to {moved:.2f}")
    assert not torch.equal(stock[:, :c], reference[:, :c])


def test_training_leaves_every_weight_of_the_base_as_it_was(trainer, base):
    before = Qwen3ForCausalLM.from_pretrained(base, dtype=torch.float32).state_dict()
    trainer._conversations = iter(trainer.stream)
    adapter = {name: p.detach().clone() for name, p in trainer.trained.items()}
    for _ in range(3):
        trainer.advance()
    assert all("lora_" in name for name in trainer.trained)
    assert all(not torch.equal(p, adapter[name]) for name, p in trainer.trained.items()), "every part of the adapter is trained"
    after = {name.replace(".base_layer", ""): p for name, p in trainer.model.state_dict().items() if "lora_" not in name}
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
