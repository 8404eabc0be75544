"""From the words after `idlm serve` to what SGLang is started with. Imports nothing heavy: it answers at once."""

import os
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from idlm_sglang.config import ALGORITHM, AUTO, COUPLED, DECODE_GRAPHS, MAX_STRIDE, OFF, ON, RAGGED_VERIFY, REJECTION, SALVAGE, STEP_OPS
from idlm_sglang.config import SettingError, share, stride_or_auto, whole_number
from idlm_sglang.demo import CHECKPOINT_DIR, RISD_ADAPTER_DIR, RISD_BASE_DIR

DEFAULT_HOST = "127.0.0.1"
DEFAULT_PORT = 30000
MAX_PORT = 65535
DEFAULT_CONCURRENCY = 64
DEMO_NAME = "idlm-demo"
IDLM, RISD = DEMOS = ("idlm", "risd")
_EMBEDDED = {CHECKPOINT_DIR: ("the embedded demo checkpoint", DEMO_NAME), RISD_BASE_DIR: ("the embedded AR base model", "risd-demo")}

_MODEL = ("--model-path", "--model")
_DP = ("--dp-size", "--data-parallel-size")
_STEPS = "--speculative-num-steps"
_ALGORITHM = "--speculative-algorithm"
_ANY_ADDRESS = {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "::": "[::1]"}


@dataclass(frozen=True)
class Launch:
    """What `idlm serve` starts.

    Attributes:
        model: path or repository name, for people.
        argv: SGLang's command line, the user's own words last so that they win.
        environ: `IDLM_*` settings to add to the environment.
        typed: environment name -> the flag the user typed for it, so that an error names what was typed.
        host, port: where the server will listen.
        verbose: SGLang's log goes to standard error; otherwise to `log_file`.
    """

    model: str
    argv: tuple[str, ...]
    environ: dict[str, str]
    typed: dict[str, str]
    host: str
    port: int
    verbose: bool
    log_file: Path | None

    @property
    def address(self) -> str:
        """host:port as a client on this machine reaches it."""
        host = _ANY_ADDRESS.get(self.host, self.host)
        return f"[{host}]:{self.port}" if ":" in host and not host.startswith("[") else f"{host}:{self.port}"

    def in_typed_words(self, message: str) -> str:
        """`message` with the flags the user typed instead of the environment names they were handed on as."""
        for name, flag in self.typed.items():
            message = message.replace(name, flag)
        return message


def resolve(own: Namespace, sglang_argv: Sequence[str], log_to_terminal: bool) -> Launch:
    """Check what can be checked before anything is loaded, and add the defaults the user left open.

    Args:
        own: the options of `idlm serve` itself.
        sglang_argv: all other words, in order; the first may be the model.
        log_to_terminal: whether SGLang's log passes through when neither --verbose nor --log-file was given.

    Raises:
        SettingError: one line that names the setting, its value and what is allowed.
    """
    words = _Words(sglang_argv)
    model, embedded = _model(words, own.demo)
    environ, typed = _settings(own, words)
    host = words.value("--host") or DEFAULT_HOST
    port = _port(words.value("--port"))
    if own.log_file is not None and own.verbose:
        raise SettingError(f"--verbose and --log-file {own.log_file} were both given; allowed: one of them")

    defaults: list[str] = []

    def default(names: Sequence[str], *value: str) -> None:
        if words.value(*names) is None:
            defaults.extend((names[0], *value))

    default(_MODEL, model)
    if embedded:
        # The demo model was made and measured in fp32; bf16 flips near-ties.
        default(("--dtype",), "float32")
        default(("--served-model-name",), embedded[1])
    if not own.ar:
        default((_ALGORITHM,), ALGORITHM)
    if own.ar or (words.value(_ALGORITHM) or ALGORITHM).upper() != ALGORITHM:
        # ISD has this default itself; both arms of a comparison should admit as many requests.
        # SGLang divides it among the ranks of data-parallel attention, and gives it to each replica elsewhere.
        ranks = words.value(*_DP) or "1" if words.value("--enable-dp-attention") not in (None, "False") else "1"
        default(("--max-running-requests",), str(DEFAULT_CONCURRENCY * (int(ranks) if ranks.isdigit() else 1)))
    if not own.no_metrics:
        default(("--enable-metrics",))

    return Launch(
        model=embedded[0] if embedded else model,
        argv=(*defaults, *words.argv),
        environ=environ,
        typed=typed,
        host=host,
        port=port,
        verbose=own.verbose or (own.log_file is None and log_to_terminal),
        log_file=own.log_file,
    )


