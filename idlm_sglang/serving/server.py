"""The process that becomes SGLang's server: `python -P -m idlm_sglang.serving.server EVENTS_FD [SGLang flags]`.

It does what `sglang serve` does, and tells its parent through EVENTS_FD what was resolved or why it was refused.
SGLang starts its workers by importing this module again, so nothing heavy is imported at the top.
"""

import argparse
import ctypes
import json
import logging
import os
import signal
import sys
from pathlib import Path
from typing import Any, NoReturn

from idlm_sglang.config import ALGORITHM, SettingError

# How SGLang refuses a value. Anything else is a defect, and its traceback belongs into the log.
_REFUSALS = (ValueError, AssertionError, OSError, ImportError, NotImplementedError)


def main(argv: list[str]) -> None:
    end_with_parent()
    events = os.fdopen(int(argv[0]), "w")
    try:
        server_args = resolve(argv[1:])
        summary = describe(server_args)
    except (Exception, SystemExit) as reason:
        if not isinstance(reason, (SystemExit, *_REFUSALS)):
            logging.getLogger(__name__).exception("idlm: resolving the arguments failed")
        json.dump({"refused": one_line(reason)}, events)
        events.close()
        sys.exit(1)
    json.dump({"summary": summary}, events)
    # Closed at once: a process of SGLang's that inherited it would keep the parent waiting.
    events.close()

    from sglang.launch_server import run_server
    from sglang.srt.utils import kill_process_tree

    try:
        run_server(server_args)
    finally:
        kill_process_tree(os.getpid(), include_parent=False)


def resolve(argv: list[str]) -> Any:
    """SGLang's own ServerArgs for this command line, plugins loaded, everything resolved.

    Raises:
        SettingError: also for a word that SGLang's parser does not accept, without its page of usage.
    """
    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import prepare_server_args

    from idlm_sglang import compat

    load_plugins()
    # ISD asserts this itself; an AR server without the plugin would be a silent surprise.
    compat.assert_applied()
    usual, argparse.ArgumentParser.error = argparse.ArgumentParser.error, _refuse_word
    try:
        server_args = prepare_server_args(argv)
    finally:
        argparse.ArgumentParser.error = usual
    try:
        server_args.resolve_once()
    except OSError as error:
        first = str(error).strip().split("\n")[0]
        allowed = "a checkpoint's directory, or a repository's owner/name that can be reached from here"
        raise SettingError(f"--model-path {server_args.model_path} cannot be read ({first}); allowed: {allowed}") from None
    return server_args


def _refuse_word(parser: argparse.ArgumentParser, message: str) -> NoReturn:
    raise SettingError(f"{message}; allowed: SGLang's flags, listed by sglang serve --help")


def describe(server_args: Any) -> dict[str, Any]:
    """What was resolved, for people: plain values only."""
    from sglang.srt.arg_groups.overrides import model_config_of, resolving_view
    from sglang.srt.platforms import current_platform

    from idlm_sglang.config import handed_down, read_settings
    from idlm_sglang.engine.algorithm import check_checkpoint
    from idlm_sglang.platform import accelerator_available
    from idlm_sglang.serving.device import device_name

    cfg = resolving_view(server_args)
    model = model_config_of(server_args)
    strided = (cfg.speculative_algorithm or "").upper() == ALGORITHM
    settings = handed_down() if strided else read_settings()
    try:
        mask = check_checkpoint(server_args, settings)
    except SettingError:
        # Refused by now where ISD was asked for; an AR server may well serve a model without MASK.
        mask = None
    return {
        "architecture": _architecture(cfg.model_path, model.hf_config.architectures),
        "dtype": str(model.dtype).removeprefix("torch."),
        "served_as": cfg.served_model_name,
        "mask": mask,
        "algorithm": cfg.speculative_algorithm,
        "stride": settings.stride if strided else None,
        "auto": strided and settings.auto,
        "max_stride": settings.max_stride if strided else None,
        "rule": settings.sampling_rule if strided else None,
        "lora": _adapter(settings.lora) if strided else None,
        "concurrency": cfg.max_running_requests,
        "device": device_name(cfg.device),
        "platform": type(current_platform).__name__,
        "attention": _attention(cfg),
        "replicas": 1 if cfg.enable_dp_attention else cfg.dp_size,
        "decode_graphs": settings.decode_graphs if strided and accelerator_available() else None,
        "step_ops": settings.step_ops if strided else None,
        "tp": cfg.tp_size,
        "dp": cfg.dp_size,
        "metrics": cfg.enable_metrics,
        "live": strided and settings.live_page and cfg.tokenizer_worker_num == 1,
        "host": cfg.host,
        "port": cfg.port,
        "tls": bool(cfg.ssl_certfile),
        "key": bool(cfg.api_key),
    }


def _attention(cfg) -> str:
    """The attention backend, or those of prompts and of decode steps."""
    prompts, steps = (half or cfg.attention_backend for half in (cfg.prefill_attention_backend, cfg.decode_attention_backend))
    return prompts if prompts == steps else f"{prompts} for prompts, {steps} for steps"


def _adapter(path: str | None) -> dict[str, Any] | None:
    """The adapter's path and rank."""
    from idlm_sglang.adapter import read_adapter

    return None if path is None else {"path": path, "rank": read_adapter(path).rank}


def _architecture(model_path: str, served: list[str] | None) -> str:
    """The name in config.json and, where it differs, the one it is served as."""
    ours = ", ".join(served or ["unknown"])
    config = Path(model_path) / "config.json"
    named = json.loads(config.read_text()).get("architectures") if config.is_file() else served
    return ours if named == served else f"{', '.join(named or ['unnamed'])}, served as {ours}"


def one_line(reason: BaseException) -> str:
    """Why a start was refused, as the one line that people see."""
    if isinstance(reason, SystemExit):
        text = reason.code if isinstance(reason.code, str) else f"SGLang refused the arguments (exit code {reason.code})"
    else:
        text = str(reason).strip() or type(reason).__name__
    first = " ".join(text.splitlines()[:1]).removeprefix("idlm: ")
    if not isinstance(reason, (SystemExit, *_REFUSALS)):
        first = f"{type(reason).__name__}: {first}"
    return f"idlm: {first}"


def end_with_parent() -> None:
    """Get SIGTERM when the process that started this one dies without saying so (Linux; elsewhere nothing)."""
    if sys.platform == "linux":
        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


if __name__ == "__main__":
    main(sys.argv[1:])
