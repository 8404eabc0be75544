"""`idlm eval` over HTTP: lossless arms come out equal, a worse one is found, a failing one is no score."""

import json
import subprocess
import sys

from idlm_sglang.quality import published

LIMIT = 45  # questions of each of the three demo tasks
HOT = {"temperature": 2.0, "top_p": 1.0, "top_k": -1}


def idlm(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "idlm_sglang.serving.cli", *words], capture_output=True, text=True, timeout=300)


def test_isd_is_equal_to_ar_and_an_arm_that_samples_worse_is_found(ar, isd, tmp_path):
    out = tmp_path / "results"
    demo = ["--suite", "demo", "--limit", str(LIMIT), "--out", str(out)]
    both = [f"ar={ar.url}", f"isd={isd.url}"]
    done = idlm("eval", *both, f"hot={isd.url}", "--extra", f"hot={json.dumps(HOT)}", *demo)
    assert done.returncode == 1, done.stderr
    found = json.loads((out / "report.json").read_text())
    assert len(found["benchmarks"]) == 3 and not found["not_run"]
    for row in found["benchmarks"]:
        means = {name: arm["mean"]["mean"] for name, arm in row["arms"].items()}
        assert means["isd"] == means["ar"] > 0.3
        assert row["comparisons"][0]["same_text"] == row["questions"] == LIMIT
        print(row["benchmark"], means)
    whole = {comparison["arm"]: comparison for comparison in found["all"]}
    assert whole["isd"]["verdict"]["word"] == "parity" and whole["hot"]["verdict"]["word"] == "worse"
    assert whole["isd"]["questions"] == 3 * LIMIT and whole["hot"]["same_text"] < 3 * LIMIT
    info = found["fingerprint"]["arms"]["isd"]["info"]
    assert info["speculative_algorithm"] == "ISD" and info["dtype"] == "float32"
    assert f"| **all questions** | isd | +0.0 [-2.8, +2.8] | 0 | 0 | {3 * LIMIT}/{3 * LIMIT} | parity |" in done.stdout

    # What was answered is kept: without the worse arm the verdict needs no further request.
    again = idlm("eval", *both, *demo, "--resume")
    assert again.returncode == 0, again.stderr
    answers = json.loads((out / "report.json").read_text())["fingerprint"]["answers"]
    assert answers == {name: {"asked": 0, "reused": 3 * LIMIT} for name in ("ar", "isd")}

    # The same answers can be audited at one token per step.
    some = tmp_path / "some.jsonl"
    some.write_text("".join((out / "answers-isd.jsonl").read_text().splitlines(keepends=True)[::20]))
    replayed = idlm("replay", str(some), "--url", isd.url)
    assert replayed.returncode == 0 and "7 equal, 0 different" in replayed.stdout, replayed.stdout


def test_a_request_that_the_server_refuses_ends_it_in_one_line(ar, isd):
    done = idlm("eval", f"ar={ar.url}", f"isd={isd.url}", "--extra", 'isd={"custom_params": {"idlm_stride": 99}}', "--suite", "demo", "--limit", "2")
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.splitlines()[-1].startswith(f"idlm: endpoint isd={isd.url} refuses a request: HTTP 400") and "idlm_stride" in done.stderr
    assert "Traceback" not in done.stderr


def test_answers_that_are_all_thinking_are_no_score(ar, isd):
    # These servers split thinking off, and this model never thinks: left to itself all of it counts as thinking.
    done = idlm("eval", f"ar={ar.url}", f"isd={isd.url}", "--thinking", "model", "--suite", "demo", "--limit", "2")
    assert done.returncode == 2 and "ar wrote nothing behind its thinking in 2 answers: --thinking off" in done.stdout


def test_every_benchmark_of_the_paper_is_named_also_where_none_can_be_run(ar, isd, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "no data"))
    done = idlm("eval", f"ar={ar.url}", f"isd={isd.url}", "--suite", "paper", "--max-tokens", "512")
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith("idlm: nothing could be run")
    why = dict(line.strip("| ").split(" | ") for line in done.stdout.split("## Not run")[1].splitlines() if line.startswith("| "))
    assert [name for name in why if name in published.BENCHMARKS] == list(published.BENCHMARKS)
    assert why["MathBench"] == "unavailable in lm-eval" and why["GSM8K"].startswith("data not at hand: ")
    print(done.stdout)
