"""Runs in a process of its own: what SGLang and the plugin say to many command lines, without starting a server.

Reads {"cases": [{"argv", "environ", "stock"}], "check": [host, port], "describe": {name: argv}} from standard input.
Writes to standard output the report of `idlm check`, per case how `idlm serve` (and stock SGLang) refused it or null, the
flags that the algorithm refuses, and what was resolved for the lines to describe.
"""

import contextlib
import gc
import io
import json
import os
import sys


def outcome(resolve, argv: list[str], environ: dict[str, str]) -> dict | None:
    """Type and text of what `resolve(argv)` raised, None where it raised nothing."""
    from idlm_sglang.serving.server import one_line

    before = dict(os.environ)
    os.environ.update(environ)
    try:
        resolve(argv)
    except (Exception, SystemExit) as reason:
        # The interpreter prints the text of such an exit, and nothing else; anything else comes with a traceback.
        clean = isinstance(reason, SystemExit) and isinstance(reason.code, str)
        return {"clean": clean, "type": type(reason).__name__, "line": one_line(reason)}
    finally:
        os.environ.clear()
        os.environ.update(before)
    return None


def stock(argv: list[str]) -> None:
    """What `sglang serve` does before it starts anything."""
    from sglang.srt.server_args import prepare_server_args

    prepare_server_args(argv).resolve_once()


def main() -> None:
    gc.disable()  # there is much of it while SGLang is imported
    asked = json.load(sys.stdin)
    result, sys.stdout = sys.stdout, sys.stderr
    report = io.StringIO()
    with contextlib.redirect_stdout(report):
        from idlm_sglang.serving.check import run

        code = run(*asked["check"])

    from idlm_sglang.serving.server import describe, resolve

    cases = []
    for case in asked["cases"]:
        cases.append({"idlm": outcome(resolve, case["argv"], case["environ"])})
        if case["stock"]:
            cases[-1]["stock"] = outcome(stock, case["argv"], case["environ"])
    described = {name: describe(resolve(argv)) for name, argv in asked["describe"].items()}

    from idlm_sglang.engine.algorithm import _REFUSED

    flags = [flag for _, _, flag, _ in _REFUSED]
    json.dump({"refused_flags": flags, "check": {"code": code, "report": report.getvalue()}, "cases": cases, "describe": described}, result)


if __name__ == "__main__":
    main()
