"""Plans and scripted answers for the tests of `idlm eval`."""

import json

import pytest

from idlm_sglang.quality import harness, options

ARMS = ["ar=http://127.0.0.1:1", "isd=http://127.0.0.1:2"]


def plan(*words: str, arms=ARMS) -> options.Plan:
    return options.resolve(options.parser().parse_args([*arms, *words]))


@pytest.fixture(scope="package", autouse=True)
def own_cache(tmp_path_factory):
    """Data sets made for the tests stay out of the user's cache. Read when `datasets` is imported, so set before it is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))
        for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE", "HF_ALLOW_CODE_EVAL", "HF_DATASETS_DISABLE_PROGRESS_BARS"):
            patch.setenv(name, "1")
        harness.prepare(plan("--suite", "demo"))
        yield


@pytest.fixture(scope="session")
def scripted():
    """A model for lm-eval that answers by a function of the messages."""
    from lm_eval.api.model import LM

    class Scripted(LM):
        tokenizer_name = ""

        def __init__(self, say):
            super().__init__()
            self.say, self.asked = say, []

        def apply_chat_template(self, chat_history, add_generation_prompt=True):
            return json.dumps(chat_history)

        def chat_template(self, chat_template=False):
            return ""

        def generate_until(self, requests, disable_tqdm=False):
            self.asked += [(json.loads(prompt), settings) for prompt, settings in (request.args for request in requests)]
            return [self.say(json.loads(request.args[0])) for request in requests]

        def loglikelihood(self, requests):
            raise NotImplementedError

        loglikelihood_rolling = loglikelihood

    return Scripted
