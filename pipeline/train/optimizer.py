"""AdamW on fp32 weights, its moments in fp32 or in 8 bits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.config import TrainConfig
from pipeline.environment import install_hint
from pipeline.errors import ConfigError, shorten


def master_weights(parameters: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """The weights for the optimizer to update: fp32 copies of half-precision parameters, all others themselves.

    A step of Adam is about the learning rate, and bf16 has no number between a weight and 1.004 times that weight:
    added to it directly, most steps would be rounded away. So an fp32 copy takes the steps, and the parameter is
    rounded from it after each (Micikevicius et al., "Mixed precision training", arXiv 1710.03740). Gradients of such
    a parameter are moved to its copy's `.grad` and accumulated there, in fp32 too.
    """
    return {name: _master(parameter) if _is_half(parameter) else parameter for name, parameter in parameters.items()}


def _is_half(parameter: nn.Parameter) -> bool:
    return parameter.dtype in (torch.bfloat16, torch.float16)


def _master(parameter: nn.Parameter) -> nn.Parameter:
    master = nn.Parameter(parameter.detach().float())

    def hand_over(parameter: Tensor) -> None:
        assert parameter.grad is not None
        if master.grad is None:
            master.grad = torch.zeros_like(master)
        master.grad += parameter.grad
        parameter.grad = None

    hooked: Any = parameter  # torch has no types for its hooks
    hooked.register_post_accumulate_grad_hook(hand_over)
    return master


@torch.no_grad()
def round_from_masters(parameters: Mapping[str, nn.Parameter], masters: Mapping[str, nn.Parameter]) -> None:
    """Give every parameter the value of its master weight, rounded to its own dtype."""
    for name, parameter in parameters.items():
        if masters[name] is not parameter:
            parameter.copy_(masters[name])


def make_optimizer(parameters: Mapping[str, nn.Parameter], train: TrainConfig) -> torch.optim.Optimizer:
    """The recipe's AdamW over `parameters`, in their order.

    With "adamw_8bit" both moments of a tensor of 4,096 elements or more take a byte per element, quantised in blocks
    of 256 (Dettmers et al., "8-bit optimizers via block-wise quantization", arXiv 2110.02861).

    Raises:
        ConfigError: bitsandbytes is not installed.
    """
    weights = list(parameters.values())
    if train.optimizer == "adamw_8bit":
        try:
            from bitsandbytes.optim.adamw import AdamW8bit
        except ImportError as error:
            raise ConfigError(
                'train.optimizer = "adamw_8bit": needs bitsandbytes, which cannot be imported '
                f'({shorten(error, 100)}); {install_hint("quant")}, or set it to "adamw"'
            ) from error
        make: Any = AdamW8bit
        in_bits: torch.optim.Optimizer = make(
            weights, lr=train.learning_rate, betas=train.betas, weight_decay=train.weight_decay
        )
        return in_bits
    on_cuda = weights[0].is_cuda
    return torch.optim.AdamW(
        weights,
        lr=train.learning_rate,
        betas=train.betas,
        weight_decay=train.weight_decay,
        # One tensor at a time on the CPU: the order of additions, and so every bit, is then fixed.
        foreach=None if on_cuda else False,
        fused=on_cuda,
    )


def state_tensors(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """The optimizer's state by "<parameter>/<key>"; empty before its first step."""
    return {
        f"{name}/{key}": torch.as_tensor(value)  # bitsandbytes counts its steps in an int
        for name, parameter in parameters.items()
        for key, value in optimizer.state[parameter].items()
    }


def set_state(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], state: Mapping[str, Tensor]
) -> None:
    """Restore the result of `state_tensors`, bit for bit.

    `load_state_dict` would cast the state of bitsandbytes, and copy all of it once more.
    """
    fused = optimizer.param_groups[0].get("fused")
    for parameter in parameters.values():
        optimizer.state[parameter] = {}
    for name, value in state.items():
        owner, _, key = name.rpartition("/")
        parameter = parameters[owner]
        if value.ndim == 0 and not value.is_floating_point():
            optimizer.state[parameter][key] = int(value)
        else:
            device = parameter.device if value.ndim or fused else torch.device("cpu")
            optimizer.state[parameter][key] = value.to(device)
