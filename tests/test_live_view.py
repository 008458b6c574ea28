"""A run in progress as its user watches it: report page, Ray's dashboard, and a real Prometheus that scrapes it."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlencode
from urllib.request import Request, urlopen

import pytest
import torch

from tests.test_deploy import DASHBOARD, DEPLOY
from tests.test_report import Page
from tests.tiny import write_tiny_jsonl, write_tiny_model

pytestmark = pytest.mark.timeout(300)

WAIT_S = 120.0
SOON = {"RAY_metrics_report_interval_ms": "1000", "REPORTER_UPDATE_INTERVAL_MS": "1000"}  # Ray's own are 10 s and 5 s
CHECK_EVERY = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveRun:
    """`first_page` is the report page before any step."""

    page_url: str
    dashboard_url: str
    token: str
    temp_dir: Path
    first_page: str


def awaited(what: str, look: Callable[[], Any]) -> Any:
    """What `look` returns as soon as it is true."""
    deadline_s = time.monotonic() + WAIT_S
    while not (found := look()):
        assert time.monotonic() < deadline_s, what
        time.sleep(0.2)
    return found


def fetched(url: str, **headers: str) -> str:
    with urlopen(Request(url, headers=headers), timeout=30) as answer:
        return str(answer.read().decode())


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveRun]:
    folder = tmp_path_factory.mktemp("live")
    write_tiny_model(folder / "model", "llama")
    write_tiny_jsonl(folder / "data.jsonl", "prompt_completion", 100)
    out, log = folder / "out", folder / "log"
    options = [
        *(
            "--model_name_or_path",
            str(folder / "model"),
            "--dataset",
            str(folder / "data.jsonl"),
            "--max_steps",
            "100000",
        ),
        *("--lsp.subspace_dim", "16", "--lsp.nnz_per_row", "2", "--lsp.check_every", str(CHECK_EVERY)),
        *("--output_dir", str(out), "--bf16", "false", "--runtime.dashboard", "true", "--report_port", "0"),
    ]
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as temp_dir, log.open("w") as lines:
        process = subprocess.Popen(
            [sys.executable, "-m", "lsp_ray.run", *options],
            env={**os.environ, **SOON, "RAY_TMPDIR": temp_dir, "PYTHONUNBUFFERED": "1"},
            stdout=lines,
            stderr=subprocess.STDOUT,
        )

        def said(pattern: str) -> Any:
            assert process.poll() is None, log.read_text()
            return re.search(pattern, log.read_text())

        try:
            page_url = awaited("report page", lambda: said(r"report: (\S+)\n"))[1]
            first_page = fetched(page_url)
            dashboard = awaited("dashboard", lambda: said(r"dashboard: (\S+) \(it asks for the token in (.+)\)"))
            awaited("a measurement of bias", lambda: said(rf"step {CHECK_EVERY + 2}/"))
            yield LiveRun(
                page_url=page_url,
                dashboard_url=dashboard[1],
                token=Path(dashboard[2]).read_text(),
                temp_dir=Path(temp_dir),
                first_page=first_page,
            )
            process.send_signal(signal.SIGTERM)
            assert process.wait(WAIT_S) == 128 + signal.SIGTERM, log.read_text()
        finally:
            process.kill()
            process.wait()


def test_the_page_is_there_before_the_first_step_and_then_shows_the_steps(live: LiveRun) -> None:
    before = Page(live.first_page)
    assert any(re.match(r"(preparing model and data|starting Ray) \(\d+:\d\d\)", text) for text in before.texts)
    assert not before.of_class("dot")

    def shown() -> Page | None:
        page = Page(fetched(live.page_url))
        return page if page.of_class("bar") and page.of_class("line") else None

    page = awaited("steps and their streams", shown)
    assert any(
        re.match(r"step \d+/100000 · epoch [\d.]+ · loss [\d.]+ · lr \S+ · \d+ tokens/s · ETA ", text)
        for text in page.texts
    )
    assert not page.of_class("complaints")


def test_rays_dashboard_shows_what_each_actor_is(live: LiveRun) -> None:
    url = f"{live.dashboard_url}/api/v0/actors?detail=true"
    actors = json.loads(fetched(url, Authorization=f"Bearer {live.token}"))["data"]["result"]["result"]
    assert {(actor["repr_name"], actor["state"]) for actor in actors} == {("gpu", "ALIVE"), ("shard-0", "ALIVE")}


@contextmanager
def prometheus(folder: Path, temp_dir: Path) -> Iterator[str]:
    """Debian's, with our configuration but for Ray's folder and the pace; yields where its API is."""
    shipped = (DEPLOY / "prometheus.yml").read_text()
    ours = re.sub(r"interval: \d+s", "interval: 1s", shipped.replace("/tmp/ray/", f"{temp_dir}/ray/"))
    (folder / "prometheus.yml").write_text(ours)
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    options = (f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'data'}")
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(["prometheus", *options, f"--web.listen-address={address}"], stdout=log, stderr=log)

    def is_ready() -> bool:
        assert process.poll() is None, (folder / "log").read_text()
        with suppress(OSError):
            return "Ready" in fetched(f"http://{address}/-/ready")
        return False

    try:
        awaited("Prometheus", is_ready)
        yield f"http://{address}/api/v1"
    finally:
        process.terminate()
        process.wait(WAIT_S)


@pytest.mark.skipif(shutil.which("prometheus") is None, reason="prometheus is not installed")
def test_a_prometheus_that_scrapes_the_run_answers_every_query_of_the_grafana_dashboard(
    live: LiveRun, tmp_path: Path
) -> None:
    panels = json.loads(DASHBOARD.read_text())["panels"]
    queries = {target["expr"] for panel in panels for target in panel["targets"]}
    if not torch.cuda.is_available():
        queries.remove("ray_node_gram_used * 1048576")
    with prometheus(tmp_path, live.temp_dir) as api:

        def result(query: str) -> Any:
            return json.loads(fetched(f"{api}/query?{urlencode({'query': query})}"))["data"]["result"]

        deadline_s = time.monotonic() + WAIT_S
        while (unanswered := {query for query in queries if not result(query)}) and time.monotonic() < deadline_s:
            time.sleep(0.5)
        assert not unanswered
        targets = json.loads(fetched(f"{api}/targets"))["data"]["activeTargets"]
        assert "up" in {target["health"] for target in targets}
        (loss,) = result("ray_lsp_loss")
        assert 0.0 < float(loss["value"][1]) < 10.0
