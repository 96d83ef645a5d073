"""The cluster manifests, checked without a cluster: against the schemas of their readers, and against each other."""

from __future__ import annotations

import copy
import re
import shlex
import shutil
import subprocess
from importlib.metadata import metadata
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import typer
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from ray.autoscaler._private.util import prepare_config, validate_config

from ovss_ray.cli import app
from ovss_ray.run.driver import FINISH_SHARDS_S
from ovss_ray.segmenters import get_method
from ovss_ray.spec import JobSpec
from ovss_ray.version import __version__
from ovss_ray.vocabulary import load_vocabulary

ROOT = Path(__file__).parent.parent
KUBERAY = ROOT / "jobs" / "kuberay"
DOCKERFILE = ROOT / "Dockerfile"


def _load(path: Path) -> dict[str, Any]:
    loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert isinstance(loaded, dict)
    return loaded


RAYJOB = _load(KUBERAY / "rayjob.yaml")
CLUSTER = RAYJOB["spec"]["rayClusterSpec"]
HEAD = CLUSTER["headGroupSpec"]
(WORKERS,) = CLUSTER["workerGroupSpecs"]
KUSTOMIZATION = _load(KUBERAY / "kustomization.yaml")
AWS = _load(ROOT / "jobs" / "cluster" / "aws.yaml")


def _fields(properties: dict[str, Any], *required: str) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}


_COUNT = {"type": "integer", "minimum": 0}
_TEXTS = {"type": "object", "additionalProperties": {"type": "string"}}
_GROUP = {"rayStartParams": _TEXTS, "template": {"type": "object"}}
# Those fields of ray.io/v1 (KubeRay 1.5) that the manifest uses; pod templates are checked by Kubernetes' own schema.
RAYJOB_SCHEMA = _fields(
    {
        "apiVersion": {"const": "ray.io/v1"},
        "kind": {"const": "RayJob"},
        # The operator refuses longer names, because it derives names of pods and services from this one.
        "metadata": _fields({"name": {"pattern": "^[a-z]([-a-z0-9]*[a-z0-9])?$", "maxLength": 47}}, "name"),
        "spec": _fields(
            {
                "entrypoint": {"type": "string"},
                "submissionMode": {"enum": ["K8sJobMode", "HTTPMode", "SidecarMode"]},
                "backoffLimit": _COUNT,
                "shutdownAfterJobFinishes": {"type": "boolean"},
                "ttlSecondsAfterFinished": _COUNT,
                "submitterConfig": _fields({"backoffLimit": _COUNT}),
                "rayClusterSpec": _fields(
                    {
                        "rayVersion": {"type": "string"},
                        "authOptions": _fields({"mode": {"enum": ["disabled", "token"]}}),
                        "enableInTreeAutoscaling": {"type": "boolean"},
                        "autoscalerOptions": _fields(
                            {
                                "idleTimeoutSeconds": _COUNT,
                                "upscalingMode": {"enum": ["Default", "Aggressive", "Conservative"]},
                            }
                        ),
                        "headGroupSpec": _fields(_GROUP, "rayStartParams", "template"),
                        "workerGroupSpecs": {
                            "type": "array",
                            "items": _fields(
                                {
                                    **_GROUP,
                                    "groupName": {"type": "string"},
                                    "replicas": _COUNT,
                                    "minReplicas": _COUNT,
                                    "maxReplicas": _COUNT,
                                },
                                "groupName", "minReplicas", "maxReplicas", "template",
                            ),
                        },
                    },
                    "headGroupSpec",
                ),
            },
            "rayClusterSpec",
        ),
    },
    "apiVersion", "kind", "metadata", "spec",
)  # fmt: skip


def test_the_rayjob_has_only_fields_that_kuberay_knows() -> None:
    jsonschema.Draft202012Validator(RAYJOB_SCHEMA).validate(RAYJOB)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("spec", "backofLimit"), 3),
        (("spec", "backoffLimit"), -1),
        (("spec", "rayClusterSpec", "headGroupSpec", "rayStartParams", "num-cpus"), 0),
        (("spec", "rayClusterSpec", "autoscalerOptions", "upscalingMode"), "Fast"),
    ],
)
def test_what_kuberay_would_refuse_is_refused_here(path: tuple[str, ...], value: object) -> None:
    broken = copy.deepcopy(RAYJOB)
    place = broken
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(broken, RAYJOB_SCHEMA)


