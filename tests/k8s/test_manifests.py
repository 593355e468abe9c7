"""The manifests, checked without a cluster: what the operator would refuse, and what must agree with the code."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import tomllib
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestrator.cli import _parser
from orchestrator.config import RunConfig, load_config
from orchestrator.environment import RAY_SETTINGS
from tests.k8s.manifest_schema import schema_errors

pytestmark = pytest.mark.k8s

_ROOT = Path(__file__).parents[2]
_K8S = _ROOT / "k8s"
_BASE = _K8S / "base"
_EXAMPLE = _K8S / "overlays" / "example"

Document = dict[str, Any]


@dataclass(frozen=True)
class Manifests:
    """What one folder gives the cluster."""

    documents: tuple[Document, ...]

    def all_of(self, kind: str) -> dict[str, Document]:
        return {document["metadata"]["name"]: document for document in self.documents if document["kind"] == kind}

    @property
    def ray_job(self) -> Document:
        (document,) = self.all_of("RayJob").values()
        return document

    @property
    def cluster(self) -> Document:
        return self.ray_job["spec"]["rayClusterSpec"]

    @property
    def groups(self) -> list[Document]:
        return self.cluster["workerGroupSpecs"]

    @property
    def head(self) -> Document:
        return self.cluster["headGroupSpec"]["template"]["spec"]

    @property
    def templates(self) -> list[Document]:
        return [self.cluster["headGroupSpec"]["template"], *(group["template"] for group in self.groups)]

    @property
    def containers(self) -> list[Document]:
        return [container for template in self.templates for container in template["spec"]["containers"]]

    @property
    def num_gpus(self) -> int:
        return sum(group["replicas"] * int(_limits(group["template"])["nvidia.com/gpu"]) for group in self.groups)

    def mounted(self, folder: str) -> Document:
        """Return the volume that lies at `folder` in the head."""
        (mount,) = (m for m in self.head["containers"][0]["volumeMounts"] if m["mountPath"] == folder)
        (volume,) = (v for v in self.head["volumes"] if v["name"] == mount["name"])
        return volume


def _limits(template: Document) -> dict[str, str]:
    return template["spec"]["containers"][0]["resources"]["limits"]


def _read(folder: Path) -> Manifests:
    """Return a folder's resources and generated ConfigMaps, without patches: the part of kustomize that base uses."""
    kustomization = yaml.safe_load((folder / "kustomization.yaml").read_text())
    documents = [yaml.safe_load((folder / name).read_text()) for name in kustomization["resources"]]
    for generator in kustomization["configMapGenerator"]:
        data = {name: (folder / name).read_text() for name in generator.get("files", [])}
        for name in generator.get("envs", []):
            lines = (folder / name).read_text().splitlines()
            data |= dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))
        documents.append(
            {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": generator["name"]}, "data": data}
        )
    return Manifests(tuple(documents))


def _render(folder: Path) -> Manifests:
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not installed: overlays cannot be rendered")
    done = subprocess.run(["kubectl", "kustomize", str(folder)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return Manifests(tuple(yaml.safe_load_all(done.stdout)))


@pytest.fixture(scope="module", params=["base as read", "base", "example"])
def manifests(request: pytest.FixtureRequest) -> Manifests:
    if request.param == "base as read":
        return _read(_BASE)
    return _render(_BASE if request.param == "base" else _EXAMPLE)


def _config(manifests: Manifests, folder: Path) -> RunConfig:
    """Return the run's configuration as the head's command loads it, with mounted files put into `folder`."""
    words = []
    for word in _parser().parse_args(_words(manifests)).words:
        volume = manifests.mounted(str(Path(word).parent))
        data = manifests.all_of("ConfigMap")[volume["configMap"]["name"]]["data"]
        (folder / Path(word).name).write_text(data[Path(word).name])
        words.append(str(folder / Path(word).name))
    return load_config(words)


def _words(manifests: Manifests) -> list[str]:
    program, *words = shlex.split(manifests.ray_job["spec"]["entrypoint"])
    assert program == "isthmus"
    return words


def test_every_field_is_one_that_is_known(manifests: Manifests) -> None:
    errors = {document["kind"]: schema_errors(document) for document in manifests.documents}
    assert not any(errors.values()), errors


def test_the_operator_takes_the_run(manifests: Manifests) -> None:
    # KubeRay's own rules that a schema cannot state.
    name = manifests.ray_job["metadata"]["name"]
    assert len(name) <= 47, "a longer name is refused: the cluster's name is made from it"
    group_names = [group["groupName"] for group in manifests.groups]
    assert len(set(group_names)) == len(group_names)
    for group in manifests.groups:
        # There is no autoscaler: a run starts with as many as are asked for, or not at all.
        assert group["minReplicas"] == group["replicas"] == group["maxReplicas"]


def test_ray_is_the_release_that_the_image_holds(manifests: Manifests) -> None:
    (pinned,) = re.findall(r"^ray==(.+)$", (_ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert manifests.cluster["rayVersion"] == pinned


def test_image_is_of_this_release(manifests: Manifests) -> None:
    version = tomllib.loads((_ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert {container["image"] for container in manifests.containers} == {f"isthmus:{version}"}


def test_no_stage_can_land_on_the_head(manifests: Manifests) -> None:
    params = manifests.cluster["headGroupSpec"]["rayStartParams"]
    assert params["num-cpus"] == "0"
    assert "nvidia.com/gpu" not in _limits(manifests.templates[0])


def test_every_worker_has_a_gpu_and_its_own_region(manifests: Manifests) -> None:
    for group in manifests.groups:
        resources = group["template"]["spec"]["containers"][0]["resources"]
        assert resources["limits"]["nvidia.com/gpu"] == resources["requests"]["nvidia.com/gpu"] == "1"
    regions = [group["labels"]["region"] for group in manifests.groups]
    assert len(set(regions)) == len(regions)


def test_every_node_runs_with_the_settings_of_the_code(manifests: Manifests) -> None:
    config_maps = manifests.all_of("ConfigMap")
    for container in manifests.containers:
        sources = [entry["configMapRef"]["name"] for entry in container["envFrom"] if "configMapRef" in entry]
        settings = {key: value for name in sources for key, value in config_maps[name]["data"].items()}
        assert settings == dict(RAY_SETTINGS)
        assert not {entry["name"] for entry in container.get("env", [])} & set(RAY_SETTINGS)


def test_every_node_reaches_the_bucket_with_credentials_of_a_secret(manifests: Manifests) -> None:
    for container in manifests.containers:
        assert {"secretRef": {"name": "isthmus-s3"}} in container["envFrom"]
    # Secrets are made by hand, and never in files of ours.
    assert not manifests.all_of("Secret")


def test_wandb_key_may_be_missing(manifests: Manifests) -> None:
    (entry,) = (entry for entry in manifests.head["containers"][0]["env"] if entry["name"] == "WANDB_API_KEY")
    assert entry["valueFrom"]["secretKeyRef"]["optional"] is True


def test_every_reference_leads_somewhere(manifests: Manifests) -> None:
    for template in manifests.templates:
        volumes = template["spec"].get("volumes", [])
        mounts = [mount["name"] for c in template["spec"]["containers"] for mount in c.get("volumeMounts", [])]
        assert sorted(mounts) == sorted(volume["name"] for volume in volumes)
        for volume in volumes:
            if "configMap" in volume:
                assert volume["configMap"]["name"] in manifests.all_of("ConfigMap")
            else:
                assert volume["persistentVolumeClaim"]["claimName"] in manifests.all_of("PersistentVolumeClaim")
    assert len({document["metadata"].get("namespace") for document in manifests.documents}) == 1


def test_the_command_trains_on_the_cluster(manifests: Manifests) -> None:
    arguments = _parser().parse_args(_words(manifests))
    assert arguments.run.__name__ == "_train"
    assert arguments.address == "auto"


def test_the_run_outlives_its_cluster(manifests: Manifests, tmp_path: Path) -> None:
    config = _config(manifests, tmp_path)
    assert config.data.path.startswith("s3://")
    assert config.checkpoints.url is not None
    assert config.checkpoints.url.startswith("s3://")
    assert config.checkpoints.every_steps > 0
    assert "persistentVolumeClaim" in manifests.mounted(config.runs_dir)


def test_a_stopped_run_has_the_time_to_end_its_step(manifests: Manifests, tmp_path: Path) -> None:
    (entry,) = (e for e in manifests.head["containers"][0]["env"] if e["name"] == "RAY_JOB_STOP_WAIT_TIME_S")
    assert int(entry["value"]) >= _config(manifests, tmp_path).timeouts.step_s
    assert manifests.head["terminationGracePeriodSeconds"] > int(entry["value"])


def test_policy_covers_every_pod(manifests: Manifests) -> None:
    (policy,) = manifests.all_of("NetworkPolicy").values()
    selected = policy["spec"]["podSelector"]["matchLabels"]
    for template in manifests.templates:
        assert selected.items() <= template["metadata"]["labels"].items()
    # Ray's nodes reach each other on every port, both ways.
    assert {"from": [{"podSelector": {"matchLabels": selected}}]} in policy["spec"]["ingress"]
    assert {"to": [{"podSelector": {"matchLabels": selected}}]} in policy["spec"]["egress"]


def test_the_overlay_is_a_run_of_its_own(tmp_path: Path) -> None:
    base, example = _read(_BASE), _render(_EXAMPLE)
    ours, theirs = _config(base, tmp_path), _config(example, tmp_path)
    assert example.ray_job["metadata"]["name"] != base.ray_job["metadata"]["name"]
    assert example.num_gpus != base.num_gpus
    assert len(example.groups) == 2
    for group in example.groups:
        selector = group["template"]["spec"]["nodeSelector"]
        assert selector == {"topology.kubernetes.io/region": group["labels"]["region"]}
    assert set(theirs.fleet.region_prices) == {group["labels"]["region"] for group in example.groups}
    assert (theirs.name, theirs.data.path, theirs.model) != (ours.name, ours.data.path, ours.model)
    assert theirs.checkpoints.url != ours.checkpoints.url


def _misspell_group_name(spec: Document) -> None:
    group = spec["rayClusterSpec"]["workerGroupSpecs"][0]
    group["groupname"] = group.pop("groupName")


def _forget_min_replicas(spec: Document) -> None:
    del spec["rayClusterSpec"]["workerGroupSpecs"][0]["minReplicas"]


def _label_in_start_params(spec: Document) -> None:
    spec["rayClusterSpec"]["workerGroupSpecs"][0]["rayStartParams"]["labels"] = "region=local"


def _number_in_start_params(spec: Document) -> None:
    spec["rayClusterSpec"]["headGroupSpec"]["rayStartParams"]["num-cpus"] = 0


def _forget_version(spec: Document) -> None:
    del spec["rayClusterSpec"]["rayVersion"]


def _switch_token_off(spec: Document) -> None:
    spec["rayClusterSpec"]["authOptions"]["mode"] = "disabled"


def _submit_before_workers(spec: Document) -> None:
    spec["submissionMode"] = "SidecarMode"


def _keep_cluster(spec: Document) -> None:
    spec["shutdownAfterJobFinishes"] = False


def _latest_image(spec: Document) -> None:
    _head_container(spec)["image"] = "isthmus:latest"


def _untagged_image(spec: Document) -> None:
    _head_container(spec)["image"] = "isthmus"


def _open_secret(spec: Document) -> None:
    _head_container(spec)["env"].append({"name": "AWS_SECRET_ACCESS_KEY", "value": "in the open"})


def _forget_limits(spec: Document) -> None:
    del _head_container(spec)["resources"]["limits"]


def _run_as_root(spec: Document) -> None:
    spec["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["securityContext"]["runAsUser"] = 0


def _mount_host(spec: Document) -> None:
    volumes = spec["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["volumes"]
    volumes.append({"name": "host", "hostPath": {"path": "/"}})


def _head_container(spec: Document) -> Document:
    return spec["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]


@pytest.mark.parametrize(
    "spoil",
    [
        _misspell_group_name,
        _forget_min_replicas,
        _label_in_start_params,
        _number_in_start_params,
        _forget_version,
        _switch_token_off,
        _submit_before_workers,
        _keep_cluster,
        _latest_image,
        _untagged_image,
        _open_secret,
        _forget_limits,
        _run_as_root,
        _mount_host,
    ],
)
def test_a_spoilt_run_is_refused(spoil: Callable[[Document], None]) -> None:
    document = deepcopy(_read(_BASE).ray_job)
    assert not schema_errors(document)
    spoil(document["spec"])
    assert schema_errors(document)


def _instructions() -> list[tuple[str, str]]:
    """Return the Dockerfile's instructions in order: the word, and the rest of its line."""
    text = (_K8S / "Dockerfile").read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in lines)]


def test_image_runs_as_the_user_that_the_pods_ask_for(manifests: Manifests) -> None:
    user = [rest for word, rest in _instructions() if word == "USER"][-1]
    for template in manifests.templates:
        context = template["spec"]["securityContext"]
        assert user == f"{context['runAsUser']}:{context['runAsGroup']}"


def test_image_is_built_from_what_is_pinned_and_there() -> None:
    (base,) = (rest for word, rest in _instructions() if word == "FROM")
    assert re.fullmatch(r"python:3\.11-slim-[a-z]+", base)
    installs = [rest for word, rest in _instructions() if word == "RUN" and "pip install" in rest]
    assert "torch" in installs[0], "the CUDA build of torch is a layer of its own"
    assert all("--constraint constraints.txt" in install for install in installs)
    copied = {name for word, rest in _instructions() if word == "COPY" for name in rest.split()[:-1]}
    assert all((_ROOT / name).exists() for name in copied)
    let_through = {line[1:] for line in (_K8S / "Dockerfile.dockerignore").read_text().splitlines() if line[:1] == "!"}
    assert let_through == copied
    assert ("ENTRYPOINT", '["isthmus"]') in _instructions(), (
        "exec form: the exit code and signals are the program's own"
    )
