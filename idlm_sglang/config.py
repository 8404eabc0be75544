"""Every setting of the plugin in one frozen dataclass, read from the environment and SGLang's flags."""

import json
import math
import os
from dataclasses import asdict, dataclass, replace
from functools import lru_cache

MAX_STRIDE = 16
ALGORITHM = "ISD"

# The controller chooses the stride, from this one on, up to that one where no other limit is set.
AUTO = "auto"
AUTO_FIRST_STRIDE = 4
AUTO_MAX_STRIDE = 8

DEFAULT_SELFCHECK = 0.001

REJECTION = "rejection"
COUPLED = "coupled"

# What a rejection leaves; `isd.layout` has the three below `auto`, which is resolved by the attention backend.
BRANCH, CHAIN, OFF = "branch", "chain", "off"
SALVAGE = (AUTO, BRANCH, CHAIN, OFF)
ON = "on"
# Whether decode forwards are captured into CUDA graphs; `auto` is resolved when the server starts.
DECODE_GRAPHS = (AUTO, ON, OFF)
# Whether a strided step leaves rows out of its forward; `auto` is resolved when the server starts.
RAGGED_VERIFY = (AUTO, ON, OFF)

# What turns logits into tokens: plain torch, or the Triton kernels; `engine.step_ops` resolves `auto`.
TORCH, TRITON = "torch", "triton"
STEP_OPS = (AUTO, TORCH, TRITON)


class SettingError(SystemExit, ValueError):
    """A setting that cannot be served: one line that names it, its value and what is allowed.

    As a SystemExit it ends a command with that line and exit code 1, without a stack trace; as a ValueError it can be
    caught by a program that builds an engine itself.
    """

    def __init__(self, message: str):
        super().__init__(f"idlm: {message}")


@dataclass(frozen=True)
class Settings:
    """What the plugin was asked for.

    Attributes:
        stride: N, tokens proposed and verified per forward (1..16; 1 is plain autoregressive decoding). Under ``auto`` the one to begin with.
        max_stride: the largest N that the controller may choose or a request ask for; state is kept for it.
        mask_token_id: MASK for checkpoints that do not name one, or None.
        sampling_rule: which exact rule serves sampled requests without a seed, ``coupled`` (the server draws one) or ``rejection``.
        selfcheck: share of finished requests that is asked again at one token per step and compared, 0 to 1.
        salvage: what a rejection leaves for the next step: survivors for a ``branch`` round or a ``chain``, or nothing (``off``).
        strided_grammars: the grammar backend in use can walk over drafts and back (the worker fills this in).
        auto: the stride controller chooses N, step by step: where no stride was asked for, too.
        mixed_steps: with the overlap schedule off, a prefill's forward takes the decode step of the running requests along.
        live_page: serve the live page at ``/idlm``.
        lora: directory of a LoRA adapter for the MASK rows (R-ISD), or None.
        step_ops: what turns logits into tokens, ``torch`` or ``triton``; ``auto`` until `engine.step_ops` has resolved it.
        decode_graphs: decode forwards are captured into CUDA graphs, one runner per stride.
        ragged_verify: rows of a strided step that are not worth their cost are left out of its forward; ``auto`` until `engine.ragged` has resolved it.
    """

    stride: int = AUTO_FIRST_STRIDE
    max_stride: int = AUTO_MAX_STRIDE
    mask_token_id: int | None = None
    sampling_rule: str = COUPLED
    selfcheck: float = DEFAULT_SELFCHECK
    salvage: str = AUTO
    strided_grammars: bool = True
    auto: bool = True
    mixed_steps: bool = True
    live_page: bool = True
    lora: str | None = None
    step_ops: str = AUTO
    decode_graphs: str = AUTO
    ragged_verify: str = AUTO

    @property
    def max_width(self) -> int:
        """W = 2N - 1 at the largest stride: rows per request and forward."""
        return 2 * self.max_stride - 1


