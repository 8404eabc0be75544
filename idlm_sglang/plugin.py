"""The ``sglang.srt.plugins`` entry points. SGLang calls them in every process that serves."""

import logging

from idlm_sglang import checkpoint, compat
from idlm_sglang.config import ALGORITHM, SettingError

logger = logging.getLogger(__name__)


def register() -> None:
    """Register the ISD algorithm, the published config and the patches.

    SGLang logs a failing plugin and serves on without it. So the algorithm's name is registered in any case, and
    carries the reason: asked for, it ends the start with that one line.
    """
    try:
        compat.check_version()
        checkpoint.register_published_config()
        compat.register_patches()
        _register_algorithm()
    except Exception as reason:
        logger.error("idlm: the plugin cannot serve here: %s", reason)
        _register_refusal(reason)
        raise


def register_cpu() -> None:
    """Register what SGLang's own code needs on the CPU platform, and nothing of ISD's.

    ``SGLANG_PLUGINS=idlm_cpu`` leaves :func:`register` out: stock SGLang, on a machine without an accelerator too.
    """
    compat.check_version()
    compat.register_patches(compat.cpu_patches())


def _register_algorithm() -> None:
    from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

    from idlm_sglang.engine.algorithm import IsdAlgorithm, worker_class

    SpeculativeAlgorithm.register(ALGORITHM, supports_overlap=True, spec_class=IsdAlgorithm)(worker_class)


def _register_refusal(reason: BaseException) -> None:
    from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

    message = str(reason).removeprefix("idlm: ")

    def refuse(server_args) -> None:
        raise SettingError(f"--speculative-algorithm {ALGORITHM} is not available: {message}")

    SpeculativeAlgorithm.register(ALGORITHM, supports_overlap=True, validate_server_args=refuse)(lambda server_args: None)
