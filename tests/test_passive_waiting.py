from __future__ import annotations

import os
import subprocess
import sys

import pytest

from lsp_ray.passive_waiting import SETTINGS, wait_passively

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
    for name in SETTINGS:
        monkeypatch.setenv(name, "")  # to be put back
        monkeypatch.delenv(name)
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    wait_passively()
    assert {name: os.environ[name] for name in SETTINGS} == SETTINGS | {"OMP_WAIT_POLICY": "active"}
