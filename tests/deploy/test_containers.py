"""Container file, compose file and scripts: what they promise is in them, and real tools accept them."""

import json
import os
import re
import subprocess
import sys
import tomllib

import pytest
import yaml

from idlm_sglang.serving import cli, options
from tests.deploy.tools import DEPLOY, ROOT, passes, run, thorough

SCRIPTS = sorted(DEPLOY.rglob("*.sh"))
CONTAINERFILE = (DEPLOY / "Containerfile").read_text()


def pinned(name: str) -> str:
    return re.search(rf"^{name}==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)[1]


def compose() -> dict:
    return yaml.safe_load((DEPLOY / "compose.yaml").read_text())


def test_yamllint_accepts_every_yaml_file():
    print(passes("yamllint", "--strict", "-c", "deploy/.yamllint", "deploy", "tests/deploy"))


def test_shellcheck_accepts_every_script():
    assert SCRIPTS and all(os.access(script, os.X_OK) for script in SCRIPTS)
    passes("shellcheck", *SCRIPTS)


def test_hadolint_accepts_the_container_file():
    passes("hadolint", "deploy/Containerfile")


def test_the_image_is_the_official_one_of_the_pinned_version():
    assert f"ARG SGLANG_TAG=v{pinned('sglang')}\n" in CONTAINERFILE
    assert "\nFROM lmsysorg/sglang:${SGLANG_TAG}${SGLANG_DIGEST:+@${SGLANG_DIGEST}}\n" in CONTAINERFILE
    assert f'== "{pinned("sglang")}"' in CONTAINERFILE
    assert compose()["services"]["server"]["build"]["args"]["SGLANG_TAG"].endswith(f"v{pinned('sglang')}}}")


def test_the_image_runs_as_a_user_that_is_not_root_and_fetches_nothing():
    assert re.findall(r"^USER (\S+)$", CONTAINERFILE, re.MULTILINE)[-1] == "10001:10001"
    assert "HF_HUB_OFFLINE=1" in CONTAINERFILE and "TRANSFORMERS_OFFLINE=1" in CONTAINERFILE


def test_what_the_image_copies_is_there_and_in_its_context():
    copied = {word for line in re.findall(r"^COPY (.*)$", CONTAINERFILE, re.MULTILINE) for word in line.split()[:-1]}
    context = set(re.findall(r"^!(\S+)$", (DEPLOY / "Containerfile.dockerignore").read_text(), re.MULTILINE))
    assert copied == context and all((ROOT / name).exists() for name in copied)


def test_the_image_adds_what_serving_needs_and_sglang_does_not_bring():
    """`peft` is for `idlm convert` alone."""
    needed = {re.split(r"[<>=]", line)[0] for line in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]}
    added = set(re.search(r"pip install --no-deps (.*?) \\$", CONTAINERFILE, re.MULTILINE)[1].split())
    assert added == needed - {"sglang", "peft"} | {".", "sglang-router"}
    assert all(pinned(name) for name in added - {"."})


def test_idlm_serve_accepts_the_command_lines_of_image_and_compose_file():
    image = json.loads(re.search(r"^CMD (\[.*\])$", CONTAINERFILE, re.MULTILINE)[1])
    model, *rest = compose()["services"]["server"]["command"]
    for words in (image, ["org/model", *rest]):
        own, others = cli.parser()[1].parse_known_args(words)
        resolved = options.resolve(own, others, log_to_terminal=False)
        assert (resolved.host, resolved.port) == ("0.0.0.0", 30000)


def test_the_compose_file_mounts_what_is_there():
    for service in compose()["services"].values():
        for volume in service["volumes"]:
            source = volume.split(":")[0]
            if source.startswith("./"):
                assert (DEPLOY / source).exists(), source
            elif "$" not in source:
                assert source in compose()["volumes"], source
    grafana = compose()["services"]["grafana"]
    (provider,) = yaml.safe_load((DEPLOY / "grafana/provisioning/dashboards/idlm.yaml").read_text())["providers"]
    assert any(volume.split(":")[1] == provider["options"]["path"] for volume in grafana["volumes"])
    (source,) = yaml.safe_load((DEPLOY / "grafana/provisioning/datasources/prometheus.yaml").read_text())["datasources"]
    assert source["url"].strip("${}") in grafana["environment"]


def test_prometheus_accepts_the_configuration_that_the_compose_file_mounts():
    assert "--config.file=/etc/prometheus/compose.yml" in compose()["services"]["prometheus"]["command"]
    passes("promtool", "check", "config", "deploy/prometheus/compose.yml")


@thorough
def test_docker_compose_accepts_the_file():
    variables = {"API_KEY": "k", "GRAFANA_PASSWORD": "p", "PROMETHEUS_TAG": "v3.5.0", "GRAFANA_TAG": "12.1.0"}
    if run("docker", "compose", "version").returncode != 0:
        pytest.skip("docker has no compose plugin here")
    passes("docker", "compose", "-f", "deploy/compose.yaml", "config", "--quiet", env=os.environ | variables)


def test_a_script_with_wrong_arguments_says_which():
    done = subprocess.run([DEPLOY / "record.sh"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, "record.sh: needs URL and REQUESTS.jsonl, got 0 arguments\n")


@thorough
def test_swap_and_rollback_rehearsed_without_network_root_or_a_writable_file_system():
    done = subprocess.run([DEPLOY / "rehearse.sh", sys.executable], capture_output=True, text=True, timeout=600)
    print(done.stdout, done.stderr)
    assert done.returncode == 0 and "8 equal, 0 different; 0 not replayable" in done.stdout
