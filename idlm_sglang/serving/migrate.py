"""`idlm migrate`: the settings file of the published SGLang fork in, our command line out, and by name what does not go over."""

import json
import math
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from idlm_sglang.config import MAX_STRIDE, SettingError

# What the fork does where its file says nothing. Its sampling parameters hold for every request, whatever that asks for.
DEFAULT_BLOCK = 3
DEFAULT_SAMPLING = {"temperature": 1.0, "top_k": 50, "top_p": 0.95}
STRIDE, BLOCK = "gen_block_size", "block_size"


@dataclass(frozen=True)
class Dropped:
    """A key without a counterpart.

    Attributes:
        why: what happens instead.
        neutral: whether a value changes nothing there either, so that nothing is lost.
    """

    why: str
    neutral: Callable[[Any], bool] = lambda value: value in (None, False, 0, "")


_LOSSY = "it changes which tokens come out; here drafts are verified by an exact rule alone"
DROPPED = {
    "use_spec_verify": Dropped("drafts are always verified", lambda value: value in (None, True)),
    "confidence_threshold": Dropped(_LOSSY),
    "confidence_accept_threshold": Dropped(_LOSSY),
    "verify_alpha": Dropped(_LOSSY, lambda value: value in (None, 1, 1.0)),
    "verify_num_specs": Dropped("it accepts later drafts unseen; here every draft is verified", lambda value: value is None),
    "fast_verify": Dropped(_LOSSY),
    "fast_verify_topk": Dropped(_LOSSY),
    "fast_verify_topk_per_spec": Dropped(_LOSSY),
    "output_correction": Dropped("there is nothing to correct: the output is AR's"),
    "conditional_lora": Dropped("the file does not name the adapter: add --idlm-lora ADAPTER, which is always gated to the MASK rows"),
    "stats_file": Dropped("the figures are at /metrics (idlm:*) and in each answer's meta_info (spec_*)"),
    "rounds_file": Dropped("the figures are at /metrics (idlm:*) and in each answer's meta_info (spec_*)"),
    "draft_conf_file": Dropped("drafts' probabilities are not written; acceptance by position is at /metrics (idlm:drafts_*)"),
}
KNOWN = {STRIDE, BLOCK, *DEFAULT_SAMPLING, *DROPPED}


@dataclass(frozen=True)
class Migration:
    """What a settings file becomes.

    Attributes:
        stride: N.
        sampling: temperature, top_k and top_p that every request had.
        notes: what was taken from where.
        lost: keys that change something in the fork and have no counterpart, with the reason.
        unknown: keys the fork is not known to have.
    """

    stride: int
    sampling: dict[str, float]
    notes: tuple[str, ...]
    lost: dict[str, str]
    unknown: tuple[str, ...]

    def command(self, model: str) -> str:
        """One line of shell."""
        preferred = json.dumps(self.sampling)
        return shlex.join(["idlm", "serve", model, "--stride", str(self.stride), "--preferred-sampling-params", preferred])


def run(file: str, model: str) -> int:
    """Print the command, everything else as comments of a shell. Returns the exit code: 2 where the file cannot be used."""
    try:
        found = migrate(file, read(file))
    except SettingError as refused:
        print(refused.code, file=sys.stderr)
        return 2
    for note in found.notes:
        print(f"# {note}")
    for key, why in found.lost.items():
        print(f"# dropped: {key}: {why}")
    for key in found.unknown:
        print(f"# not known: {key}: nothing was made of it")
    fields = ", ".join(f'"{name}": {json.dumps(value)}' for name, value in found.sampling.items())
    print("# sampling: the server's word there, a default here that each request may change. The flag below serves /generate;")
    print(f"#   /v1/chat/completions takes it from the checkpoint's generation_config.json ({fields}),")
    print("#   /v1/completions from the request alone")
    print(found.command(model))
    return 0


def read(file: str) -> dict[str, Any]:
    """The settings in a YAML file. An empty one is one of defaults alone."""
    allowed = "the YAML file of --dllm-algorithm-config"
    try:
        content = yaml.safe_load(Path(file).read_text())
    except OSError as error:
        raise SettingError(f"{file} cannot be read ({error.strerror}); allowed: {allowed}") from None
    except UnicodeDecodeError:
        raise SettingError(f"{file} cannot be read (not UTF-8); allowed: {allowed}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}: " if mark else ""
        reason = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise SettingError(f"{file} is not YAML ({where}{reason}); allowed: {allowed}") from None
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise SettingError(f"{file} holds no settings; allowed: {allowed}, one `name: value` a line")
    return content


def migrate(file: str, settings: dict[str, Any]) -> Migration:
    """Our counterpart of the fork's settings.

    Raises:
        SettingError: a value that names no stride or no sampling parameter.
    """
    stride, notes = _stride(file, settings)
    sampling = {name: _number(file, name, settings.get(name, default)) for name, default in DEFAULT_SAMPLING.items()}
    if absent := [name for name in DEFAULT_SAMPLING if name not in settings]:
        notes.append(f"{', '.join(absent)}: not in the file, the fork's own default")
    lost = {key: DROPPED[key].why for key, value in settings.items() if key in DROPPED and not DROPPED[key].neutral(value)}
    return Migration(stride, sampling, tuple(notes), lost, tuple(key for key in settings if key not in KNOWN))


def _stride(file: str, settings: dict[str, Any]) -> tuple[int, list[str]]:
    """N, from the block to generate or, where only that is given, from the width 2N - 1."""
    width = _whole(file, BLOCK, settings.get(BLOCK), 2 * MAX_STRIDE - 1)
    stride = _whole(file, STRIDE, settings.get(STRIDE), MAX_STRIDE)
    if width is not None and width % 2 == 0:
        raise SettingError(f"{file}: {BLOCK} {width} is even; allowed: 2N - 1 for a stride of N")
    if stride is None and width is None:
        return DEFAULT_BLOCK, [f"stride {DEFAULT_BLOCK}: {STRIDE} is not in the file, the fork's own default"]
    if stride is None:
        return (width + 1) // 2, [f"stride {(width + 1) // 2}: {STRIDE} is not in the file, taken from {BLOCK} {width} = 2N - 1"]
    if width is not None and width != 2 * stride - 1:
        raise SettingError(f"{file}: {BLOCK} {width} and {STRIDE} {stride} disagree; allowed: {BLOCK} {2 * stride - 1}, or one of them left out")
    return stride, [f"stride {stride}: {STRIDE}"]


def _whole(file: str, name: str, value: Any, high: int) -> int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= high:
        raise SettingError(f"{file}: {name} {value!r} is not valid; allowed: an integer from 1 to {high}")
    return value


# As SGLang has them in a request.
_ALLOWED: dict[str, tuple[Callable[[float], bool], str]] = {
    "temperature": (lambda value: value >= 0, "a number >= 0"),
    "top_k": (lambda value: value == int(value) and (value == -1 or value >= 1), "an integer >= 1, or -1 for all"),
    "top_p": (lambda value: 0 < value <= 1, "a number above 0 and up to 1"),
}


def _number(file: str, name: str, value: Any) -> float:
    valid, allowed = _ALLOWED[name]
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or not valid(value):
        raise SettingError(f"{file}: {name} {value!r} is not valid; allowed: {allowed}")
    return value