class _Words:
    """SGLang's flags as the user wrote them, those of a --config file included."""

    def __init__(self, argv: Sequence[str]):
        self.positional = argv[0] if argv and not argv[0].startswith("-") else None
        self.argv = tuple(argv[1:] if self.positional is not None else argv)
        self._config = self._read_config(self._typed("--config"))

    def _typed(self, *names: str) -> str | None:
        found = None
        for i, word in enumerate(self.argv):
            if word in names:
                following = self.argv[i + 1 : i + 2]
                found = following[0] if following and not following[0].startswith("--") else ""
            elif word.partition("=")[0] in names and "=" in word:
                found = word.partition("=")[2]
        return found

    @staticmethod
    def _read_config(path: str | None) -> dict:
        # SGLang puts the file's flags before the typed ones; ours would come behind them and win.
        if not path:
            return {}
        import yaml

        try:
            content = yaml.safe_load(Path(path).read_text())
        except (OSError, yaml.YAMLError) as error:
            raise SettingError(f"--config {path} cannot be read ({str(error).splitlines()[0]}); allowed: a YAML file") from None
        if not isinstance(content, dict):
            raise SettingError(f"--config {path} holds no mapping; allowed: a YAML file of flag: value")
        return {"--" + str(key).replace("_", "-"): value for key, value in content.items()}

    def value(self, *names: str) -> str | None:
        """The value given under any of these spellings, typed words before the file's; None where none was."""
        typed = self._typed(*names)
        if typed is not None:
            return typed
        return next((str(self._config[name]) for name in names if name in self._config), None)


def _model(words: _Words, demo: str | None) -> tuple[str, tuple[str, str] | None]:
    """The model's path or repository name; for an embedded one also what people and clients call it."""
    flag = words.value(*_MODEL)
    if demo not in (None, *DEMOS):
        raise SettingError(f"--demo {demo} is not known; allowed: {', '.join(DEMOS)}")
    if demo is not None and (words.positional or flag) is not None:
        raise SettingError(f"--demo {demo} and the model {words.positional or flag} were both named; allowed: one of them")
    if words.positional is not None:
        if flag is not None:
            raise SettingError(f"two models were named, {words.positional} and --model-path {flag}; allowed: one of them")
    model = words.positional or flag or str(RISD_BASE_DIR if demo == RISD else CHECKPOINT_DIR)
    path = Path(model).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise SettingError(f"--model-path {model} holds no config.json; allowed: a Hugging Face checkpoint")
        return (str(path) if model.startswith("~") else model), _EMBEDDED.get(path.resolve())
    # `name` and `owner/name` may be a repository; anything else can only be a path.
    looks_like_repository = model.count("/") <= 1 and not model.startswith((".", "/", "~")) and not model.endswith("/")
    if not path.exists() and not looks_like_repository and "://" not in model:
        raise SettingError(f"--model-path {model} does not exist; allowed: a checkpoint's directory or a repository's owner/name")
    return model, None


