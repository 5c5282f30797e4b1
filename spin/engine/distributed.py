"""Process group, device mesh, sharding and collectives.

`python train.py` is one rank, `torchrun --nproc-per-node 8 train.py` eight; both run the same code. On a CPU
the collectives are gloo's.
"""

import gc
import os
import resource
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from model.config import ModelConfig
from model.kv_cache import free_memory
from model.mistral import Mistral
from model.weights import Checkpoint

# How long a rank waits for one that is still sampling, hashing a checkpoint or writing a shard.
TIMEOUT = timedelta(hours=4)


@dataclass(frozen=True)
class Ranks:
    """This process among the others."""

    rank: int
    world_size: int
    device: torch.device
    mesh: DeviceMesh  # (replicas, shards): parameters are sharded along the second dimension

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes files and shows progress."""
        return self.rank == 0

    def progress(self, total: int, desc: str, unit: str, initial: int = 0, **settings) -> tqdm:
        """A progress bar with rate and remaining time, on the first rank; in log files updated less often."""
        seconds = 0.2 if sys.stderr.isatty() else 10.0
        settings |= {"desc": desc, "unit": unit, "initial": initial, "mininterval": seconds}
        return tqdm(total=total, disable=not self.first, **settings)

    def release_memory(self) -> None:
        """Free the memory of models that are no longer used, whose FSDP modules are reference cycles."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def free_memory(self) -> int:
        """Free bytes of this rank's GPU, or its share of the machine's."""
        sharing = 1 if self.device.type == "cuda" else int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        return free_memory(self.device) // sharing

    def peak_memory(self) -> int:
        """Peak memory in bytes: torch's tensors on this rank's GPU, or the whole process on a CPU."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

    def barrier(self) -> None:
        dist.barrier()

    def sum(self, values: list[float]) -> list[float]:
        """Element-wise sum over all ranks, in fp64."""
        return self.sum_tensor(torch.tensor(values, dtype=torch.float64)).tolist()

    def sum_tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        """Element-wise sum over all ranks of a CPU tensor, in place."""
        dist.all_reduce(tensor)
        return tensor

    def gather(self, value, group=None) -> list:
        """The value of every rank, in the order of ranks, on every rank."""
        values = [None] * self.world_size
        dist.all_gather_object(values, value, group)
        return values

    def from_first(self, make):
        """make() of the first rank, on every rank; an OSError or ValueError there is raised on every rank."""
        box = [None, None]
        if self.first:
            try:
                box[0] = make()
            except (OSError, ValueError) as error:
                box[1] = error
        dist.broadcast_object_list(box)
        if box[1] is not None:
            raise box[1]
        return box[0]


def this_device() -> torch.device:
    """The GPU of this process, or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("cpu")


def lost_rank(error: RuntimeError) -> bool:
    """Whether a collective failed because another rank has ended; gloo has no exception class for that."""
    signs = ("by peer", "Connection refused", "Broken pipe")
    return isinstance(error, dist.DistError) or any(sign in str(error) for sign in signs)


@contextmanager
def ranks(shard_size: int = 0):
    """Join the process group that torchrun describes, or a group of one; leave it at the end.

    Groups of `shard_size` consecutive ranks (0: all) each hold one copy of a sharded model's parameters: with
    the number of GPUs per node, each node has a copy. Raises ValueError if it doesn't divide the ranks.

    After an error, one of several ranks doesn't leave: that would wait for the others, which wait in a
    collective. The process ends with its error, and torchrun ends the others.
    """
    # On a CPU in bf16, oneDNN and torch keep compiled code for 1,024 shapes of products each. Packed streams
    # have ever new lengths: a model of 135M parameters took 50 MB more in each step.
    for cache in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(cache, "64")
    device = this_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if "RANK" in os.environ:
        store, rank, world_size = next(dist.rendezvous("env://", timeout=TIMEOUT))
        if os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]:
            # After a restart torchrun's store still has the addresses of the ranks that died. (One agent
            # counts the restarts; of several each counts its own: they need
            # TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1, see docs/clusters.md.)
            store = dist.PrefixStore("restart" + os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=TIMEOUT)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    alone = dist.get_world_size() == 1
    try:
        group = Ranks(dist.get_rank(), dist.get_world_size(), device, _mesh(device.type, shard_size))
        yield group
    except (Exception, KeyboardInterrupt):
        if alone:  # a notebook's next cell starts again
            dist.destroy_process_group()
        raise
    group.release_memory()
    group.barrier()  # no rank leaves while another still works
    dist.destroy_process_group()


