"""Learning rates: the whole schedule at once, from transformers' own scheduler, so that every actor agrees on it."""

from __future__ import annotations

import math

import torch

from lsp_ray.config import RunConfig
from lsp_ray.errors import ConfigError

_TAKE_NOTHING = ("constant", "constant_with_warmup")  # transformers drops whatever they are given


def learning_rates(config: RunConfig, num_steps: int) -> tuple[float, ...]:
    """Return the learning rate of every optimizer update: `transformers.get_scheduler`'s, to the bit.

    Raises:
        ConfigError: The schedule needs other arguments, or gives no rates with them.
    """
    if config.lr_scheduler_kwargs and config.lr_scheduler_type in _TAKE_NOTHING:
        bound = f"be left out where lr_scheduler_type is {config.lr_scheduler_type}"
        raise ConfigError("lr_scheduler_kwargs", bound, config.lr_scheduler_kwargs)
    try:
        rates = _rates(config, num_steps)
    except (TypeError, ValueError, ArithmeticError, LookupError) as error:  # of transformers, or of a strange number
        why = " ".join(str(error).split())
        raise _refused(config, why) from error
    bad = next((step for step, rate in enumerate(rates) if not (math.isfinite(rate) and rate >= 0)), None)
    if bad is not None:
        raise _refused(config, f"step {bad + 1} has the learning rate {rates[bad]}")
    return rates


def _rates(config: RunConfig, num_steps: int) -> tuple[float, ...]:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=config.learning_rate)
    from transformers import get_scheduler  # imports PEFT and what that can use, for seconds; actors have no need of it

    scheduler = get_scheduler(
        config.lr_scheduler_type, optimizer, config.warmup_steps, num_steps, config.lr_scheduler_kwargs
    )
    rates = []
    for _ in range(num_steps):
        rates.append(float(scheduler.get_last_lr()[0]))
        optimizer.step()
        scheduler.step()
    return tuple(rates)


def _refused(config: RunConfig, why: str) -> ConfigError:
    bound = f"be what transformers' {config.lr_scheduler_type} takes ({why})"
    return ConfigError("lr_scheduler_kwargs", bound, config.lr_scheduler_kwargs)