def _settings(own: Namespace, words: _Words) -> tuple[dict[str, str], dict[str, str]]:
    """`IDLM_*` values for the flags that were typed, and which flag each came from."""
    algorithm = words.value(_ALGORITHM)
    if own.ar and algorithm is not None:
        raise SettingError(f"--ar and {_ALGORITHM} {algorithm} were both given; allowed: one of them")
    strided = {"--stride": own.stride, "--max-stride": own.max_stride, "--sampling-rule": own.sampling_rule}
    strided |= {"--selfcheck": own.selfcheck, "--salvage": own.salvage, "--mixed-steps": own.mixed_steps, "--idlm-lora": own.idlm_lora}
    strided |= {"--decode-graphs": own.decode_graphs, "--ragged-verify": own.ragged_verify}
    for flag, value in (strided | {"--step-ops": own.step_ops}).items():
        if value is None:
            continue
        if own.ar and flag in strided:
            raise SettingError(f"{flag} {value} has no meaning with --ar, which decodes one token per forward; allowed: one of them")
        if algorithm is not None and algorithm.upper() != ALGORITHM:
            raise SettingError(f"{flag} {value} has no meaning with {_ALGORITHM} {algorithm}; allowed: only with {ALGORITHM}")

    stride = None if own.stride is None else stride_or_auto(f"--stride {own.stride}", own.stride)
    auto = own.stride is not None and stride is None
    top = integer("--max-stride", own.max_stride, 1, MAX_STRIDE)
    integer("--mask-token-id", own.mask_token_id, 0, None)
    if own.sampling_rule not in (None, REJECTION, COUPLED):
        raise SettingError(f"--sampling-rule {own.sampling_rule} is not known; allowed: {COUPLED}, {REJECTION}")
    if own.salvage not in (None, *SALVAGE):
        raise SettingError(f"--salvage {own.salvage} is not known; allowed: {', '.join(SALVAGE)}")
    if own.mixed_steps not in (None, ON, OFF):
        raise SettingError(f"--mixed-steps {own.mixed_steps} is not known; allowed: {ON}, {OFF}")
    if own.step_ops not in (None, *STEP_OPS):
        raise SettingError(f"--step-ops {own.step_ops} is not known; allowed: {', '.join(STEP_OPS)}")
    if own.decode_graphs not in (None, *DECODE_GRAPHS):
        raise SettingError(f"--decode-graphs {own.decode_graphs} is not known; allowed: {', '.join(DECODE_GRAPHS)}")
    if own.ragged_verify not in (None, *RAGGED_VERIFY):
        raise SettingError(f"--ragged-verify {own.ragged_verify} is not known; allowed: {', '.join(RAGGED_VERIFY)}")
    if own.idlm_lora is not None and not Path(own.idlm_lora).expanduser().is_dir():
        raise SettingError(f"--idlm-lora {own.idlm_lora} is not a directory; allowed: the directory of an adapter in PEFT's format")
    if own.selfcheck is not None:
        share(f"--selfcheck {own.selfcheck}", own.selfcheck)
    if stride is not None and top is not None and top < stride:
        raise SettingError(f"--max-stride {top} is below --stride {stride}; allowed: {stride} to {MAX_STRIDE}")
    steps = words.value(_STEPS)
    if auto and steps is not None:
        raise SettingError(f"--stride {AUTO} and {_STEPS} {steps} were both given; allowed: one of them")
    if stride is not None and steps is not None and steps != str(stride - 1):
        raise SettingError(f"--stride {stride} and {_STEPS} {steps} disagree; allowed: {_STEPS} {stride - 1}, or leave it out")

    typed = {
        "IDLM_STRIDE": ("--stride", own.stride),
        "IDLM_MAX_STRIDE": ("--max-stride", own.max_stride),
        "IDLM_MASK_TOKEN_ID": ("--mask-token-id", own.mask_token_id),
        "IDLM_SAMPLING_RULE": ("--sampling-rule", own.sampling_rule),
        "IDLM_SELFCHECK": ("--selfcheck", own.selfcheck),
        "IDLM_SALVAGE": ("--salvage", own.salvage),
        "IDLM_MIXED_STEPS": ("--mixed-steps", own.mixed_steps),
        "IDLM_LORA": ("--idlm-lora", own.idlm_lora),
        "IDLM_STEP_OPS": ("--step-ops", own.step_ops),
        "IDLM_DECODE_GRAPHS": ("--decode-graphs", own.decode_graphs),
        "IDLM_RAGGED_VERIFY": ("--ragged-verify", own.ragged_verify),
    }
    if own.no_live_page:
        typed["IDLM_LIVE_PAGE"] = ("--no-live-page", OFF)
    given = {name: pair for name, pair in typed.items() if pair[1] is not None}
    environ = {name: value for name, (_, value) in given.items()}
    if own.demo == RISD and not own.ar and (algorithm or ALGORITHM).upper() == ALGORITHM:
        environ.setdefault("IDLM_LORA", str(RISD_ADAPTER_DIR))
    return environ, {name: flag for name, (flag, _) in given.items()}


def integer(flag: str, text: str | None, low: int, high: int | None) -> int | None:
    """The whole number in `text`, None for None. Raises :class:`SettingError` outside low..high (None: no limit)."""
    return None if text is None else whole_number(f"{flag} {text}", text, low, high)


def _port(text: str | None) -> int:
    port = integer("--port", text, 1, MAX_PORT)
    return DEFAULT_PORT if port is None else port


def default_log_file(port: int) -> Path:
    """Where a quiet server's log goes: the user's state directory, one file per port."""
    state = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    return Path(state) / "idlm" / f"serve-{port}.log"