@contextmanager
def pretended_ranks(world_size: int, shard_size: int = 0):
    """The first of `world_size` simulated ranks on the CPU, whose collectives do nothing (spin/plan.py)."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    try:
        yield Ranks(0, world_size, torch.device("cpu"), _mesh("cpu", shard_size))
    finally:
        dist.destroy_process_group()


def _mesh(device_type: str, shard_size: int) -> DeviceMesh:
    world_size = dist.get_world_size()
    if world_size % (shard_size or world_size):
        raise ValueError(f"run.shard_size = {shard_size} does not divide the number of ranks, {world_size}")
    shape = (world_size // shard_size, shard_size) if shard_size else (1, world_size)
    return init_device_mesh(device_type, shape, mesh_dim_names=("replicas", "shards"))


def sharded_model(
    source: Path | ModelConfig,
    ranks: Ranks,
    dtype: torch.dtype,
    checkpointing: str = "none",
    seed: int = 0,
    attention: str = "auto",
    compile: bool = False,
) -> Mistral:
    """A model with fp32 parameters sharded over `ranks.mesh` (FSDP2), which computes in `dtype`.

    Gradients are reduced in fp32. `source` is a model directory, of which each rank reads only its shards'
    rows, or an architecture, whose weights are drawn from `seed` (the same on any number of ranks).
    """
    config = source if isinstance(source, ModelConfig) else ModelConfig.from_pretrained(source)
    with torch.device("meta"):
        model = Mistral(config, attention)
    if not isinstance(source, ModelConfig):
        checkpoint = Checkpoint(source)
        checkpoint.check(model)
    # Rotary angles stay fp32, so a block's inputs are not cast; activations have `dtype` already.
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    mesh = ranks.mesh if ranks.mesh["replicas"].size() > 1 else ranks.mesh["shards"]
    for block in model.model["layers"]:  # type: ignore[attr-defined]  # for ModuleDict, any Module
        block.checkpointing = checkpointing
        if compile:  # attention is left out: its segments differ in every pack
            block.before = torch.compile(block.before, dynamic=True)
            block.after = torch.compile(block.after, dynamic=True)
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    model.to_empty(device=ranks.device)
    if not isinstance(source, ModelConfig):
        checkpoint.fill(model, lambda parameter: (local(parameter), shard_rows(parameter)))
        return model
    with torch.no_grad():
        for parameter, values in model.draw_weights(seed):
            local(parameter).copy_(values[shard_rows(parameter)])
    return model


def shard_rows(parameter: torch.Tensor) -> slice:
    """The rows of the whole parameter that this rank holds: torch.chunk's, as FSDP2 shards them."""
    assert isinstance(parameter, DTensor)
    shards = parameter.device_mesh["shards"]
    size = -(-parameter.shape[0] // shards.size())
    start = min(shards.get_local_rank() * size, parameter.shape[0])
    return slice(start, min(start + size, parameter.shape[0]))


def fsdp(model: Mistral) -> FSDPModule:
    """A sharded model as the class that `fully_shard` mixed into it."""
    assert isinstance(model, FSDPModule)
    return model


def whole(parameter: torch.Tensor) -> torch.Tensor:
    """A sharded tensor gathered on every rank (a collective)."""
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a sharded tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
