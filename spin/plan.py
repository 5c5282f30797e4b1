"""What an iteration needs: memory per GPU, the token budget and slots that fit, FLOPs, hours.

Needs no GPU and no weights: the real model, its sharding, a training step and the optimizer run on fake
tensors, in a process group that simulates all ranks, and allocations are counted. The CUDA context, NCCL's
and the kernels' own buffers, and fragmentation are not seen; --reserve is for them.
"""

import sys
from argparse import Namespace
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from model.config import ModelConfig
from model.kv_cache import KVCache
from model.sampler import CACHE_SHARE, MOST_SLOTS
from spin.config import Config
from spin.engine import cli
from spin.engine.batches import flops
from spin.engine.distributed import Ranks, fsdp, pretended_ranks, sharded_model
from spin.engine.files import read_json
from spin.engine.memory import KINDS, Memory
from spin.engine.metrics import GPUS
from spin.engine.optimizer import CHUNK, RMSprop, make_optimizer, state_bytes
from spin.loss import spin_step
from spin.packing import Item, pack, response_logps, response_places
from spin.trainer import backward

GIB = 2**30
SHAPE = "model_type vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads".split()
SHAPE += ["num_key_value_heads", "tie_word_embeddings"]
ARCHITECTURES = {  # SHAPE of their config.json
    "smollm2-135m": ("llama", 49152, 576, 1536, 30, 9, 3, True),
    "tinyllama-1.1b": ("llama", 32000, 2048, 5632, 22, 32, 4, False),
    "qwen2.5-1.5b": ("qwen2", 151936, 1536, 8960, 28, 12, 2, True),
    "zephyr-7b": ("mistral", 32000, 4096, 14336, 32, 32, 8, False),
    "llama-2-70b": ("llama", 32000, 8192, 28672, 80, 64, 8, False),
}


@contextmanager
def norms_of_a_gpu():
    """Run RMSNorm as one operator, as on a GPU; on a CPU it is several, each with a result to keep."""
    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("_fused_rms_norm", lambda *_: None, "CPU")
        yield


