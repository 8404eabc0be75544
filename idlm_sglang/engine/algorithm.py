"""The ISD entry in SGLang's speculative registry: name, server arguments, limits."""

import json
import logging
import os
from dataclasses import replace
from pathlib import Path

from sglang.srt.arg_groups.overrides import declare_resolution
from sglang.srt.environ import envs
from sglang.srt.speculative.spec_registry import CustomSpecAlgo

from idlm_sglang import adapter, checkpoint
from idlm_sglang.platform import accelerator_available
from idlm_sglang.config import ALGORITHM, AUTO, BRANCH, OFF, ON, Settings, SettingError, hand_down, read_settings, widened
from idlm_sglang.engine.ragged import resolve_ragged
from idlm_sglang.engine.step_ops import resolve_step_ops

logger = logging.getLogger(__name__)

DEFAULT_MAX_RUNNING_REQUESTS = 64
PAGE_SIZES = (1, 16, 32, 64)
# SGLang's fa3 fixes its verify width at start and would compute wrong attention at any other stride.
GPU_BACKENDS = ("triton", "flashinfer")
DEFAULT_GPU_BACKEND = "triton"
# FlashInfer plans a captured verify on the host, from lengths that would have to include the step's rows.
GRAPH_BACKEND = "triton"
# The ones whose verify forward hides columns; unasked only the first, with which it has been measured.
MASKING_BACKENDS = ("torch_native", "triton")

# Server arguments that ISD does not serve: field, whether a value is refused, the flag as typed, what is allowed.
_REFUSED = (
    ("dllm_algorithm", lambda v: v is not None, "--dllm-algorithm", "only one decoding algorithm; leave it out"),
    ("speculative_draft_model_path", lambda v: v is not None, "--speculative-draft-model-path", "none: the model drafts for itself"),
    ("uno_lora_path", lambda v: v is not None, "--uno-lora-path", "only with --speculative-algorithm UNO"),
    ("speculative_adaptive", bool, "--speculative-adaptive", "off"),
    ("speculative_accept_threshold_single", lambda v: v not in (None, 1.0), "--speculative-accept-threshold-single", "1.0: acceptance is exact"),
    ("speculative_accept_threshold_acc", lambda v: v not in (None, 1.0), "--speculative-accept-threshold-acc", "1.0: acceptance is exact"),
    ("speculative_eagle_topk", lambda v: v not in (None, 1), "--speculative-eagle-topk", "1: drafts form one chain"),
    ("enable_lora", bool, "--enable-lora", "off"),
    ("lora_paths", bool, "--lora-paths", "none"),
    ("pp_size", lambda v: v > 1, "--pp-size", "1"),
    ("dcp_size", lambda v: (v or 1) > 1, "--dcp-size", "1"),
    ("attn_cp_size", lambda v: (v or 1) > 1, "--attn-cp-size", "1"),
    ("enable_dp_attention", bool, "--enable-dp-attention", "off (--dp-size alone is fine)"),
    ("attn_dp_size", lambda v: (v or 1) > 1, "--attn-dp-size", "1 (--dp-size alone is fine)"),
    ("max_running_requests", lambda v: v is not None and v < 1, "--max-running-requests", "an integer >= 1"),
    ("disaggregation_mode", lambda v: v not in (None, "null"), "--disaggregation-mode", "null"),
    ("tokenizer_worker_num", lambda v: v > 1, "--tokenizer-worker-num", "1: further HTTP workers load no plugins"),
    ("enable_hierarchical_cache", bool, "--enable-hierarchical-cache", "off"),
    ("enable_lmcache", bool, "--enable-lmcache", "off"),
    ("enable_flexkv", bool, "--enable-flexkv", "off"),
    ("enable_hisparse", bool, "--enable-hisparse", "off"),
    ("enable_two_batch_overlap", bool, "--enable-two-batch-overlap", "off"),
    ("enable_pdmux", bool, "--enable-pdmux", "off"),
    ("enable_watermark", bool, "--enable-watermark", "off"),
    ("enable_streaming_session", bool, "--enable-streaming-session", "off"),
    ("enable_deterministic_inference", bool, "--enable-deterministic-inference", "off: a request's seed is honoured without it"),
    ("enable_mis", bool, "--enable-mis", "off"),
    # A captured prefill gives one row of logits a request; the first drafts need those of the MASK rows, too.
    ("cuda_graph_backend_prefill", lambda v: v == "full", "--cuda-graph-backend-prefill", "breakable, disabled"),
    ("enable_torch_compile", bool, "--enable-torch-compile", "off"),
    ("enable_unified_cache_external_linker", bool, "--enable-unified-cache-external-linker", "off"),
    ("use_ray", bool, "--use-ray", "off"),
    ("model_impl", lambda v: str(v) not in ("auto", "sglang"), "--model-impl", "auto, sglang"),
    ("is_embedding", bool, "--is-embedding", "off"),
    ("page_size", lambda v: v is not None and v not in PAGE_SIZES, "--page-size", ", ".join(map(str, PAGE_SIZES))),
    # AR reads its own row's keys and values back from the cache, rounded; a verify forward reads those of its rows as they are.
    ("kv_cache_dtype", lambda v: v not in (None, "auto", "bfloat16", "bf16"), "--kv-cache-dtype", "auto, bfloat16"),
)
BACKEND_FIELDS = ("attention_backend", "prefill_attention_backend", "decode_attention_backend")


