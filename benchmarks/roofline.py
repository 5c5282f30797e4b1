"""Where a GPU's time would go if each operator took just what its FLOPs or its bytes take. No GPU is needed.

    python -m benchmarks.roofline            # Mistral-7B on an H200: training, scoring, decoding

The code runs as it is, on tensors without values (as in spin.plan). Each operator that it ends in is charged
the longest of: its FLOPs at a large matrix product's rate, the bytes that it reads and writes at a large
copy's, a kernel's least time. So losses are seen that a count of FLOPs does not show: what is no matrix
product, what is computed or copied twice. Not seen: kernels that miss their rates, copies inside of them
(softmax copies bf16 logits to fp32), waiting for the host, what torch.compile fuses, and the L2 cache (which
makes small ones faster).
"""

import argparse
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.gpu import ASSUMED, PROMPT, SHAPES, Shape, decoding_step, trainings, ultrachat_like
from model.attention import Segments
from model.kv_cache import KVCache
from model.mistral import Mistral
from model.sampling import sample
from spin.engine.batches import flops, micro_batches
from spin.engine.distributed import DTensor, pretended_ranks
from spin.engine.files import to_json, write_whole
from spin.engine.optimizer import clip_gradient
from spin.engine.recipe import build
from spin.loss import spin_step
from spin.packing import Item, pack, response_logps, response_places
from spin.plan import Plan, norms_of_a_gpu
from spin.trainer import backward

KERNEL = 2e-6  # seconds: no kernel takes less
# What FlashAttention-2 reaches of a large product's rate on a Hopper GPU, forward and backward, with texts of
# some hundred tokens: about 300 and 200 TFLOP/s (arXiv 2407.08608, figures 5 and 6, extrapolated to short
# ones).
# FLOPs per forward's; share
FLASH = {"_flash_attention_forward": (1.0, 0.38), "_flash_attention_backward": (2.5, 0.25)}
# touch what they choose alone
CHOOSE = {"embedding", "index_select", "gather", "index", "index_put_", "scatter_add_"}
FILL = {"zeros", "zeros_like", "new_zeros", "zero_", "fill_", "full", "full_like", "ones_like", "arange"}
ALLOCATE = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "resize_"}


@dataclass
class Rates:
    """FLOP/s of a large matrix product, B/s of a large copy."""

    matmul: float
    copy: float


class Roofline(TorchDispatchMode):
    """Seconds of the operators inside, by name.

    seen: keys that the queries of a packed stream see, all together; held: tokens that a slot holds, in
    decoding.
    """

    def __init__(self, rates: Rates, seen: int = 0, held: int = 0):
        super().__init__()
        self.rates, self.seen, self.held = rates, seen, held
        self.seconds: Counter = Counter()
        self.kernels = 0

    @property
    def total(self) -> float:
        return sum(self.seconds.values())

    def add(self, other: "Roofline") -> "Roofline":
        self.seconds += other.seconds
        self.kernels += other.kernels
        return self

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it comes back as operators on what this rank holds
        result = func(*args, **(kwargs or {}))
        given = {name: value for name, value in (kwargs or {}).items() if name != "out"}
        inputs, outputs = (
            [x for x in tree_leaves(tree) if isinstance(x, FakeTensor)] for tree in ((args, given), result)
        )
        name = func._schema.name.split("::")[1]
        if not outputs and func._schema.is_mutable:  # torch._foreach_mul_, FSDP's: they return nothing
            written = (kwargs or {}).get("out", args[0] if args else None)
            outputs = [x for x in tree_leaves(written) if isinstance(x, FakeTensor)]
        storages = {x.untyped_storage()._cdata for x in inputs}
        aliases = not func._schema.is_mutable and all(x.untyped_storage()._cdata in storages for x in outputs)
        if outputs and not aliases and name not in ALLOCATE:
            self.seconds[name] += max(self._seconds(name, inputs, outputs), KERNEL)
            self.kernels += 1
        return result

    def _seconds(self, name: str, inputs: list[Tensor], outputs: list[Tensor]) -> float:
        if name == "_flash_attention_forward" and self.held:
            q, k = inputs[:2]
            return 2 * len(q) * self.held * k[0].numel() * k.element_size() / self.rates.copy
        if name in FLASH:
            q = inputs["backward" in name]
            times, share = FLASH[name]
            return times * 4 * q[0].numel() * self.seen / (share * self.rates.matmul)
        moved = inputs + outputs
        if name in CHOOSE:
            moved = 2 * (inputs[-1:] if name.endswith("_") else outputs)
        elif name in FILL:
            moved = outputs
        elif name == "copy_":
            moved = inputs[1:] + outputs
        operations = 2 * inputs[-2].numel() * inputs[-1].shape[-1] if name == "mm" else 0
        return max(
            operations / self.rates.matmul, sum(x.numel() * x.element_size() for x in moved) / self.rates.copy
        )


