"""Names of data sets that are no files: what is looked for on the hub, and what happens without it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from datasets import load_dataset

from lsp_ray.data.dataset import load_rows
from lsp_ray.errors import ConfigError


@pytest.mark.parametrize("name", ["missing.jsonl", "./missing", "/no/such/file", "~/no such file", "a/b/c", "", "..."])
def test_a_missing_file_is_not_looked_for_on_the_hub(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="dataset must be an existing file"):
        load_rows(name, seed=0, cache_dir=tmp_path)


def load_elsewhere(name: str, cache_dir: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Load in a fresh interpreter: the hub client reads its environment at import only."""
    script = (
        "import sys; from pathlib import Path; from lsp_ray.data.dataset import load_rows; "
        "print(list(load_rows(sys.argv[1], seed=0, cache_dir=Path(sys.argv[2])).eval['text']))"
    )
    return subprocess.run(
        [sys.executable, "-c", script, name, str(cache_dir)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_a_hub_out_of_reach_ends_in_one_line(tmp_path: Path) -> None:
    # nothing listens on port 9
    ended = load_elsewhere("someone/something", tmp_path, HF_ENDPOINT="http://127.0.0.1:9", no_proxy="*")
    last_line = ended.stderr.strip().splitlines()[-1]
    assert "ConfigError: dataset must be" in last_line
    assert "http://127.0.0.1:9 cannot be reached" in last_line


def test_a_data_set_of_the_hub_is_found_in_the_local_cache(tmp_path: Path) -> None:
    folder = tmp_path / "something"
    for split in ("train", "validation"):
        folder.mkdir(exist_ok=True)
        (folder / f"{split}.jsonl").write_text(f'{{"text": "{split}"}}\n', encoding="utf-8")
    load_dataset(str(folder), cache_dir=str(tmp_path / "cache"))
    # where it would lie, had it come from the hub
    (tmp_path / "cache" / "something").rename(tmp_path / "cache" / "someone___something")
    for name in ("someone/something", "someone/something:default"):
        ended = load_elsewhere(name, tmp_path / "cache", HF_HUB_OFFLINE="1")
        assert ended.stdout == "['validation']\n", ended.stderr
