"""`lsp-ray export`: a run's model in another dtype, or its adapter, with a model card, checked against the original."""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lsp_ray.arguments import Parser
from lsp_ray.errors import ConfigError, LspRayError
from lsp_ray.output_folder import BASE_MODEL, INTERNALS
from lsp_ray.process import prepare_process

if TYPE_CHECKING:  # --help is answered before torch is imported
    import torch
    from transformers import PreTrainedModel

    from lsp_ray.report.run_folder import RunFolder

DTYPES = ("float32", "bfloat16", "float16")
ADAPTER = "adapter"
PROBE_TOKENS = 32
MAX_ERROR_IN_EPS = 10.0  # of ‖logits‖: every layer rounds anew, and errors of a layer add up like a random walk's

_PIPELINES = {False: "text-generation", True: "text-classification"}
_FACTS = {
    "method": "Method",
    "dataset": "Data",
    "max_steps": "Steps",
    "learning_rate": "Learning rate",
    "per_device_train_batch_size": "Examples in a micro-batch",
    "gradient_accumulation_steps": "Micro-batches in an update",
    "max_seq_length": "Tokens of an example, at most",
    "lsp.subspace_dim": "Subspace d",
    "lsp.nnz_per_row": "Non-zeros r in a row",
    "seed": "Seed",
}
_QUANTISERS = {
    "load_in_4bit": 'load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True',
    "load_in_8bit": "load_in_8bit=True",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """What `export` made.

    Attributes:
        folder: Where the model is.
        dtype: Of its weights: float32, bfloat16 or float16; of an adapter, "adapter".
        relative_error: ‖difference‖ / ‖logits‖ to the trained model's, both in float32.
        kept: The share of the update's norm that an adapter keeps.
    """

    folder: Path
    dtype: str
    relative_error: float
    kept: float = 1.0


def main(argv: Sequence[str] | None = None, *, prog: str = "python -m lsp_ray.export") -> int:
    """Run the command line; returns the exit code: 0, 2 for what a person can mend, 1 for a failed check."""
    prepare_process()
    try:
        options = _parser(prog).parse_args(argv)
        exported = export(
            options.run_dir, options.output_dir, options.dtype, merge=options.merge, rank=options.export_rank
        )
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except LspRayError as error:
        print(f"failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    how = "equal the trained model's" if exported.relative_error == 0 else f"differ by {exported.relative_error:.2g}"
    kept = f" with {exported.kept:.2%} of the update's norm" if exported.kept < 1 else ""
    print(f"exported: {exported.folder}, {exported.dtype}{kept}; logits {how}")
    return 0


def _parser(prog: str = "python -m lsp_ray.export") -> Parser:
    parser = Parser(
        prog=prog,
        description="Write a trained model in another dtype, with a model card, and check that its logits stay.",
        allow_abbrev=False,
    )
    parser.add_argument("run_dir", type=Path, help="Output folder of a finished run.")
    parser.add_argument("output_dir", type=Path, help="New or empty folder.")
    parser.add_argument("--dtype", choices=DTYPES, help="Of the weights; default: the run's.")
    parser.add_argument(
        "--merge", action="store_true", help="Of a run on a quantised base: a whole model, no longer quantised."
    )
    parser.add_argument(
        "--export_rank", type=int, metavar="K", help="Of a run's adapter: the K leading directions of each linear."
    )
    return parser


def export(
    run_dir: Path, output_dir: Path, dtype: str | None = None, *, merge: bool = False, rank: int | None = None
) -> Exported:
    """Write the model of `run_dir` into `output_dir`, load it from there and compare its logits.

    A run on a quantised base has an adapter: this is what is written then, unless it is to be merged.

    Args:
        run_dir: Output folder of a finished run.
        output_dir: New or empty.
        dtype: float32, bfloat16 or float16; default: the run's.
        merge: Write a whole model of a run on a quantised base.
        rank: Write the run's adapter, with at most so many directions a linear.

    Raises:
        ConfigError: `run_dir` holds no finished run, or not what is asked for, or `output_dir` has content.
        LspRayError: The logits are not the trained model's to the dtype's accuracy: exactly for the run's own.
    """
    import torch

    from lsp_ray.methods.lora import merged_state
    from lsp_ray.models.load import load_tokenizer
    from lsp_ray.models.save import save_model
    from lsp_ray.models.trained import is_beside_base, load_trained, plain_model
    from lsp_ray.report.run_folder import read_run

    is_apart = is_beside_base(run_dir)
    _check_folder(output_dir)
    run = read_run(run_dir)
    _check_asked(run_dir, dtype, merge=merge, rank=rank, is_apart=is_apart)
    if rank is not None or (is_apart and not merge):
        return _export_adapter(run_dir, output_dir, run, rank)
    trained = load_trained(run_dir)
    own = str(trained.dtype).removeprefix("torch.")
    dtype = dtype or own
    expected = _logits(trained)
    card = model_card(run, dtype, base=base_model(run_dir, run.config), is_classifier=not trained.can_generate())
    if is_apart:
        trained = plain_model(trained, merged_state(trained))
    try:
        save_model(trained.to(getattr(torch, dtype)), load_tokenizer(run_dir), output_dir, source=run_dir)
        (output_dir / "README.md").write_text(card, encoding="utf-8")
    except OSError as error:
        raise ConfigError("output_dir", f"be writable ({error.strerror})", str(output_dir)) from error
    relative_error = float((_logits(load_trained(output_dir)) - expected).norm() / expected.norm())
    # merged, what was computed in two parts is rounded in other places
    eps = max(torch.finfo(getattr(torch, name)).eps for name in ({dtype, own} if is_apart else {dtype}))
    bound = 0.0 if dtype == own and not is_apart else MAX_ERROR_IN_EPS * eps
    if not relative_error <= bound:  # also what is not a number
        shutil.rmtree(output_dir)
        raise LspRayError(
            f"logits in {dtype} differ by {relative_error:.2g} of the trained model's (at most {bound:.2g})"
        )
    return Exported(folder=output_dir, dtype=dtype, relative_error=relative_error)


def _check_folder(output_dir: Path) -> None:
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise ConfigError("output_dir", "be a new or empty folder", str(output_dir))


def _check_asked(run_dir: Path, dtype: str | None, *, merge: bool, rank: int | None, is_apart: bool) -> None:
    has_adapter = (run_dir / ADAPTER / "adapter_config.json").is_file()
    if rank is not None and rank < 1:
        raise ConfigError("export_rank", "be at least 1", rank)
    if rank is not None and not has_adapter:
        raise ConfigError("export_rank", f"be left out: the run has no {ADAPTER} folder", rank)
    if rank is not None and merge:
        raise ConfigError("export_rank", "be left out beside merge, which keeps all directions", rank)
    if merge and not is_apart:
        raise ConfigError("merge", "be left out: the run's model is a whole one already", merge)
    if dtype is not None and (rank is not None or (is_apart and not merge)):
        raise ConfigError("dtype", "be left out for an adapter; with --merge a whole model is written", dtype)


def _export_adapter(run_dir: Path, output_dir: Path, run: RunFolder, rank: int | None) -> Exported:
    """Write it as PEFT's own folder and compare the logits of the base with it."""
    from lsp_ray.methods.adapter_rank import export_adapter
    from lsp_ray.models.load import load_tokenizer
    from lsp_ray.models.trained import load_trained, with_adapter

    expected = _logits(load_trained(run_dir))
    card = model_card(run, "as the base's", base=base_model(run_dir, run.config), is_adapter=True)
    try:
        kept = export_adapter(run_dir / ADAPTER, output_dir, rank, base=base_model(run_dir, run.config))
        load_tokenizer(run_dir).save_pretrained(output_dir)
        (output_dir / "README.md").write_text(card, encoding="utf-8")
    except OSError as error:
        raise ConfigError("output_dir", f"be writable ({error.strerror})", str(output_dir)) from error
    relative_error = float((_logits(with_adapter(run_dir, output_dir)) - expected).norm() / expected.norm())
    if not math.isfinite(relative_error):
        shutil.rmtree(output_dir)
        raise LspRayError("the adapter's logits are not finite")
    return Exported(folder=output_dir, dtype="adapter", relative_error=relative_error, kept=kept)


def model_card(
    run: RunFolder, dtype: str, *, base: str | None, is_classifier: bool = False, is_adapter: bool = False
) -> str:
    """The run's facts, and how to load the model, as a README.md for a model hub; no path of this machine is in it.

    Args:
        run: The run.
        dtype: Of the weights.
        base: What the run began with, by a name that others know.
        is_classifier: What to load it as.
        is_adapter: Whether it is no whole model.
    """
    config = dict(run.config)
    if "dataset" in config and _is_path(config["dataset"]):
        config["dataset"] = Path(config["dataset"]).name
    facts = [(label, config[name]) for name, label in _FACTS.items() if name in config]
    library = "peft" if is_adapter else "transformers"
    header = ["---", f"library_name: {library}", f"pipeline_tag: {_PIPELINES[is_classifier]}", "tags:", "- lsp_ray"]
    if base is not None:
        facts.insert(0, ("Base model", base))
        header.append(f"base_model: {json.dumps(base)}")
    lines = [*header, "---", "", f"# {run.name}", "", "Fine-tuned with lsp_ray (learned sparse projectors).", ""]
    lines += [
        "## Use",
        "",
        "```python",
        *(_adapter_usage(base, run.config) if is_adapter else _usage(is_classifier)),
        "```",
        "",
        "## Training",
        "",
    ]
    lines += ["| | |", "|---|---|", *(f"| {label} | {_cell(value)} |" for label, value in facts)]
    lines += [f"| Weights | {dtype} |", *_results(run.summary), ""]
    return "\n".join(lines)


def _is_path(value: str) -> bool:
    """Whether a value says where something is on this machine, and so means nothing to others."""
    return Path(value).is_absolute() or value.startswith(("~", "./", "../")) or Path(value).exists()


def base_model(run_dir: Path, config: Mapping[str, str]) -> str | None:
    """What the run began with, by a name that others know: of an alias the hub's; None for a folder or file."""
    from lsp_ray.models.aliases import ALIASES

    noted = run_dir / INTERNALS / BASE_MODEL  # of a model that was in memory
    name = noted.read_text(encoding="utf-8").strip() if noted.is_file() else config.get("model_name_or_path", "")
    if name in ALIASES:
        return ALIASES[name].hub_id
    return None if not name or _is_path(name) or name.endswith(".gguf") else name


def _usage(is_classifier: bool) -> list[str]:
    kind = "AutoModelForSequenceClassification" if is_classifier else "AutoModelForCausalLM"
    return [
        f"from transformers import {kind}, AutoTokenizer",
        "",
        'folder = "."  # or where this model is',
        "tokenizer = AutoTokenizer.from_pretrained(folder)",
        f'model = {kind}.from_pretrained(folder, dtype="auto")',
        'inputs = tokenizer("Write your text here", return_tensors="pt")',
        "print(model(**inputs).logits.argmax(-1))"
        if is_classifier
        else "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=64)[0], skip_special_tokens=True))",
    ]


def _adapter_usage(base: str | None, config: Mapping[str, str]) -> list[str]:
    quantiser = next((text for name, text in _QUANTISERS.items() if config.get(name, "").lower() == "true"), None)
    asked = "" if quantiser is None else f"quantization_config=BitsAndBytesConfig({quantiser}), "
    is_bound = config.get("method") == "lsp" and config.get("load_in_4bit", "").lower() == "true"
    return [
        "from peft import PeftModel",
        f"from transformers import AutoModelForCausalLM{', BitsAndBytesConfig' if asked else ''}",
        "",
        f'base = "{base or "the model that it was trained from"}"',
        *(["# to be loaded in 4 bits: the adapter gives back some of that rounding as well"] if is_bound else []),
        f'model = AutoModelForCausalLM.from_pretrained(base, {asked}dtype="auto")',
        'model = PeftModel.from_pretrained(model, ".")  # or where this adapter is',
    ]


def _results(summary: dict[str, Any]) -> list[str]:
    names = {"eval_loss_before": "Held-out loss before", "eval_loss_after": "Held-out loss after"}
    return [f"| {label} | {summary[name]:.4f} |" for name, label in names.items() if name in summary]


def _cell(value: str) -> str:
    return " ".join(value.split()).replace("|", "\\|")


def _logits(model: PreTrainedModel) -> torch.Tensor:
    """Float32, of random tokens that are the same for every model of a vocabulary."""
    import torch

    generator = torch.Generator().manual_seed(0)
    tokens_1S = torch.randint(model.config.get_text_config().vocab_size, (1, PROBE_TOKENS), generator=generator)
    model.eval()
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=tokens_1S).logits.float()
    return logits


if __name__ == "__main__":
    sys.exit(main())
