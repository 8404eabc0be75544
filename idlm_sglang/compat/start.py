"""Before a server serves: sizes, model class and configuration, settings that cannot be served."""

import logging
import os

from idlm_sglang.compat.running import is_isd
from idlm_sglang.config import ALGORITHM, SettingError
from idlm_sglang.platform.float32 import ATTENTION, float32_environ, in_float32

logger = logging.getLogger(__name__)


def room_for_strides(result: int) -> int:
    """What: ``get_req_to_token_extra_context_len`` returns at least the decode reserve.
    Why: at page size 1 it adds 4 + W columns while a decode step reserves 2W: rows overflow from W = 5 on.
    Guard: the hook applied; test with W >= 9 and a small context.
    Goes when: SGLang sizes the row by ``get_alloc_reserve_per_decode`` for every algorithm, as it does for UNO.
    """
    from sglang.srt.mem_cache.allocation_sizing import get_alloc_page_size, get_alloc_reserve_per_decode

    if not is_isd():
        return result
    return max(result, get_alloc_reserve_per_decode() + get_alloc_page_size() - 1)


def serve_as_idlm(config, server_args, *_, **kwargs) -> None:
    """What: ``ModelConfig.from_server_args`` maps I-DLM checkpoints to our class and fills in MASK.
    Why: ``SDARForCausalLM`` is SGLang's block-diffusion class; a plain Qwen3 checkpoint needs MASK removed under ISD.
    Guard: nothing changes for other architectures, nor with ``--dllm-algorithm``.
    Goes when: published checkpoints name an architecture of their own.
    """
    from sglang.srt.arg_groups.overrides import resolving_view

    from idlm_sglang import checkpoint
    from idlm_sglang.adapter import read_adapter
    from idlm_sglang.config import Settings, hand_down, read_settings, read_step_ops
    from idlm_sglang.engine.step_ops import resolve_step_ops

    cfg = resolving_view(server_args)
    hf = config.hf_config
    names = list(hf.architectures or [])
    isd = (cfg.speculative_algorithm or "").upper() == ALGORITHM
    if not isd:
        # The sampler is ours in any case: a seeded answer is the same in AR serving and with ISD.
        hand_down(Settings(step_ops=resolve_step_ops(read_step_ops(), cfg.device)))
    ours = {checkpoint.ARCHITECTURE, checkpoint.PUBLISHED_ARCHITECTURE} | ({checkpoint.AR_ARCHITECTURE} if isd else set())
    if cfg.dllm_algorithm is not None or not ours & set(names):
        return

    def load_tokenizer():
        from sglang.srt.utils.hf_transformers_utils import get_tokenizer

        return get_tokenizer(cfg.tokenizer_path or cfg.model_path, trust_remote_code=cfg.trust_remote_code, tokenizer_revision=cfg.revision)

    loader = None if cfg.skip_tokenizer_init else load_tokenizer
    settings = read_settings()
    lora = settings.lora if isd else None
    adapters = None if lora is None else read_adapter(lora).mask_token_id
    hf.mask_token_id, _ = checkpoint.resolve_mask_token_id(hf, loader, settings.mask_token_id, hf.vocab_size, adapters)
    # Under an adapter the answers are the base model's own, and its AR serving takes MASK for a token like any other.
    hf.idlm_keeps_mask = lora is not None and checkpoint.AR_ARCHITECTURE in names
    hf.architectures = [checkpoint.ARCHITECTURE]
    if "flashinfer" in (cfg.attention_backend, cfg.prefill_attention_backend, cfg.decode_attention_backend):
        # SGLang gives models of this kind more, by the name that is gone now.
        os.environ.setdefault("SGLANG_FLASHINFER_WORKSPACE_SIZE", str(512 << 20))


