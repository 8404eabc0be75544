"""A mistake in the command, the data or the base ends in one line that names it."""

import json
import shutil

import pytest
import torch

from idlm_sglang.config import SettingError
from idlm_sglang.convert import base as bases
from idlm_sglang.convert import chats, train
from idlm_sglang.serving.cli import main

CHAT = json.dumps({"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello you"}]})
QUESTION = json.dumps({"messages": [{"role": "user", "content": "Hi"}]})


def _refused(capsys, *words: str) -> tuple[int, str]:
    try:
        code = main(["convert", *words])
    except SystemExit as ended:
        code = ended.code
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("idlm: "), lines
    return code, lines[0]


@pytest.mark.parametrize("words, said", [
    (("--rank", "0"), "--rank 0 is out of range"),
    (("--blocks", "1,16"), "--blocks 1,16 is out of range; allowed: an integer from 1 to 15"),
    (("--learning-rate", "nan"), "--learning-rate nan"),
    (("--clean-weight", "0.2"), "--clean-weight 0.2"),
    (("--held-out", "0"), "--held-out 0"),
    (("--mask-token", "<|none|>"), "--mask-token <|none|> is no token of BASE"),
    (("--mask-token", "1030"), "--mask-token 1030"),
    (("--data", "/nowhere.jsonl"), "--data /nowhere.jsonl cannot be read: No such file"),
    (("--length", "8"), "--length 8: no conversation has two tokens"),
])
def test_a_setting(capsys, base, data, tmp_path, words, said):
    code, line = _refused(capsys, str(base), "--data", str(data), "--out", str(tmp_path / "out"), "--rows", "1", "--steps", "1", "--device", "cpu", *words)
    assert code == 2 and said in line


@pytest.mark.parametrize("text, said", [
    (CHAT + "\n\n{\n", "line 3: no JSON object with messages"),
    (CHAT + "\n[1]\n", "line 2: no JSON object with messages"),
    (CHAT + '\n{"messages": []}\n', "line 2: messages is not a list with entries"),
    (CHAT + '\n{"messages": [{"role": "assistant", "content": [1]}]}\n', "line 2: a message without a role and a content that are text"),
    (f"{QUESTION}\n{CHAT}\n", "line 1: no answer (role assistant)"),
    (CHAT + "\n", "has 1 conversations"),
    ("", "has 0 conversations"),
])
def test_a_line_of_the_data(capsys, base, tmp_path, text, said):
    (tmp_path / "bad.jsonl").write_text(text)
    code, line = _refused(capsys, str(base), "--data", str(tmp_path / "bad.jsonl"), "--out", str(tmp_path / "out"))
    assert code == 2 and said in line and not (tmp_path / "out").exists()


def test_lines_are_ended_by_newlines_alone(tmp_path):
    chat = json.dumps({"messages": [{"role": "user", "content": "a\u2028b"}, {"role": "assistant", "content": "c\u0085d"}, {"role": "user", "content": "e"}]}, ensure_ascii=False)
    (tmp_path / "chats.jsonl").write_text(f"{chat}\r\n\n{CHAT}\n", encoding="utf-8")
    first, second = chats.read(tmp_path / "chats.jsonl")
    assert [m["content"] for m in first] == ["a\u2028b", "c\u0085d"], "what follows the last answer is left out"
    assert second[-1]["content"] == "Hello you"


@pytest.mark.parametrize("changes, said", [
    ({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}, "is a llama"),
    ({"vocab_size": 4}, "cannot be loaded"),
    (None, "cannot be loaded"),
])
def test_a_base(capsys, base, data, tmp_path, changes, said):
    other = tmp_path / "other"
    if changes:
        shutil.copytree(base, other)
        (other / "config.json").write_text(json.dumps(json.loads((base / "config.json").read_text()) | changes))
    code, line = _refused(capsys, str(other), "--data", str(data), "--out", str(tmp_path / "out"), "--device", "cpu")
    assert code == 2 and said in line


def test_the_mask_is_the_tokenizers_else_a_spare_row_else_refused(base):
    config, tokenizer = bases.load_config(str(base)), bases.load_tokenizer(str(base))
    assert bases.mask_token(config, tokenizer, None)[0] == 3
    assert bases.mask_token(config, tokenizer, "1025")[0] == 1025

    class Plain:
        """The tokenizer of a model without MASK."""
        mask_token_id = None

        def get_vocab(self):
            return {f"t{i}": i for i in range(1024)}

    assert bases.mask_token(config, Plain(), None)[0] == 1024
    config.vocab_size = 1024
    with pytest.raises(SettingError, match="no token to be MASK"):
        bases.mask_token(config, Plain(), None)
    config.mask_token_id = 5
    with pytest.raises(SettingError, match="contradicts"):
        bases.mask_token(config, Plain(), "t6")


def test_out(capsys, base, data, tmp_path):
    line = [str(base), "--data", str(data), "--out", str(tmp_path / "out"), "--rank", "4", "--rows", "1", "--length", "64", "--steps", "2", "--device", "cpu"]
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "letter.txt").write_text("mine")
    code, said = _refused(capsys, *line, "--out", str(tmp_path / "taken"))
    assert code == 2 and "holds something else" in said
    code, said = _refused(capsys, *line, "--learning-rate", "1e30")
    assert code == 1 and "the loss is nan at step 2" in said
    code, said = _refused(capsys, *line, "--learning-rate", "1e30", "--rank", "8")
    assert code == 2 and "--rank 8: the training in" in said and "was begun with 4" in said
    assert main(["convert", *line, "--out", str(tmp_path / "new")]) == 0
    code, said = _refused(capsys, *line, "--out", str(tmp_path / "new"))
    assert code == 2 and "holds a finished training" in said


def test_a_device_that_is_too_small(capsys, base, data, tmp_path, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(train.Trainer, "run", full)
    code, line = _refused(capsys, str(base), "--data", str(data), "--out", str(tmp_path / "out"), "--rows", "3", "--length", "64", "--steps", "1", "--device", "cpu")
    assert code == 1 and "cpu has not enough memory for --rows 3 of --length 64" in line