def refuse_unserved(server_args) -> None:
    """Raise :class:`SettingError` for the first server argument that ISD does not serve."""
    for field, refused, flag, allowed in _REFUSED:
        value = getattr(server_args, field)
        if refused(value):
            raise SettingError(f"{flag} {value} cannot be combined with --speculative-algorithm {ALGORITHM}; allowed: {allowed}")
    if envs.SGLANG_ENABLE_POST_CAPTURE_KV_SIZING.get():
        # It leaves next to nothing for steps that are not captured, and the cache is there only behind the time at which steps are measured in it.
        raise SettingError(f"SGLANG_ENABLE_POST_CAPTURE_KV_SIZING=1 cannot be combined with --speculative-algorithm {ALGORITHM}; allowed: 0, or unset")
    if not accelerator_available():
        return  # The CPU platform says which attention backends it has.
    for field in BACKEND_FIELDS:
        value = getattr(server_args, field)
        if value is not None and value not in GPU_BACKENDS:
            flag = "--" + field.replace("_", "-")
            raise SettingError(f"{flag} {value} cannot be combined with --speculative-algorithm {ALGORITHM}; allowed: {', '.join(GPU_BACKENDS)}")


def choose_backend(server_args) -> None:
    """On a GPU, name an attention backend where the user left it open, all of it or a half: SGLang's own choice may be one that cannot verify."""
    if accelerator_available() and server_args.attention_backend is None:
        declare_resolution(server_args, "idlm_sglang", attention_backend=DEFAULT_GPU_BACKEND)
        logger.info("idlm: attention backend %s", DEFAULT_GPU_BACKEND)


def _verifies(server_args) -> str | None:
    """The attention backend of verify forwards, as far as it is named: where prompts and decode steps have one each, that of prompts unless asked otherwise."""
    prompts, steps = _halves(server_args)
    return steps if server_args.speculative_attention_mode == "decode" else prompts


def _halves(server_args) -> tuple[str | None, str | None]:
    """The attention backends of prompts and of decode steps."""
    return tuple(getattr(server_args, half) or server_args.attention_backend for half in BACKEND_FIELDS[1:])


def resolve_salvage(salvage: str, server_args, graphs: str = OFF) -> str:
    """What a rejection leaves, for the attention backend in use; :class:`SettingError` for a branch where it cannot hide columns."""
    backend, (prompts, steps) = _verifies(server_args), _halves(server_args)
    if salvage == BRANCH and prompts != steps:
        # SGLang's backend of both halves takes no mask for one of them.
        raise SettingError(
            f"IDLM_SALVAGE={salvage} cannot be served with --prefill-attention-backend {prompts} and --decode-attention-backend {steps}; "
            f"allowed: auto, chain, off, or --attention-backend {DEFAULT_GPU_BACKEND} for both"
        )
    if salvage == AUTO:
        return BRANCH if backend == MASKING_BACKENDS[0] and graphs == OFF else OFF
    if graphs == ON and salvage == BRANCH and backend != GRAPH_BACKEND:
        raise SettingError(
            f"IDLM_SALVAGE={salvage} cannot be served with IDLM_DECODE_GRAPHS=on and --attention-backend {backend}, whose captured forwards hide no columns; "
            f"allowed: auto, chain, off, or --attention-backend {GRAPH_BACKEND}"
        )
    if salvage == BRANCH and backend not in MASKING_BACKENDS:
        raise SettingError(
            f"IDLM_SALVAGE={salvage} cannot be served with --attention-backend {backend}, whose verify forward hides no columns; "
            f"allowed: auto, chain, off, or --attention-backend {DEFAULT_GPU_BACKEND}"
        )
    return salvage


