"""A tiny random Qwen3 model with the demo tokenizer, and conversations to train it on."""

import json
import shutil

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from idlm_sglang.convert import options
from idlm_sglang.demo import RISD_BASE_DIR
from idlm_sglang.demo.corpus import training_dialogues

VOCABULARY = 1030  # the tokenizer has 1,024: six rows of the embedding are spare


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """Directory of the model: 2 layers, hidden 32."""
    directory = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    config = Qwen3Config(vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
                         tie_word_embeddings=True, initializer_range=0.1, eos_token_id=2, pad_token_id=0, bos_token_id=0)
    Qwen3ForCausalLM(config).save_pretrained(directory)
    for name in "tokenizer.json", "tokenizer_config.json":
        shutil.copy(RISD_BASE_DIR / name, directory)
    return directory


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A JSONL file of 60 conversations."""
    path = tmp_path_factory.mktemp("data") / "chats.jsonl"
    stream = training_dialogues(3)
    path.write_text("".join(json.dumps({"messages": next(stream).messages()}) + "\n" for _ in range(60)))
    return path


@pytest.fixture
def plan(base, data, tmp_path):
    """A function: the plan of a small command line with further words."""
    def make(*words, out="out"):
        line = [str(base), "--data", str(data), "--out", str(tmp_path / out), "--rank", "4", "--steps", "20", "--rows", "2", "--length", "96",
                "--learning-rate", "0.01", "--device", "cpu", *words]
        return options.resolve(options.parser().parse_args(line))
    return make
