"""The manifests: valid for Kubernetes, and the parts of each other that they name are there."""

import os
import re
from argparse import ArgumentParser
from functools import cache
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import yaml

from idlm_sglang.parity import options as parity_options
from idlm_sglang.serving import cli, options
from tests.deploy.tools import DEPLOY, KUBERNETES, passes, thorough

OLDEST, NEWEST = "1.33", "1.37"
BUILT = ["base", "gate", "gate-canary", *(f"overlays/{path.name}" for path in sorted((KUBERNETES / "overlays").iterdir()))]
# Kinds that Kubernetes does not know by itself, checked against their definitions where IDLM_CRDS holds those.
CUSTOM = {"PodMonitor", "PrometheusRule", "ScaledObject", "HTTPRoute"}
PLAIN = [
    path
    for path in sorted([*KUBERNETES.rglob("*.yaml"), DEPLOY / "prometheus" / "prometheusrule.yaml"])
    if path.name != "kustomization.yaml"
]


def documents(path: Path) -> list[dict]:
    return list(yaml.safe_load_all(path.read_text()))


@cache
def built_text(name: str) -> str:
    return passes("kubectl", "kustomize", KUBERNETES / name)


def build(name: str) -> dict[tuple[str, str], dict]:
    """Everything a kustomization makes, by kind and name."""
    text = built_text(name)
    return {(d["kind"], d["metadata"]["name"]): d for d in yaml.safe_load_all(text)}


def pods(built: dict) -> dict[str, dict]:
    """Pod templates by the name of what makes them."""
    return {name: d["spec"]["template"] for (kind, name), d in built.items() if kind in ("Deployment", "Job")}


def matches(selector: dict, labels: dict) -> bool:
    return selector.items() <= labels.items()


def closed(schema: dict) -> dict:
    """The schema with fields it does not name forbidden, as `kubectl --validate=strict` has it."""
    if isinstance(schema, dict):
        schema = {key: closed(value) for key, value in schema.items()}
        if "properties" in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
            schema.setdefault("additionalProperties", False)
    return [closed(item) for item in schema] if isinstance(schema, list) else schema


@pytest.mark.parametrize("version", [OLDEST, NEWEST])
def test_every_manifest_is_valid_as_it_stands(version):
    seen = [d for path in PLAIN for d in documents(path) if d["kind"] not in CUSTOM]
    for document in seen:
        kubernetes_validate.validate(document, version, strict=True)
    print(f"{len(seen)} resources valid for Kubernetes {version}")
    assert len(seen) >= 12


def test_a_misspelt_field_is_found():
    broken = documents(KUBERNETES / "server" / "server.yaml")[0]
    broken["spec"]["template"]["spec"]["terminationGracePeriodsSeconds"] = 1
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(broken, OLDEST, strict=True)


def test_custom_resources_are_valid_by_their_definitions():
    """IDLM_CRDS: a directory with the CustomResourceDefinition files of Prometheus operator, KEDA and Gateway API."""
    directory = os.environ.get("IDLM_CRDS")
    if not directory:
        pytest.skip("IDLM_CRDS names no directory of CustomResourceDefinition files")
    schemas = {}
    for definition in (d for path in Path(directory).glob("*.yaml") for d in documents(path) if d):
        for version in definition["spec"]["versions"]:
            schema = version["schema"]["openAPIV3Schema"]
            schema["properties"]["metadata"] = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
            schemas[f"{definition['spec']['group']}/{version['name']}", definition["spec"]["names"]["kind"]] = closed(schema)
    checked = set()
    for document in (d for path in PLAIN for d in documents(path) if d["kind"] in CUSTOM):
        # Not checked themselves: their patterns are in Go's syntax.
        jsonschema.Draft202012Validator(schemas[document["apiVersion"], document["kind"]]).validate(document)
        checked.add(document["kind"])
    print(f"valid by their definitions: {sorted(checked)}")
    assert checked == CUSTOM


@pytest.mark.parametrize("name", BUILT)
class TestBuilt:
    def test_is_valid(self, name):
        for document in build(name).values():
            if document["kind"] not in CUSTOM:
                kubernetes_validate.validate(document, OLDEST, strict=True)

    def test_every_container_is_confined(self, name):
        for owner, pod in pods(build(name)).items():
            spec = pod["spec"]
            assert spec["securityContext"]["runAsNonRoot"] and spec["securityContext"]["runAsUser"] == 10001, owner
            for container in spec["containers"]:
                confined = container["securityContext"]
                assert confined["readOnlyRootFilesystem"] and not confined["allowPrivilegeEscalation"], owner
                assert confined["capabilities"] == {"drop": ["ALL"]}, owner
                assert container["image"].startswith("registry.example/idlm:"), owner

    def test_what_is_selected_is_there(self, name):
        built = build(name)
        if name.startswith("gate"):
            return
        labels = {owner: pod["metadata"]["labels"] for owner, pod in pods(built).items()}
        selecting = {
            key: d["spec"].get("podSelector") or d["spec"]["selector"]
            for key, d in built.items()
            if d["kind"] in ("Service", "NetworkPolicy", "PodDisruptionBudget", "Deployment", "PodMonitor")
        }
        for key, selector in selecting.items():
            found = [owner for owner, have in labels.items() if matches(selector.get("matchLabels", selector), have)]
            assert found, f"{key} selects no pod"
            if key[0] in ("Deployment", "Service"):
                assert len(found) == 1, f"{key} selects {found}"

    def test_every_port_that_is_named_is_a_containers(self, name):
        for (kind, owner), d in build(name).items():
            if kind == "Deployment":
                (container,) = d["spec"]["template"]["spec"]["containers"]
                ports = {port["name"] for port in container["ports"]}
                probes = [container[probe] for probe in ("startupProbe", "readinessProbe", "livenessProbe") if probe in container]
                assert {probe["httpGet"]["port"] for probe in probes} <= ports, owner

    def test_a_replica_has_time_to_drain(self, name):
        """preStop runs inside the grace period; the router waits longer than a server may take."""
        for owner, pod in pods(build(name)).items():
            for container in pod["spec"]["containers"]:
                if "lifecycle" in container:
                    sleep = container["lifecycle"]["preStop"]["sleep"]["seconds"]
                    drain = [int(arg.partition("=")[2]) for arg in container["args"] if arg.startswith("--shutdown-grace-period-secs")]
                    assert pod["spec"]["terminationGracePeriodSeconds"] > sleep + (drain or [300])[0], owner


