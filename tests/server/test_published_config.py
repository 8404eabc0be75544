"""The published checkpoints' configuration, served unmodified: the right class, no remote code, in every process."""

import json
import shutil

import pytest
from safetensors.torch import save_file

from idlm_sglang.demo import CHECKPOINT_DIR
from tests.published import CONFIG, TRAP, random_shards
from tests.server.harness import Server, differing, prompts, side_by_side

# The 8B's config.json, its sizes scaled down.
SMALL = {
    "bos_token_id": 1,
    "eos_token_id": 2,
    "head_dim": 32,
    "hidden_size": 128,
    "intermediate_size": 384,
    "mask_token_id": 3,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "num_key_value_heads": 1,
    "vocab_size": 1024,
}


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A checkpoint directory of the published shape, with remote code that must never run."""
    at = tmp_path_factory.mktemp("published")
    config = CONFIG | SMALL
    (at / "config.json").write_text(json.dumps(config))
    for name in ("configuration_sdar.py", "modeling_sdar.py"):
        (at / name).write_text(TRAP)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(CHECKPOINT_DIR / name, at / name)
    save_file({name: weight for shard in random_shards(config) for name, weight in shard.items()}, at / "model.safetensors", {"format": "pt"})
    return str(at)


def test_the_published_config_is_served_as_an_idlm(published, logs):
    """AR (rollback: no ISD flag) and ISD, the latter even under --trust-remote-code, agree token for token; both started by SGLang's own command."""
    calls = [{"prompt": p, "temperature": 0, "max_new_tokens": 24, "ignore_eos": True} for p in prompts(60, seed=111)]
    ar = Server("published_ar", published, logs, module="sglang.launch_server")
    isd = Server("published_isd", published, logs, "--speculative-algorithm", "ISD", "--trust-remote-code", module="sglang.launch_server")
    with side_by_side(ar, isd):
        want, got = ar.many(calls, 8), isd.many(calls, 8)
        ar_log, isd_log = (server.log.read_text(errors="replace") for server in (ar, isd))
    assert not differing(want, got)
    assert not any(3 in a["output_ids"] for a in got), "MASK was emitted"
    for log in (ar_log, isd_log):
        assert "type=IDLMForCausalLM" in log, "another class was loaded"
        assert "remote code of the checkpoint was executed" not in log
    assert "A genuine block-diffusion SDAR model uses the same name" in isd_log
    assert "idlm: MASK token 3 (from the config)" in isd_log
    assert "the model accepts almost none of its own drafts" in isd_log, "random weights accept nothing: a warning is due"
