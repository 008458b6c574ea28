"""GaLore's update is the paper's: one-sided projection, moments in the small space, a new basis every gap steps."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from lsp_ray.config import GaloreConfig
from lsp_ray.device.unit import RawTarget, Unit
from lsp_ray.errors import ConfigError
from lsp_ray.methods.galore import GaloreShard, check_rank
from lsp_ray.models.layers import find_layers
from lsp_ray.optim.shard import OptimizerShard
from tests.tiny import tiny_model
from tests.tiny_jobs import run_on_threads, tiny_job

GALORE = GaloreConfig(rank=3, update_proj_gap=2, scale=0.5)
CPU = torch.device("cpu")


def unit_of(*shapes: tuple[int, ...]) -> Unit:
    owner = nn.Module()
    targets = [RawTarget(nn.Parameter(torch.zeros(shape)), owner) for shape in shapes]
    return Unit(index=0, name="unit", targets=targets, readers=[owner], first_key=0)


class Reference:
    """The paper's Algorithm 2 for one matrix, with the whole decomposition and Adam written out."""

    def __init__(self) -> None:
        self.exp_avg = self.exp_avg_sq = torch.zeros(())
        self.num_updates = 0

    def step(self, grad_AB: torch.Tensor, learning_rate: float) -> torch.Tensor:
        if (
            self.num_updates % GALORE.update_proj_gap == 0
        ):  # of the gradient as it lies: singular vectors' signs are free
            self.left_AA, _, self.right_BB = torch.linalg.svd(grad_AB)
        if grad_AB.shape[0] < grad_AB.shape[1]:
            return self._step(self.left_AA[:, : GALORE.rank], grad_AB, learning_rate)
        return self._step(self.right_BB[: GALORE.rank].t(), grad_AB.t(), learning_rate).t()

    def _step(self, basis_AK: torch.Tensor, grad_AB: torch.Tensor, learning_rate: float) -> torch.Tensor:
        """The rows are the side that is projected."""
        self.num_updates += 1
        small_KB = basis_AK.t() @ grad_AB
        self.exp_avg = 0.9 * self.exp_avg + 0.1 * small_KB
        self.exp_avg_sq = 0.999 * self.exp_avg_sq + 0.001 * small_KB**2
        corrected = self.exp_avg / (1 - 0.9**self.num_updates)
        scale = (self.exp_avg_sq / (1 - 0.999**self.num_updates)).sqrt() + 1e-8
        return -learning_rate * GALORE.scale * basis_AK @ (corrected / scale)


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (6, 6)])
def test_five_updates_are_those_of_the_papers_algorithm(shape: tuple[int, int]) -> None:
    shard, reference = GaloreShard([unit_of(shape)], GALORE, CPU), Reference()
    generator = torch.Generator().manual_seed(1)
    delta = torch.empty(math.prod(shape))
    for step in range(5):
        grad_AB = torch.randn(shape, generator=generator)
        shard.update(0, [grad_AB.reshape(-1)], delta, learning_rate=0.01 * (step + 1))
        # both are products in float32, summed in another order
        expected_AB = reference.step(grad_AB, 0.01 * (step + 1))
        torch.testing.assert_close(delta.view(shape), expected_AB, rtol=1e-4, atol=1e-6)


def test_what_is_no_larger_than_the_rank_trains_as_without_projection() -> None:
    unit = unit_of((3, 9), (7,), (8, 5))
    shard = GaloreShard([unit], GALORE, CPU)
    plain = OptimizerShard({0: unit.numel})
    generator = torch.Generator().manual_seed(2)
    delta, plain_delta = torch.empty(unit.numel), torch.empty(unit.numel)
    for _ in range(3):
        grad = torch.randn(unit.numel, generator=generator)
        shard.update(0, [grad], delta, learning_rate=0.1)
        plain.update(0, [grad], plain_delta, learning_rate=0.1)
        assert torch.equal(delta[:34], plain_delta[:34])
        assert not torch.allclose(delta[34:], plain_delta[34:])


def test_the_state_is_as_small_as_the_paper_says() -> None:
    shard = GaloreShard([unit_of((100, 40), (40,))], GALORE, CPU)
    [state] = shard.states.values()
    assert state.exp_avg.nbytes + state.exp_avg_sq.nbytes == 8 * (3 * 100 + 40)


def test_a_gradient_that_is_not_finite_is_neither_decomposed_nor_counted() -> None:
    shard, delta = GaloreShard([unit_of((5, 9))], GALORE, CPU), torch.ones(45)
    shard.update(0, [torch.full((45,), math.nan)], delta, learning_rate=0.1)
    assert not delta.any()
    assert shard.states[0].step == 0


def test_a_rank_that_leaves_nothing_to_project_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"galore\.rank must be at most 63, below the sides of .*, got 64"):
        check_rank(find_layers(tiny_model("llama")), GaloreConfig(rank=64))


def test_a_run_learns(tmp_path: Path) -> None:
    galore = GaloreConfig(rank=4, update_proj_gap=5, scale=1.0)
    job = tiny_job(tmp_path, method="galore", max_steps=16, learning_rate=1e-2, galore=galore)
    summary, _ = run_on_threads(job, tmp_path / "out")
    assert summary.eval_loss_after < 0.9 * summary.eval_loss_before
    assert (summary.policy, summary.num_shards, summary.bytes_d2h_per_step) == (None, 0, 0)
