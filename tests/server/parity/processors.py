"""Custom logit processors of the cases. The servers import this module by its name: they run in the repository's root."""

from sglang.srt.sampling.custom_logit_processor import CustomLogitProcessor


class Ban(CustomLogitProcessor):
    """Tokens in each request's own ``custom_params["ban"]`` hardly ever come; a grammar may still need them."""

    def __call__(self, logits, custom_param_list=None):
        for row, params in zip(logits, custom_param_list, strict=True):
            row[params["ban"]] -= 40.0
        return logits


class Fails(CustomLogitProcessor):
    """Fails in the way that a request's own ``custom_params["fails"]`` names, and spoils the logits first."""

    def __call__(self, logits, custom_param_list=None):
        ways = [params.get("fails") for params in custom_param_list]
        if any(ways):
            logits.fill_(0.0)
        if "raises" in ways:
            raise KeyError("ban")
        if "exits" in ways:
            raise SystemExit(3)
        if "shape" in ways:
            return logits[:, :3]
        return None if "nothing" in ways else logits
