"""What cannot be served is refused in one line, before the model loads, by `idlm serve` and by stock SGLang alike."""

import pytest

from idlm_sglang.platform import accelerator_available

from .refusals import CASES


@pytest.mark.parametrize("number", range(len(CASES)), ids=[str(case) for case in CASES])
def test_it_is_refused_in_one_line_that_names_setting_value_and_what_is_allowed(number, sglang_says):
    case, says = CASES[number], sglang_says["cases"][number]
    if case.cpu_only and accelerator_available():
        pytest.skip("this machine has an accelerator")
    assert says["idlm"] is not None, "it was served"
    line = says["idlm"]["line"]
    assert line.startswith("idlm: ") and "\n" not in line
    for part in case.names:
        assert part in line
    if case.stock:
        assert says["stock"] == says["idlm"] and says["stock"]["clean"], says["stock"]


def test_every_setting_that_the_algorithm_refuses_is_in_the_table(sglang_says):
    typed = {word for case in CASES for word in case.argv}
    assert set(sglang_says["refused_flags"]) <= typed


def test_what_was_resolved_is_described(sglang_says):
    isd = sglang_says["describe"]["isd"]
    assert isd["architecture"] == "IDLMForCausalLM" and isd["dtype"] == "float32"
    assert isd["stride"] == 4 and isd["concurrency"] == 64 and isd["mask"][1] == "config"
    ar = sglang_says["describe"]["ar"]
    assert ar["stride"] is None and ar["algorithm"] is None and ar["mask"] == isd["mask"]
    published = sglang_says["describe"]["published"]
    assert published["architecture"] == "SDARForCausalLM, served as IDLMForCausalLM"