@pytest.mark.parametrize("version", ["1.29", "1.34"])
@pytest.mark.parametrize("group", [HEAD, WORKERS], ids=["head", "workers"])
def test_pod_templates_fit_the_schema_of_kubernetes(group: dict[str, Any], version: str) -> None:
    pods = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "pods"}, "template": group["template"]}
    kubernetes_validate.validate(pods, version, strict=True)
    misspelt = copy.deepcopy(pods)
    misspelt["template"]["spec"]["terminationGracePeriod"] = 60
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(misspelt, version, strict=True)


def _container(group: dict[str, Any]) -> dict[str, Any]:
    (container,) = group["template"]["spec"]["containers"]
    assert isinstance(container, dict)
    return container


def _env(group: dict[str, Any], name: str) -> str:
    (value,) = [str(item["value"]) for item in _container(group)["env"] if item["name"] == name]
    return value


def _args(command: list[str]) -> dict[str, Any]:
    """The parameters that our command line understands from `command`; raises click's error if it does not."""
    assert command[0] == "ovss-ray"
    group = typer.main.get_command(app)
    subcommand = group.commands[command[1]]  # type: ignore[attr-defined]
    with subcommand.make_context(command[1], command[2:]) as context:
        return dict(context.params)


def test_the_entrypoint_runs_the_mounted_job_file() -> None:
    job = _args(shlex.split(RAYJOB["spec"]["entrypoint"]))["job"]
    (generator,) = KUSTOMIZATION["configMapGenerator"]
    assert KUSTOMIZATION["generatorOptions"]["disableNameSuffixHash"]
    (volume,) = [
        v["name"] for v in HEAD["template"]["spec"]["volumes"] if v.get("configMap") == {"name": generator["name"]}
    ]
    (mount,) = [mount["mountPath"] for mount in _container(HEAD)["volumeMounts"] if mount["name"] == volume]
    assert [f"{mount}/{name}" for name in generator["files"]] == [str(job)]
    assert all((KUBERAY / name).is_file() for name in [*generator["files"], *KUSTOMIZATION["resources"]])


def test_the_job_file_asks_for_what_the_cluster_has() -> None:
    spec = JobSpec.from_file(KUBERAY / "job.yaml")
    assert load_vocabulary(spec.classes, templates=spec.templates, background=spec.background).num_classes > 1
    assert get_method(spec.method).parse_settings(spec.settings)
    assert spec.run.startswith("s3://")
    assert spec.ray_address == "auto"
    assert spec.workers == WORKERS["maxReplicas"] >= WORKERS["replicas"] >= WORKERS["minReplicas"] >= 1
    assert spec.gpus_per_worker == int(_container(WORKERS)["resources"]["limits"]["nvidia.com/gpu"]) == 1


def test_pods_request_what_they_are_limited_to_and_only_workers_have_gpus() -> None:
    for group in (HEAD, WORKERS):
        resources = _container(group)["resources"]
        assert resources["requests"] == resources["limits"]
        assert int(resources["limits"]["cpu"]) > 0  # Ray counts whole ones
    assert "nvidia.com/gpu" not in _container(HEAD)["resources"]["limits"]
    assert HEAD["rayStartParams"]["num-cpus"] == "0"


