"""The report page of a run in progress, over real HTTP and in a real browser."""

from __future__ import annotations

import http.client
import re
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest

from lsp_ray.report.page import live_report
from lsp_ray.report.run_folder import read_run
from lsp_ray.report.server import FRESH_S, ReportServer
from tests.test_report import Page, write_run

Answer = tuple[int, str, http.client.HTTPMessage]


def ask(server: ReportServer, path: str = "/", method: str = "GET", host: str | None = None) -> Answer:
    place = re.fullmatch(r"http://([\d.]+):(\d+)/", server.url)
    assert place
    with closing(http.client.HTTPConnection(place[1], int(place[2]), timeout=20)) as connection:
        connection.request(method, path, headers={"Host": host} if host else {})
        answer = connection.getresponse()
        return answer.status, answer.read().decode(), answer.headers


@contextmanager
def serving(
    folder: Path, status: Callable[[], str] = lambda: "step 4/9", clock: Callable[[], float] | None = None
) -> Iterator[ReportServer]:
    calls = count()
    server = ReportServer(0, clock=clock or (lambda: 100.0 ** next(calls)))  # by default no page is fresh any more
    server.serve(folder, status)
    try:
        yield server
    finally:
        server.close()


def unfinished(folder: Path, *, num_steps: int) -> Path:
    """What a run in progress has written."""
    write_run(folder, num_steps=num_steps)
    (folder / "summary.json").unlink()
    trace = folder / "trace.json"
    trace.write_text(trace.read_text().removesuffix("\n]\n"))
    return folder


def test_the_page_shows_the_run_so_far_without_a_word_about_what_is_not_there_yet(tmp_path: Path) -> None:
    with serving(unfinished(tmp_path / "run", num_steps=4)) as server:
        status, document, headers = ask(server)
    assert status == 200
    assert (headers["Content-Type"], headers["Cache-Control"]) == ("text/html; charset=utf-8", "no-store")
    page = Page(document)
    assert "step 4/9" in page.texts
    assert len(page.of_class("dot")) == 2 * 4 + 2
    assert page.of_class("bar")
    assert not page.of_class("complaints")
    assert not re.search(r"https?:|url\(", document)


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl", "trace.json"])
def test_a_run_that_has_made_no_step_has_a_page(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").touch()  # the first thing that a run writes
    (folder / name).touch()
    with serving(folder, lambda: "loading <the model>") as server:
        status, document, _ = ask(server)
    assert status == 200
    page = Page(document)
    assert "loading <the model>" in page.texts
    assert "Loss" not in page.texts  # no heading without content
    assert "–" not in page.texts


def test_figures_of_a_run_in_progress_are_those_of_its_steps(tmp_path: Path) -> None:
    run = read_run(unfinished(tmp_path / "run", num_steps=5))
    late = replace(run.steps[-1], num_tokens=100, step_time_s=3.0, exposed_d2h_s=0.0, exposed_cpu_s=0.5)
    figures = replace(run, steps=(*run.steps[:2], late, late)).figures  # two steps warm up
    assert figures["tokens_per_second"] == pytest.approx(100 / 3)
    assert figures["overlap_fraction"] == pytest.approx(1 - 0.5 / 3)
    assert figures["bytes_d2h_per_step"] == late.bytes_d2h
    assert replace(run, summary={"tokens_per_second": 7.0}).figures["tokens_per_second"] == 7.0
    assert replace(run, steps=(), summary={}).figures["method"] is None


@pytest.mark.parametrize("path", ["/config.yaml", "/?x", "/../config.yaml", "/%2e%2e/config.yaml", "//etc/passwd", "*"])
def test_nothing_but_the_page_is_served(tmp_path: Path, path: str) -> None:
    with serving(unfinished(tmp_path / "run", num_steps=2)) as server:
        assert ask(server, path)[:2] == (404, "There is only /.\n")


def test_only_get_is_answered_and_only_to_this_machines_names(tmp_path: Path) -> None:
    with serving(unfinished(tmp_path / "run", num_steps=2)) as server:
        assert [ask(server, method=method)[0] for method in ("POST", "PUT", "DELETE", "OPTIONS")] == [501] * 4
        assert [ask(server, host=host)[0] for host in ("localhost:9", "127.0.0.1:9")] == [200] * 2
        assert [ask(server, host=host)[0] for host in ("evil.example:9", "evil.example", "127.0.0.1.evil:1")] == [
            403
        ] * 3


def test_however_many_look_the_page_is_made_anew_only_after_a_while(tmp_path: Path) -> None:
    now = [0.0]
    made = count(1)

    def status() -> str:
        now[0] += 10.0  # that long it takes to make a page
        return f"page {next(made)}"

    with serving(unfinished(tmp_path / "run", num_steps=2), status, lambda: now[0]) as server:
        for later_s, page in ((0.0, 1), (FRESH_S, 1), (197.0, 1), (2.0, 2), (0.0, 2)):
            now[0] += later_s
            assert f">page {page}<" in ask(server)[1], later_s


def test_a_page_that_cannot_be_made_and_a_browser_that_says_nothing_do_no_harm(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = unfinished(tmp_path / "run", num_steps=2)
    with serving(folder) as server, socket.create_connection(("127.0.0.1", int(server.url[:-1].rpartition(":")[2]))):
        folder.rename(tmp_path / "elsewhere")
        with pytest.raises(http.client.RemoteDisconnected):
            ask(server)
        (tmp_path / "elsewhere").rename(folder)
        assert ask(server)[0] == 200
    assert capsys.readouterr() == ("", "")


def test_the_port_is_free_again_afterwards_also_where_nothing_was_served(tmp_path: Path) -> None:
    with serving(unfinished(tmp_path / "run", num_steps=2)) as server:
        ask(server)
    port = int(server.url[:-1].rpartition(":")[2])
    ReportServer(port).close()
    ReportServer(port).close()


@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")
def test_the_page_renews_itself_in_chromium_and_stays_when_the_run_is_gone(tmp_path: Path) -> None:
    folder, made = unfinished(tmp_path / "run", num_steps=3), count(1)

    def shown(server: ReportServer) -> str:
        return subprocess.run(
            [
                *("chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"),
                *("--virtual-time-budget=12000", "--dump-dom", server.url),
            ],
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        ).stdout

    with serving(folder, lambda: f"page {next(made)}") as server:
        page = Page(shown(server).strip())
    assert [text for text in page.texts if re.fullmatch(r"page [2-9]", text)]
    assert len(page.of_class("bar")) == len(Page(live_report(read_run(folder), "")).of_class("bar"))

    def only_once() -> str:
        if next(made) > 100:
            raise ConnectionError  # as good as gone
        return "the first page"

    made = count(100)
    with serving(folder, only_once) as server:
        page = Page(shown(server).strip())
    assert "The run has ended, or cannot be reached: this is its last page." in page.texts
    assert page.of_class("bar")
