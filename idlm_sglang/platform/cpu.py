"""The CPU platform class handed to SGLang's `sglang.srt.platforms` registry."""

import os

from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import PlatformCapabilities, SRTPlatform
from torch.profiler import ProfilerActivity

from idlm_sglang.config import SettingError
from idlm_sglang.platform.threads import threads_per_rank

ATTENTION_BACKEND = "torch_native"

# SGLang sizes its pools for a dedicated accelerator: left alone it would fill 70 % of a laptop's memory with KV.
DEFAULT_MAX_TOTAL_TOKENS = 65_536
DEFAULT_MAX_RUNNING_REQUESTS = 64
DEFAULT_CHUNKED_PREFILL_SIZE = 1_024

# OpenMP threads spin before they sleep, by default for milliseconds. The server's own processes compete for the same
# cores, and a spinning thread then costs its partner whole time slices. Read by the OpenMP runtime when a worker
# process starts.
OPENMP_SPIN_COUNT = "1000"

# With "1" the overlap schedule stays on. On a CPU the forward itself takes the cores that scheduling would overlap with,
# each answer costs one step too many, and its tokens leave one step late.
OVERLAP_VARIABLE = "IDLM_CPU_OVERLAP"

# SGLang's: the cores of each rank on this machine, "0-3|4-7".
_BIND = "SGLANG_CPU_OMP_THREADS_BIND"

# What SGLang would reach for a GPU with: at its start, or at the first request.
_NEEDS_A_GPU = ("enable_memory_saver", "enable_forward_pass_metrics")

_BACKEND_FIELDS = ("attention_backend", "prefill_attention_backend", "decode_attention_backend")


class IdlmCpuPlatform(CpuDeviceMixin, SRTPlatform):
    """Plain torch on the host CPU: no Triton, no graphs, SGLang's own scheduler and KV cache."""

    _enum = PlatformEnum.OOT
    device_name = "cpu"
    capabilities = PlatformCapabilities(supports_triton=False, graph_capture=False)

    def get_device(self, device_id: int = 0) -> str:
        # The mixin returns a torch.device; ServerArgs splits the name as a string.
        return self.device_type

    def apply_server_args_defaults(self, server_args) -> None:
        """Set what a CPU needs, default what the user left open. Raises SettingError on what cannot run here."""
        if server_args.device != "cpu":
            raise SettingError(f"--device {server_args.device}: this machine has no accelerator; allowed: cpu")
        for field in _NEEDS_A_GPU:
            if getattr(server_args, field):
                raise SettingError(f"--{field.replace('_', '-')} True cannot be served on a CPU; allowed: off")
        if server_args.enable_strict_thinking and server_args.reasoning_parser:
            # Its masks, for requests without a grammar of their own, have no CPU path.
            raise SettingError("--enable-strict-thinking True cannot be served on a CPU with --reasoning-parser; allowed: off")
        # SGLang has already put its AMX backend there when the user named none; its kernels are not installed.
        if server_args.attention_backend in (None, "intel_amx"):
            server_args.attention_backend = ATTENTION_BACKEND
        for field in _BACKEND_FIELDS:
            _check_attention_backend(field, getattr(server_args, field))
        server_args.sampling_backend = "pytorch"
        # An idle scheduler otherwise polls without a pause, and takes a core from everything else on the machine.
        server_args.sleep_on_idle = True
        if not _switch(OVERLAP_VARIABLE):
            server_args.disable_overlap_schedule = True
        if "OMP_WAIT_POLICY" not in os.environ:
            os.environ.setdefault("GOMP_SPINCOUNT", OPENMP_SPIN_COUNT)
        ranks = max(server_args.tp_size * server_args.dp_size // server_args.nnodes, 1)
        _check_cores(ranks, server_args.tp_size * server_args.dp_size * server_args.pp_size)
        os.environ.setdefault("OMP_NUM_THREADS", str(threads_per_rank(ranks)))
        for field, default in (
            ("max_total_tokens", DEFAULT_MAX_TOTAL_TOKENS),
            ("max_running_requests", DEFAULT_MAX_RUNNING_REQUESTS),
            ("chunked_prefill_size", DEFAULT_CHUNKED_PREFILL_SIZE),
        ):
            if getattr(server_args, field) is None:
                setattr(server_args, field, default)

    def get_torch_profiler_activity_str(self) -> str:
        # /start_profile asks for it; the base class raises, which would end the server.
        return "CPU"

    def get_torch_profiler_activity(self) -> ProfilerActivity:
        return ProfilerActivity.CPU

    def get_default_attention_backend(self) -> str:
        return ATTENTION_BACKEND

    def get_kv_pool_cls(self, *, kind: str) -> type | None:
        if kind != "mha":
            return None
        from idlm_sglang.platform.kv_pool import CpuMHATokenToKVPool

        return CpuMHATokenToKVPool

    def supports_speculative_algorithm(self, algorithm: str) -> bool:
        return algorithm == "ISD"

    def get_full_graph_backend_cls(self) -> type:
        # `capabilities.graph_capture` stays off: SGLang captures nothing; IDLM_DECODE_GRAPHS=on does (engine.graphs).
        from idlm_sglang.platform.calls import RecordedCalls

        return RecordedCalls

    def get_dispatch_key_name(self) -> str:
        return "native"

    def init_backend(self) -> None:
        """Called once in every worker process, before the model runner exists."""
        from idlm_sglang.platform import attention, memory

        attention.register()
        memory.keep_freed_memory()

    def post_load_model(self, model) -> None:
        """Called once per worker process, behind the loading of the weights."""
        from idlm_sglang.platform.linear import pack_weights

        pack_weights(model)


def _switch(name: str) -> bool:
    value = os.environ.get(name, "0")
    if value not in ("0", "1"):
        raise SettingError(f"{name}={value!r} is not valid; allowed: 0, 1")
    return value == "1"


def _check_cores(ranks: int, all_ranks: int) -> None:
    """SGLang asserts this in each rank, of which the log then says that it died; without cores named for each it counts the ranks of all machines."""
    from sglang.srt.utils.common import get_cpu_ids_by_node  # which imports the platform

    nodes, bound = len(get_cpu_ids_by_node()), os.environ.get(_BIND, "all")
    if (all_ranks > nodes) if bound == "all" else (ranks > len(bound.split("|"))):
        found = f"{_BIND}={bound} names the cores of fewer" if bound != "all" else f"this machine has {nodes} NUMA node{'s' if nodes > 1 else ''}"
        example = "|".join(map(str, range(ranks)))
        raise SettingError(f"{all_ranks if bound == 'all' else ranks} ranks, and {found}; allowed: as many ranks as NUMA nodes, or {_BIND} with the cores of each, such as '{example}'")


def _check_attention_backend(field: str, value: str | None) -> None:
    interpreted = os.environ.get("TRITON_INTERPRET", "0") == "1"
    if value in (None, ATTENTION_BACKEND) or (value == "triton" and interpreted):
        return
    raise SettingError(
        f"--{field.replace('_', '-')} {value}: not available without an accelerator; "
        f"allowed: {ATTENTION_BACKEND} (or triton under TRITON_INTERPRET=1)"
    )
