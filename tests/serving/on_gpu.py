"""Runs in a process of its own, where torch says that the machine has an H200: how SGLang resolves command lines there, without starting a server.

Nothing runs on a GPU: what is seen is which defaults SGLang and the plugin take, and what they refuse. sgl_kernel, which loads the driver, is
stood in for by empty modules.

Reads [{"argv", "environ"}] from standard input, each behind `--model-path MODEL`; writes for each {"refused": line or null, "resolved": {field:
value}, "environ": what the plugin added to the environment}.
"""

import importlib.abc
import importlib.machinery
import json
import os
import sys
import types
from types import SimpleNamespace

FIELDS = ("attention_backend", "prefill_attention_backend", "decode_attention_backend", "page_size", "max_running_requests", "speculative_num_draft_tokens")
_GIB = 1 << 30


class _Hollow(types.ModuleType):
    __path__ = []

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return _Hollow(f"{self.__name__}.{name}")


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path, target=None):
        return importlib.machinery.ModuleSpec(name, self) if name.partition(".")[0] == "sgl_kernel" else None

    def create_module(self, spec):
        return _Hollow(spec.name)

    def exec_module(self, module):
        pass


def pretend() -> None:
    """One H200 on this machine, as far as torch is asked."""
    import torch

    sys.meta_path.insert(0, _Finder())
    said = {
        "is_available": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_capability": (9, 0),
        "get_device_name": "NVIDIA H200",
        "get_device_properties": SimpleNamespace(name="NVIDIA H200", total_memory=141 * _GIB, major=9, minor=0, multi_processor_count=132),
        "mem_get_info": (139 * _GIB, 141 * _GIB),
        "is_bf16_supported": True,
    }
    for name, value in said.items():
        setattr(torch.cuda, name, lambda *_, value=value, **__: value)


def resolved(argv: list[str], environ: dict[str, str]) -> dict:
    from sglang.srt.arg_groups.overrides import resolution_result
    from sglang.srt.server_args import prepare_server_args

    before = dict(os.environ)
    os.environ.update(environ)
    found = {"refused": None, "resolved": {}}
    try:
        args = prepare_server_args(argv)
        args.resolve_once()
        found["resolved"] = {field: resolution_result(args, field) for field in FIELDS}
        found["resolved"]["decode_graphs"] = str(resolution_result(args, "cuda_graph_config").decode.backend)
    except SystemExit as refused:
        found["refused"] = str(refused.code)
    finally:
        found["environ"] = {name: value for name, value in os.environ.items() if name not in before | environ and not name.startswith("IDLM_")}
        os.environ.clear()
        os.environ.update(before)
    return found


def main() -> None:
    asked = json.load(sys.stdin)
    result, sys.stdout = sys.stdout, sys.stderr
    pretend()
    from sglang.srt.plugins import load_plugins

    load_plugins()
    json.dump([resolved(case["argv"], case["environ"]) for case in asked], result)


if __name__ == "__main__":
    main()
