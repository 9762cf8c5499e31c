"""The kustomize base and its example: valid resources, restricted pods, and settings and commands that exist."""

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from typer.main import get_command

from app.cli import app
from app.ingest.dicomweb_source import read_sources
from app.pacs.routes import DimseTarget, read_routes
from app.settings import PREFIX, SECRETS_FOLDER_VARIABLE, Settings

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "deploy" / "kubernetes"
KUBERNETES_VERSIONS = ("1.30", "1.33")
# Kinds of operators, whose schemas kubernetes-validate does not have.
CUSTOM_KINDS = {"ScaledObject", "PodMonitor"}
Resource = dict[str, Any]
Documents = list[Resource]


def files() -> Documents:
    """Return all resources as they are in the files."""
    paths = [path for path in FOLDER.rglob("*.yaml") if path.name != "kustomization.yaml"]
    return [document for path in sorted(paths) for document in yaml.safe_load_all(path.read_text())]


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> Documents:
    """Return the resources of the example, with its optional component, as kustomize renders them."""
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("kubectl is not installed")
    folder = tmp_path_factory.mktemp("kubernetes") / "kubernetes"
    shutil.copytree(FOLDER, folder)
    example = folder / "example" / "kustomization.yaml"
    optional = "# - ../components/node-tls"
    assert optional in example.read_text()
    example.write_text(example.read_text().replace(optional, optional.removeprefix("# ")))
    subprocess.run([ROOT / "deploy" / "compose" / "make-secrets.sh", folder / "example" / "secrets"], check=True)
    command = [kubectl, "kustomize", str(folder / "example")]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return list(yaml.safe_load_all(text))


def of_kind(documents: Documents, kind: str) -> dict[str, Resource]:
    return {document["metadata"]["name"]: document for document in documents if document["kind"] == kind}


def pods() -> Iterator[tuple[str, Resource]]:
    for kind in ("Deployment", "StatefulSet"):
        for name, workload in of_kind(files(), kind).items():
            yield name, workload["spec"]["template"]["spec"]


PODS = dict(pods())


@pytest.mark.parametrize("version", KUBERNETES_VERSIONS)
def test_every_resource_is_valid(version: str) -> None:
    for document in files():
        if document["kind"] not in CUSTOM_KINDS:
            kubernetes_validate.validate(document, version, strict=True)


def test_rendered_resources_are_valid(rendered: Documents) -> None:
    for document in rendered:
        if document["kind"] not in CUSTOM_KINDS:
            kubernetes_validate.validate(document, KUBERNETES_VERSIONS[-1], strict=True)
        if document["kind"] != "Namespace":
            assert document["metadata"]["namespace"] == "counterpart"


def test_pods_are_restricted() -> None:
    assert set(PODS) == {"counterpart-api", "counterpart-worker", "counterpart-worker-gpu", "counterpart-node"}
    for pod in PODS.values():
        (container,) = pod["containers"]
        assert pod["securityContext"]["runAsNonRoot"]
        assert pod["securityContext"]["runAsUser"] == 10001
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        # A service named counterpart would set COUNTERPART_PORT.
        assert pod["enableServiceLinks"] is False
        assert pod["automountServiceAccountToken"] is False
        assert {"memory", "ephemeral-storage"} <= set(container["resources"]["limits"])


def test_user_is_that_of_the_image() -> None:
    assert "\nUSER 10001:10001\n" in (ROOT / "Dockerfile").read_text()


def test_commands_and_options_exist() -> None:
    for pod in PODS.values():
        command, *options = pod["containers"][0]["args"]
        get_command(app).commands[command].make_context(command, options)  # type: ignore[attr-defined]


def test_probes_name_routes_of_a_named_port() -> None:
    for pod in PODS.values():
        container = pod["containers"][0]
        assert container["ports"][0] == {"name": "http", "containerPort": 8000}
        probes = {name: container[name]["httpGet"] for name in ("startupProbe", "livenessProbe", "readinessProbe")}
        # A pod whose database is absent is not ready. A restart would not help it.
        paths = {"startupProbe": "/livez", "livenessProbe": "/livez", "readinessProbe": "/readyz"}
        assert probes == {name: {"path": path, "port": "http"} for name, path in paths.items()}


