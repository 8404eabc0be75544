"""The tools that check the files under ``deploy/``, and what is read from those files more than once."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
RULES = sorted((DEPLOY / "prometheus" / "rules").glob("*.yaml"))
DASHBOARD = DEPLOY / "grafana" / "dashboards" / "idlm.json"
KUBERNETES = DEPLOY / "kubernetes"

# `make deploy-check` wants every tool; `make test` does with those that are there.
REQUIRED = os.environ.get("IDLM_DEPLOY_CHECK") == "1"
thorough = pytest.mark.skipif(not REQUIRED, reason="takes longer: make deploy-check")
FROM = {
    "promtool": "apt install prometheus",
    "prometheus": "apt install prometheus",
    "kubectl": "kubectl's own page of downloads",
    "docker": "Docker's own page of downloads, with its compose plugin",
}


def tool(name: str) -> str:
    """Path of a command; without it the test is skipped, or fails under ``make deploy-check``."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        reason = f"{name} is not on PATH ({FROM.get(name, 'pip install .[deploy]')})"
        pytest.fail(reason) if REQUIRED else pytest.skip(reason)
    return found


def run(name: str, *words: str | Path, **kwargs) -> subprocess.CompletedProcess:
    """Run a tool from the repository's root."""
    return subprocess.run([tool(name), *map(str, words)], cwd=ROOT, capture_output=True, text=True, **kwargs)


def passes(name: str, *words: str | Path, **kwargs) -> str:
    """What the tool printed; its complaint where its exit code is not 0."""
    done = run(name, *words, **kwargs)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def groups() -> list[dict]:
    return [group for path in RULES for group in yaml.safe_load(path.read_text())["groups"]]


def rules() -> list[dict]:
    return [rule for group in groups() for rule in group["rules"]]


def panels() -> list[dict]:
    return json.loads(DASHBOARD.read_text())["panels"]


def dashboard_queries() -> dict[str, str]:
    """Title and letter of every query -> PromQL, Grafana's variables filled in."""
    found = {f"{panel['title']} {target['refId']}": target["expr"] for panel in panels() for target in panel.get("targets", [])}
    filled = {"$__rate_interval": "1m", "$__range": "1h", "$model": ".*", "$arm": ".*", "$instance": ".*"}
    for old, new in filled.items():
        found = {name: text.replace(old, new) for name, text in found.items()}
    return found


def autoscaler_queries() -> dict[str, str]:
    scaled = yaml.safe_load((KUBERNETES / "components" / "autoscaling" / "scaledobject.yaml").read_text())
    return {f"autoscaler {i}": trigger["metadata"]["query"] for i, trigger in enumerate(scaled["spec"]["triggers"])}


def queries() -> dict[str, str]:
    """Everything that is asked of Prometheus under ``deploy/``, by where it stands."""
    of_rules = {rule.get("alert") or rule["record"]: rule["expr"] for rule in rules()}
    return of_rules | dashboard_queries() | autoscaler_queries()


_NAME = re.compile(r"(?<![\w:])((?:idlm|sglang):\w+)(\{[^}]*\})?")


def series(text: str) -> list[tuple[str, set[str]]]:
    """The servers' own series in a query, each with the labels it is selected by."""
    return [(name, set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", labels or ""))) for name, labels in _NAME.findall(text)]
