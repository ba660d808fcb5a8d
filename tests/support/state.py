"""What no run may change of a model: compared before and after."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as torch_module

HOOKS = [name for name in vars(nn.Linear(1, 1)) if "hooks" in name]


def state(model: nn.Module) -> dict[str, Any]:
    """Everything a run of ours touches, in a form that compares with ``==``."""
    return {
        "hooks": [
            [(name, list(getattr(module, name).items())) for name in HOOKS]
            for module in model.modules()
        ],
        "global hooks": [
            list(value) for name, value in vars(torch_module).items() if name.endswith("_hooks")
        ],
        "attributes": [sorted(vars(module)) for module in model.modules()],
        "config": model.config.to_dict(),  # type: ignore[union-attr, operator]
        "attention": [
            module.config._attn_implementation
            for module in model.modules()
            if hasattr(module, "config")
        ],
        "training": [module.training for module in model.modules()],
        "random": torch.get_rng_state().tolist(),
        "gradients": torch.is_grad_enabled(),
        "weights": [parameter.detach().tolist() for parameter in model.parameters()],
        "requires_grad": [parameter.requires_grad for parameter in model.parameters()],
    }
