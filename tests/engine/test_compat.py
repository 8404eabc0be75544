"""The patches on SGLang: all of them take, each does its one thing, and a failure is loud."""

import pkgutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from idlm_sglang import compat
from idlm_sglang.config import SettingError, Settings, hand_down, handed_down


@pytest.mark.parametrize("found", ["0.5.23", "0.5.23.post1"])
def test_the_tested_versions_are_accepted(found):
    compat.check_version(found)


@pytest.mark.parametrize("found", ["0.5.22", "0.5.23rc1", "0.5.24", "0.6.0", "1.0", "0.4.99"])
def test_other_versions_are_refused_in_one_line(found):
    with pytest.raises(SettingError, match=f"SGLang {found} is installed; .*>=0.5.23,<0.5.24"):
        compat.check_version(found)


def test_every_patch_says_what_why_guard_and_when_it_goes():
    for patch in compat.PATCHES + compat.CPU_PATCHES:
        for word in ("What:", "Why:", "Guard:", "Goes when:"):
            assert word in patch.hook.__doc__, (patch.target, word)


def run(code: str) -> subprocess.CompletedProcess:
    """In a process that collects no garbage, which is much of what importing SGLang takes."""
    return subprocess.run([sys.executable, "-c", f"import gc; gc.disable()\n{code}"], capture_output=True, text=True, timeout=300)


def test_all_patches_take_in_a_fresh_process_and_registering_again_is_harmless():
    done = run(
        "from sglang.srt.plugins import load_plugins; load_plugins(); load_plugins()\n"
        "from idlm_sglang import compat; compat.assert_applied()\n"
        "from sglang.srt.speculative.spec_info import SpeculativeAlgorithm\n"
        "print(type(SpeculativeAlgorithm.from_string('ISD')).__name__)"
    )
    assert done.returncode == 0 and "IsdAlgorithm" in done.stdout, done.stderr[-2000:]


def test_a_patch_that_did_not_take_ends_the_start_by_name():
    done = run(
        "from idlm_sglang import compat\n"
        "compat.PATCHES += (compat.Patch('sglang.srt.layers.sampler.gone_in_this_version', 'AFTER', compat.attach_seeds),)\n"
        "from sglang.srt.plugins import load_plugins; load_plugins()\n"
        "compat.assert_applied()"
    )
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("idlm: SGLang 0.5.23 did not take 1 of ")
    assert "sglang.srt.layers.sampler.gone_in_this_version" in done.stderr.strip().splitlines()[-1]


def test_a_failing_plugin_is_a_refusal_and_never_a_silent_ar_server():
    done = run(
        "from idlm_sglang import compat\n"
        "compat.SUPPORTED = '>=9,<10'\n"
        "from sglang.srt.plugins import load_plugins; load_plugins()\n"
        "from sglang.srt.server_args import prepare_server_args\n"
        "from idlm_sglang.demo import CHECKPOINT_DIR\n"
        "a = prepare_server_args(['--model-path', str(CHECKPOINT_DIR), '--speculative-algorithm', 'ISD', '--device', 'cpu'])\n"
        "a.resolve_once()"
    )
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("idlm: --speculative-algorithm ISD is not available: SGLang 0.5.23 is installed")


def test_a_replaced_function_that_changed_is_an_error(monkeypatch):
    wrong = compat.Patch("sglang.srt.layers.sampler.create_sampler", "REPLACE", compat.page_table_on_host, ("backend", "more"))
    monkeypatch.setattr(compat, "patches", lambda: (wrong,))
    with pytest.raises(SettingError, match="create_sampler takes .*backend.*; allowed: .*more"):
        compat.register_patches()


def test_the_cpu_patches_are_for_machines_without_an_accelerator(monkeypatch):
    monkeypatch.setattr(compat.platform, "accelerator_available", lambda: True)
    assert compat.patches() == compat.PATCHES
    monkeypatch.setattr(compat.platform, "accelerator_available", lambda: False)
    assert compat.patches() == compat.PATCHES + compat.CPU_PATCHES


def test_the_sampler_is_replaced_only_where_it_is_the_stock_one():
    from sglang.srt.layers.sampler import Sampler

    class Custom(Sampler):
        def __init__(self):
            pass

    custom = Custom()
    assert compat.token_keyed_sampler(custom) is custom


@pytest.mark.parametrize("kind", ["torch", "triton"])
def test_the_sampler_draws_by_the_ops_of_the_settings(kind, monkeypatch):
    from sglang.srt.layers.sampler import Sampler

    from idlm_sglang.engine.step_ops import step_ops

    monkeypatch.setattr(Sampler, "__init__", torch.nn.Module.__init__)
    monkeypatch.setenv("IDLM_RESOLVED_SETTINGS", "")
    hand_down(Settings(step_ops=kind))
    assert compat.token_keyed_sampler(Sampler())._ops is step_ops(kind)