def test_workers_are_on_spot_nodes_and_the_head_is_not() -> None:
    (label,) = WORKERS["template"]["spec"]["nodeSelector"].items()
    required = HEAD["template"]["spec"]["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    (term,) = required["nodeSelectorTerms"]
    avoided = {(item["key"], value) for item in term["matchExpressions"] for value in item["values"]}
    assert {item["operator"] for item in term["matchExpressions"]} == {"NotIn"}
    assert label in avoided
    assert "tolerations" not in HEAD["template"]["spec"]


def test_pods_are_given_the_time_that_ray_and_the_driver_take_to_stop() -> None:
    from ray._private import ray_constants

    assert hasattr(ray_constants, "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S")  # this Ray knows the variable
    grace_s = WORKERS["template"]["spec"]["terminationGracePeriodSeconds"]
    assert float(_env(WORKERS, "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S")) < grace_s
    assert float(_env(HEAD, "RAY_JOB_STOP_WAIT_TIME_S")) > FINISH_SHARDS_S


def test_the_secret_is_valid_not_applied_and_the_one_that_pods_read() -> None:
    secret = _load(KUBERAY / "secret.example.yaml")
    kubernetes_validate.validate(secret, "1.34", strict=True)
    assert "secret.example.yaml" not in KUSTOMIZATION["resources"]
    assert all("fill-me-in" in value for name, value in secret["stringData"].items() if "KEY" in name)
    for group in (HEAD, WORKERS):
        (source,) = _container(group)["envFrom"]
        assert source["secretRef"]["name"] == secret["metadata"]["name"]


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="needs kubectl, which is not a Python package")
def test_kubectl_builds_the_kustomization() -> None:
    command = ["kubectl", "kustomize", str(KUBERAY)]
    built = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    documents = {document["kind"]: document for document in yaml.safe_load_all(built)}
    assert set(documents) == {"ConfigMap", "RayJob"}
    kubernetes_validate.validate(documents["ConfigMap"], "1.34", strict=True)
    assert documents["ConfigMap"]["data"] == {"job.yaml": (KUBERAY / "job.yaml").read_text()}
    jsonschema.validate(documents["RayJob"], RAYJOB_SCHEMA)
    cluster = documents["RayJob"]["spec"]["rayClusterSpec"]
    images = {_container(group)["image"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])}
    assert images == {AWS["docker"]["image"]}


