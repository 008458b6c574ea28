"""Runs on folders that are quantised already: the seam is a module that passes gradients on to its input."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from lsp_ray.config import RunConfig
from lsp_ray.errors import ConfigError
from lsp_ray.export import export
from lsp_ray.methods.lora import ADAPTER_FOLDER
from lsp_ray.models.load import load_model, load_skeleton
from lsp_ray.models.quantized import FORMATS, Format, bits_of, dense_weight, is_quantized_linear
from lsp_ray.plan.__main__ import main as plan
from lsp_ray.runtime.checkpoints.checkpoint import checkpoints
from lsp_ray.runtime.prepare.job import prepare_job, resumed
from tests.test_quantized import adapter, eval_loss
from tests.tiny_jobs import assert_same_bits, run_on_threads, tiny_config

# peft asks transformers by a name that is going away
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
GROUP = 32
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


class PackedLinear(nn.Module):
    """A linear as libraries make them: nothing in it is a parameter, and its gradient is a function of its own."""

    codes_MN: torch.Tensor
    scales_M: torch.Tensor
    bias: torch.Tensor | None

    def __init__(self, linear: nn.Linear, *, for_inference: bool) -> None:
        super().__init__()
        self.in_features, self.out_features, self.for_inference = linear.in_features, linear.out_features, for_inference
        self.register_buffer("codes_MN", torch.empty(linear.weight.shape, dtype=torch.int8))
        self.register_buffer("scales_M", torch.empty(linear.out_features))
        self.register_buffer("bias", None if linear.bias is None else torch.empty(linear.out_features))

    def forward(self, input_TN: torch.Tensor) -> torch.Tensor:
        read_TN = input_TN.detach() if self.for_inference else input_TN
        output: torch.Tensor = _Packed.apply(read_TN, self.codes_MN, self.scales_M)  # type: ignore[no-untyped-call]
        return output if self.bias is None else output + self.bias.to(output.dtype)


class _Packed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input_TN: torch.Tensor, codes_MN: torch.Tensor, scales_M: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(codes_MN, scales_M)
        return input_TN @ (codes_MN * scales_M[:, None]).t().to(input_TN.dtype)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        codes_MN, scales_M = ctx.saved_tensors
        return grad @ (codes_MN * scales_M[:, None]).to(grad.dtype), None, None


@register_quantization_config("packed")
@dataclass
class PackedConfig(QuantizationConfigMixin):
    quant_method: Any = "packed"
    for_inference: bool = False


@register_quantizer("packed")
class PackedQuantizer(HfQuantizer):
    requires_calibration = False
    quantization_config: PackedConfig

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **_options: Any) -> None:
        for name, module in list(model.named_modules()):
            if isinstance(module, nn.Linear) and name != "lm_head":
                with torch.device("meta"):
                    packed = PackedLinear(module, for_inference=self.quantization_config.for_inference)
                model.set_submodule(name, packed)

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return torch.float16 if dtype == torch.bfloat16 else dtype  # as AWQ's on a GPU

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def packed_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FORMATS, "packed", Format(packages=("torch",), has_parameters=False))


def quantised(config: RunConfig, folder: Path, told: dict[str, Any], tensors: dict[str, torch.Tensor]) -> RunConfig:
    """The run on a folder with these tensors, whose config.json says this of them."""
    source = Path(config.model_name_or_path)
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    content = json.loads((source / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | {"quantization_config": told}))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return replace(config, model_name_or_path=str(folder))


def packed(config: RunConfig, folder: Path, **told: Any) -> tuple[RunConfig, RunConfig]:
    """The run on packed weights, and the same on the floating weights that these stand for."""
    codes: dict[str, torch.Tensor] = {}
    dense: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(Path(config.model_name_or_path) / "model.safetensors").items():
        dense[name] = codes[name] = tensor
        if name.endswith("proj.weight"):
            del codes[name]
            prefix = name.removesuffix("weight")
            scales_M = tensor.abs().amax(1) / 127
            codes_MN = (tensor / scales_M[:, None]).round().to(torch.int8)
            codes |= {f"{prefix}codes_MN": codes_MN, f"{prefix}scales_M": scales_M}
            dense[name] = codes_MN * scales_M[:, None]
    shutil.copytree(config.model_name_or_path, folder / "dense")
    save_file(dense, folder / "dense" / "model.safetensors", {"format": "pt"})
    on_dense = replace(config, model_name_or_path=str(folder / "dense"))
    return quantised(config, folder / "packed", {"quant_method": "packed"} | told, codes), on_dense


def test_a_module_of_any_kind_is_trained_beside_as_the_weights_that_it_stands_for(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, max_steps=8, lsp={"delta": "apart", "check_every": 0})
    runs = packed(config, tmp_path)
    folders = [tmp_path / "on packed", tmp_path / "on dense"]
    jobs = [prepare_job(run, lambda _line: None) for run in runs]
    summaries = [run_on_threads(job, folder)[0] for job, folder in zip(jobs, folders, strict=True)]
    assert summaries[0].eval_loss_after < 0.95 * summaries[0].eval_loss_before
    assert summaries[0].eval_loss_after == summaries[1].eval_loss_after
    assert_same_bits(*map(adapter, folders))  # projectors that share an input as well


def test_biases_that_are_buffers_stay_and_all_else_is_in_the_runs_type(tmp_path: Path) -> None:
    config, _ = packed(tiny_config(tmp_path, "qwen2", bf16=True, save_steps=3), tmp_path)
    job = prepare_job(config, lambda _line: None)
    run_on_threads(job, tmp_path / "out")
    base = load_model(job.model_folder, dtype=torch.bfloat16, task="causal_lm")
    assert {parameter.dtype for parameter in base.parameters()} == {torch.bfloat16}
    skeleton = load_skeleton(job.model_folder, task="causal_lm")
    assert {name for name, _ in base.named_parameters()} == {
        name for name, _ in skeleton.named_parameters() if "_proj." not in name
    }
    assert sum(is_quantized_linear(module) for module in base.modules()) == 14
    [checkpoint, *_] = checkpoints(tmp_path / "out").values()
    run_on_threads(resumed(prepare_job(config, lambda _line: None), checkpoint), tmp_path / "from")
    assert_same_bits(adapter(tmp_path / "from"), adapter(tmp_path / "out"))


def test_kernels_for_inference_alone_are_refused(tmp_path: Path) -> None:
    config, _ = packed(tiny_config(tmp_path), tmp_path, for_inference=True)
    job = prepare_job(config, lambda _line: None)
    line = r"^model_name_or_path must be quantised for kernels that pass gradients on .*; model\.layers\.0\..*q_proj: "
    with pytest.raises(ConfigError, match=line):
        load_model(job.model_folder, dtype=torch.float32, task="causal_lm")


def test_a_missing_package_is_named_with_what_installs_it_and_what_else_can_be_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, _ = packed(tiny_config(tmp_path), tmp_path)
    monkeypatch.setitem(FORMATS, "packed", Format(packages=("no_such", "torch", "nor_this")))
    line = (
        r"^model_name_or_path must be loaded by no_such and nor_this, missing here, got 'packed'; "
        r"pip install no_such nor_this; a model that is not quantised trains in 4 bits with --load_in_4bit true$"
    )
    with pytest.raises(ConfigError, match=line):
        prepare_job(config, lambda _line: None)
    with pytest.raises(ConfigError, match=line):  # as where a run is exported or spoken with
        load_model(Path(config.model_name_or_path), dtype=torch.float32, task="causal_lm")
    monkeypatch.setitem(FORMATS, "bitsandbytes", Format(packages=("no_such",)))
    with pytest.raises(ConfigError, match=r"^load_in_4bit must be loaded by no_such, .*; pip install no_such$"):
        prepare_job(tiny_config(tmp_path, load_in_4bit=True), lambda _line: None)


@pytest.mark.parametrize(
    ("told", "named"),
    [
        ({"quant_method": "fp8"}, "'fp8'"),
        ({"quant_method": "compressed-tensors"}, "'compressed-tensors'"),
        ({"quant_method": "exl3", "bits": 4}, "'exl3'"),
        ({"bits": 4}, "'None'"),
        ({"quant_method": ["gptq"]}, ""),
        ({}, "'None'"),
    ],
)
def test_a_format_that_is_not_trained_is_refused_with_those_that_are(
    tmp_path: Path, told: dict[str, Any], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = quantised(tiny_config(tmp_path), tmp_path / "foreign", told, {})
    line = r"^model_name_or_path must be quantised by awq, bitsandbytes, gptq.* torchao.*, or not at all, got "
    with pytest.raises(ConfigError, match=line + named):
        prepare_job(config, lambda _line: None)
    assert plan(["--model_name_or_path", config.model_name_or_path, "--hardware", "rtx3060"]) == 2
    assert "\nerror: model_name_or_path must be quantised by awq," in capsys.readouterr().err


@pytest.mark.parametrize("told", [[1], "gptq", 4])
def test_what_is_no_record_of_a_format_is_refused_in_one_line(tmp_path: Path, told: Any) -> None:
    config = quantised(tiny_config(tmp_path), tmp_path / "damaged", told, {})
    with pytest.raises(ConfigError, match="model_name_or_path must hold a config") as raised:
        prepare_job(config, lambda _line: None)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("told", "bits"),
    [
        ({"quant_method": "gptq", "bits": 3}, 4),
        ({"quant_method": "gptq", "bits": 8}, 8),
        ({"quant_method": "awq", "bits": 4}, 4),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, 8),
        ({"quant_method": "torchao", "quant_type": {"default": {"_type": "Int4WeightOnlyConfig"}}}, 4),
        ({"quant_method": "torchao", "quant_type": {"default": {"_type": "Float8WeightOnlyConfig"}}}, 8),
    ],
)
def test_the_planner_takes_a_formats_bits_and_says_that_its_bytes_are_an_estimate(
    tmp_path: Path, told: dict[str, Any], bits: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bits_of(told) == bits
    config = quantised(tiny_config(tmp_path), tmp_path / "folder", told, {})
    assert plan(["--model_name_or_path", config.model_name_or_path, "--hardware", "rtx3060", "--json"]) == 0
    output = capsys.readouterr()
    assert json.loads(output.out)["recommended"]["bits"] == bits
    assert ("their bytes are estimated" in output.err) == (told["quant_method"] != "bitsandbytes")


def assert_trained_beside(config: RunConfig, folder: Path) -> None:
    """It learns, goes on bit for bit, passes gradients on, and leaves an adapter for its base, or a whole model."""
    config = replace(config, bf16=True, max_steps=8, save_steps=3)
    job = prepare_job(config, lambda _line: None)
    summary, _ = run_on_threads(job, folder / "out")
    assert summary.eval_loss_after < 0.95 * summary.eval_loss_before
    [checkpoint, *_] = checkpoints(folder / "out").values()
    run_on_threads(resumed(prepare_job(config, lambda _line: None), checkpoint), folder / "from")
    assert_same_bits(adapter(folder / "from"), adapter(folder / "out"))
    base = load_model(job.model_folder, dtype=torch.bfloat16, task="causal_lm")
    linears = [module for module in base.modules() if is_quantized_linear(module)]
    assert len(linears) == 14
    for module in linears[:7]:
        weight_MN = dense_weight(module, torch.bfloat16).float()
        input_TN = torch.randn(4, weight_MN.shape[1]).bfloat16().requires_grad_()
        grad_TM = torch.randn(4, weight_MN.shape[0]).bfloat16()
        module(input_TN).backward(grad_TM)
        assert input_TN.grad is not None
        expected = grad_TM.float() @ weight_MN
        assert (input_TN.grad.float() - expected).norm() < 0.01 * expected.norm()
    trained = PeftModel.from_pretrained(base, str(folder / "out" / ADAPTER_FOLDER))
    assert eval_loss(trained, job) == pytest.approx(summary.eval_loss_after, rel=5e-3)
    (folder / "out" / "config.yaml").write_text(yaml.safe_dump(asdict(job.resolved_config)))
    assert export(folder / "out", folder / "merged", merge=True).relative_error < 0.03
    merged = AutoModelForCausalLM.from_pretrained(folder / "merged")
    assert eval_loss(merged, job) == pytest.approx(summary.eval_loss_after, rel=0.02)
    assert export(folder / "out", folder / "adapter").relative_error == 0
    assert "BitsAndBytes" not in (folder / "adapter" / "README.md").read_text()


@pytest.mark.parametrize("method", ["lsp", "lora"])
def test_torchaos_tensors_are_trained_beside(tmp_path: Path, method: str) -> None:
    torchao = pytest.importorskip("torchao.quantization")
    config = in_torchaos(
        tiny_config(tmp_path, method=method), tmp_path / "quantised", torchao.Int8WeightOnlyConfig(version=2)
    )
    assert_trained_beside(config, tmp_path)


def test_torchaos_products_of_whole_numbers_are_refused(tmp_path: Path) -> None:
    torchao = pytest.importorskip("torchao.quantization")
    kind = torchao.Int8DynamicActivationInt8WeightConfig(version=2)
    config = in_torchaos(tiny_config(tmp_path), tmp_path / "quantised", kind)
    with pytest.raises(ConfigError, match=r"pass gradients on to their input, got 'Int8Tensor'; .*its output has none"):
        load_model(Path(config.model_name_or_path), dtype=torch.bfloat16, task="causal_lm")


def in_torchaos(config: RunConfig, folder: Path, kind: Any) -> RunConfig:
    from transformers import TorchAoConfig

    source = Path(config.model_name_or_path)
    shutil.copytree(source, folder)
    AutoModelForCausalLM.from_pretrained(
        source, dtype=torch.bfloat16, quantization_config=TorchAoConfig(kind), device_map="cpu"
    ).save_pretrained(folder)
    return replace(config, model_name_or_path=str(folder))


@pytest.mark.parametrize("method", ["lsp", "lora"])
@pytest.mark.parametrize("kind", ["gptq", "awq"])
def test_gptqs_and_awqs_folders_are_trained_beside(tmp_path: Path, kind: str, method: str) -> None:
    pytest.importorskip("gptqmodel")
    pytest.importorskip("optimum")
    config = tiny_config(tmp_path, "qwen2", method=method)
    tensors = {}
    for name, tensor in load_file(Path(config.model_name_or_path) / "model.safetensors").items():
        if not name.endswith("proj.weight"):
            tensors[name] = tensor
            continue
        packed_NM = tensor.t().unflatten(0, (-1, GROUP))
        scales = (packed_NM.abs().amax(1) / 7).half()
        codes = (packed_NM / scales[:, None] + 8).round().clamp(0, 15).flatten(0, 1).long()
        zeros = torch.full(scales.shape, 7 if kind == "gptq" else 8)  # GPTQ's are one less
        order = range(8) if kind == "gptq" else AWQ_ORDER
        tensors |= {
            name.replace("weight", "scales"): scales,
            name.replace("weight", "qzeros"): in_words(zeros, order),
            name.replace("weight", "qweight"): in_words(codes.t(), order).t().contiguous()
            if kind == "gptq"
            else in_words(codes, order),
        }
        if kind == "gptq":
            tensors[name.replace("weight", "g_idx")] = torch.arange(len(codes), dtype=torch.int32) // GROUP
    told = {"quant_method": kind, "bits": 4, "group_size": GROUP, "sym": kind == "gptq", "desc_act": False}
    assert_trained_beside(quantised(config, tmp_path / "quantised", told, tensors), tmp_path)


def in_words(codes: torch.Tensor, order: Any) -> torch.Tensor:
    """Eight numbers of 4 bits along the last side in one of 32, the first of `order` lowest."""
    parts = codes.unflatten(-1, (-1, 8))[..., list(order)] << torch.arange(0, 32, 4)
    words = parts.sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32).contiguous()
