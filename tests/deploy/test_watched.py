"""A real Prometheus over two real servers, one per arm: every panel of the dashboard and both triggers of the autoscaler get values."""

import math
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import requests
import yaml

from tests.deploy.tools import DEPLOY, RULES, autoscaler_queries, dashboard_queries, rules, thorough, tool
from idlm_sglang.serving.ports import free_port
from tests.server.harness import CHECKPOINT, Server, chat

NAME = "idlm"  # as the manifests have it: the autoscaler asks by it
LOAD_SECONDS = 25


@pytest.fixture(scope="module")
def arms(tmp_path_factory):
    logs = tmp_path_factory.mktemp("arms")
    flags = ("--enable-metrics", "--served-model-name", NAME)
    isd = Server("isd", CHECKPOINT, logs, "--speculative-algorithm", "ISD", *flags, env={"IDLM_SELFCHECK": "1"})
    with isd, Server("ar", CHECKPOINT, logs, *flags) as ar:
        yield {"isd": isd, "ar": ar}


@pytest.fixture(scope="module")
def prometheus(arms, tmp_path_factory):
    """Its address, with the configuration that is shipped, in a hurry."""
    place = tmp_path_factory.mktemp("prometheus")
    shipped = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
    shipped["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    shipped["rule_files"] = [str(path) for path in RULES]
    (job,) = shipped["scrape_configs"]
    job["static_configs"] = [{"targets": [f"127.0.0.1:{server.port}"], "labels": {"arm": arm}} for arm, server in arms.items()]
    (place / "prometheus.yml").write_text(yaml.safe_dump(shipped))
    address = f"127.0.0.1:{free_port()}"
    words = [f"--config.file={place / 'prometheus.yml'}", f"--storage.tsdb.path={place / 'data'}", f"--web.listen-address={address}"]
    with (place / "log").open("wb") as log:
        process = subprocess.Popen([tool("prometheus"), *words], stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            try:
                if requests.get(f"http://{address}/-/ready", timeout=1).ok:
                    break
            except requests.ConnectionError:
                time.sleep(0.2)
        yield address
    finally:
        process.terminate()
        process.wait(30)


def ask(address: str, query: str) -> list[dict]:
    reply = requests.get(f"http://{address}/api/v1/query", params={"query": query}, timeout=10).json()
    assert reply["status"] == "success", reply
    return reply["data"]["result"]


@thorough
def test_every_panel_and_trigger_gets_a_value_and_no_alert_fires(arms, prometheus):
    def talk(server, until):
        while time.monotonic() < until:
            body = {"text": chat("Count from 3 to 20."), "sampling_params": {"temperature": 1.0, "max_new_tokens": 60}, "stream": True}
            list(server.post("/generate", body, stream=True).iter_lines())

    until = time.monotonic() + LOAD_SECONDS
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda server: talk(server, until), [*arms.values()] * 2))
        queries = dashboard_queries() | autoscaler_queries() | {r["record"]: r["record"] for r in rules() if "record" in r}
        targets = requests.get(f"http://{prometheus}/api/v1/targets", timeout=10).json()["data"]["activeTargets"]
        assert [t["health"] for t in targets] == ["up", "up"], [t["lastError"] for t in targets]
        found = {where: ask(prometheus, query) for where, query in queries.items()}
    empty = [where for where, samples in found.items() if not any(math.isfinite(float(s["value"][1])) for s in samples)]
    speed = found["model:idlm_speedup_over_ar:ratio5m"]
    # What the arms do to each other on one machine says nothing about their speed: a value is all that is looked for.
    print(f"{len(found) - len(empty)} of {len(found)} queries have values")
    assert not empty, empty
    assert {s["metric"]["arm"] for s in found["model_arm:sglang_generation_tokens:rate5m"]} == {"isd", "ar"}
    assert len(speed) == 1 and float(speed[0]["value"][1]) > 0
    firing = ask(prometheus, 'ALERTS{alertstate="firing"}')
    assert not firing, firing