def test_settings_exist(rendered: Documents) -> None:
    data = of_kind(rendered, "ConfigMap")["counterpart-settings"]["data"]
    secret = of_kind(rendered, "Secret")["counterpart"]["data"]
    variables = [variable["name"] for pod in PODS.values() for variable in pod["containers"][0].get("env", [])]
    named = {name.upper() for name in (*data, *secret, *variables) if name.upper().startswith(PREFIX)}
    assert named <= {f"{PREFIX}{field.upper()}" for field in Settings.model_fields} | {SECRETS_FOLDER_VARIABLE}
    for deployment in of_kind(rendered, "Deployment").values():
        pod = deployment["spec"]["template"]["spec"]
        mounts = {mount["name"]: mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]}
        assert mounts["secrets"] == data[SECRETS_FOLDER_VARIABLE]
        assert mounts["scratch"] == data["COUNTERPART_SCRATCH"]
        assert {volume["name"] for volume in pod["volumes"]} == set(mounts)
        grace = pod["terminationGracePeriodSeconds"]
        is_api = deployment["metadata"]["name"] == "counterpart-api"
        assert is_api or grace >= int(data["COUNTERPART_DRAIN_SECONDS"]) + 20


def test_selectors_match_their_pods(rendered: Documents) -> None:
    deployments = of_kind(rendered, "Deployment")
    labels = {name: d["spec"]["template"]["metadata"]["labels"] for name, d in deployments.items()}
    for name, deployment in deployments.items():
        assert deployment["spec"]["selector"]["matchLabels"].items() <= labels[name].items()
    for name, budget in of_kind(rendered, "PodDisruptionBudget").items():
        selector = budget["spec"]["selector"]["matchLabels"].items()
        assert [pod for pod, own in labels.items() if selector <= own.items()] == [name]
    service = of_kind(rendered, "Service")["counterpart"]["spec"]["selector"].items()
    assert [pod for pod, own in labels.items() if service <= own.items()] == ["counterpart-api"]
    policies = {name: p["spec"]["podSelector"].get("matchLabels", {}) for name, p in policies_of(rendered).items()}
    assert all(policies["counterpart-deny"].items() <= own.items() for own in labels.values())
    assert [pod for pod, own in labels.items() if policies["counterpart-api"].items() <= own.items()] == [
        "counterpart-api"
    ]


def policies_of(documents: Documents) -> dict[str, Resource]:
    return of_kind(documents, "NetworkPolicy")


