"""What an iteration needs, before one pays for it: memory of each GPU, token budget and slots that fit,
FLOPs, hours.

    python -m spin.plan --config configs/zephyr-7b.toml --gpus 8 --memory 80

No GPU and no weights are needed: the model, its sharding, a training step and the optimizer run as they are,
in a process group that pretends to have all ranks, on tensors that have shapes and no values. What is
allocated on the way is counted. Not seen, and left to --reserve: the CUDA context, NCCL's and the kernels'
own buffers, fragmentation.
"""

import sys
import weakref
from collections.abc import Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import torch
from torch import Tensor
from torch._guards import active_fake_mode
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model.config import ModelConfig
from model.kv_cache import KVCache
from model.mistral import Mistral
from model.sampler import CACHE_SHARE, MOST_SLOTS
from spin.config import Config
from spin.engine import cli
from spin.engine.distributed import DTensor, Ranks, fsdp, local, pretended_ranks, sharded_model
from spin.engine.files import read_json
from spin.engine.metrics import PEAKS
from spin.engine.optimizer import CHUNK, RMSprop, make_optimizer, state_bytes
from spin.loss import spin_step
from spin.packing import Item, flops, identical_pairs, pack, response_logps
from spin.trainer import backward

GIB = 2**30
MEMORIES = {"H200": 139, "L40S": 44, "RTX 4090": 24}  # GiB, of those that have not 80
BANDWIDTHS = {
    "H200": 4.8e12,
    "H100 PCIe": 2.0e12,
    "H100": 3.35e12,
    "A100": 2.04e12,
    "L40S": 0.86e12,
    "RTX 4090": 1.01e12,
}
KINDS = ("parameters", "gradients", "optimizer", "gathered parameters", "activations", "other")


class Memory(TorchDispatchMode):
    """The size of every storage that operators return, from its birth to its death.

    What a storage was for is said where it is known, at the latest at the end (gradients, the optimizer's
    state); what lives when a backward pass begins, and has no name yet, is activations.
    """

    def __init__(self) -> None:
        super().__init__()
        self.events: list[tuple[int, int]] = []  # (number of a storage, bytes it has from now on)
        self.kinds: dict[int, str] = {}
        self._live: dict[int, tuple[int, weakref.ref, int]] = {}  # by id: number, storage, bytes
        self._numbers = count()

    def __enter__(self):
        self._mode, self._resize = active_fake_mode(), torch.UntypedStorage.resize_

        def resize_(storage, size):  # no operator; only FSDP does it, to gather parameters and to let them go
            result = self._resize(storage, size)
            self._see(storage, "gathered parameters")
            return result

        torch.UntypedStorage.resize_ = resize_
        return super().__enter__()

    def __exit__(self, *error):
        torch.UntypedStorage.resize_ = self._resize
        return super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it comes back as operators on what this rank holds
        result = func(*args, **(kwargs or {}))
        if active_fake_mode() is self._mode:  # else it is DTensor thinking about shapes
            for tensor in tree_leaves(result):
                if isinstance(tensor, Tensor):
                    self._see(tensor.untyped_storage())
        return result

    def name(self, kind: str, tensors) -> None:
        """Say what these (sharded or plain) tensors are."""
        for tensor in tensors:
            self._see(local(tensor).untyped_storage(), kind)

    def name_rest(self, kind: str) -> None:
        """Say what all is that lives now and has no name."""
        for number, _, size in self._live.values():
            if size:
                self.kinds.setdefault(number, kind)

    def peak(self) -> dict[str, int]:
        """Bytes by kind at the moment at which they were most together."""
        sizes: dict[int, int] = {}
        now = dict.fromkeys(KINDS, 0)
        best, most = dict(now), 0
        for number, size in self.events:
            kind = self.kinds.get(number, "other")
            now[kind] += size - sizes.get(number, 0)
            sizes[number] = size
            if (total := sum(now.values())) > most:
                best, most = dict(now), total
        return best

    def _see(self, storage, kind: str | None = None) -> None:
        key, size = id(storage), storage.nbytes()
        if key not in self._live:
            number = next(self._numbers)

            def gone(_, key=key, number=number):
                del self._live[key]
                self.events.append((number, 0))

            self._live[key] = (number, weakref.ref(storage, gone), 0)
        number, reference, before = self._live[key]
        if size != before:
            self._live[key] = (number, reference, size)
            self.events.append((number, size))
        if kind and self.kinds.get(number) in (None, "activations"):
            self.kinds[number] = kind


