"""The manifests hold together, and with the server and the image: no cluster is asked."""

from __future__ import annotations

import asyncio
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import CollectorRegistry

from service.settings import Settings
from service.telemetry.probes import Probes
from tests.deploy.test_container_image import ROOT, accepted, instructions, only

Manifest = dict[str, Any]


@pytest.fixture(scope="module")
def manifests() -> list[Manifest]:
    return list(yaml.safe_load_all((ROOT / "deploy" / "kubernetes" / "lookalike.yaml").read_text()))


def named(manifests: list[Manifest], kind: str, name: str = "lookalike") -> Manifest:
    (found,) = [each for each in manifests if (each["kind"], each["metadata"]["name"]) == (kind, name)]
    return found


@pytest.fixture(scope="module")
def pod(manifests: list[Manifest]) -> Manifest:
    spec: Manifest = named(manifests, "Deployment")["spec"]["template"]["spec"]
    return spec


@pytest.fixture(scope="module")
def container(pod: Manifest) -> Manifest:
    (one,) = pod["containers"]
    return dict(one)


@pytest.fixture(scope="module")
def settings(manifests: list[Manifest]) -> Settings:
    """Those of the config map, all of them known and in their ranges."""
    return Settings.checked(**tomllib.loads(named(manifests, "ConfigMap")["data"]["lookalike.toml"]))


def test_the_command_line_accepts_the_arguments_and_names_the_file_that_is_mounted(
    manifests: list[Manifest], container: Manifest
) -> None:
    parameters = accepted(container["args"]).params
    (mount,) = [each for each in container["volumeMounts"] if each["name"] == "config"]
    (file,) = named(manifests, "ConfigMap")["data"]
    assert parameters["settings_file"] == Path(mount["mountPath"]) / file


def test_ports_are_those_that_the_settings_open(
    manifests: list[Manifest], container: Manifest, settings: Settings
) -> None:
    ports = {each["name"]: each["containerPort"] for each in container["ports"]}
    assert ports == {"grpc": settings.port, "metrics": settings.metrics_port}
    assert settings.host == settings.metrics_host == "0.0.0.0"
    (service,) = named(manifests, "Service")["spec"]["ports"]
    assert (service["targetPort"], service["port"]) == ("grpc", settings.port)
    scraped = named(manifests, "Deployment")["spec"]["template"]["metadata"]["annotations"]["prometheus.io/port"]
    assert int(scraped) == settings.metrics_port


@pytest.mark.parametrize(
    ("kind", "state", "status"),
    [
        ("startupProbe", "loading", 503),
        ("readinessProbe", "draining", 503),
        ("readinessProbe", "serving", 200),
        ("livenessProbe", "loading", 200),
    ],
)
def test_probes_ask_what_the_server_answers(container: Manifest, kind: str, state: str, status: int) -> None:
    asked = container[kind]["httpGet"]
    assert asked["port"] == "metrics"
    probes = Probes(CollectorRegistry(), lambda: state)
    answer = asyncio.run(probes._answer(f"GET {asked['path']} HTTP/1.1\r\nHost: pod"))
    assert answer.split()[1] == str(status).encode()


def test_one_process_at_a_time_holds_the_galleries(
    manifests: list[Manifest], pod: Manifest, settings: Settings
) -> None:
    deployment = named(manifests, "Deployment")["spec"]
    assert (deployment["replicas"], deployment["strategy"]) == (1, {"type": "Recreate"})
    assert named(manifests, "PersistentVolumeClaim", "lookalike-data")["spec"]["accessModes"] == ["ReadWriteOncePod"]
    assert pod["terminationGracePeriodSeconds"] >= settings.drain_seconds + 10


def test_every_path_of_the_settings_lies_on_a_volume_that_is_there(
    manifests: list[Manifest], pod: Manifest, container: Manifest, settings: Settings
) -> None:
    mounts = {each["name"]: each for each in container["volumeMounts"]}
    volumes = {each["name"]: each for each in pod["volumes"]}
    assert mounts.keys() == volumes.keys()
    on = {
        "data": (settings.galleries, settings.audit_log),
        "models": (settings.bundle, settings.models),
        "secrets": (settings.tls_certificate, settings.tls_key, settings.keys),
    }
    for name, paths in on.items():
        assert all(path is not None and path.is_relative_to(mounts[name]["mountPath"]) for path in paths)
    assert "readOnly" not in mounts["data"]
    for volume in volumes.values():
        if "persistentVolumeClaim" in volume:
            named(manifests, "PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"])
        if "configMap" in volume:
            named(manifests, "ConfigMap", volume["configMap"]["name"])


def test_it_runs_as_the_user_of_the_image_and_has_no_rights_beyond(pod: Manifest, container: Manifest) -> None:
    user, group = only(instructions((ROOT / "Dockerfile").read_text()), "USER").split(":")
    secured = pod["securityContext"]
    assert (secured["runAsUser"], secured["runAsGroup"], secured["fsGroup"]) == (int(user), int(group), int(group))
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }


def test_threads_are_no_more_than_the_cores_that_the_pod_may_use(container: Manifest, settings: Settings) -> None:
    cores = int(container["resources"]["limits"]["cpu"])
    assert settings.decode_threads == settings.encode_threads == cores


def test_what_selects_pods_finds_these(manifests: list[Manifest]) -> None:
    deployment = named(manifests, "Deployment")["spec"]
    labels = deployment["template"]["metadata"]["labels"].items()
    assert named(manifests, "Service")["spec"]["selector"].items() <= labels
    assert deployment["selector"]["matchLabels"].items() <= labels
