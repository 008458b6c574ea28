#!/usr/bin/env python3
"""Writes docs/api.md from signatures and docstrings, and docs/options.md from the fields of a run's configuration.

python scripts/api_reference.py
"""

from __future__ import annotations

import dataclasses
import inspect
import sys
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from pydoc import locate
from typing import Any

from docstring_parser import Docstring, parse_from_object

from lsp_ray.config import RunConfig
from scripts.wrapped import wrapped

PAGE = Path(__file__).resolve().parent.parent / "docs" / "api.md"
OPTIONS_PAGE = PAGE.with_name("options.md")
SECTIONS = {
    "Training": "finetune LSPTrainer LSPAdamW RunResult runtime.fine_tune.Summary trace.StepMetrics",
    "Configuration": "RunConfig LspConfig config.LoraConfig config.GaloreConfig RuntimeConfig",
    "After training": "export.export export.Exported generate.Speaker generate.Sampling "
    "report.run_folder.read_run report.page.report",
    "Planning": "plan.skeleton.shape_of sim.hardware_profile.load_hardware sim.workload.Workload plan.plan.make_plan "
    "plan.plan.Plan sim.forecast.forecast sim.forecast.Forecast sim.memory.DeviceMemory sim.memory.HostMemory",
    "Projectors": "projection.sparse_projector.SparseProjector projection.sparse_projector.ProjectorSizes "
    "projection.sparse_projector.UpdateSize projection.block_factor.BlockFactor projection.bias.relative_bias",
    "Errors": "errors.LspRayError errors.ConfigError errors.CheckpointError errors.StoppedError "
    "errors.DeadlineError errors.WorkerLostError errors.GpuLostError errors.RayLostError errors.DivergedError "
    "errors.StaleSlotError errors.ForeignSlotError errors.NonFiniteLossError errors.NonFiniteGradientError "
    "errors.OutOfDeviceMemoryError errors.TrackerError",
}
BAR = "\\|"
HEAD = """# API reference

Written by `scripts/api_reference.py` from signatures and docstrings. Names directly in `lsp_ray` are meant to
stay; others may move.

M are a weight's rows (out), N its columns (in), D the subspace, R non-zeros in a projector's row, T tokens; a
name that ends in such letters is a tensor of that shape. Times are in seconds, sizes in bytes, unless a name
says otherwise.
"""


OPTIONS_HEAD = """# Options of a run

Written by `scripts/api_reference.py` from the texts that `lsp-ray train --help_all` shows. `--config
run.yaml` reads any of these from a file; options after it win. A value that cannot work ends the run before
it starts, with one line that names the option and what would be accepted. An option of another method than
the one that runs has no effect.

| option | default | meaning |
|---|---|---|
"""
OPTIONS_TAIL = """
Policies, for a layer's gradient on its way down, through its update and up again:

| policy | order |
|---|---|
| `sequential` | Zero-Offload's: all gradients down, then all updates, then all deltas up |
| `delayed` | the same, beside the next step: each update is added one step late, so losses differ from the others' |
| `layerwise_fcfs` | each layer as soon as its gradient is there, first come, first served |
| `layerwise` | first come, first served while the deep layers go by, then the shallowest first |
| `earliest_deadline` | each layer as soon as its gradient is there, the shallowest first |
"""


def main() -> int:
    """Write both pages; returns the exit code."""
    PAGE.write_text(page(), encoding="utf-8")
    OPTIONS_PAGE.write_text(options_page(), encoding="utf-8")
    return 0


def options_page() -> str:
    """Return the page of options."""
    return OPTIONS_HEAD + "".join(_option_rows(RunConfig)) + OPTIONS_TAIL


def _option_rows(config: type, prefix: str = "") -> Iterator[str]:
    said = {param.arg_name: _line(param.description) for param in parse_from_object(config).params}
    for field in dataclasses.fields(config):
        if isinstance(field.default_factory, type):
            yield from _option_rows(field.default_factory, f"{prefix}{field.name}.")
            continue
        default = str(field.default).lower() if isinstance(field.default, bool) else field.default
        shown = "" if default is None else f"`{default}`"
        yield f"| `--{prefix}{field.name}` | {shown} | {said[field.name].replace('|', BAR)} |\n"


def page() -> str:
    """Return the page."""
    parts = [HEAD]
    for title, names in SECTIONS.items():
        parts.append(f"## {title}\n")
        for name in names.split():
            parts += _entry(f"lsp_ray.{name}", locate(f"lsp_ray.{name}"))
    return wrapped("\n".join(parts))


def _entry(name: str, found: Any) -> Iterator[str]:
    yield f"### `{name}`\n"
    is_record, is_error = dataclasses.is_dataclass(found), name.endswith("Error")
    if not is_record and not is_error:
        yield _signature(name.rsplit(".", maxsplit=1)[-1], found)
    yield from _text(parse_from_object(found), dataclasses.fields(found) if is_record else ())
    for member, value in vars(found).items() if isinstance(found, type) and not is_error else ():
        if member.startswith("_"):
            continue
        if isinstance(value, property):
            yield f"Property `{member}`: {_line(value.__doc__)}\n"
        elif inspect.isroutine(getattr(found, member)):
            yield _signature(f"{found.__name__}.{member}", getattr(found, member))
            yield from _text(parse_from_object(getattr(found, member)), ())


def _text(doc: Docstring, fields: Sequence[dataclasses.Field[Any]]) -> Iterator[str]:
    """The description, then what there is of fields or arguments, result and errors."""
    yield "\n\n".join(text for text in (doc.short_description, doc.long_description) if text) + "\n"
    said = {param.arg_name: _line(param.description) for param in doc.params}
    if fields:
        yield "| field | type | default | |\n|---|---|---|---|"
        yield "\n".join(_row(field, said.get(field.name, "")) for field in fields) + "\n"
    items = [f"`{name}`: {text}" for name, text in said.items() if not fields]
    items += [f"returns: {_line(doc.returns.description)}"] if doc.returns else []
    items += [f"raises `{error.type_name}`: {_line(error.description)}" for error in doc.raises]
    if items:
        yield "".join(f"- {item}\n" for item in items)


def _row(field: dataclasses.Field[Any], text: str) -> str:
    default = "" if field.default is dataclasses.MISSING else f"`{field.default!r}`"
    cells = (f"`{field.name}`", f"`{field.type}`", default, text)
    return f"| {' | '.join(cell.replace('|', BAR) for cell in cells)} |"


def _signature(name: str, function: Any) -> str:
    """As it was written, without `self`, in lines that fit a page."""
    found = inspect.signature(function)
    kept = [parameter for parameter in found.parameters.values() if parameter.name != "self"]
    result = "" if isinstance(function, type) else f" -> {found.return_annotation}"
    written = [parameter.replace(annotation=_Written(parameter.annotation)) for parameter in kept]
    shown = f"{name}{found.replace(parameters=written, return_annotation=inspect.Signature.empty)}{result}"
    wrapped = textwrap.fill(shown, 118, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False)
    return f"```python\n{wrapped}\n```\n"


class _Written(str):
    """An annotation that is shown as it was written."""

    __slots__ = ()
    __repr__ = str.__str__


def _line(text: str | None) -> str:
    return " ".join((text or "").split())


if __name__ == "__main__":
    sys.exit(main())