class Plan:
    """A recipe's sharded model and optimizer on fake tensors, on the first of the simulated ranks."""

    def __init__(self, config: Config, architecture: ModelConfig, ranks: Ranks):
        self.config, self.ranks = config, ranks
        part, dtype = config.train, getattr(torch, config.train.dtype)
        with FakeTensorMode() as self.mode:
            self.model = sharded_model(architecture, ranks, dtype, part.activation_checkpointing)
            # A GPU's backend; flash-attn allocates the same.
            self.model.backend = lambda x: "torch-flash"  # type: ignore[method-assign]
            self.parameters = list(self.model.parameters())
            self.optimizer = make_optimizer(part, self.parameters)
            if isinstance(self.optimizer, RMSprop):
                self.optimizer.chunk = CHUNK["cuda"]
        self.train(64)  # creates the optimizer's state, and DTensor's caches of shapes

    def train(self, budget: int) -> dict[str, int]:
        """Bytes by kind at the peak of a training step with two micro-batches of `budget` tokens."""
        with self.mode, norms_of_a_gpu(), Memory() as memory:
            self._step(memory, filling(budget, self.config))
        return memory.peak()

    def score(self, budget: int) -> dict[str, int]:
        """Bytes by kind at the peak of a forward pass without gradients or optimizer."""
        with self.mode, norms_of_a_gpu(), Memory() as memory, torch.no_grad():
            memory.name("parameters", self.parameters)
            response_logps(self.model, pack(filling(budget, self.config)), self.config.train.logit_chunk)
            fsdp(self.model).reshard()
        return memory.peak()

    def largest_budget(self, free: float) -> int:
        """The largest multiple of 1,024 up to 65,536 whose training step fits in `free` bytes, or 0."""
        first, second = 1024, 4096  # interpolated until a step with the result fits
        least, memory = (sum(self.train(budget).values()) for budget in (first, second))
        while least <= free:
            # At least 1.0: in a small model the optimizer's peak may hide the activations.
            slope = max((memory - least) / (second - first), 1.0)
            budget = min(int((free - least) / slope + first) // 1024 * 1024, 65536)
            memory, second = sum(self.train(budget).values()), budget
            if memory <= free or budget == first:
                return budget
        return 0

    def _step(self, memory: Memory, items: list[Item]) -> None:
        """A step of spin.trainer.train from its parts, with its allocations named."""
        part = self.config.train
        memory.name("parameters", self.parameters)
        state = tree_leaves(list(self.optimizer.state.values()))
        memory.name("optimizer", [value for value in state if isinstance(value, Tensor)])
        for last in (False, True):
            logps = response_logps(self.model, pack(items), part.logit_chunk)
            same, lengths = response_places(items)
            loss, _ = spin_step(logps, torch.zeros(same.shape), same, lengths, 2 * len(items), part)
            memory.name_rest("activations")
            backward(part, self.model, loss, self.ranks, last)
            memory.name("gradients", [weight.grad for weight in self.parameters if weight.grad is not None])
        # No clipping: it takes next to nothing, but DTensor (torch 2.11) would create whole gradients for it.
        self.optimizer.step()
        self.optimizer.zero_grad()


def filling(budget: int, config: Config) -> list[Item]:
    """Prompts with responses that fill a token budget, as long as the recipe's limits allow."""
    prompt, responses = config.data.max_prompt_length, 1 + generated_responses(config)
    response = config.data.max_length - prompt
    whole, left = divmod(budget, prompt + responses * (response - 1))
    items = [Item([1] * prompt, ([1] * response,) * responses)] * whole
    return items + ([Item([1] * (left - responses), ([1] * 2,) * responses)] if left > responses else [])


def generated_responses(config: Config) -> int:
    """How many generated responses a prompt is packed with."""
    return 1 if config.data.pairs else config.generate.samples + (config.train.loss == "t-spin")


def report(config: Config, architecture: ModelConfig, options: Namespace) -> str:
    """The plan as text, for the command line's options."""
    part, gpus, (prompt, real, generated) = config.train, options.gpus, options.lengths
    free, shards = (options.memory - options.reserve) * GIB, config.run.shard_size or gpus
    with pretended_ranks(gpus, config.run.shard_size) as ranks:
        plan = Plan(config, architecture, ranks)
        score, train = plan.score(part.token_budget), plan.train(part.token_budget)
        largest = plan.largest_budget(free)
    sizes = [weight.numel() for weight in plan.parameters]  # of the whole parameters, not of this rank's
    replayed = min(part.replay, options.iter) * (part.replay_share == "all")
    size, trained = sum(sizes), options.pairs * (1 + replayed)
    item = Item([1] * prompt, ([1] * real, *[[1] * generated] * generated_responses(config)))
    forward, rate = flops(architecture, item) * trained, gpus * GPUS[options.gpu][0] * options.share
    scored = forward * {"none": 0, "mixture": 1 + (options.iter > 0)}.get(part.reference, 1)
    useful, tokens = 3 * forward * part.epochs, part.batch_size * item.packed_length / gpus
    hours = f"{_hours(useful / rate)} for {trained} pairs, {part.epochs:g} epochs"
    # Both the forward and the backward pass gather the parameters, unless each GPU holds all of them.
    gathered = 2 * getattr(torch, part.dtype).itemsize * size if shards > 1 else 0
    state, reduced = (4 + state_bytes(part)) * size / shards, 4 * size if gpus > 1 else 0
    needed, fits = sum(train.values()), "fits" if sum(train.values()) <= free else "DOES NOT FIT"
    room = f"largest token_budget that fits: {largest}{' or more' if largest == 65536 else ''}"
    if not largest:
        room = (
            "no token_budget fits; more GPUs, full activation_checkpointing, bfloat16 second_moment take less"
        )
    lines = [
        f"{size / 1e9:.2f}e9 parameters, {options.pairs} pairs of {prompt} + {real} + {generated} tokens "
        f"(prompt, real, generated), {gpus} x {options.memory:g} GiB ({options.reserve:g} reserved), "
        f"at {options.share:.0%} of {GPUS[options.gpu][0] / 1e12:.0f} TFLOP/s ({options.gpu})",
        "",
        _generate(config, architecture, size, free, options),
        f"score     {_gib(sum(score.values()))} at train.token_budget = {part.token_budget}; "
        f"{scored:.2e} FLOPs, {_hours(scored / rate)} for {trained} pairs",
        f"train     {_gib(needed)} at train.token_budget = {part.token_budget}: {fits}",
        *(f"            {_gib(train[kind]):>10} {kind}" for kind in KINDS),
        f"            {room}",
        f"            {useful:.2e} FLOPs, {hours}",
        f"            a step of {part.batch_size} pairs gives each GPU {tokens:.0f} tokens, "
        "the largest useful token_budget",
        f"            each micro-batch gathers {_gib(gathered)} and reduces {_gib(reduced)}",
        f"            a checkpoint being written takes {_gib(state)} of the host's memory for each GPU",
        f"export    {_gib(6 * max(sizes))} more than the parameters; {2 * size / 1e9:.1f} GB of files",
    ]
    return "\n".join(lines) + "\n"


def _generate(config: Config, architecture: ModelConfig, size: int, free: float, options: Namespace) -> str:
    """Memory and time to generate, with a replica of all `size` parameters on each GPU."""
    (peak, _, bandwidth), (prompt, _, generated) = GPUS[options.gpu], options.lengths
    dtype, length = getattr(torch, config.generate.dtype), config.generate.max_new_tokens
    weights = size * dtype.itemsize
    slot = KVCache.bytes_per_slot(architecture, config.data.max_prompt_length + length, dtype)
    if weights + slot > free:
        return f"generate  {_gib(weights)} of weights DO NOT FIT: every GPU holds a whole replica"
    most = min(int((free - weights) * CACHE_SHARE / slot), MOST_SLOTS["cuda"])
    slots = min(config.generate.slots or most, most)
    # A decoding step reads the weights and the slots' contents so far, or computes, whichever takes longer.
    held = slots * KVCache.bytes_per_slot(architecture, prompt + generated // 2, dtype)
    response = flops(architecture, Item([1], ([1] * generated,)))  # approximately
    step = max((weights + held) / bandwidth, response / generated * slots / peak)
    prefill = flops(architecture, Item([1] * prompt, ([1],))) / peak
    responses = options.pairs * config.generate.samples * (config.generate.share if options.iter else 1)
    seconds = responses / options.gpus * (generated * step / slots + prefill) / options.share
    return (
        f"generate  {_gib(weights)} weights and {_gib(slots * slot)} cache, {slots} slots on each GPU; "
        f"{_hours(seconds)} for {options.pairs} prompts at {options.share:.0%} of {bandwidth / 1e12:g} TB/s"
    )


def _gib(size: float) -> str:
    return f"{size / GIB:.1f} GiB" if size >= GIB else f"{size / 2**20:.0f} MiB"


def _hours(seconds: float) -> str:
    hours, minutes = seconds / 3600, seconds / 60
    return f"{hours:.1f} h" if hours >= 1 else f"{minutes:.1f} min" if minutes >= 1 else f"{seconds:.0f} s"


def main(argv: Sequence[str] | None = None) -> None:
    parser = cli.parser(__doc__.splitlines()[0])
    parser.add_argument("--iter", type=int, default=0, help="use this iteration's settings (default: 0)")
    names = f"config.json, a model's directory, or one of {', '.join(ARCHITECTURES)} (default: the recipe's)"
    parser.add_argument("--architecture", type=Path, help=names)
    parser.add_argument("--gpus", type=int, default=1, help="over all nodes (default: 1)")
    parser.add_argument("--memory", type=float, help="GiB of each GPU (default: --gpu's)")
    parser.add_argument("--reserve", type=float, default=4, help="GiB for what is not counted (default: 4)")
    parser.add_argument("--gpu", default="H100", choices=GPUS, help="its peak, bandwidth (default: H100)")
    parser.add_argument("--share", type=float, default=0.4, help="of the peak that is reached (default: 0.4)")
    parser.add_argument("--pairs", type=int, help="of one iteration (default: data.num_prompts)")
    lengths = "mean tokens of prompt, real and generated response (default: %(default)s, about UltraChat's)"
    parser.add_argument("--lengths", default="260,280,180", help=lengths)
    with cli.errors_in_words():
        options, recipe = cli.parse(parser, argv)
        config = recipe.at(options.iter)
        options.memory = options.memory or GPUS[options.gpu][1]
        options.pairs = options.pairs or config.data.num_prompts
        if not options.pairs:
            raise ValueError("data.num_prompts is 0, which means all; give their number with --pairs")
        options.lengths = [int(part) for part in options.lengths.split(",")]
        sys.stdout.write(report(config, _architecture(options.architecture, config, recipe.path), options))


def _architecture(given: Path | None, config: Config, recipe: Path) -> ModelConfig:
    """What --architecture names; by default the base model's architecture, or the recipe's namesake."""
    path = given or (config.base if (config.base / "config.json").is_file() else Path(recipe.stem))
    file = path / "config.json" if path.is_dir() else path
    if file.is_file():
        return ModelConfig.from_dict(read_json(file), str(file))
    if shape := ARCHITECTURES.get(str(path)):
        return ModelConfig.from_dict(dict(zip(SHAPE, shape)), str(path))
    known = f"a config.json, a model's directory, or {', '.join(ARCHITECTURES)}"
    raise FileNotFoundError(f"{path}: no such architecture; --architecture takes {known}")


if __name__ == "__main__":
    main()