def check_adapter(server_args, path: str) -> None:
    """Raise :class:`SettingError` for a LoRA adapter that is not served, or is not this checkpoint's; its weights are read for that."""
    if getattr(server_args, "enable_layernorm_sp", False):
        # It multiplies past the layers' methods, where the adapter is added.
        raise SettingError(f"--enable-layernorm-sp True cannot be combined with IDLM_LORA={path}; allowed: off")
    found = adapter.read_adapter(path)
    adapter.check_adapter(found, _config_of(server_args))
    made_for = (found.base or "").rstrip("/").split("/")[-1]
    if made_for and made_for.lower() != str(server_args.model_path).rstrip("/").split("/")[-1].lower():
        logger.warning("idlm: the adapter says it was made for %s; its shapes fit %s, which is served", found.base, server_args.model_path)


def _config_of(server_args):
    from sglang.srt.utils.hf_transformers_utils import get_config

    overrides = server_args.json_model_override_args
    return get_config(
        server_args.model_path,
        trust_remote_code=server_args.trust_remote_code,
        revision=server_args.revision,
        model_override_args=json.loads(overrides) if overrides else {},
    )


def check_checkpoint(server_args, settings: Settings, config=None) -> tuple[int, str]:
    """MASK id and its source for the checkpoint to be served, before any weight is loaded. config: its own, where it was read already."""
    from sglang.srt.utils.hf_transformers_utils import get_tokenizer

    config = config or _config_of(server_args)
    name = checkpoint.check_architecture(config.architectures)
    if name == checkpoint.PUBLISHED_ARCHITECTURE:
        logger.warning("idlm: %s", checkpoint.SDAR_NOTE)

    def load_tokenizer():
        return get_tokenizer(
            server_args.tokenizer_path or server_args.model_path,
            trust_remote_code=server_args.trust_remote_code,
            tokenizer_revision=server_args.revision,
        )

    loader = None if server_args.skip_tokenizer_init else load_tokenizer
    adapters = None if settings.lora is None else adapter.read_adapter(settings.lora).mask_token_id
    return checkpoint.resolve_mask_token_id(config, loader, settings.mask_token_id, config.vocab_size, adapters)