@contextmanager
def norms_of_a_gpu():
    """On a CPU a norm is many operators, each with a result to keep; on a GPU one. Here it is one without
    values.
    """
    library = torch.library.Library("aten", "IMPL")
    library.impl("_fused_rms_norm", lambda *_: None, "CPU")
    try:
        yield
    finally:
        library._destroy()


class Plan:
    """A recipe's sharded model and optimizer without values, on the first of a process group's pretended
    ranks.
    """

    def __init__(self, config: Config, architecture: ModelConfig, ranks: Ranks):
        self.config, self.ranks = config, ranks
        with FakeTensorMode() as self.mode:
            part = config.train
            self.model = sharded_model(
                architecture, ranks, getattr(torch, part.dtype), part.activation_checkpointing
            )
            # a GPU's; flash-attn allocates alike
            self.model.backend = lambda x: "torch-flash"  # type: ignore[method-assign]  # of this model alone
            self.parameters = list(self.model.parameters())
            self.optimizer = make_optimizer(part, self.parameters)
            if isinstance(self.optimizer, RMSprop):
                self.optimizer.chunk = CHUNK["cuda"]
            # the optimizer's state is made, and DTensor learns the shapes
            with norms_of_a_gpu(), Memory() as memory:
                self._step(memory, filling(64, config))

    def train(self, budget: int) -> dict[str, int]:
        """Bytes by kind at the peak of a training step with two micro-batches of `budget` tokens."""
        with self.mode, norms_of_a_gpu(), Memory() as memory:
            self._step(memory, filling(budget, self.config))
        return memory.peak()

    def score(self, budget: int) -> dict[str, int]:
        """The same of a forward pass that keeps nothing, before there is an optimizer."""
        with self.mode, norms_of_a_gpu(), Memory() as memory, torch.no_grad():
            memory.name("parameters", self.parameters)
            self._logps(filling(budget, self.config))
            fsdp(self.model).reshard()
        return memory.peak()

    def largest_budget(self, free: float) -> int:
        """The largest token budget, in steps of 1,024 up to 65,536, of which a training step fits in `free`
        bytes; or 0.

        Found by a line through two budgets and run itself; while it does not fit, by a line through the first
        and it.
        """
        first, second = 1024, 4096
        least, memory = (sum(self.train(budget).values()) for budget in (first, second))
        while least <= free:
            # what a small model's optimizer takes may hide the rest
            slope = max((memory - least) / (second - first), 1.0)
            budget = min(int((free - least) / slope + first) // 1024 * 1024, 65536)
            memory, second = sum(self.train(budget).values()), budget
            if memory <= free or budget == first:
                return budget
        return 0

    def _logps(self, items: list[Item]) -> Tensor:
        return response_logps(self.model, pack(items), self.config.train.logit_chunk)

    def _step(self, memory: Memory, items: list[Item]) -> None:
        """A step of spin.trainer.train, from its parts; what it allocates, named."""
        part = self.config.train
        memory.name("parameters", self.parameters)
        memory.name("optimizer", _tensors(self.optimizer))
        for last in (False, True):
            opponent, identical = torch.zeros(len(items), 2), identical_pairs(items)
            logps = self._logps(items)
            loss, _ = spin_step(logps, opponent, identical, 2 * len(items), part.beta, part.loss)
            memory.name("gradients", [weight.grad for weight in self.parameters if weight.grad is not None])
            memory.name_rest("activations")
            backward(part, self.model, loss, self.ranks, last)
        memory.name("gradients", [weight.grad for weight in self.parameters])
        # Clipping is left out: it takes next to nothing, while DTensor (torch 2.11) imagines whole gradients
        # for it.
        self.optimizer.step()
        self.optimizer.zero_grad()


def filling(budget: int, config: Config) -> list[Item]:
    """Pairs that fill a token budget, of the longest form that the recipe's lengths allow."""
    prompt = config.data.max_prompt_length
    response = config.data.max_length - prompt
    length = prompt + 2 * (response - 1)
    whole, left = divmod(budget, length)
    items = [Item([1] * prompt, ([1] * response, [1] * response))] * whole
    return items + ([Item([1] * (left - 2), ([1] * 2, [1] * 2))] if left > 2 else [])


def _tensors(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [
        value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)
    ]


def report(
    config: Config,
    architecture: ModelConfig,
    gpus: int,
    memory: float,
    reserve: float,
    gpu: str,
    share: float,
    pairs: int,
    lengths: tuple[int, int, int],
) -> str:
    """The plan in words. memory, reserve: GiB of each GPU; share: of its peak that is reached; lengths:
    tokens of prompt, real and generated response.
    """
    with pretended_ranks(gpus, config.run.shard_size) as ranks:
        free = (memory - reserve) * GIB
        with torch.device("meta"):
            model = Mistral(architecture)
        count = sum(weight.numel() for weight in model.parameters())
        lines = [
            f"{count / 1e9:.2f}e9 parameters, {pairs} pairs of {lengths[0]} + {lengths[1]} + {lengths[2]} "
            f"tokens (prompt, real, generated), {gpus} x {memory:g} GiB ({reserve:g} kept back), at "
            f"{share:.0%} of {PEAKS[gpu] / 1e12:.0f} TFLOP/s ({gpu})",
            "",
            *_generate(config, architecture, count, gpus, free, gpu, share, pairs, lengths),
        ]
        prompt, real, generated = lengths
        trained = pairs * (1 + config.train.replay)
        item = Item([1] * prompt, ([1] * real, [1] * generated))
        rate = gpus * PEAKS[gpu] * share
        forward = flops(architecture, item) * trained
        plan = Plan(config, architecture, ranks)
        scored = plan.score(config.train.token_budget)
        total = sum(scored.values())
        lines += [
            f"score     {_gib(total)} at train.token_budget = {config.train.token_budget}; "
            f"{forward:.2e} FLOPs, {_hours(forward / rate)} for {trained} pairs"
        ]
        now = plan.train(config.train.token_budget)
        total = sum(now.values())
        useful = 3 * forward * config.train.epochs
        lines += [
            f"train     {_gib(total)} at train.token_budget = {config.train.token_budget}: "
            + ("fits" if total <= free else "DOES NOT FIT"),
            *(f"            {_gib(now[kind]):>10} {kind}" for kind in KINDS),
        ]
        budget = plan.largest_budget(free)
        if budget:
            lines += [
                f"            largest token_budget that fits: {budget}" + " or more" * (budget == 65536)
            ]
        else:
            helps = ["more GPUs to share the parameters"]
            helps += ['train.activation_checkpointing = "full"'] * (
                config.train.activation_checkpointing != "full"
            )
            helps += ['train.second_moment = "bfloat16"'] * (state_bytes(config.train) == 4)
            lines += [f"            no token_budget fits; what takes less: {', '.join(helps)}"]
        shards = config.run.shard_size or gpus
        state = (4 + state_bytes(config.train)) * count
        # forward and backward
        gathered = 0 if shards == 1 else 2 * getattr(torch, config.train.dtype).itemsize * count
        lines += [
            f"            {useful:.2e} FLOPs, {_hours(useful / rate)} for {trained} pairs, "
            f"{config.train.epochs:g} epochs",
            f"            a step of {config.train.batch_size} pairs gives each GPU "
            f"{config.train.batch_size * item.packed_length / gpus:.0f} tokens; a larger token_budget is "
            "not used",
            f"            each micro-batch gathers {_gib(gathered)} and reduces "
            f"{_gib(4 * count if gpus > 1 else 0)}",
            f"            a checkpoint being written takes {_gib(state / shards)} of the host's memory for "
            "each GPU",
            f"export    {_gib(max(weight.numel() for weight in model.parameters()) * 6)} beside the "
            f"parameters; {2 * count / 1e9:.1f} GB of files",
        ]
    return "\n".join(lines) + "\n"


def _generate(
    config: Config,
    architecture: ModelConfig,
    count: int,
    gpus: int,
    free: float,
    gpu: str,
    share: float,
    pairs: int,
    lengths: tuple[int, int, int],
) -> list[str]:
    """A whole bf16 replica on each GPU, and its cache in what is left."""
    dtype = getattr(torch, config.generate.dtype)
    weights = count * dtype.itemsize
    slot = KVCache.bytes_per_slot(
        architecture, config.data.max_prompt_length + config.generate.max_new_tokens, dtype
    )
    if weights + slot > free:
        return [
            f"generate  {_gib(weights)} of weights on each GPU DO NOT FIT: every GPU has a replica of its own"
        ]
    most = min(int((free - weights) * CACHE_SHARE / slot), MOST_SLOTS["cuda"])
    slots = min(config.generate.slots, most) if config.generate.slots else most
    prompt, _, generated = lengths
    # A decoding step reads the weights and what the slots hold so far, or computes, whichever takes longer.
    held = slots * KVCache.bytes_per_slot(architecture, prompt + generated // 2, dtype)
    answer = flops(architecture, Item([1], ([1] * generated,)))  # about what its tokens take
    step = max((weights + held) / BANDWIDTHS[gpu], answer / generated * slots / PEAKS[gpu])
    read = flops(architecture, Item([1] * prompt, ([1],))) / PEAKS[gpu]  # seconds, of a prompt
    seconds = pairs / gpus * (generated * step / slots + read) / share
    return [
        f"generate  {_gib(weights)} weights and {_gib(slots * slot)} cache, {slots} slots on each GPU; "
        f"{_hours(seconds)} for {pairs} prompts at {share:.0%} of {BANDWIDTHS[gpu] / 1e12:g} TB/s"
    ]


def _gib(size: float) -> str:
    return f"{size / GIB:.1f} GiB" if size >= GIB else f"{size / 2**20:.0f} MiB"


def _hours(seconds: float) -> str:
    hours, minutes = seconds / 3600, seconds / 60
    return f"{hours:.1f} h" if hours >= 1 else f"{minutes:.1f} min" if minutes >= 1 else f"{seconds:.0f} s"


def main(argv: Sequence[str] | None = None) -> None:
    parser = cli.parser(__doc__.splitlines()[0])
    parser.add_argument(
        "--iter", type=int, default=0, help="the iteration whose settings are taken (default: 0)"
    )
    parser.add_argument(
        "--architecture", type=Path, help="config.json; default: the base model's, else <recipe>.json"
    )
    parser.add_argument("--gpus", type=int, default=1, help="over all nodes (default: 1)")
    parser.add_argument("--memory", type=float, help="GiB of each (default: --gpu's)")
    parser.add_argument(
        "--reserve", type=float, default=4, help="GiB kept back for what is not seen here (default: 4)"
    )
    parser.add_argument(
        "--gpu", default="H100", choices=list(PEAKS), help="whose peak and bandwidth (default: H100)"
    )
    parser.add_argument("--share", type=float, default=0.4, help="of the peak that is reached (default: 0.4)")
    parser.add_argument("--pairs", type=int, help="of one iteration (default: data.num_prompts)")
    parser.add_argument(
        "--lengths",
        default="260,280,180",
        help="mean tokens of prompt, real and generated response "
        "(default: %(default)s, about UltraChat's under these limits)",
    )
    with cli.errors_in_words():
        arguments, recipe = cli.parse(parser, argv)
        config = recipe.at(arguments.iter)
        architecture = _architecture(arguments.architecture, config, recipe.path)
        pairs = arguments.pairs or config.data.num_prompts
        if not pairs:
            raise ValueError("data.num_prompts is 0, for all of them; say with --pairs how many that is")
        lengths = tuple(int(part) for part in arguments.lengths.split(","))
        if len(lengths) != 3 or min(lengths) < 1 or arguments.gpus < 1 or not 0 < arguments.share <= 1:
            raise ValueError("--lengths takes three numbers, --gpus one of at least 1, --share one in (0, 1]")
        memory = arguments.memory or MEMORIES.get(arguments.gpu, 80)
        text = report(
            config,
            architecture,
            arguments.gpus,
            memory,
            arguments.reserve,
            arguments.gpu,
            arguments.share,
            pairs,
            lengths,
        )
        sys.stdout.write(text)


def _architecture(given: Path | None, config: Config, recipe: Path) -> ModelConfig:
    """From the file or directory that is named, the base model, or the file beside the recipe."""
    beside = recipe.with_suffix(".json")
    for path in [given] if given else [config.base / "config.json", beside]:
        if path.is_dir():
            return ModelConfig.from_pretrained(path)
        if path.is_file():
            return ModelConfig.from_dict(read_json(path), str(path))
    raise FileNotFoundError(
        f"{given or beside}: no such file; --architecture takes a config.json or a model's directory"
    )


if __name__ == "__main__":
    main()