def training(shape: Shape, rates: Rates, items: list[Item], budget: int, settings: dict) -> Roofline:
    """A step over all items, the optimizer's part of it included."""
    changes = {f"train.{name}": value for name, value in settings.items()} | {
        "train.logit_chunk": shape.chunk
    }
    config, total = build(changes), Roofline(rates)
    with pretended_ranks(1) as ranks:
        plan = Plan(config, shape.config, ranks)
        with plan.mode, norms_of_a_gpu():
            batches = micro_batches_of(shape, items, budget)
            for k, chosen in enumerate(batches, 1):
                packed, (same, lengths) = pack(chosen), response_places(chosen)
                with Roofline(rates, seen=seen(packed.segments)) as now:
                    logps = response_logps(plan.model, packed, shape.chunk)
                    reference = torch.zeros(same.shape)
                    loss, _ = spin_step(logps, reference, same, lengths, len(items), config.train)
                    backward(config.train, plan.model, loss, ranks, last=k == len(batches))
                total.add(now)
            # DTensor learns the shapes, and would be charged for it
            clip_gradient(plan.model, config.train.max_grad_norm)
            with Roofline(rates) as now:
                clip_gradient(plan.model, config.train.max_grad_norm)
                plan.optimizer.step()
            return total.add(now)


def scoring(shape: Shape, rates: Rates, items: list[Item], budget: int) -> Roofline:
    """The opponent's log-probabilities of all items."""
    total = Roofline(rates)
    with pretended_ranks(1) as ranks:
        plan = Plan(build({}), shape.config, ranks)
        with plan.mode, norms_of_a_gpu(), torch.no_grad():
            for chosen in micro_batches_of(shape, items, budget):
                packed = pack(chosen)
                with Roofline(rates, seen=seen(packed.segments)) as now:
                    response_logps(plan.model, packed, shape.chunk)
                total.add(now)
    return total


def decoding(shape: Shape, rates: Rates, slots: int, held: int) -> Roofline:
    """A greedy token more in each slot, of which each holds `held` tokens."""
    with FakeTensorMode(), norms_of_a_gpu(), torch.no_grad():
        model = Mistral(shape.config).to(torch.bfloat16)
        model.backend = lambda x: "torch-flash"
        cache = KVCache(shape.config, slots, 2 * held, torch.bfloat16)
        tokens = torch.zeros(slots, dtype=torch.int64)
        with Roofline(rates, held=held) as now:
            sample(model(tokens, tokens, None, cache, slots=tokens), 0.0)
    return now


def micro_batches_of(shape: Shape, items: list[Item], budget: int) -> list[list[Item]]:
    """As the trainer makes them on one rank."""
    (batches,) = micro_batches(
        [i.packed_length for i in items], [flops(shape.config, i) for i in items], 1, budget
    )
    return [[items[i] for i in batch] for batch in batches]


def seen(segments: Segments) -> int:
    """Keys that a stream's queries see, all together."""
    lengths = zip(*([b - a for a, b in pairwise(of)] for of in (segments.q_offsets, segments.k_offsets)))
    return sum(q * (k - q) + q * (q + 1) // 2 for q, k in lengths)


def main() -> None:
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("--shape", choices=SHAPES, default="7b")
    arguments.add_argument(
        "--matmul", type=float, default=ASSUMED["matmul"], help="FLOP/s of a large bf16 product"
    )
    arguments.add_argument("--copy", type=float, default=ASSUMED["copy"], help="B/s of a large copy")
    arguments.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = arguments.parse_args()
    if min(options.matmul, options.copy) <= 0:
        raise SystemExit("--matmul and --copy are rates, above 0")
    options.out.mkdir(parents=True, exist_ok=True)
    shape, rates = SHAPES[options.shape], Rates(options.matmul, options.copy)
    items = ultrachat_like(shape, shape.pairs)
    forward = sum(flops(shape.config, item) for item in items) / rates.matmul
    results = {}

    def keep(name: str, of: Roofline, floor: float) -> None:
        most = {operator: round(1e3 * seconds, 3) for operator, seconds in of.seconds.most_common(12)}
        results[name] = {
            "ms": round(1e3 * of.total, 3),
            "floor_ms": round(1e3 * floor, 3),
            "share": round(floor / of.total, 4),
            "kernels": of.kernels,
            "ms_by_operator": most,
        }
        print(
            f"{name}: {of.total * 1e3:.1f} ms, floor {floor * 1e3:.1f} ms: {floor / of.total:.0%}; "
            f"{of.kernels} kernels"
        )
        print(
            "   ",
            ", ".join(f"{operator} {ms / of.total / 1e3:.1%}" for operator, ms in most.items()),
            flush=True,
        )

    for name, (settings, budget) in trainings(shape).items():
        if "compile" not in settings:
            keep(name, training(shape, rates, items, budget, settings), 3 * forward)
    keep("score", scoring(shape, rates, items, shape.budgets[-1]), forward)
    for slots in shape.slots:
        step = decoding(shape, rates, slots, PROMPT + shape.max_new_tokens // 2)
        keep(f"generate, {slots} slots", step, decoding_step(shape, slots, rates.matmul, rates.copy))
    write_whole(options.out / f"roofline-{shape.name}.json", to_json({"rates": vars(rates)} | results))


if __name__ == "__main__":
    main()
