"""One student on several processes: what each of them holds, and what they tell one another.

    ddp     a whole student on every rank
    fsdp    its weights in shards over all ranks, gathered layer by layer as they are needed (FSDP2, `fully_shard`)

Every rank takes the gradient of its share of the global batch's mean loss. The token count that it is divided by is
known beforehand, so shares are summed, never averaged, and the sum does not depend on how many ranks there are.

Weights that are held whole (all of them under ddp; a LoRA, in fp32, under either) have their gradients in one flat
tensor, which is summed over the ranks once a step by one `all_reduce`: DistributedDataParallel would reduce in
buckets whose order it finds out while it runs, average, and expect loss and decoder within a single forward call; the
overlap with the last backward that it offers is worth nothing for an adapter (87 M parameters in fp32 are a few
milliseconds between GPUs). Weights in shards have theirs reduce-scattered by FSDP, which keeps them in shards.

FSDP wants one dtype a group and lends out whole weights only during a module's forward. Hence the LoRA is left out of
its groups, and all that a step reads of the student, head included, is run inside the forward of one root module.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from pipeline.config import ModelConfig, TrainConfig
from pipeline.distributed.ranks import Ranks
from pipeline.distributed.signals import defer_to_main_process
from pipeline.errors import ConfigError, Interrupted, ModelError, RedpenError
from pipeline.forward.head import unwrapped
from pipeline.models.load import pick_device

_T = TypeVar("_T")

# Bounds the wait for a rank that is alive but stuck; one that has ended is noticed at once.
_TIMEOUT = timedelta(minutes=30)
_groups = itertools.count()


@dataclass(frozen=True)
class WeightSharding:
    """This process among those that train one student. By default it is alone.

    Attributes:
        mesh: the ranks that the student's weights are spread over; None where each holds them whole.
    """

    rank: int = 0
    size: int = 1
    mesh: DeviceMesh | None = None

    @property
    def is_main_process(self) -> bool:
        """Whether this rank is the one that writes files."""
        return self.rank == 0

    def load_config(self, student: ModelConfig) -> ModelConfig:
        """Where to load the student: in host memory if no single device has to hold all of it."""
        return student if self.mesh is None else student.model_copy(update={"device": "cpu"})

    def parallelize(self, model: nn.Module) -> Callable[[Callable[[], _T]], _T]:
        """Lay out a student that every rank has loaded; shards of it move to this rank's device.

        Returns a function within which the student is to be used: it calls its argument and gives what that returns.

        Raises:
            ModelError: a rank holds other weights than the first.
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

    def gather(self, values: Tensor) -> list[Tensor]:
        """Every rank's `values` (of one shape and dtype), in order of ranks."""
        if self.size == 1:
            return [values]
        gathered = [torch.empty_like(values) for _ in range(self.size)]
        dist.all_gather(gathered, values.contiguous())
        return gathered

    def maximum(self, value: int) -> int:
        """The largest of what the ranks say."""
        return max(int(told) for told in self.gather(torch.tensor(value)))

    def all_reduce(self, gradients: Tensor) -> None:
        """Replace `gradients` by its sum over the ranks, the same bits on every rank."""
        if self.size > 1:
            dist.all_reduce(gradients)

    def full_tensor(self, value: Tensor) -> Tensor:
        """A weight or its like, from the shards of all ranks; what is in no shards is given back as it is."""
        return value.full_tensor() if isinstance(value, DTensor) else value

    def copy_to_main_process(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Whole copies in the first rank's host memory, made one after the other; elsewhere their outlines."""
        place = "cpu" if self.is_main_process else "meta"
        return {name: self.full_tensor(value.detach()).to(place, copy=True) for name, value in values.items()}

    def broadcast(self, value: _T) -> _T:
        """What the first rank says, on every rank. It is pickled."""
        told = [value]
        if self.size > 1:
            dist.broadcast_object_list(told, 0)
        return told[0]

    def distribute(self, value: Tensor, owner: Tensor) -> Tensor:
        """This rank's part of a weight, or of what an optimizer keeps of it, that the first rank holds whole.

        Args:
            value: on the first rank; elsewhere its like on torch's meta device.
            owner: the weight itself.
        """
        if self.size == 1:
            return value
        device = owner.device if value.ndim else torch.device("cpu")  # an optimizer counts its steps there
        whole = torch.empty_like(value, device=device) if value.is_meta else value.to(device)
        dist.broadcast(whole, 0)
        if isinstance(owner, DTensor) and value.shape == owner.shape:
            return distribute_tensor(whole, owner.device_mesh, owner.placements, src_data_rank=None)
        return whole

    def barrier(self) -> None:
        """Wait for every rank."""
        self.maximum(0)

    def _require_equal(self, model: nn.Module) -> None:
        if self.size == 1:
            return
        names, prints = zip(*((n, torch.hash_tensor(p.detach())) for n, p in model.named_parameters()), strict=True)
        first, *others = self.gather(torch.stack([p.cpu() for p in prints]).view(torch.int64))
        for rank, theirs in enumerate(others, 1):
            if len(differing := (theirs != first).nonzero()):
                raise ModelError(
                    f"student: rank {rank} holds other weights than rank 0 ({len(differing)} of {len(names)} differ, "
                    f"the first is {names[int(differing[0])]}); give every machine the same files of it"
                )


class Gradients:
    """The `.grad` of weights: views of one flat tensor where they are held whole, else shards of their own."""

    def __init__(self, weights: Mapping[str, nn.Parameter], sharding: WeightSharding):
        self._sharding = sharding
        self._sharded = [weight for weight in weights.values() if isinstance(weight, DTensor)]
        self._flat: list[Tensor] = []
        self._parts: list[tuple[nn.Parameter, Tensor]] = []
        whole = [weight for weight in weights.values() if not isinstance(weight, DTensor)]
        for kind in dict.fromkeys((weight.dtype, weight.device) for weight in whole):
            alike = [weight for weight in whole if (weight.dtype, weight.device) == kind]
            sizes = [weight.numel() for weight in alike]
            flat = torch.zeros(sum(sizes), dtype=kind[0], device=kind[1])
            parts = zip(alike, torch.split(flat, sizes), strict=True)
            self._parts += [(weight, part.view_as(weight)) for weight, part in parts]
            self._flat.append(flat)
        self.clear()

    def clear(self) -> None:
        """Set all to 0."""
        for flat in self._flat:
            flat.zero_()
        for weight, part in self._parts:
            weight.grad = part  # a caller's zero_grad() may have taken it away
        for weight in self._sharded:
            weight.grad = torch.zeros_like(weight)

    def all_reduce(self) -> None:
        """Sum over the ranks; what is in shards has been summed during backward."""
        for flat in self._flat:
            self._sharding.all_reduce(flat)


class _Root(nn.Module):
    """FSDP's root: the weights that no decoder layer holds (embeddings, final norm, head) are whole within a call."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, work: Callable[[], _T]) -> _T:
        return work()


def _reduce_unused(root: FSDPModule, model: nn.Module) -> None:
    """Have ranks reduce the gradients of experts that their own tokens did not reach, as others' may have."""
    if hasattr(root, "set_reduce_scatter_unused_params"):
        root.set_reduce_scatter_unused_params(True)
        return
    config = unwrapped(model).config.get_text_config()
    if any(getattr(config, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts")):
        raise ConfigError(
            'train.parallel = "fsdp" with train.method = "full" trains mixtures of experts from torch 2.13 on, this '
            f'is {torch.__version__}; set train.method = "lora", or train.parallel = "ddp"'
        )


def _decoder_layers(model: nn.Module) -> list[nn.Module]:
    layers: Any = unwrapped(model).get_decoder().layers
    return list(layers)


@contextmanager
def weight_sharding(ranks: Ranks, student: ModelConfig, train: TrainConfig) -> Iterator[WeightSharding]:
    """The layout of this job, in a process group that lasts as long as the body.

    Ranks leave the body together: none ends, and so has torchrun end the others, while the first is still writing.
    Of an error that all of them meet only the first speaks; a rank that is gone ends the job.

    Raises:
        ConfigError: ranks share a GPU.
    """
    if ranks.store is None:
        yield WeightSharding()
        return
    device = pick_device(student)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # initialises it: a mesh would choose by LOCAL_RANK, which is hidden from us
    store = PrefixStore(f"train/{next(_groups)}", ranks.store)
    try:
        # Numbers that only steer are on the CPU and go by gloo.
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=ranks.rank, world_size=ranks.size, timeout=_TIMEOUT)
        here = WeightSharding(ranks.rank, ranks.size)
        if device.type == "cuda":
            _require_own_gpu(here, device)
        mesh = init_device_mesh(device.type, (ranks.size,)) if train.parallel == "fsdp" else None
        yield WeightSharding(ranks.rank, ranks.size, mesh)
        ranks.barrier()
        dist.destroy_process_group()
    except Interrupted as error:
        if dist.is_initialized():
            dist.destroy_process_group()
        if ranks.is_main_process:
            raise
        raise SystemExit(error.exit_code) from None  # the first rank has been stopped too, and says so
    except Exception as error:
        lost = _lost_a_rank(error)
        if not ranks.is_main_process:
            defer_to_main_process()
            with suppress(dist.DistError):  # torchrun may have ended too
                ranks.store.set("train/told", str(lost))
        if not lost:
            raise
        if ranks.is_main_process and ranks.store.check(["train/told"]):
            raise SystemExit(1) from None
        raise RedpenError(
            "another rank of this job has ended, and with it the job (torchrun's report says how); the same command "
            "continues from the last checkpoint"
        ) from error


def _require_own_gpu(sharding: WeightSharding, device: torch.device) -> None:
    """NCCL hangs or fails, depending on its release, where two ranks use one GPU."""
    name = torch.tensor(list(str(torch.cuda.get_device_properties(device).uuid).encode()))
    n_gpus = len({tuple(told.tolist()) for told in sharding.gather(name)})
    if n_gpus < sharding.size:
        raise ConfigError(
            f"torchrun: {sharding.size} ranks have {n_gpus} GPUs between them, and training needs one each; lower "
            "--nproc-per-node"
        )


def _lost_a_rank(error: Exception) -> bool:
    """gloo raises plain RuntimeErrors, some of them out of FSDP's hooks in backward."""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in ("gloo", "NCCL"))
    )
