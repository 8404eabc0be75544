"""The shipped checkpoint: pinned, loadable by stock loaders, and as good as its model card says on a few held-out prompts."""

import hashlib
import json
import subprocess
import sys

import pytest
import torch

from idlm_sglang.demo import CHECKPOINT_DIR, CHECKPOINT_SHA256
from idlm_sglang.demo.corpus import held_out_dialogues
from idlm_sglang.demo.evaluate import Counts, Decoder
from idlm_sglang.demo.split import VALUES
from idlm_sglang.demo.tokenizer import encode_dialogue


@pytest.fixture(scope="module")
def decoder():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a model this small loses time on a second one
    yield Decoder(CHECKPOINT_DIR)
    torch.set_num_threads(threads)


def test_weights_are_the_pinned_ones_and_small():
    weights = (CHECKPOINT_DIR / "model.safetensors").read_bytes()
    assert hashlib.sha256(weights).hexdigest() == CHECKPOINT_SHA256
    assert len(weights) < 5.9e6
    assert CHECKPOINT_SHA256 in (CHECKPOINT_DIR / "README.md").read_text(), "the model card names the same file"


def test_importing_the_package_loads_no_torch():
    code = "import sys, idlm_sglang.demo; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "False"


def test_config_names_our_architecture_and_the_mask_token(decoder):
    config = json.loads((CHECKPOINT_DIR / "config.json").read_text())
    assert config["architectures"] == ["IDLMForCausalLM"] and config["model_type"] == "qwen3"
    assert config["mask_token_id"] == decoder.tokenizer.convert_tokens_to_ids("<|MASK|>") == decoder.mask
    assert config["eos_token_id"] == decoder.tokenizer.convert_tokens_to_ids("<|im_end|>") == decoder.tokenizer.eos_token_id
    assert config["pad_token_id"] == decoder.tokenizer.convert_tokens_to_ids("<|endoftext|>") == decoder.tokenizer.pad_token_id
    assert decoder.model.lm_head.weight is decoder.model.model.embed_tokens.weight
    assert len(decoder.tokenizer) == config["vocab_size"]


def test_chat_template_renders_chatml_with_the_tokens_of_training(decoder):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 47 + 38?"},
                {"role": "assistant", "content": "- 85\n- é"}, {"role": "user", "content": "Thanks"}]
    text = decoder.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == ("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhat is 47 + 38?<|im_end|>\n<|im_start|>assistant\n- 85\n- é<|im_end|>\n"
                    "<|im_start|>user\nThanks<|im_end|>\n<|im_start|>assistant\n")
    ids = decoder.tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
    assert ids == encode_dialogue(decoder.tokenizer.backend_tokenizer, messages)[0]
    assert decoder.tokenizer.decode(decoder.tokenizer("any Text,  ü 日本\n")["input_ids"]) == "any Text,  ü 日本\n"


def test_a_digit_is_one_token(decoder):
    assert [decoder.tokenizer.decode(t) for t in decoder.tokenizer("2026")["input_ids"]] == list("2026")


@pytest.mark.parametrize("family, least", [("addition", 16), ("whereabouts", 16), ("greeting", 16)])
def test_answers_to_held_out_prompts_are_mostly_right(decoder, family, least):
    right = 0
    for item in held_out_dialogues(9, 20, [family], VALUES):
        output = decoder.generate(decoder.prompt(item), 4, 0.0, Counts())
        assert output[-1] == decoder.tokenizer.eos_token_id
        right += decoder.tokenizer.decode(output, skip_special_tokens=True) == item.turns[-1][1]
    print(f"{family}: {right}/20 exactly right")
    assert right >= least


def test_greedy_isd_is_ar_at_three_tokens_per_forward_on_held_out_prompts(decoder):
    prompts = [decoder.prompt(item) for item in held_out_dialogues(9, 30)]
    counts = Counts()
    for prompt in prompts:
        assert decoder.generate(prompt, 4, 0.0, counts) == decoder.generate(prompt, 1, 0.0, Counts())
    print(f"{counts.tokens / counts.forwards:.2f} tokens per forward at N = 4")
    assert counts.tokens / counts.forwards >= 3.0
