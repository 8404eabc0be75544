"""The `idlm` command: what it accepts and where it goes. Nothing heavy is imported before it is needed."""

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from idlm_sglang.config import AUTO, AUTO_MAX_STRIDE, DEFAULT_SELFCHECK, MAX_STRIDE, SettingError

_DESCRIPTION = "Serve Introspective Diffusion Language Models (I-DLM) through SGLang, several tokens per forward."
_EPILOG = "Run `idlm serve` alone for a first look: it serves a small embedded checkpoint, with or without a GPU."

_SERVE_DESCRIPTION = """\
Serve a checkpoint behind SGLang's OpenAI-compatible server.

MODEL is a directory or a repository's owner/name; without it the embedded demo checkpoint is served. It comes first
or behind the options below; SGLang's own --model-path does as well.

Every other flag is SGLang's and reaches it untouched (list: sglang serve --help). Set here unless you set them:
  --speculative-algorithm ISD   --max-running-requests 64   --enable-metrics
  and for the embedded checkpoint --dtype float32 --served-model-name idlm-demo
SGLang's own defaults: --host 127.0.0.1 --port 30000. Listening on other addresses: add --api-key."""

_SERVE_EPILOG = """\
examples:
  idlm serve                                         the embedded checkpoint at http://127.0.0.1:30000
  idlm serve /models/I-DLM-8B --tp-size 2            a checkpoint on two GPUs
  idlm serve /models/I-DLM-8B --stride 4             four tokens proposed per forward, at every load
  idlm serve /models/I-DLM-8B --ar                   the same checkpoint, one token per forward, for comparison
  idlm serve /models/Qwen3-8B --idlm-lora /adapters/r128    Qwen3-8B's own answers, several tokens per forward

exit code: 0 after an orderly stop (SIGTERM, Ctrl-C; a second one ends it at once), 1 or 2 for settings that cannot be
served or a server that failed, 128 + n when it was ended by signal n."""

_CHECK_DESCRIPTION = """\
Say whether this environment can serve, one line per item: ok, warn (works, with the limit named) or FAIL.
Exit code 1 if anything fails."""


_REPLAY_DESCRIPTION = """\
Ask a log of answers again at one token per step, and compare: token ids where the log has them, else text and how the
answer ended. FILE is JSONL, one answer (or one request's list of answers) a line; - is standard input:

  {"path": "/generate" | "/v1/chat/completions" | "/v1/completions", "request": {...}, "response": {...}}

The seed is the request's, or the one in the answer's meta_info. A line is printed for every difference and for every
answer that cannot be replayed, such as a sampled one without a seed.

exit code: 0 all equal, 1 some differ, 2 the file or the server cannot be read or nothing could be replayed."""


class _Parser(argparse.ArgumentParser):
    """Mistakes end in one line, without a page of usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"idlm: {message}; see {self.prog} --help\n")

_MIGRATE_DESCRIPTION = """\
Read the settings file of the published SGLang fork (--dllm-algorithm-config), and print the command that serves the
same here. What is lossy there is named as dropped, with the reason; docs/migration.md has the whole table. All but the
command is printed as comments of a shell: idlm migrate FILE > serve.sh

