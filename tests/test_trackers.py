"""TensorBoard and W&B hold what metrics.jsonl holds, each step once, however often a run goes on."""

from __future__ import annotations

import json
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lsp_ray.errors import ConfigError, TrackerError
from lsp_ray.runtime.prepare.job import Job, resumed
from lsp_ray.runtime.watch.trackers import check_tracker, scalars
from lsp_ray.trace import StepMetrics
from tests.test_progress import STEP
from tests.tiny_jobs import run_on_threads, tiny_job

History = list[dict[str, float]]


def written(folder: Path) -> History:
    """The scalars of metrics.jsonl, and each step's number."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    steps = [StepMetrics(**json.loads(line)) for line in lines]
    return [{"step": metrics.step, **scalars(metrics)} for metrics in steps]


def in_tensorboard(folder: Path) -> History:
    """What a reader of the event files is shown, step by step."""
    events = EventAccumulator(str(folder / "tensorboard"), purge_orphaned_data=True).Reload()
    found: dict[int, dict[str, float]] = {}
    for name in events.Tags()["scalars"]:
        for event in events.Scalars(name):
            values = found.setdefault(event.step, {"step": event.step})
            assert name not in values
            values[name] = event.value
    return [found[step] for step in sorted(found)]


FAKE_WANDB = '''
import json
from pathlib import Path

class Error(Exception):
    pass

class Run:
    """Keeps what W&B's server would, in a file beside this module; refuses what W&B drops."""

    def __init__(self, path):
        self.path = path
        self.lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        self.step = self.lines[-1]["step"] + 1 if self.lines else 0
        self.last = self.step - 1

    def log(self, values, step):
        assert step > self.last
        self.last = step
        self.lines.append({"step": step, **values})

    def __enter__(self):
        return self

    def __exit__(self, *_error):
        self.path.write_text("".join(json.dumps(line) + "\\n" for line in self.lines))

def init(*, project, name, dir, id, resume, config):
    assert (project, resume, config["seed"]) == ("lsp_ray", "allow", 42)
    assert Path(dir).name == name
    if name == "no-login":
        raise Error("api_key not configured\\n(no-tty)")
    return Run(Path(__file__).with_name(id))
'''


@pytest.fixture
def fake_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    package = tmp_path / "packages" / "wandb"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(FAKE_WANDB)
    monkeypatch.syspath_prepend(package.parent)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    return package


def in_wandb(folder: Path, package: Path) -> History:
    lines = (package / (folder / "wandb" / "run_id").read_text()).read_text().splitlines()
    return [json.loads(line) for line in lines]


def tracked(tmp_path: Path, **changes: Any) -> Job:
    lsp = {"check_every": 6, "max_bias": 0.0}  # so that some steps have a bias
    return tiny_job(tmp_path, max_steps=8, save_steps=2, save_total_limit=None, lsp=lsp, **changes)


@pytest.mark.parametrize("tracker", ["tensorboard", "wandb"])
def test_a_tracker_holds_all_of_metrics_jsonl_each_step_once_after_every_kind_of_break(
    tmp_path: Path, fake_wandb: Path, tracker: Any
) -> None:
    def assert_tracked(folder: Path) -> None:
        expected = written(folder)
        assert [values["step"] for values in expected] == list(range(1, 9))
        shown = in_tensorboard(folder) if tracker == "tensorboard" else in_wandb(folder, fake_wandb)
        steady = ("step", "loss", "grad_norm", "num_tokens")  # a step that is made again takes another time
        for values, reference in zip(shown, expected, strict=True):
            assert values.keys() == reference.keys()
            assert all(values[name] == pytest.approx(reference[name]) for name in steady)
        assert any("bias_by_layer/0" in values or "bias_by_layer/1" in values for values in shown)

    job = tracked(tmp_path, report_to=tracker)
    run_on_threads(job, tmp_path / "out")
    assert_tracked(tmp_path / "out")
    at_4 = tmp_path / "out" / "checkpoint-4"
    run_on_threads(resumed(job, at_4), tmp_path / "new")
    assert_tracked(tmp_path / "new")
    run_on_threads(resumed(job, at_4), tmp_path / "out")  # steps 5 to 8 are made again
    assert_tracked(tmp_path / "out")


def test_a_run_may_go_on_with_another_tracker_which_gets_the_steps_before_too(tmp_path: Path) -> None:
    run_on_threads(tracked(tmp_path), tmp_path / "out")
    assert not (tmp_path / "out" / "tensorboard").exists()
    job = resumed(tracked(tmp_path, report_to="tensorboard"), tmp_path / "out" / "checkpoint-6")
    run_on_threads(job, tmp_path / "out")
    assert [values["step"] for values in in_tensorboard(tmp_path / "out")] == list(range(1, 9))


@pytest.mark.usefixtures("fake_wandb")
def test_wandb_that_does_not_start_ends_the_run_with_one_line(tmp_path: Path) -> None:
    with pytest.raises(TrackerError, match=r"^wandb did not start: api_key not configured \(no-tty\)$"):
        run_on_threads(tiny_job(tmp_path, report_to="wandb"), tmp_path / "no-login")


def test_a_folder_that_wandb_wrote_is_not_taken_for_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "wandb").mkdir()
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(ConfigError, match=r"^report_to must be none where wandb is not installed"):
        check_tracker("wandb")


def test_every_number_of_a_step_is_a_scalar_and_what_is_not_measured_is_left_out() -> None:
    everything = replace(
        STEP, bias=0.5, bias_by_layer={"3": 0.25}, num_refitted=0, eval_loss=2.5, computed_s_by_gpu={"gpu-1": 0.5}
    )
    names = {field.name for field in fields(StepMetrics)} - {"step", "bias_by_layer", "computed_s_by_gpu"}
    assert scalars(everything).keys() == names | {"bias_by_layer/3", "computed_s_by_gpu/gpu-1"}
    assert scalars(STEP).keys() == names - {"bias", "num_refitted", "eval_loss"}
