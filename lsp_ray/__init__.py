"""Fine-tune large language models on the GPU you own: learned sparse projectors on a Ray actor runtime.

The names below are imported when they are first used: `import lsp_ray` alone imports neither torch nor ray.
"""

import logging
from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

# where they are installed, transformers imports them: they then warn of kernels for servers, or for other machines, of
# types inside of LLM.int8, and of what torch would have them write otherwise
for _name in ("bitsandbytes", "torchao", "torch.utils._pytree"):
    logging.getLogger(_name).setLevel(logging.ERROR)

if TYPE_CHECKING:
    from lsp_ray.config import LspConfig as LspConfig
    from lsp_ray.config import RunConfig as RunConfig
    from lsp_ray.config import RuntimeConfig as RuntimeConfig
    from lsp_ray.launch import RunResult as RunResult
    from lsp_ray.methods.lsp_adamw import LSPAdamW as LSPAdamW
    from lsp_ray.trainer import LSPTrainer as LSPTrainer
    from lsp_ray.trainer import finetune as finetune

_HOMES = {
    "LSPAdamW": "lsp_ray.methods.lsp_adamw",
    "LSPTrainer": "lsp_ray.trainer",
    "LspConfig": "lsp_ray.config",
    "RunConfig": "lsp_ray.config",
    "RunResult": "lsp_ray.launch",
    "RuntimeConfig": "lsp_ray.config",
    "finetune": "lsp_ray.trainer",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