def _pins() -> dict[str, Requirement]:
    lines = [line.partition("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines()]
    requirements = [Requirement(line) for line in lines if line]
    image = {"python_version": "3.11"}
    return {pin.name: pin for pin in requirements if pin.marker is None or pin.marker.evaluate(image)}


def test_all_name_the_tested_ray_and_this_version() -> None:
    assert _pins()["ray"].specifier == SpecifierSet(f"=={CLUSTER['rayVersion']}")
    (image,) = KUSTOMIZATION["images"]
    assert image["newTag"] == __version__
    assert {_container(group)["image"] for group in (HEAD, WORKERS)} == {image["name"]}
    assert AWS["docker"]["image"] == f"{image['newName']}:{image['newTag']}"


def _instructions() -> list[tuple[str, str]]:
    text = re.sub(r"^\s*#.*\n", "", DOCKERFILE.read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    lines = [line.strip().partition(" ") for line in text.splitlines() if line.strip()]
    return [(name, arguments.strip()) for name, _, arguments in lines]


def test_the_image_installs_the_tested_versions_and_nothing_else() -> None:
    project = metadata("ovss-ray")
    ((_, base),) = [item for item in _instructions() if item[0] == "FROM"]
    python = base.removeprefix("python:").partition("-")[0]
    assert SpecifierSet(project["Requires-Python"]).contains(f"{python}.0")
    installs = [
        shlex.split(arguments) for name, arguments in _instructions() if name == "RUN" and "pip install" in arguments
    ]
    wanted: list[str] = []
    for install in installs:
        assert install[:4] == ["pip", "install", "--constraint", "constraints.txt"]
        wanted += install[4:]
    for requirement in (Requirement(item) for item in wanted if not item.startswith(".")):
        assert not requirement.specifier  # versions are the constraints' business
        assert requirement.name in _pins()
    extras = {extra for item in wanted if item.startswith(".") for extra in re.findall(r"\w+", item)}
    assert {"s3", "gcs", "azure"} == extras <= set(project.get_all("Provides-Extra") or ())


def test_the_image_copies_what_exists_and_what_dockerignore_lets_through() -> None:
    let_through = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = {source for name, paths in _instructions() if name == "COPY" for source in paths.split()[:-1]}
    assert copied == let_through
    assert all((ROOT / source).exists() for source in copied)
    # What pip needs to build the package.
    assert {"pyproject.toml", "README.md", "LICENSE", "schemas", "ovss_ray", "constraints.txt"} <= copied


def test_the_image_runs_as_an_ordinary_user_and_leaves_the_command_to_others() -> None:
    instructions = _instructions()
    users = [arguments for name, arguments in instructions if name == "USER"]
    (added,) = [arguments for name, arguments in instructions if "useradd" in arguments]
    uid = re.search(r"--uid (\d+)", added)
    assert uid is not None
    assert users[-1] != "root"
    for group in (HEAD, WORKERS):
        assert group["template"]["spec"]["securityContext"] == {"runAsNonRoot": True, "runAsUser": int(uid[1])}
    # KubeRay and the cluster launcher start a shell; the launcher reads HOME in the image.
    assert not any(name == "ENTRYPOINT" for name, _ in instructions)
    (command,) = [arguments for name, arguments in instructions if name == "CMD"]
    assert command == '["ovss-ray", "--help"]'
    assert any(name == "ENV" and f"HOME=/home/{users[-1]}" in arguments for name, arguments in instructions)


def test_the_launcher_file_fits_rays_schema() -> None:
    config = prepare_config(AWS)
    validate_config(config)
    # The defaults would install another Ray, and boto3, into the image.
    assert not any(config[name] for name in config if name.endswith("setup_commands"))
    with pytest.raises(jsonschema.ValidationError, match="max_worker"):
        validate_config(prepare_config({**AWS, "max_worker": 8}))


def test_ec2_starts_the_nodes_of_the_launcher_file(
    s3_endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import boto3
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider

    (tmp_path / ".ssh").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))  # the launcher keeps its key there
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_endpoint)  # plays EC2 and IAM, too
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    session = boto3.Session(region_name=AWS["provider"]["region"])
    node_types = AWS["available_node_types"]
    for node_type in node_types.values():
        profile = node_type["node_config"]["IamInstanceProfile"]["Name"]
        session.client("iam").create_instance_profile(InstanceProfileName=profile)

    config = AWSNodeProvider.fillout_available_node_types_resources(prepare_config(AWS))
    assert config["available_node_types"]["head"]["resources"] == {"CPU": 0}
    assert config["available_node_types"]["gpu-spot"]["resources"]["GPU"] == 1
    config = AWSNodeProvider.bootstrap_config(config)
    provider = AWSNodeProvider(config["provider"], config["cluster_name"])
    for name, node_type in config["available_node_types"].items():
        provider.create_node(node_type["node_config"], {"ray-node-type": "worker", "ray-user-node-type": name}, 1)

    reservations = session.client("ec2").describe_instances()["Reservations"]
    started = {}
    for instance in (instance for reservation in reservations for instance in reservation["Instances"]):
        tags = {tag["Key"]: tag["Value"] for tag in instance["Tags"]}
        started[tags["ray-user-node-type"]] = instance
    assert set(started) == set(node_types)
    assert started["gpu-spot"]["InstanceLifecycle"] == "spot"
    assert "InstanceLifecycle" not in started["head"]
    for name, instance in started.items():
        assert instance["InstanceType"] == node_types[name]["node_config"]["InstanceType"]
        profile = node_types[name]["node_config"]["IamInstanceProfile"]["Name"]
        assert instance["IamInstanceProfile"]["Arn"].endswith(f"/{profile}")


def _documented(first: str) -> list[str]:
    """The lines of the page's code blocks that call `first`, and those that `ray exec` and `ray job submit` carry."""
    page = (ROOT / "docs" / "clusters.md").read_text()
    commands = [
        line for block in re.findall(r"^```\n(.*?)^```", page, re.DOTALL | re.MULTILINE) for line in block.splitlines()
    ]
    for command in commands:
        words = shlex.split(command)
        if words[:2] == ["ray", "exec"]:
            commands.append(words[3])
        elif words[:3] == ["ray", "job", "submit"]:
            commands.append(shlex.join(words[words.index("--") + 1 :]))
    without_variables = [re.sub(r"^(env )?([A-Z]+=\S+ )+", "", command) for command in commands]
    return [command for command in without_variables if command.startswith(f"{first} ")]


@pytest.mark.parametrize("command", _documented("ovss-ray"))
def test_our_commands_on_the_page_are_understood(command: str) -> None:
    assert _args(shlex.split(command))


@pytest.mark.parametrize("command", _documented("ray"))
def test_rays_commands_on_the_page_are_understood(command: str) -> None:
    from ray.scripts.scripts import cli

    group, words = cli, shlex.split(command)[1:]
    while words and words[0] in getattr(group, "commands", {}):
        group, words = group.commands[words[0]], words[1:]
    assert not hasattr(group, "commands")
    with group.make_context(group.name, words) as context:
        assert context.params