def servers(name: str) -> dict[str, dict]:
    return {owner: pod for owner, pod in pods(build(name)).items() if pod["metadata"]["labels"]["app.kubernetes.io/component"] == "server"}


def test_the_router_finds_the_servers_that_are_meant_for_it_and_no_other():
    expected = {"base": {"idlm"}, "overlays/rollback": {"idlm"}, "overlays/canary": {"idlm", "idlm-canary"}, "overlays/mirror": {"idlm"}}
    for name, wanted in expected.items():
        args = pods(build(name))["idlm-router"]["spec"]["containers"][0]["args"]
        at = args.index("--selector") + 1
        pairs = dict(arg.split("=", 1) for arg in args[at:] if not arg.startswith("--"))
        found = {owner for owner, pod in pods(build(name)).items() if matches(pairs, pod["metadata"]["labels"])}
        assert found == wanted, name


def test_each_arm_is_named_after_how_it_decodes():
    """The label that rules and dashboard compare by agrees with the command line."""
    for name in BUILT:
        for owner, pod in servers(name).items():
            args = pod["spec"]["containers"][0]["args"]
            assert pod["metadata"]["labels"]["arm"] == ("ar" if "--ar" in args else "isd"), f"{name} {owner}"
    assert {p["metadata"]["labels"]["arm"] for p in servers("overlays/canary").values()} == {"ar", "isd"}


def test_the_way_back_changes_nothing_but_the_decoding():
    before, after = (servers(name)["idlm"] for name in ("base", "overlays/rollback"))
    assert after["spec"]["containers"][0]["args"] == [*before["spec"]["containers"][0]["args"], "--ar"]
    after["spec"]["containers"][0]["args"] = before["spec"]["containers"][0]["args"]
    after["metadata"]["labels"]["arm"] = before["metadata"]["labels"]["arm"]
    assert after == before


def test_as_many_gpus_as_ranks():
    for name in BUILT:
        for owner, pod in servers(name).items():
            (container,) = pod["spec"]["containers"]
            ranks = [int(arg.partition("=")[2]) for arg in container["args"] if arg.startswith("--tp-size")]
            for bound in ("requests", "limits"):
                assert container["resources"][bound]["nvidia.com/gpu"] == (ranks or [1])[0], f"{name} {owner}"


def test_idlm_serve_accepts_each_command_line():
    """As far as it reads them itself."""
    for name in BUILT:
        for owner, pod in servers(name).items():
            model, *args = pod["spec"]["containers"][0]["args"]
            own, rest = cli.parser()[1].parse_known_args(["org/model", *args])
            assert options.resolve(own, rest, log_to_terminal=False).port == 30000, owner


@thorough
def test_sglang_and_the_router_know_every_flag():
    from sglang.srt.server_args import ServerArgs
    from sglang_router.launch_router import parse_router_args

    parser = ArgumentParser()
    ServerArgs.add_cli_args(parser)
    for name in BUILT:
        built = pods(build(name))
        for pod in servers(name).values():
            own = ("--ar", "--selfcheck")
            words = [arg for arg in pod["spec"]["containers"][0]["args"][1:] if arg.partition("=")[0] not in own]
            parser.parse_args(["--model-path", "m", *words])
        if "idlm-router" in built:
            parsed = parse_router_args([arg.replace("$(NAMESPACE)", "idlm") for arg in built["idlm-router"]["spec"]["containers"][0]["args"]])
            assert parsed.service_discovery and parsed.health_check_endpoint == "/ready" and parsed.service_discovery_namespace == "idlm"


@pytest.mark.parametrize("gate, stage", [("gate", "overlays/mirror"), ("gate-canary", "overlays/canary")])
def test_the_gate_compares_the_candidate_with_the_arm_at_one_token_per_step(gate, stage):
    (job,) = pods(build(gate)).values()
    (container,) = job["spec"]["containers"]
    assert container["command"] == ["idlm", "parity"]
    plan = parity_options.resolve(parity_options.parser().parse_args(container["args"]))
    arms = {}
    for side, url in (("baseline", plan.baseline), ("candidate", plan.candidate)):
        host = re.match(r"http://([\w-]+):30000$", url)[1]
        built = build(stage)
        selector = built["Service", host]["spec"]["selector"]
        (arms[side],) = {pod["metadata"]["labels"]["arm"] for pod in pods(built).values() if matches(selector, pod["metadata"]["labels"])}
        policies = [d["spec"] for (kind, _), d in built.items() if kind == "NetworkPolicy" and matches(d["spec"]["podSelector"]["matchLabels"], selector)]
        expressions = [e for p in policies for rule in p["ingress"] for peer in rule.get("from", []) for e in peer.get("podSelector", {}).get("matchExpressions", [])]
        assert any(job["metadata"]["labels"][e["key"]] in e["values"] for e in expressions), f"{host} does not let the gate in"
    assert arms == {"baseline": "ar", "candidate": "isd"}