def stride_or_auto(shown: str, text: str) -> int | None:
    """The stride in ``text``, None for ``auto``; ``shown`` as for :func:`whole_number`."""
    try:
        return None if text.strip().lower() == AUTO else whole_number(shown, text, 1, MAX_STRIDE)
    except SettingError as error:
        raise SettingError(f"{str(error).removeprefix('idlm: ')}, or {AUTO}") from None


def whole_number(shown: str, text: str, low: int, high: int | None) -> int:
    """The number in ``text``; ``shown`` names the setting and its value in the :class:`SettingError` for a bad one."""
    allowed = f"an integer from {low} to {high}" if high is not None else f"an integer >= {low}"
    try:
        value = int(text)
    except ValueError:
        raise SettingError(f"{shown} is not valid; allowed: {allowed}") from None
    if value < low or (high is not None and value > high):
        raise SettingError(f"{shown} is out of range; allowed: {allowed}")
    return value


def share(shown: str, text: str) -> float:
    """The number from 0 to 1 in ``text``; ``shown`` as for :func:`whole_number`."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 1:
        raise SettingError(f"{shown} is not valid; allowed: a share from 0 (off) to 1")
    return value


def _integer(name: str, text: str, low: int, high: int | None) -> int:
    return whole_number(f"{name}={text!r}", text, low, high)


def read_settings(num_steps: int | None = None, environ: dict[str, str] | None = None) -> Settings:
    """Settings from the environment and ``--speculative-num-steps`` (= N - 1).

    ``IDLM_STRIDE``, ``IDLM_MAX_STRIDE``, ``IDLM_MASK_TOKEN_ID``, ``IDLM_SAMPLING_RULE``, ``IDLM_SELFCHECK``, ``IDLM_SALVAGE``,
    ``IDLM_MIXED_STEPS``, ``IDLM_LIVE_PAGE``, ``IDLM_LORA``, ``IDLM_STEP_OPS``, ``IDLM_DECODE_GRAPHS`` and
    ``IDLM_RAGGED_VERIFY`` are read; every bad value raises :class:`SettingError`.
    """
    env = os.environ if environ is None else environ
    stride, auto = None, False
    if "IDLM_STRIDE" in env:
        stride = stride_or_auto(f"IDLM_STRIDE={env['IDLM_STRIDE']!r}", env["IDLM_STRIDE"])
        auto = stride is None
    if num_steps is not None:
        if not 0 <= num_steps < MAX_STRIDE:
            raise SettingError(
                f"--speculative-num-steps {num_steps} is out of range; for {ALGORITHM} it is the stride minus one, "
                f"allowed: 0 to {MAX_STRIDE - 1}"
            )
        if auto or (stride is not None and stride != num_steps + 1):
            raise SettingError(
                f"IDLM_STRIDE={AUTO if auto else stride} and --speculative-num-steps {num_steps} (stride {num_steps + 1}) disagree; "
                "set one of them"
            )
        stride = num_steps + 1
    auto = stride is None
    stride = AUTO_FIRST_STRIDE if auto else stride
    max_stride = AUTO_MAX_STRIDE if auto else stride
    if "IDLM_MAX_STRIDE" in env:
        max_stride = _integer("IDLM_MAX_STRIDE", env["IDLM_MAX_STRIDE"], 1, MAX_STRIDE)
        if auto:
            stride = min(stride, max_stride)
        elif max_stride < stride:
            raise SettingError(f"IDLM_MAX_STRIDE={max_stride} is below the stride {stride}; allowed: {stride} to {MAX_STRIDE}")
    mask = env.get("IDLM_MASK_TOKEN_ID")
    rule = env.get("IDLM_SAMPLING_RULE", COUPLED)
    if rule not in (REJECTION, COUPLED):
        raise SettingError(f"IDLM_SAMPLING_RULE={rule!r} is not known; allowed: {COUPLED}, {REJECTION}")
    checked = env.get("IDLM_SELFCHECK")
    salvage = env.get("IDLM_SALVAGE", AUTO)
    if salvage not in SALVAGE:
        raise SettingError(f"IDLM_SALVAGE={salvage!r} is not known; allowed: {', '.join(SALVAGE)}")
    mixed = env.get("IDLM_MIXED_STEPS", ON)
    if mixed not in (ON, OFF):
        raise SettingError(f"IDLM_MIXED_STEPS={mixed!r} is not known; allowed: {ON}, {OFF}")
    live = env.get("IDLM_LIVE_PAGE", ON)
    if live not in (ON, OFF):
        raise SettingError(f"IDLM_LIVE_PAGE={live!r} is not known; allowed: {ON}, {OFF}")
    graphs = env.get("IDLM_DECODE_GRAPHS", AUTO)
    if graphs not in DECODE_GRAPHS:
        raise SettingError(f"IDLM_DECODE_GRAPHS={graphs!r} is not known; allowed: {', '.join(DECODE_GRAPHS)}")
    ragged = env.get("IDLM_RAGGED_VERIFY", AUTO)
    if ragged not in RAGGED_VERIFY:
        raise SettingError(f"IDLM_RAGGED_VERIFY={ragged!r} is not known; allowed: {', '.join(RAGGED_VERIFY)}")
    lora = env.get("IDLM_LORA")
    if lora is not None and not os.path.isdir(os.path.expanduser(lora)):
        raise SettingError(f"IDLM_LORA={lora} is not a directory; allowed: the directory of an adapter in PEFT's format")
    return Settings(
        stride=stride,
        auto=auto,
        max_stride=max_stride,
        mask_token_id=None if mask is None else _integer("IDLM_MASK_TOKEN_ID", mask, 0, None),
        sampling_rule=rule,
        selfcheck=DEFAULT_SELFCHECK if checked is None else share(f"IDLM_SELFCHECK={checked!r}", checked),
        salvage=salvage,
        mixed_steps=mixed == ON,
        live_page=live == ON,
        lora=lora,
        step_ops=read_step_ops(env),
        decode_graphs=graphs,
        ragged_verify=ragged,
    )


def read_step_ops(environ: dict[str, str] | None = None) -> str:
    """``IDLM_STEP_OPS``, which AR serving has, too."""
    kind = (os.environ if environ is None else environ).get("IDLM_STEP_OPS", AUTO)
    if kind not in STEP_OPS:
        raise SettingError(f"IDLM_STEP_OPS={kind!r} is not known; allowed: {', '.join(STEP_OPS)}")
    return kind


def widened(settings: Settings, block_size: object, environ: dict[str, str] | None = None) -> Settings:
    """Settings for a checkpoint whose configuration has this ``block_size``, the MASK tokens per block that it was trained on.

    The controller may go up to ``block_size`` + 1 where that is above its usual limit and no ``IDLM_MAX_STRIDE`` says otherwise. Anything
    but an integer says nothing.
    """
    env = os.environ if environ is None else environ
    if not settings.auto or "IDLM_MAX_STRIDE" in env or isinstance(block_size, bool) or not isinstance(block_size, int):
        return settings
    return replace(settings, max_stride=max(settings.max_stride, min(block_size + 1, MAX_STRIDE)))


_RESOLVED = "IDLM_RESOLVED_SETTINGS"


def hand_down(settings: Settings) -> None:
    """Leave the resolved settings to the scheduler processes, which inherit this process's environment."""
    os.environ[_RESOLVED] = json.dumps(asdict(settings))


def handed_down() -> Settings:
    """The settings that the launching process resolved. Raises :class:`SettingError` where none did."""
    text = os.environ.get(_RESOLVED)
    if text is None:
        raise SettingError("the launching process resolved no settings; start through --speculative-algorithm ISD")
    return _parsed(text)


@lru_cache(1)
def _parsed(text: str) -> Settings:
    return Settings(**json.loads(text))