def test_traffic_is_denied_by_default() -> None:
    policies = policies_of(files())
    assert policies["counterpart-deny"]["spec"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    egress = policies["counterpart-servers"]["spec"]["egress"]
    assert {port["port"] for rule in egress for port in rule["ports"]} == {53, 5432, 443}
    for name, policy in policies.items():
        for rule in policy["spec"].get("ingress", []):
            assert rule["from"], name


def test_scaling_and_scrapes_name_what_exists(rendered: Documents) -> None:
    scaled = of_kind(rendered, "ScaledObject")["counterpart-worker"]["spec"]
    assert scaled["scaleTargetRef"]["name"] in PODS
    monitor = of_kind(rendered, "PodMonitor")["counterpart"]["spec"]
    credentials = monitor["podMetricsEndpoints"][0]["authorization"]["credentials"]
    assert credentials["key"] in of_kind(rendered, "Secret")[credentials["name"]]["data"]
    for deployment in of_kind(rendered, "Deployment").values():
        labels = deployment["spec"]["template"]["metadata"]["labels"]
        assert monitor["selector"]["matchLabels"].items() <= labels.items()


def test_instances_outlive_the_pod_of_the_node(rendered: Documents) -> None:
    node = of_kind(rendered, "StatefulSet")["counterpart-node"]["spec"]
    (claim,) = node["volumeClaimTemplates"]
    mounts = {m["name"]: m["mountPath"] for m in node["template"]["spec"]["containers"][0]["volumeMounts"]}
    data = of_kind(rendered, "ConfigMap")["counterpart-settings"]["data"]
    assert mounts[claim["metadata"]["name"]] == data["COUNTERPART_SCRATCH"]
    assert node["replicas"] == 1
    service = of_kind(rendered, "Service")["counterpart-node"]["spec"]
    assert service["selector"].items() <= node["template"]["metadata"]["labels"].items()
    assert data["COUNTERPART_NODE_PEERS"]


def test_files_of_routes_and_sources_are_mounted_and_can_be_read(rendered: Documents) -> None:
    (files,) = [data for name, data in of_kind(rendered, "ConfigMap").items() if name.startswith("counterpart-files-")]
    settings = of_kind(rendered, "ConfigMap")["counterpart-settings"]["data"]
    secret = of_kind(rendered, "Secret")["counterpart"]["data"]
    workloads = [*of_kind(rendered, "Deployment").values(), *of_kind(rendered, "StatefulSet").values()]
    assert len(workloads) == 4
    for workload in workloads:
        pod = workload["spec"]["template"]["spec"]
        volume = next(volume["configMap"] for volume in pod["volumes"] if volume["name"] == "files")
        assert volume == {"name": files["metadata"]["name"], "optional": True}
        mounts = {mount["name"]: mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]}
        for name in ("ROUTES", "SOURCES"):
            folder, _, file = settings[f"COUNTERPART_{name}"].rpartition("/")
            assert (folder, file in files["data"]) == (mounts["files"], True)
    routes = read_routes(FOLDER / "example" / "files" / "routes.toml")
    assert routes.routes
    for source in read_sources(FOLDER / "example" / "files" / "sources.toml").values():
        assert source.token_file is not None
        assert str(source.token_file.parent) == settings[SECRETS_FOLDER_VARIABLE]
        assert source.token_file.name in secret


def test_workers_may_call_the_pacs(rendered: Documents) -> None:
    policy = policies_of(rendered)["counterpart-pacs"]["spec"]
    (expression,) = policy["podSelector"]["matchExpressions"]
    workers = {
        deployment["spec"]["template"]["metadata"]["labels"][expression["key"]]
        for name, deployment in of_kind(rendered, "Deployment").items()
        if "worker" in name
    }
    assert (expression["operator"], set(expression["values"])) == ("In", workers)
    targets = read_routes(FOLDER / "example" / "files" / "routes.toml").targets.values()
    ports = {port["port"] for rule in policy["egress"] for port in rule["ports"]}
    assert {target.port for target in targets if isinstance(target, DimseTarget)} <= ports


def test_tls_of_the_node_comes_from_a_secret(rendered: Documents) -> None:
    pod = of_kind(rendered, "StatefulSet")["counterpart-node"]["spec"]["template"]["spec"]
    container = pod["containers"][0]
    variables = {variable["name"]: variable["value"] for variable in container["env"]}
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert {volume["name"] for volume in pod["volumes"]} | {"scratch"} == set(mounts)
    tls = {name: value for name, value in variables.items() if "_TLS_" in name}
    assert {f"{PREFIX}{field.upper()}" for field in Settings.model_fields if "_tls_" in field} == set(tls)
    # The files of a secret of type kubernetes.io/tls.
    assert {value.removeprefix(f"{mounts['node-tls']}/") for value in tls.values()} == {"tls.crt", "tls.key", "ca.crt"}
    assert variables["COUNTERPART_NODE_HOST"]


def test_gpu_worker_requests_a_gpu_and_cuda() -> None:
    container = PODS["counterpart-worker-gpu"]["containers"][0]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert {"name": "COUNTERPART_PROVIDER", "value": "cuda"} in container["env"]
    assert container["image"] == "counterpart-gpu"
