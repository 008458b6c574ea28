"""deploy/ parses, keeps to its tools' formats and names nothing that is not there."""

from __future__ import annotations

import configparser
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import jsonschema
import psutil
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from lsp_ray.config import RunConfig
from lsp_ray.runtime.watch.live_metrics import BIAS, BIAS_OF_LAYER, COUNTERS, GAUGES, GPU_COMPUTED, PREFIX, STEPS

DEPLOY = Path(__file__).resolve().parent.parent / "deploy"
UNIT = DEPLOY / "lsp-ray@.service"
DASHBOARD = DEPLOY / "grafana" / "lsp_ray.json"


def loaded(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's instructions and what follows them, continued lines joined."""
    text = re.sub(r"^#.*\n", "", (DEPLOY / "Dockerfile").read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    return [(name, rest) for name, _, rest in (line.partition(" ") for line in text.splitlines() if line)]


@pytest.mark.parametrize("path", [path for path in DEPLOY.rglob("*") if path.is_file()], ids=lambda path: path.name)
def test_every_file_says_what_was_not_run(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    head = (
        json.loads(text)["description"]
        if path.suffix == ".json"
        else text[: text.index("\n\n") if "\n\n" in text else None]
    )
    assert re.search(r"\b(never|no|not)\b.*\b(run|built|started|launched|shown)\b|\bwas run\b", head, re.DOTALL)


def test_the_image_runs_lsp_ray_and_not_as_root() -> None:
    parsed = instructions()
    known = {"FROM", "RUN", "WORKDIR", "COPY", "USER", "ENTRYPOINT", "CMD"}
    assert {name for name, _ in parsed} <= known
    assert parsed[0][0] == "FROM"
    assert parsed[0][1].startswith("nvidia/cuda:")
    users = [position for position, (name, rest) in enumerate(parsed) if name == "USER" and rest != "root"]
    started = next(position for position, (name, _) in enumerate(parsed) if name == "ENTRYPOINT")
    assert users
    assert users[-1] < started
    assert json.loads(parsed[started][1])[-1] == "lsp_ray.run"
    for name, rest in parsed:
        if name == "COPY":
            for source in rest.split()[:-1]:
                assert (DEPLOY.parent / source).exists(), source


def test_compose_mounts_files_that_are_there_and_serves_nothing_to_others() -> None:
    services = loaded(DEPLOY / "compose.yaml")["services"]
    assert set(services) == {"train", "prometheus", "grafana"}
    for service in services.values():
        for source in (volume.split(":")[0] for volume in service["volumes"]):
            assert source in ("ray", "./work") or (DEPLOY / source).is_file(), source
    assert (DEPLOY / services["train"]["build"]["context"] / services["train"]["build"]["dockerfile"]).is_file()
    assert any(argument.endswith("127.0.0.1:9090") for argument in services["prometheus"]["command"])
    assert services["grafana"]["environment"]["GF_SERVER_HTTP_ADDR"] == "127.0.0.1"


def test_grafana_asks_the_prometheus_that_scrapes_ray() -> None:
    (scraped,) = loaded(DEPLOY / "prometheus.yml")["scrape_configs"]
    assert scraped["file_sd_configs"][0]["files"] == ["/tmp/ray/prom_metrics_service_discovery.json"]
    (source,) = loaded(DEPLOY / "grafana" / "datasource.yml")["datasources"]
    assert source["url"] == "http://127.0.0.1:9090"
    panels = json.loads(DASHBOARD.read_text())["panels"]
    assert {panel["datasource"]["uid"] for panel in panels} == {source["uid"]}
    (provider,) = loaded(DEPLOY / "grafana" / "dashboards.yml")["providers"]
    mounted = loaded(DEPLOY / "compose.yaml")["services"]["grafana"]["volumes"]
    assert any(volume.split(":")[1] == f"{provider['options']['path']}/lsp_ray.json" for volume in mounted)


def test_the_dashboard_shows_metrics_that_a_run_has() -> None:
    ours = {*GAUGES, BIAS, BIAS_OF_LAYER, GPU_COMPUTED, *(f"{name}_total" for name in (*COUNTERS, STEPS))}
    rays = {"ray_node_mem_used", "ray_object_store_used_memory", "ray_node_gram_used"}
    panels = json.loads(DASHBOARD.read_text())["panels"]
    asked = {name for panel in panels for target in panel["targets"] for name in re.findall(r"ray_\w+", target["expr"])}
    assert asked - rays <= {f"ray_{PREFIX}{name}" for name in ours}
    streams = {f"ray_{PREFIX}{stream}_busy_s" for stream in ("gpu", "d2h", "cpu", "h2d")}
    waits = {f"ray_{PREFIX}exposed_{stream}_s" for stream in ("d2h", "cpu", "h2d")}
    assert streams | waits | {f"ray_{PREFIX}loss", f"ray_{PREFIX}{BIAS}", "ray_node_mem_used"} <= asked
    places = [tuple(panel["gridPos"][side] for side in "xy") for panel in panels]
    assert len(set(places)) == len(panels)


def test_the_service_starts_a_run_with_options_that_exist() -> None:
    unit = configparser.ConfigParser(interpolation=None, strict=True)
    unit.optionxform = str  # type: ignore[assignment, method-assign]
    unit.read_string(UNIT.read_text(encoding="utf-8"))
    service = unit["Service"]
    assert service["User"] not in ("", "root")
    assert service["KillMode"] == "mixed"
    command = service["ExecStart"].split()
    assert command[1:4] == ["-P", "-m", "lsp_ray.run"]
    known = {f"--{field.name}" for field in fields(RunConfig)} | {"--config"}
    assert {word for word in command if word.startswith("--")} <= known


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd here")
def test_systemd_has_nothing_to_say_against_the_service(tmp_path: Path) -> None:
    # an absolute program that is there: verify looks for it
    text = UNIT.read_text(encoding="utf-8").replace("/opt/lsp_ray/.venv/bin/python", "/bin/true")
    copy = tmp_path / "lsp-ray@notes.service"
    copy.write_text(text.replace("User=lsp_ray\n", ""))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", copy], capture_output=True, text=True, timeout=60, check=False
    )
    assert [line for line in done.stderr.splitlines() if "lsp-ray" in line] == []


@pytest.mark.parametrize("name", ["ray-workstation.yaml", "ray-cluster.yaml"])
def test_rays_launcher_takes_the_cluster_files_and_every_ray_asks_for_the_token(name: str) -> None:
    config = loaded(DEPLOY / name)
    validate_config(prepare_config(config))
    assert config["file_mounts"] == {"~/.ray/auth_token": "~/.ray/auth_token"}
    for commands in (config["head_start_ray_commands"], config["worker_start_ray_commands"]):
        assert not any("0.0.0.0" in command for command in commands)
        assert all(command.startswith("RAY_AUTH_MODE=token ") for command in commands if " ray start " in command)
        assert all(" start " in command or command in ("ray stop", CLOSE_TOKEN) for command in commands)


def _exactly(required: dict[str, Any], **optional: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": required | optional,
        "required": list(required),
        "additionalProperties": False,
    }


WHOLE, TEXT = {"type": "integer", "minimum": 0}, {"type": "string"}
TEXTS = {"type": "object", "additionalProperties": TEXT}  # numbers would be refused, as Kubernetes does
NAMED = {"type": "array", "items": {"type": "object", "required": ["name"]}}
CONTAINER = _exactly(
    {"name": TEXT, "image": TEXT},
    env={"type": "array", "items": _exactly({"name": TEXT, "value": TEXT})},
    resources=_exactly({"limits": TEXTS}, requests=TEXTS),
    volumeMounts={"type": "array", "items": _exactly({"name": TEXT, "mountPath": TEXT})},
)
POD = _exactly({"spec": _exactly({"containers": {"type": "array", "items": CONTAINER}}, volumes=NAMED)})
GROUP = {"rayStartParams": TEXTS, "template": POD}
KUBERAY = _exactly(  # the fields of KubeRay's RayCluster, ray.io/v1, that a cluster of two groups needs
    {
        "apiVersion": {"const": "ray.io/v1"},
        "kind": {"const": "RayCluster"},
        "metadata": _exactly({"name": {"type": "string", "pattern": "^[a-z]([-a-z0-9]*[a-z0-9])?$"}}),
        "spec": _exactly(
            {
                "headGroupSpec": _exactly(GROUP),
                "workerGroupSpecs": {
                    "type": "array",
                    "items": _exactly(
                        {"groupName": TEXT, "minReplicas": WHOLE, "maxReplicas": WHOLE, **GROUP}, replicas=WHOLE
                    ),
                },
            },
            rayVersion=TEXT,
            authOptions=_exactly({"mode": {"enum": ["token", "disabled"]}}),  # from KubeRay 1.5.1 on
        ),
    }
)


def test_kubernetes_pods_ask_for_a_token_share_their_work_and_have_room_for_the_slots() -> None:
    manifest = loaded(DEPLOY / "kuberay.yaml")
    jsonschema.validate(manifest, KUBERAY)
    spec = manifest["spec"]
    assert spec["authOptions"] == {"mode": "token"}
    assert f"ray=={spec['rayVersion']}" in (DEPLOY.parent / "constraints.txt").read_text().splitlines()
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        assert {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]} == {
            "work": "/work",
            "shm": "/dev/shm",
        }
        assert volumes["work"]["persistentVolumeClaim"] == {"claimName": "lsp-ray-work"}
        shared = volumes["shm"]["emptyDir"]
        assert shared["medium"] == "Memory"
        assert int(group["rayStartParams"]["object-store-memory"]) < int(shared["sizeLimit"].removesuffix("Gi")) << 30
        assert {"name": "RAY_worker_niceness", "value": "0"} in container["env"]
        assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"


CLOSE_TOKEN = "chmod 600 ~/.ray/auth_token"
CLIENT = """
import sys, ray
ray.init(address=sys.argv[1], log_to_driver=False)
print(ray.get(ray.remote(lambda: "ran").remote()))
"""


def test_rays_head_on_a_workstation_is_on_the_loopback_interface_and_refuses_who_has_no_token(tmp_path: Path) -> None:
    config = loaded(DEPLOY / "ray-workstation.yaml")
    [command] = [command for command in config["head_start_ray_commands"] if " ray start " in command]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = re.sub(r" --autoscaling-config=\S+", "", command).replace(
        "--port=6379", f"--port={address.split(':')[1]}"
    )
    command += " --include-dashboard=false --num-cpus=1 --object-store-memory=100000000 --block"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"HOME": str(tmp_path), "RAY_USAGE_STATS_ENABLED": "0"}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("5" * 64)
    head = subprocess.Popen(command, shell=True, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert head.stdout is not None
        assert any("Ray runtime started" in line for line in head.stdout)
        processes = [psutil.Process(head.pid), *psutil.Process(head.pid).children(recursive=True)]
        listening = {
            connection.laddr.ip
            for process in processes
            for connection in process.net_connections()
            if connection.status == psutil.CONN_LISTEN
        }
        assert listening <= {"127.0.0.1", "::ffff:127.0.0.1", "::1"}
        clients = [
            subprocess.Popen(
                [sys.executable, "-c", CLIENT, address],
                # the address that Ray answers to is not looked for on other interfaces
                env={**environment, "RAY_AUTH_MODE": mode, "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"},
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
            for mode in ("token", "disabled")
        ]
        said = [client.communicate(timeout=200)[0] for client in clients]
        assert said == ["ran\n", ""]
        assert [client.returncode for client in clients] == [0, 1]
    finally:
        for child in psutil.Process(head.pid).children(recursive=True):
            child.kill()
        head.kill()
        head.communicate()
