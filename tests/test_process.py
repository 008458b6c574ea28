from __future__ import annotations

import gc
import os
import subprocess
import sys

import pytest
import ray

from lsp_ray.process import PASSIVE_WAITING, keep_loaded, prepare_process
from lsp_ray.runtime.transport.lanes import actor_class

# torch's import stands for it: OpenMP reads the settings when it is loaded, and never again
LOOK = """
import importlib.abc, importlib, os, sys

class Torch(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "torch":
            print(os.environ.get("OMP_WAIT_POLICY"), os.environ.get("KMP_BLOCKTIME"))
            os._exit(0)

sys.meta_path.insert(0, Torch())
name, *argv = sys.argv[1:]
importlib.import_module(name).main(argv)
"""


@pytest.mark.parametrize(
    "command",
    [
        "lsp_ray.run --output_dir {folder}/out",
        "lsp_ray.generate --model {folder} --prompt Hello",
        "lsp_ray.export {folder} {folder}/out",
        "lsp_ray.plan.__main__ --measure",
    ],
    ids=lambda command: command.split()[0],
)
def test_every_program_that_computes_waits_passively_before_it_imports_torch(
    tmp_path_factory: pytest.TempPathFactory, command: str
) -> None:
    argv = command.format(folder=tmp_path_factory.mktemp("run")).split()
    ended = subprocess.run([sys.executable, "-c", LOOK, *argv], capture_output=True, text=True, check=False)
    assert ended.stdout.splitlines()[-1:] == ["passive 0"], ended.stderr


def test_a_persons_own_setting_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in PASSIVE_WAITING:
        monkeypatch.setenv(name, "")  # to be put back
        monkeypatch.delenv(name)
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    prepare_process()
    assert {name: os.environ[name] for name in PASSIVE_WAITING} == PASSIVE_WAITING | {"OMP_WAIT_POLICY": "active"}


ENDED = """
import atexit, gc
from lsp_ray.process import keep_loaded, prepare_process, uncollected

atexit.register(lambda: print("kept at the end", gc.get_freeze_count() > 0))
with uncollected(is_own=False):
    print("while it loads", gc.isenabled())
print("then", gc.isenabled(), gc.get_freeze_count())
gc.disable()
with uncollected(is_own=True):
    pass
print("off stays off", gc.isenabled(), gc.get_freeze_count() > 0)
gc.unfreeze()
keep_loaded()
print("in an actor", gc.isenabled(), gc.get_freeze_count() > 0)
gc.unfreeze()
prepare_process()
"""


def test_what_stays_until_the_end_is_not_collected() -> None:
    ended = subprocess.run([sys.executable, "-c", ENDED], capture_output=True, text=True, check=True)
    assert ended.stdout.splitlines() == [
        "while it loads False",
        "then True 0",
        "off stays off False True",
        "in an actor True True",
        "kept at the end True",
    ]


@pytest.mark.usefixtures("cluster")
def test_workers_collect_once_their_actor_is_there() -> None:
    class Ready:  # begins as ours do
        def __init__(self) -> None:
            self._before = gc.isenabled()
            keep_loaded()

        def look(self) -> tuple[bool, bool]:
            return self._before, gc.isenabled()

    actor = actor_class(Ready).remote()
    assert ray.get(actor.look.remote()) == (False, True)
    ray.kill(actor)
