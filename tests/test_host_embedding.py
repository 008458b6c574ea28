"""Embeddings in main memory: looked up, saved and given back as the table on the device is."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lsp_ray.device.host_embedding import HostEmbedding
from lsp_ray.device.host_table import HostTable
from lsp_ray.device.memory import LiveStorage

ROWS, COLUMNS = 40, 6


def table(padding: int | None = None) -> nn.Embedding:
    torch.manual_seed(0)
    module = nn.Embedding(ROWS, COLUMNS, padding_idx=padding)
    module.requires_grad_(requires_grad=False)
    return module


def on_host(module: nn.Embedding) -> tuple[HostEmbedding, HostTable]:
    held = HostTable(module.get_parameter("weight"), torch.device("cpu"))
    return HostEmbedding(module, held), held


class Scaled(nn.Embedding):
    """As Gemma's, whose output is scaled."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return super().forward(ids) * 3.0


@given(ids=st.lists(st.lists(st.integers(0, ROWS - 1), min_size=5, max_size=5), min_size=1, max_size=4))
def test_any_ids_are_looked_up_as_in_the_whole_table(ids: list[list[int]]) -> None:
    ids_BS = torch.tensor(ids)
    for module in (table(), table(padding=ROWS - 1), Scaled(ROWS, COLUMNS)):
        expected = module(ids_BS).detach()
        hosted, held = on_host(module)
        assert torch.equal(module(ids_BS), expected)
        assert torch.equal(module(ids_BS[:, :1]), expected[:, :1])
        hosted.close()
        held.close()
        assert torch.equal(module(ids_BS), expected)


def test_at_rest_it_has_its_shape_and_no_memory_and_is_saved_whole() -> None:
    module = table(padding=3)
    whole = module.weight.data.clone()
    hosted, held = on_host(module)
    module(torch.tensor([1, 2]))
    live = LiveStorage(ignored=[held.table_VH])
    live.watch(module.weight)
    assert live.live_bytes == 4 * COLUMNS
    assert module.weight.shape == (ROWS, COLUMNS)
    assert torch.equal(nn.Sequential(module).state_dict()["0.weight"], whole)
    hosted.close()
    held.close()
    assert module.padding_idx == 3
    assert torch.equal(module.weight, whole)
    assert torch.equal(module.state_dict()["weight"], whole)


def test_an_id_beyond_the_table_is_an_error() -> None:
    module = table()
    on_host(module)
    with pytest.raises(IndexError):
        module(torch.tensor([ROWS]))
