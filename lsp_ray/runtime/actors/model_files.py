"""ModelFiles: which files a run's model is read from and written to, which depends on what stays beside its base."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lsp_ray.device.delta_linear import DeltaLinear
from lsp_ray.device.projected_linear import InSubspace
from lsp_ray.device.shared_weights import SharedWeights
from lsp_ray.device.trained_file import save_trained
from lsp_ray.device.unit import Unit
from lsp_ray.methods import lora, lsp
from lsp_ray.methods.lsp_adapter import save_adapter
from lsp_ray.models.digest import weights_digest
from lsp_ray.models.load import load_model
from lsp_ray.models.save import save_description, save_model
from lsp_ray.output_folder import INTERNALS
from lsp_ray.projection.projector_file import FILE_NAME, save_projectors
from lsp_ray.runtime.actors.decided import Decided
from lsp_ray.runtime.prepare.beginning import UPDATES
from lsp_ray.runtime.prepare.job import Job

if TYPE_CHECKING:
    from peft import PeftModel


class ModelFiles:
    """See the module's text.

    Args:
        job: The run.
        device: Of a quantised model; another one is loaded to the CPU.
    """

    def __init__(self, job: Job, device: torch.device) -> None:
        self._job, self._device = job, device

    def load(self, folder: Path) -> PreTrainedModel:
        """The model of a folder, as this run trains it."""
        job = self._job
        return load_model(
            folder,
            dtype=job.dtype,
            task=job.task,
            label_names=job.label_names,
            seed=job.config.seed,
            new_head=folder == job.model_folder,
            bits=job.config.bits,
            device=self._device,
        )

    def load_base(self, decided: Decided | None, shared: SharedWeights | None) -> PreTrainedModel:
        """The model that a run begins with, or goes on with.

        Where others of this machine have it, that one; else the folder's. What another GPU has trained replaces a
        checkpoint, which may be gone by then.
        """
        if shared is not None and shared.is_filled:
            return shared.model()
        saved, is_given = self._job.saved, decided is not None and decided.weights is not None
        if saved is None or self._job.config.keeps_base or is_given:
            return self.load(self._job.model_folder)
        return self.load(saved.folder)

    def save(
        self,
        folder: Path,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        adapters: PeftModel | None,
        linears: Sequence[tuple[str, nn.Module]],
        *,
        is_checkpoint: bool = False,
    ) -> None:
        """Write a whole model where that can be, with what stands beside its base merged; adapters as they are too.

        No whole model is made of a quantised base, nor in checkpoints where updates are kept apart.
        """
        source, state = self._job.model_folder, None
        if self._job.quantized or (is_checkpoint and self._job.sums is not None):
            save_description(model, tokenizer, folder, source=source)
        else:
            if adapters is not None:
                state = lora.merged_state(model)
            elif apart(linears):
                state = lsp.merged_state(model)
            save_model(model, tokenizer, folder, state=state, source=source)
        if adapters is not None:
            lora.save_adapter(adapters, folder)

    def save_delta(
        self, folder: Path, model: nn.Module, units: Sequence[Unit], linears: Sequence[tuple[str, nn.Module]]
    ) -> None:
        """Write updates that are kept apart as an adapter, if they are all that was added to the base."""
        found = apart(linears)
        if found and not any(linear.is_merged for _, linear in found):
            save_adapter(model, units, folder, base=self._job.config.model_name_or_path, task=self._job.task)

    def save_beginning(self, folder: Path, units: Sequence[Unit], linears: Sequence[tuple[str, InSubspace]]) -> None:
        """Write what another run can begin with, if there is anything: projectors, and updates that are kept apart."""
        save_linears(folder / INTERNALS, linears)
        if apart(linears):
            path = folder / INTERNALS / UPDATES
            save_trained(units, path, digest=weights_digest(self._job.model_folder))
            path.chmod((folder / INTERNALS / FILE_NAME).stat().st_mode)  # safetensors makes it private (0600)


def save_linears(folder: Path, linears: Sequence[tuple[str, InSubspace]]) -> None:
    """Write the projectors, if there are any."""
    if linears:
        folder.mkdir(exist_ok=True)
        save_projectors(folder / FILE_NAME, {name: module.projector for name, module in linears})


def apart(linears: Sequence[tuple[str, nn.Module]]) -> list[tuple[str, DeltaLinear]]:
    """Those whose updates are kept apart."""
    return [(name, linear) for name, linear in linears if isinstance(linear, DeltaLinear)]
