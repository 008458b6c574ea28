"""A model folder from anywhere: no code of it runs, nothing in it is unpickled."""

from __future__ import annotations

import ast
import json
from contextlib import suppress
from pathlib import Path

import pytest
import torch

import lsp_ray
from lsp_ray.device.evaluate import generate
from lsp_ray.errors import ConfigError
from lsp_ray.models.load import check_weights, load_model, load_skeleton, load_tokenizer
from lsp_ray.models.resolve import resolve_model
from lsp_ray.special_tokens import SpecialTokens
from tests.tiny import tiny_model, write_tiny_model

PROMPT = [[3, 4, 5]]
AUTO_MAP = {
    "AutoConfig": "planted.PlantedConfig",
    "AutoModelForCausalLM": "planted.PlantedModel",
    "AutoTokenizer": ["planted.PlantedTokenizer", "planted.PlantedTokenizer"],
}


def plant(folder: Path, mark: Path, model_type: str) -> None:
    """Let every configuration of the folder ask for code that leaves a mark when it is imported."""
    code = (
        f"open({str(mark)!r}, 'w').close()\n"
        "from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast\n"
        "class PlantedConfig(LlamaConfig): model_type = 'planted'\n"
        "class PlantedModel(LlamaForCausalLM): config_class = PlantedConfig\n"
        "class PlantedTokenizer(PreTrainedTokenizerFast): pass\n"
        "def generate(*args, **kwargs): pass\n"
    )
    (folder / "custom_generate").mkdir()
    for name in ("planted.py", "tokenization_planted.py", "custom_generate/generate.py"):
        (folder / name).write_text(code)
    for name in ("config.json", "tokenizer_config.json"):
        content = json.loads((folder / name).read_text())
        changed = {"model_type": model_type} if name == "config.json" else {"tokenizer_class": "PlantedTokenizer"}
        (folder / name).write_text(json.dumps({**content, **changed, "auto_map": AUTO_MAP}))


@pytest.mark.parametrize("model_type", ["llama", "planted"])
def test_code_in_a_model_folder_never_runs(tmp_path: Path, model_type: str) -> None:
    folder, mark = write_tiny_model(tmp_path / "model", "llama"), tmp_path / "mark"
    plant(folder, mark, model_type)
    with suppress(ConfigError):  # refused is as good as loaded without it
        load_skeleton(folder, task="causal_lm")
    with suppress(ConfigError):
        load_tokenizer(folder)
    with suppress(ConfigError):
        generate(load_model(folder, dtype=torch.float32, task="causal_lm"), PROMPT, 1, SpecialTokens(pad=0, ends=()))
    assert not mark.exists()


def test_the_planted_code_would_leave_its_mark(tmp_path: Path) -> None:
    folder, mark = write_tiny_model(tmp_path / "model", "llama"), tmp_path / "mark"
    plant(folder, mark, "planted")
    exec(compile((folder / "planted.py").read_text(), "planted", "exec"), {})
    assert mark.exists()


class Bomb:
    """Leaves a mark when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self._mark = mark

    def __reduce__(self) -> tuple[object, ...]:
        return (open, (str(self._mark), "w"))


def test_pickled_weights_are_refused_and_never_opened(tmp_path: Path) -> None:
    folder, mark = write_tiny_model(tmp_path / "model", "llama"), tmp_path / "mark"
    torch.save({"bomb": Bomb(mark), **tiny_model("llama").state_dict()}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"hold its weights as \.safetensors, .*pytorch_model\.bin is a pickle"):
        check_weights(resolve_model(str(folder)))
    with pytest.raises(ConfigError, match="hold intact weights"):
        load_model(folder, dtype=torch.float32, task="causal_lm")
    assert not mark.exists()


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "sub/model.safetensors", "..", ""])
def test_an_index_that_names_files_elsewhere_is_refused(tmp_path: Path, name: str) -> None:
    folder = write_tiny_model(tmp_path, "llama")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(ConfigError, match=r"hold the weights that its .*index\.json names.*without"):
        check_weights(folder)


@pytest.mark.parametrize("text", ["[]", "{}", "{", '{"weight_map": [1]}', '{"weight_map": {"a": 1}}', "\udcff"])
def test_an_index_that_is_none_is_one_line(tmp_path: Path, text: str) -> None:
    folder = write_tiny_model(tmp_path, "llama")
    (folder / "model.safetensors.index.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ConfigError, match=r"hold intact weights \(model\.safetensors\.index\.json\)") as caught:
        check_weights(folder)
    assert "\n" not in str(caught.value)


UNPICKLERS = {"pickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
RUNNERS = {"eval", "exec", "compile", "__import__"}
LOADERS = {("torch", "load"), ("np", "load"), ("numpy", "load"), ("yaml", "load"), ("yaml", "unsafe_load")}


def unsafe(tree: ast.AST) -> list[str]:
    """What in the code could run what a file says."""
    found = []
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                found += [alias.name for alias in names if alias.name.split(".")[0] in UNPICKLERS]
            case ast.ImportFrom(module=str(module)) if module.split(".")[0] in UNPICKLERS:
                found.append(module)
            case ast.Call(func=ast.Name(id=name)) if name in RUNNERS:
                found.append(name)
            case ast.Attribute(value=ast.Name(id=owner), attr=name) if (owner, name) in LOADERS:
                found.append(f"{owner}.{name}")
            case ast.keyword(arg="trust_remote_code", value=ast.Constant(value=value)) if value is not False:
                found.append(f"trust_remote_code={value!r}")
    return found


def test_no_module_unpickles_or_runs_what_a_file_says() -> None:
    modules = sorted(Path(lsp_ray.__file__).parent.rglob("*.py"))
    assert len(modules) > 50
    found = {path.name: names for path in modules if (names := unsafe(ast.parse(path.read_text())))}
    own = ["lanes.py", "messages.py", "shared_weights.py"]  # what a run's own processes say, where this user alone can
    assert found == {name: ["pickle"] for name in own}


@pytest.mark.parametrize(
    "code", ["import pickle", "from pickle import load", "torch.load(f)", "eval(s)", "f(trust_remote_code=True)"]
)
def test_the_search_for_unsafe_calls_finds_them(code: str) -> None:
    assert unsafe(ast.parse(code))