class IsdAlgorithm(CustomSpecAlgo):
    """What SGLang asks about ``--speculative-algorithm ISD``."""

    def supports_mixed_chunk(self) -> bool:
        return True

    def has_draft_kv(self) -> bool:
        return False

    def carries_draft_hidden_states(self) -> bool:
        return False

    def need_topk(self) -> bool:
        return False

    def create_future_map(self, device, req_to_token_pool, needs_cpu_seq_lens=True, needs_confidence_relay=False):
        from sglang.srt.managers.overlap_utils import FutureMap

        return FutureMap(device, self, req_to_token_pool, needs_cpu_seq_lens, needs_confidence_relay)

    def handle_server_args(self, server_args) -> None:
        """Check everything that can be checked before the model loads, and set what SGLang sizes its pools by."""
        from idlm_sglang import compat

        compat.assert_applied()
        settings = read_settings(server_args.speculative_num_steps)
        refuse_unserved(server_args)
        refuse_captured_prompts(server_args)
        graphs, step_ops = resolve_graphs(settings.decode_graphs, server_args), resolve_step_ops(settings.step_ops, server_args.device)
        salvage = resolve_salvage(settings.salvage, server_args, graphs)
        ragged = resolve_ragged(settings.ragged_verify, _verifies(server_args), graphs, step_ops, server_args.tp_size)
        config = _config_of(server_args)
        trained_on = getattr(config, "block_size", None) if settings.lora is None else adapter.read_adapter(settings.lora).block_size
        settings = widened(replace(settings, salvage=salvage, step_ops=step_ops, decode_graphs=graphs, ragged_verify=ragged), trained_on)
        width = server_args.speculative_num_draft_tokens
        if width not in (None, settings.max_width):
            raise SettingError(
                f"--speculative-num-draft-tokens {width} does not fit strides of up to {settings.max_stride}{' (auto)' if settings.auto else ''}; "
                f"allowed: {settings.max_width} (2N - 1), or leave it out"
            )
        mask_id, source = check_checkpoint(server_args, settings, config)
        logger.info("idlm: MASK token %d (from the %s)", mask_id, source)
        if server_args.load_format in ("auto", "safetensors") and os.path.isdir(server_args.model_path):
            checkpoint.check_weights(Path(server_args.model_path))
        if settings.lora is not None:
            check_adapter(server_args, settings.lora)
        hand_down(settings)
        server_args.speculative_num_steps = max(settings.max_stride - 1, 1)
        server_args.speculative_eagle_topk = 1
        server_args.speculative_num_draft_tokens = settings.max_width
        if server_args.max_running_requests is None:
            server_args.max_running_requests = DEFAULT_MAX_RUNNING_REQUESTS
        if graphs == OFF:
            disable_decode_graphs(server_args)
        if server_args.tp_size > 1:
            # SGLang's own switch for what its sampler draws; for what a strided step draws there is engine.ranks.
            os.environ.setdefault("SYNC_TOKEN_IDS_ACROSS_TP", "true")


def resolve_graphs(asked: str, server_args) -> str:
    """Whether decode forwards are captured, ``on`` or ``off``.

    Raises:
        SettingError: ``on`` where no graphs can be captured.
    """
    if asked == AUTO:
        logger.info("idlm: decode CUDA graphs are off: IDLM_DECODE_GRAPHS=auto is off until they have been measured; on captures them")
    if asked != ON:
        return OFF
    if not accelerator_available():
        logger.warning("idlm: IDLM_DECODE_GRAPHS=on on a CPU: decode forwards go through the buffers of graphs, and are not faster by it")
        return ON
    for field in BACKEND_FIELDS:
        value = getattr(server_args, field)
        if value not in (None, GRAPH_BACKEND):
            flag = "--" + field.replace("_", "-")
            raise SettingError(f"IDLM_DECODE_GRAPHS=on cannot be served with {flag} {value}; allowed: {GRAPH_BACKEND}, or IDLM_DECODE_GRAPHS=off")
    backend = server_args.cuda_graph_config.decode.backend
    if backend != "full":
        raise SettingError(f"IDLM_DECODE_GRAPHS=on cannot be served with --cuda-graph-backend-decode {backend}; allowed: full, or IDLM_DECODE_GRAPHS=off")
    return ON


def refuse_captured_prompts(server_args) -> None:
    """``--cuda-graph-backend-prefill full`` in the words of ``--cuda-graph-config``."""
    config = server_args.cuda_graph_config
    if accelerator_available() and config is not None and getattr(config.prefill.backend, "value", config.prefill.backend) == "full":
        raise SettingError(f"--cuda-graph-config with a prefill backend of full cannot be combined with --speculative-algorithm {ALGORITHM}; allowed: breakable, disabled")


def disable_decode_graphs(server_args) -> None:
    """Decode CUDA graphs off. The worker refuses to start with a runner that is not its own."""
    if str(server_args.device).startswith("cpu"):
        return
    config = server_args.cuda_graph_config
    if config is not None and hasattr(config, "decode"):
        from sglang.srt.arg_groups.cuda_graph_hook import Backend

        config.decode.backend = Backend.DISABLED
        server_args.cuda_graph_config = config
    else:
        server_args.disable_decode_cuda_graph = True


def worker_class(server_args) -> type:
    """Factory that SGLang calls in each scheduler process."""
    from idlm_sglang.engine.worker import IsdWorker

    return IsdWorker
