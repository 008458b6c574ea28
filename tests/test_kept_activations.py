"""scripts/kept_activations.py: what LSP's linears keep for the backward is one X Q for every input."""

from __future__ import annotations

import torch

from lsp_ray.config import LspConfig
from lsp_ray.methods.lsp import lsp_units
from lsp_ray.models.layers import find_layers
from lsp_ray.models.shared_inputs import shared_inputs
from scripts.kept_activations import PARTS, kept_bytes
from tests.tiny import tiny_model

SHAPE = 2, 12


def test_linears_keep_one_projected_input_each_group_and_other_parts_what_they_kept() -> None:
    ids_BS = torch.randint(64, SHAPE, generator=torch.Generator().manual_seed(0))
    native, model = tiny_model("llama"), tiny_model("llama")
    find_layers(native)
    shared, layers = shared_inputs(model), find_layers(model)
    _, linears = lsp_units(layers, LspConfig(subspace_dim=16, nnz_per_row=2), seed=0, shared=shared)
    plain, projected = kept_bytes(native, ids_BS), kept_bytes(model, ids_BS)
    inputs = {id(module.projector.right): module.projector.dims[1] for _, module in linears}
    assert projected["linears"] == 4 * ids_BS.numel() * sum(inputs.values())
    assert plain["linears"] > projected["linears"]
    assert {part: plain[part] for part in PARTS[1:]} == {part: projected[part] for part in PARTS[1:]}