def test_targets_are_where_the_patches_say():
    for patch in compat.PATCHES + compat.CPU_PATCHES:
        found = pkgutil.resolve_name(patch.target)
        assert isinstance(found, property) if patch.kind == compat.PROPERTY else callable(found), patch.target


class _Config(SimpleNamespace):
    pass


def mapped(architectures, **args):
    """The architectures and MASK that serve_as_idlm leaves for a checkpoint of these architectures."""
    fields = {"speculative_algorithm": None, "dllm_algorithm": None, "tokenizer_path": None, "model_path": "x"}
    fields |= {"trust_remote_code": False, "revision": None, "skip_tokenizer_init": True, "device": "cpu"}
    fields |= {"attention_backend": None, "prefill_attention_backend": None, "decode_attention_backend": None} | args
    hf = SimpleNamespace(architectures=list(architectures), mask_token_id=3, vocab_size=10)
    compat.serve_as_idlm(_Config(hf_config=hf), SimpleNamespace(**fields))
    return hf.architectures


def test_which_checkpoints_become_idlm(monkeypatch):
    monkeypatch.setenv("IDLM_RESOLVED_SETTINGS", "")
    ours = ["IDLMForCausalLM"]
    assert mapped(["SDARForCausalLM"]) == ours, "AR serving of a published checkpoint (rollback)"
    assert handed_down().step_ops == "torch", "the sampler of AR serving has the ops of the settings, too"
    assert mapped(["SDARForCausalLM"], speculative_algorithm="ISD") == ours
    assert mapped(["Qwen3ForCausalLM"], speculative_algorithm="ISD") == ours
    assert mapped(["SDARForCausalLM"], dllm_algorithm="LowConfidence") == ["SDARForCausalLM"], "genuine SDAR stays SGLang's"
    assert mapped(["Qwen3ForCausalLM"]) == ["Qwen3ForCausalLM"], "plain AR serving is left alone"
    assert mapped(["LlamaForCausalLM"], speculative_algorithm="ISD") == ["LlamaForCausalLM"]


def test_a_function_that_a_module_does_not_see_any_more_is_an_error(monkeypatch):
    wrong = compat.Patch("sglang.srt.managers.schedule_batch.gone.search", compat.MODULE, compat.search_in_time)
    monkeypatch.setattr(compat, "patches", lambda: (wrong,))
    with pytest.raises(SettingError, match="schedule_batch has no gone.search any more"):
        compat.register_patches()


def test_a_property_that_is_none_any_more_is_an_error(monkeypatch):
    wrong = compat.Patch("sglang.srt.managers.schedule_batch.Req.finished", compat.PROPERTY, compat.scores_without_generating)
    monkeypatch.setattr(compat, "patches", lambda: (wrong,))
    with pytest.raises(SettingError, match="Req.finished is no property any more"):
        compat.register_patches()


class Pool:
    """As much of an allocator and of a prefix cache as a budget asks for."""

    def __init__(self, free: int, evictable: int, page: int):
        self.page_size, self._free, self._evictable = page, free, evictable

    def available_size(self):
        return self._free

    def evictable_size(self):
        return self._evictable

    def supports_mamba(self):
        return False


@pytest.mark.parametrize(
    "free, evictable, page, expected, chunk",
    [(6, 0, 1, 500, 6), (6, 4, 1, 500, 10), (0, 0, 1, 500, None), (40, 0, 16, 500, 32), (300, 0, 1, 0, 256), (300, 0, 1, 100, 200), (5, 0, 16, 500, None)],
)
def test_a_chunk_is_no_longer_than_what_the_pool_has_left(free, evictable, page, expected, chunk, monkeypatch):
    """``expected``: tokens that running requests are expected to take; SGLang then offers the full 256, free or not."""
    from sglang.srt.mem_cache.prefill_budget import PrefillBudget

    from idlm_sglang.compat.reserve import chunk_that_fits

    pool = Pool(free, evictable, page)
    budget = PrefillBudget(pool, pool, num_mixed_decode_tokens=expected)
    original = vars(PrefillBudget)["available_chunk_tokens"]
    original = getattr(original, "__wrapped__", original)
    schedule = SimpleNamespace(enable_priority_scheduling=False, disable_priority_preemption=False)
    monkeypatch.setattr("sglang.srt.runtime_context.get_schedule", lambda: schedule)
    assert chunk_that_fits(original, budget, 256) == chunk
    schedule.enable_priority_scheduling = True
    assert chunk_that_fits(original, budget, 256) == original(budget, 256), "a waiting chunk would be counted as run"
