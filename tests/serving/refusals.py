"""The table of settings that ISD refuses: what is typed, and what the one line must name."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Case:
    """One refused command line.

    Attributes:
        argv: behind `--model-path MODEL --speculative-algorithm ISD`.
        names: parts of the line: the setting with its value, and what is allowed.
        stock: whether plain `sglang serve` shows the same line and no traceback. Where False, SGLang rewrites the
            setting or fails on it before a plugin is asked; `idlm serve` looks at what was typed.
        model: a name in the `checkpoints` fixture, or a path.
    """

    argv: tuple[str, ...]
    names: tuple[str, ...]
    stock: bool = True
    environ: dict[str, str] = field(default_factory=dict)
    model: str = "demo"
    cpu_only: bool = False

    def __str__(self) -> str:
        return " ".join((*self.argv, *self.environ, *([self.model] if self.model != "demo" else [])))


def _flag(flag: str, *value: str, allowed: str = "", stock: bool = True, also: tuple[str, ...] = ()) -> Case:
    return Case((flag, *value, *also), (f"{flag} {' '.join(value) or 'True'}", f"; allowed: {allowed}"), stock)


CASES = (
    _flag("--dllm-algorithm", "LowConfidence", allowed="only one decoding algorithm"),
    _flag("--speculative-draft-model-path", "owner/draft", allowed="none"),
    _flag("--uno-lora-path", "x", allowed="only with --speculative-algorithm UNO"),
    _flag("--speculative-adaptive", allowed="off"),
    _flag("--speculative-accept-threshold-single", "0.9", allowed="1.0"),
    _flag("--speculative-accept-threshold-acc", "0.9", allowed="1.0"),
    _flag("--speculative-eagle-topk", "4", allowed="1"),
    _flag("--enable-lora", allowed="off"),
    Case(("--lora-paths", "a=/tmp/a"), ("--lora-paths ['a=/tmp/a']", "; allowed: none")),
    _flag("--pp-size", "2", allowed="1"),
    _flag("--dcp-size", "2", allowed="1"),
    _flag("--attn-cp-size", "2", allowed="1"),
    _flag("--enable-dp-attention", allowed="off", also=("--tp-size", "2", "--dp-size", "2")),
    _flag("--attn-dp-size", "2", allowed="1", also=("--tp-size", "2", "--dp-size", "2")),
    _flag("--max-running-requests", "0", allowed="an integer >= 1"),
    _flag("--disaggregation-mode", "prefill", allowed="null"),
    _flag("--disaggregation-mode", "decode", allowed="null"),
    _flag("--tokenizer-worker-num", "2", allowed="1"),
    _flag("--enable-hierarchical-cache", allowed="off"),
    _flag("--enable-lmcache", allowed="off"),
    _flag("--enable-flexkv", allowed="off"),
    _flag("--enable-hisparse", allowed="off"),
    _flag("--enable-two-batch-overlap", allowed="off"),
    _flag("--enable-pdmux", allowed="off"),
    _flag("--enable-watermark", allowed="off"),
    _flag("--cuda-graph-backend-prefill", "full", allowed="breakable"),
    Case(("--enable-strict-thinking", "--reasoning-parser", "qwen3"), ("--enable-strict-thinking True", "on a CPU", "; allowed: off"), cpu_only=True),
    _flag("--enable-streaming-session", allowed="off"),
    _flag("--enable-deterministic-inference", allowed="off: a request's seed"),
    _flag("--enable-mis", allowed="off"),
    _flag("--enable-torch-compile", allowed="off"),
    _flag("--enable-unified-cache-external-linker", allowed="off"),
    _flag("--use-ray", allowed="off"),
    _flag("--model-impl", "transformers", allowed="auto, sglang"),
    _flag("--is-embedding", allowed="off"),
    _flag("--page-size", "3", allowed="1, 16, 32, 64"),
    _flag("--kv-cache-dtype", "fp8_e4m3", allowed="auto, bfloat16"),
    _flag("--kv-cache-dtype", "fp8_e5m2", allowed="auto, bfloat16"),
    Case((), ("SGLANG_ENABLE_POST_CAPTURE_KV_SIZING=1", "; allowed: 0, or unset"), environ={"SGLANG_ENABLE_POST_CAPTURE_KV_SIZING": "1"}),
    _flag("--attention-backend", "fa4", allowed="torch_native"),
    _flag("--prefill-attention-backend", "fa4", allowed="torch_native"),
    _flag("--decode-attention-backend", "fa4", allowed="torch_native"),
    Case(("--speculative-num-steps", "16"), ("--speculative-num-steps 16", "allowed: 0 to 15")),
    Case(("--speculative-num-steps", "-1"), ("--speculative-num-steps -1", "allowed: 0 to 15")),
    _flag("--speculative-num-draft-tokens", "3", allowed="31 (2N - 1)"),
    # SGLang's own parser, whose page of usage `idlm serve` leaves out.
    Case(("--speculative-num-steps", "abc"), ("--speculative-num-steps", "'abc'", "; allowed: "), stock=False),
    Case(("--no-such-flag",), ("--no-such-flag", "; allowed: SGLang's flags"), stock=False),
    # Settings of the environment.
    Case((), ("IDLM_STRIDE='17'", "; allowed: an integer from 1 to 16"), environ={"IDLM_STRIDE": "17"}),
    Case((), ("IDLM_STRIDE='four'", "; allowed: an integer from 1 to 16"), environ={"IDLM_STRIDE": "four"}),
    Case((), ("IDLM_MAX_STRIDE=2", "; allowed: 4 to 16"), environ={"IDLM_STRIDE": "4", "IDLM_MAX_STRIDE": "2"}),
    Case((), ("IDLM_SAMPLING_RULE='x'", "; allowed: coupled, rejection"), environ={"IDLM_SAMPLING_RULE": "x"}),
    Case((), ("IDLM_STEP_OPS='cuda'", "; allowed: auto, torch, triton"), environ={"IDLM_STEP_OPS": "cuda"}),
    Case((), ("IDLM_MIXED_STEPS='yes'", "; allowed: on, off"), environ={"IDLM_MIXED_STEPS": "yes"}),
    Case((), ("IDLM_SALVAGE='on'", "; allowed: auto, branch, chain, off"), environ={"IDLM_SALVAGE": "on"}),
    Case((), ("IDLM_SELFCHECK='1.5'", "; allowed: a share from 0 (off) to 1"), environ={"IDLM_SELFCHECK": "1.5"}),
    Case(("--speculative-num-steps", "2"), ("IDLM_STRIDE=8", "--speculative-num-steps 2"), environ={"IDLM_STRIDE": "8"}),
    # Checkpoints.
    Case((), ("names no MASK token", "IDLM_MASK_TOKEN_ID is not set", "; allowed: "), model="without_mask"),
    Case((), ("MASK token id 5000", "outside the vocabulary; allowed: 0 to 1023"), model="mask_outside"),
    Case((), ("IDLM_MASK_TOKEN_ID=7 contradicts the config",), environ={"IDLM_MASK_TOKEN_ID": "7"}),
    Case((), ("architectures ['LlamaForCausalLM']", "; allowed: IDLMForCausalLM"), model="llama"),
    Case((), ("--model-path /no/such/model cannot be read", "; allowed: "), model="/no/such/model", stock=False),
    Case((), ("--model-path no-such-owner/model cannot be read", "; allowed: "), model="no-such-owner/model", stock=False),
    Case((), ("model.safetensors cannot be read (", "; allowed: a complete safetensors file"), model="cut_off"),
    Case((), ("holds no weights; allowed: ", "--load-format dummy"), model="without_weights"),
    Case((), ("lacks model-00002-of-00002.safetensors", "; allowed: a complete checkpoint"), model="without_a_shard"),
    Case((), ("model.safetensors.index.json cannot be read; allowed: ",), model="without_an_index"),
    # Adapters; the paths are names in the `checkpoints` fixture.
    Case((), ("IDLM_LORA=/no/such is not a directory", "; allowed: "), environ={"IDLM_LORA": "/no/such"}),
    Case((), ("layer 1: lora_B of v_proj holds NaN", "; allowed: finite weights"), environ={"IDLM_LORA": "nan_adapter"}),
    Case((), ("the base model has 4 layers", "; allowed: an adapter made for this base"), environ={"IDLM_LORA": "deeper_adapter"}),
    Case((), ("the adapter says MASK is 4, the base model's config.json 3", "; allowed: "), environ={"IDLM_LORA": "mask_4_adapter"}),
    Case((), ("names no MASK token", "(nor in an adapter's)"), environ={"IDLM_LORA": "maskless_adapter"}, model="without_mask"),
    Case(("--enable-lora",), ("--enable-lora True", "; allowed: off"), environ={"IDLM_LORA": "adapter"}),
    Case(("--speculative-algorithm", "NGRAM"), ("IDLM_LORA=", "--speculative-algorithm NGRAM", "; allowed: --speculative-algorithm ISD"), environ={"IDLM_LORA": "adapter"}),
    # What this machine lacks.
    Case(("--enable-memory-saver",), ("--enable-memory-saver True", "on a CPU", "; allowed: off"), cpu_only=True),
    Case(("--enable-forward-pass-metrics",), ("--enable-forward-pass-metrics True", "on a CPU", "; allowed: off"), cpu_only=True),
    Case(("--device", "cuda"), ("--device cuda", "; allowed: cpu"), cpu_only=True),
    Case(("--attention-backend", "flashinfer"), ("--attention-backend flashinfer", "; allowed: torch_native"), cpu_only=True),
    Case((), ("IDLM_STEP_OPS=triton", "without one; allowed: auto, torch, or TRITON_INTERPRET=1"), environ={"IDLM_STEP_OPS": "triton"}, cpu_only=True),
    Case(("--speculative-algorithm", "NGRAM"), ("IDLM_STEP_OPS=triton", "; allowed: auto, torch"), environ={"IDLM_STEP_OPS": "triton"}, cpu_only=True),
)