def model_class_on_demand(*args, **kwargs) -> None:
    """What: before ``get_model_architecture`` looks a class up, ours is in ``ModelRegistry``.
    Why: registering at plugin load would import the model code in every process, HTTP and detokenizer included.
    Guard: the hook applied; without it the architecture name is unknown and the start fails.
    Goes when: ``ModelRegistry`` takes lazy entries.
    """
    from sglang.srt.models.registry import ModelRegistry

    from idlm_sglang.model import IDLMForCausalLM

    ModelRegistry.models[IDLMForCausalLM.__name__] = IDLMForCausalLM


def refuse_before_resolution(server_args) -> None:
    """What: before SGLang resolves its arguments, those that ISD does not serve are refused as typed.
    Why: a registered algorithm is asked late: until then some are rewritten (``--enable-dp-attention``), dropped
    (``--speculative-adaptive``), or fail elsewhere with a stack trace.
    Guard: the hook applied; the table of refusals in tests/serving.
    Goes when: ``CustomSpecAlgo.validate_server_args`` runs on the raw arguments.
    """
    from idlm_sglang.engine.algorithm import choose_backend, refuse_unserved

    if (server_args.speculative_algorithm or "").upper() == ALGORITHM:
        refuse_unserved(server_args)
        choose_backend(server_args)
    elif "IDLM_LORA" in os.environ:
        allowed = f"--speculative-algorithm {ALGORITHM}, or IDLM_LORA unset"
        raise SettingError(f"IDLM_LORA={os.environ['IDLM_LORA']} has no meaning with --speculative-algorithm {server_args.speculative_algorithm}; allowed: {allowed}")


def compute_in_float32(server_args) -> None:
    """What: where ``--dtype float32`` is served on a GPU, environment and attention backend are those that compute in it, as far as the user names none.
    Why: SGLang's norms and its own choice of attention have no float32, and Triton would multiply in TF32.
    Guard: the hook applied; tests/serving/on_gpu.py.
    Goes when: ``rmsnorm`` of sgl_kernel takes float32, and SGLang's Triton attention says its ``input_precision``.
    """
    if not in_float32(server_args.dtype):
        return
    from sglang.srt.arg_groups.overrides import declare_resolution

    if server_args.attention_backend is None:
        declare_resolution(server_args, "idlm_sglang", attention_backend=ATTENTION)
    lacking = float32_environ(server_args.dtype)
    os.environ.update(lacking)
    if lacking:
        logger.info("idlm: float32 on a GPU: %s", " ".join(f"{name}={value}" for name, value in lacking.items()))


_SECRETS = ("api_key", "admin_api_key", "ssl_keyfile_password")


def without_secrets(result: dict, *_, **__) -> dict:
    """What: the arguments that SGLang writes into its log at start have no keys in them.
    Why: at log level info they are written whole, ``--api-key`` in clear, wherever the log goes.
    Guard: the hook applied; a test looks for the key in the log.
    Goes when: ``_server_args_for_logging`` hides the keys, as it hides those of watermarks.
    """
    return {**result, **{name: "***" for name in _SECRETS if result.get(name)}}


def page_table_on_host(*args, **kwargs) -> None:
    """What: ``assign_req_to_token_pool_func`` is NumPy slices on the CPU platform.
    Why: off SGLang's own CPU engine it launches a Triton kernel, on every speculative decode step.
    Guard: the function still takes the parameters that the replacement was written for.
    Goes when: SGLang consults ``capabilities.supports_triton`` there, as its paged allocator does.
    """
    from idlm_sglang.platform.page_table import assign_req_to_token

    assign_req_to_token(*args, **kwargs)


def packed_anew(_, updater, *args, **kwargs) -> None:
    """What: behind an update of the weights in place, those that are packed for a CPU are packed anew.
    Why: only updates from disk, and those between ``begin_weight_update`` and its end, tell the layers' methods of new weights.
    Guard: the hook applied; a test changes weights and looks at the product.
    Goes when: every update of weights runs ``process_weights_after_loading``.
    """
    from idlm_sglang.platform.linear import pack_again

    pack_again(updater.get_model())
