"""One student on several ranks: its weights, whole or sharded, and their gradients.

    ddp     each rank holds the whole student
    fsdp    its weights are sharded over the ranks and gathered layer by layer when needed (FSDP2, `fully_shard`)

Each rank computes the gradient of its part of the global batch's mean loss. The token count that the mean divides by
is known beforehand, so gradients are summed, never averaged, and the sum does not depend on the number of ranks.

Gradients of weights that are held whole (all of them under ddp; a LoRA, in fp32, under either) are views of one flat
tensor, which one `all_reduce` a step sums over the ranks. DistributedDataParallel would reduce buckets in an order
found at run time, average, and expect loss and decoder within one forward call; the overlap with backward that it
offers gains nothing for an adapter (87 M parameters in fp32 take a few milliseconds between GPUs). Gradients of
sharded weights are reduce-scattered by FSDP.

FSDP requires one dtype per group and gathers weights only during a module's forward. Hence the LoRA is left out of
its groups, and all that a step computes with the student, head included, runs inside the forward of one root module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from pipeline.config import ModelConfig, TrainConfig
from pipeline.distributed.ranks import Ranks, process_group
from pipeline.errors import ConfigError, ModelError
from pipeline.forward.head import unwrapped
from pipeline.models.load import pick_device

_T = TypeVar("_T")


@dataclass(frozen=True)
class WeightSharding:
    """How the ranks of a job hold the student's weights.

    Attributes:
        mesh: the ranks that the weights are sharded over; None if each rank holds them whole.
    """

    ranks: Ranks = Ranks()  # noqa: RUF009  frozen
    mesh: DeviceMesh | None = None

    def load_config(self, student: ModelConfig) -> ModelConfig:
        """The student's config for loading: in host memory if the weights will be sharded."""
        return student if self.mesh is None else student.model_copy(update={"device": "cpu"})

    def parallelize(self, model: nn.Module) -> Callable[[Callable[[], _T]], _T]:
        """Shard a student that every rank has loaded, if there is a mesh; its shards move to this rank's device.

        Returns a function that calls its argument and returns the result; use the student only inside such a call.

        Raises:
            ModelError: the ranks loaded different weights.
        """
        self._require_equal(model)
        if self.mesh is None:
            return lambda work: work()
        whole = {p for p in model.parameters() if p.requires_grad} if isinstance(model, PeftModel) else set()
        for parameter in whole:
            parameter.data = parameter.data.to(self.mesh.device_type)
        root = _Root(model)
        for module in [*_decoder_layers(model), root]:
            sharded = fully_shard(
                module,
                mesh=self.mesh,
                ignored_params=whole,
                mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float32),
            )
            sharded.set_gradient_divide_factor(1.0)
            sharded.set_force_sum_reduction_for_comms(True)
        if not whole:
            _reduce_unused(sharded, model)
        return root

    def full_tensor(self, value: Tensor) -> Tensor:
        """A tensor gathered from the shards of all ranks; one that is not sharded is returned unchanged."""
        return value.full_tensor() if isinstance(value, DTensor) else value

    def copy_to_main_process(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Full copies in the main process's host memory, made one at a time; on other ranks, meta tensors."""
        device = "cpu" if self.ranks.is_main_process else "meta"
        return {name: self.full_tensor(value.detach()).to(device, copy=True) for name, value in values.items()}

    def distribute(self, value: Tensor, owner: Tensor) -> Tensor:
        """This rank's shard of a full tensor that the main process holds: a weight, or its optimizer state.

        Args:
            value: on the main process; on other ranks a meta tensor like it.
            owner: the weight.
        """
        if self.ranks.size == 1:
            return value
        device = owner.device if value.ndim else torch.device("cpu")  # optimizers keep step counts there
        whole = torch.empty_like(value, device=device) if value.is_meta else value.to(device)
        dist.broadcast(whole, 0)
        if isinstance(owner, DTensor) and value.shape == owner.shape:
            return distribute_tensor(whole, owner.device_mesh, owner.placements, src_data_rank=None)
        return whole

    def _require_equal(self, model: nn.Module) -> None:
        if self.ranks.size == 1:
            return
        names, prints = zip(*((n, torch.hash_tensor(p.detach())) for n, p in model.named_parameters()), strict=True)
        first, *others = self.ranks.gather(torch.stack([p.cpu() for p in prints]).view(torch.int64))
        for rank, theirs in enumerate(others, 1):
            if len(differing := (theirs != first).nonzero()):
                raise ModelError(
                    f"student: rank {rank} and rank 0 loaded different weights "
                    f"({len(differing)} of {len(names)} tensors, the first is {names[int(differing[0])]}); "
                    "copy the same files to every machine"
                )


class Gradients:
    """The `.grad` of weights: views of one flat tensor for whole weights, shards for sharded weights."""

    def __init__(self, weights: Mapping[str, nn.Parameter], ranks: Ranks):
        self._ranks = ranks
        self._sharded = [weight for weight in weights.values() if isinstance(weight, DTensor)]
        self._flat: list[Tensor] = []
        self._views: list[tuple[nn.Parameter, Tensor]] = []
        whole = [weight for weight in weights.values() if not isinstance(weight, DTensor)]
        for kind in dict.fromkeys((weight.dtype, weight.device) for weight in whole):
            alike = [weight for weight in whole if (weight.dtype, weight.device) == kind]
            sizes = [weight.numel() for weight in alike]
            flat = torch.zeros(sum(sizes), dtype=kind[0], device=kind[1])
            views = zip(alike, torch.split(flat, sizes), strict=True)
            self._views += [(weight, view.view_as(weight)) for weight, view in views]
            self._flat.append(flat)
        self.clear()

    def clear(self) -> None:
        """Set all to 0."""
        for flat in self._flat:
            flat.zero_()
        for weight, view in self._views:
            weight.grad = view  # a caller's zero_grad() may have taken it away
        for weight in self._sharded:
            weight.grad = torch.zeros_like(weight)

    def all_reduce(self) -> None:
        """Sum over the ranks; FSDP has summed those of sharded weights during backward."""
        for flat in self._flat:
            self._ranks.all_reduce(flat)


class _Root(nn.Module):
    """FSDP's root: weights outside the decoder layers (embeddings, final norm, head) are gathered during its call."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, work: Callable[[], _T]) -> _T:
        return work()


def _reduce_unused(root: FSDPModule, model: nn.Module) -> None:
    """Make ranks reduce gradients of experts that no token of theirs was routed to; other ranks may have some."""
    if hasattr(root, "set_reduce_scatter_unused_params"):
        root.set_reduce_scatter_unused_params(True)
        return
    config = unwrapped(model).config.get_text_config()
    if any(getattr(config, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts")):
        raise ConfigError(
            'train.parallel = "fsdp" with train.method = "full": mixtures of experts need torch 2.13, found '
            f'{torch.__version__}; set train.method = "lora", or train.parallel = "ddp"'
        )


def _decoder_layers(model: nn.Module) -> list[nn.Module]:
    layers: Any = unwrapped(model).get_decoder().layers
    return list(layers)


@contextmanager
def weight_sharding(ranks: Ranks, student: ModelConfig, train: TrainConfig) -> Iterator[WeightSharding]:
    """The student's weights on these ranks, in a process group while the body runs (see `process_group`)."""
    device = pick_device(student)
    with process_group(ranks, device) as grouped:
        sharded = train.parallel == "fsdp" and grouped.has_process_group
        yield WeightSharding(grouped, init_device_mesh(device.type, (ranks.size,)) if sharded else None)