exit code: 0, or 2 where the file cannot be read or a value has no meaning."""


def parser() -> tuple[argparse.ArgumentParser, argparse.ArgumentParser]:
    """The command's parser and that of `idlm serve`, which does not know SGLang's flags."""
    style = argparse.RawDescriptionHelpFormatter
    top = _Parser(prog="idlm", description=_DESCRIPTION, epilog=_EPILOG, formatter_class=style, allow_abbrev=False)
    top.add_argument("--version", action="store_true", help="print the versions in use and exit")
    commands = top.add_subparsers(dest="command", metavar="{serve,convert,check,replay,migrate,bench,eval,parity}")

    serve = commands.add_parser(
        "serve",
        help="serve a checkpoint",
        usage="idlm serve [MODEL] [options] [any SGLang flag ...]",
        description=_SERVE_DESCRIPTION,
        epilog=_SERVE_EPILOG,
        formatter_class=style,
        allow_abbrev=False,
    )
    option = serve.add_argument
    option("--stride", metavar="N", help=f"tokens proposed and verified per forward, 1 to {MAX_STRIDE}, or {AUTO}: the fastest, step by step (default {AUTO})")
    option("--max-stride", metavar="N", help=f"the largest stride that {AUTO} may choose and a request ask for (default {AUTO_MAX_STRIDE}, or the checkpoint's block_size + 1 where larger; a fixed stride's own)")
    option("--mask-token-id", metavar="ID", help="MASK, for a checkpoint that names none in its config or tokenizer")
    option("--sampling-rule", metavar="RULE", help="exact rule for sampled requests without a seed: coupled (default; the server draws one) or rejection")
    option("--selfcheck", metavar="SHARE", help=f"share of answers asked again at one token per step when idle, 0 to 1 (default {DEFAULT_SELFCHECK})")
    option("--salvage", metavar="MODE", help="what a rejection leaves for the next step: auto (default), branch, chain or off")
    option("--ragged-verify", metavar="MODE", help="leave out rows of a step that are not worth their cost: auto (default: on a CPU), on or off")
    option("--mixed-steps", metavar="on|off", help="with the overlap schedule off, decode steps ride in the forwards of prompts (default on)")
    option("--step-ops", metavar="KIND", help="what turns logits into tokens: auto (default), torch, or triton, the project's kernels on a CUDA GPU")
    option("--decode-graphs", metavar="on|off|auto", help="decode forwards in CUDA graphs, one set per stride (default auto: off until they have been measured)")
    option("--idlm-lora", metavar="ADAPTER", help="a LoRA adapter (PEFT's directory) for the MASK rows alone: the answers are MODEL's own")
    option("--demo", metavar="NAME", help="which embedded model, where none is named: idlm (default), or risd, a plain AR model with such an adapter")
    option("--ar", action="store_true", help="serve autoregressively, the plugin loaded: the baseline")
    option("--no-metrics", action="store_true", help="no Prometheus metrics at /metrics")
    option("--no-live-page", action="store_true", help="no live page at /idlm")
    option("--verbose", action="store_true", help="SGLang's log to standard error (default where that is not a terminal)")
    option("--log-file", metavar="PATH", type=Path, help="SGLang's log to this file (default on a terminal: a file that is named)")

    check = commands.add_parser(
        "check", help="can this environment serve?", description=_CHECK_DESCRIPTION, formatter_class=style, allow_abbrev=False
    )
    check.add_argument("--host", default="127.0.0.1", help="address the server would listen on (default 127.0.0.1)")
    check.add_argument("--port", default="30000", help="port the server would listen on (default 30000)")

    replay = commands.add_parser(
        "replay", help="ask logged answers again at one token per step", description=_REPLAY_DESCRIPTION, formatter_class=style, allow_abbrev=False
    )
    replay.add_argument("file", metavar="FILE", help="a JSONL log of answers, - for standard input")
    replay.add_argument("--url", default="http://127.0.0.1:30000", help="the server to ask (default http://127.0.0.1:30000)")
    replay.add_argument("--api-key", metavar="KEY", help="sent as a bearer token (default: the variable API_KEY, if set)")
    replay.add_argument("--clients", metavar="N", default="4", help="requests at a time (default 4)")

    migrate = commands.add_parser(
        "migrate", help="the published fork's settings as our command line", description=_MIGRATE_DESCRIPTION, formatter_class=style, allow_abbrev=False
    )
    migrate.add_argument("file", metavar="CONFIG.yaml", help="the fork's settings")
    migrate.add_argument("--model", metavar="MODEL", default="MODEL", help="the checkpoint to name in the command (default: the word MODEL)")
    # Listed for the help alone: what follows is read by the commands' own modules.
    commands.add_parser("convert", help="train an adapter for an AR model, or an I-DLM from it", add_help=False)
    commands.add_parser("bench", help="compare servers of one checkpoint under load", add_help=False)
    commands.add_parser("eval", help="compare endpoints on lm-eval's benchmarks", add_help=False)
    commands.add_parser("parity", help="the same requests to two servers: are the answers the same?", add_help=False)
    return top, serve


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the `idlm` script. Returns the exit code; a bad setting exits with its one line, and so does an interrupt."""
    try:
        return _main(argv)
    except KeyboardInterrupt:
        print("idlm: interrupted", file=sys.stderr)
        return 130


def _main(argv: Sequence[str] | None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    top, serve = parser()
    if words[:1] == ["serve"]:
        # Parsed on its own: SGLang's flags and their values are words that no parser here knows.
        own, rest = serve.parse_known_args(words[1:])
        return _serve(own, rest)
    if words[:1] == ["convert"]:
        from idlm_sglang.convert.command import main as convert

        return convert(words[1:], _Parser)
    if words[:1] == ["bench"]:
        return _bench(words[1:])
    if words[:1] == ["eval"]:
        from idlm_sglang.quality.command import main as evaluate

        return evaluate(words[1:], _Parser)
    if words[:1] == ["parity"]:
        from idlm_sglang.parity.command import main as compare

        return compare(words[1:], _Parser)
    own = top.parse_args(words)
    if own.version:
        from idlm_sglang.serving.summary import versions

        print(versions())
        return 0
    if own.command == "check":
        from idlm_sglang.serving.check import run

        return run(own.host, own.port)
    if own.command == "replay":
        from idlm_sglang.serving.replay import run

        return run(own.file, own.url, own.api_key or os.environ.get("API_KEY"), own.clients)
    if own.command == "migrate":
        from idlm_sglang.serving.migrate import run

        return run(own.file, own.model)
    top.print_help()
    return 0 if not words else 2


def _serve(own: argparse.Namespace, rest: Sequence[str]) -> int:
    from idlm_sglang.serving import launch, options

    try:
        return launch.serve(options.resolve(own, rest, log_to_terminal=not sys.stderr.isatty()))
    except SettingError as refused:
        print(refused.code, file=sys.stderr)
        return 1


def _bench(words: Sequence[str]) -> int:
    from idlm_sglang.bench import options

    own = options.parser(_Parser).parse_args(words)
    try:
        asked = options.resolve(own, words)
    except SettingError as refused:
        print(refused.code, file=sys.stderr)
        return 2
    try:
        from idlm_sglang.bench.run import run

        # As an exception, so that the servers are ended.
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
        return run(asked)
    except KeyboardInterrupt:
        print(f"idlm: stopped; the same command with --out {asked.out} goes on from here", file=sys.stderr)
        return 130
    except ModuleNotFoundError as missing:
        print(f"idlm: bench needs {missing.name}, which is not installed; allowed: pip install 'idlm-sglang[bench]'", file=sys.stderr)
        return 1
    except SettingError as refused:
        print(refused.code, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
