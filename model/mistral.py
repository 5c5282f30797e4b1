"""Mistral as a flat stream of tokens: no batch dimension, no padding.

T packed tokens, N of them decoding steps, R predicted tokens, H query heads, K key/value heads, D head size,
E width, F feed-forward width, V vocabulary. Parameter names and the rotary layout are Hugging Face's.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from model.attention import Decoding, Segments, attend, attend_cached, attention_ops, choose_backend
from model.config import ModelConfig
from model.kv_cache import KVCache

RMSNorm = nn.RMSNorm  # arXiv 1910.07467; computes in fp32
# Activation checkpointing: what the backward pass recomputes.
RECOMPUTED = {"none": "nothing", "selective": "all but matrix products and attention", "full": "all"}


@dataclass
class Context:
    """What every block reads besides its input."""

    rope: tuple[Tensor, Tensor]  # from `rotary_angles`
    backend: str  # of attention
    positions: Tensor  # (T,)
    segments: Segments | None  # of the last T - N rows
    step: Decoding | None  # of the first N rows
    cache: KVCache | None
    slots: Tensor | None  # (T,)


class Mistral(nn.Module):
    """The decoder with its language-model head. `attention` is one of model.attention.BACKENDS, or "auto"."""

    def __init__(self, config: ModelConfig, attention: str = "auto"):
        super().__init__()
        self.config, self.attention = config, attention
        embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.model = nn.ModuleDict({"embed_tokens": embedding, "layers": layers, "norm": norm})
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie_weights()

    def tie_weights(self) -> None:
        """Share the embedding's matrix with the head, if the configuration says so."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.get_parameter("model.embed_tokens.weight")

    def draw_weights(self, seed: int) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Each parameter with fresh fp32 values: matrices from N(0, initializer_range²), norms 1, biases 0.

        The values depend only on the seed and the unsharded shapes, so each rank can copy its own rows.
        """
        generator = torch.Generator().manual_seed(seed)
        for name, weight in self.named_parameters():
            values = torch.zeros(weight.shape) if name.endswith(".bias") else torch.ones(weight.shape)
            if weight.dim() > 1:
                values.normal_(0, self.config.initializer_range, generator=generator)
            yield weight, values

    def backend(self, x: Tensor) -> str:
        """The attention backend for activations like x."""
        return choose_backend(self.attention, x.device.type, x.dtype, self.config.head_dim)

    @torch.no_grad()
    def init_weights(self, seed: int) -> "Mistral":
        """Draw new weights. Returns self."""
        for weight, values in self.draw_weights(seed):
            weight.copy_(values)
        return self

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        segments: Segments | None = None,
        cache: KVCache | None = None,
        slots: Tensor | None = None,
        at: Tensor | None = None,
        targets: Tensor | None = None,
        chunk: int = 256,
    ) -> Tensor:
        """Logits (R, V), or with `targets` log p(target) (R,) in nats; both fp32.

        Training and scoring pass a packed stream (`segments`). The sampler also passes `cache` and `slots`:
        rows 0..N-1 are decoding steps of slots 0..N-1, which attend to the cache; the stream of `segments`
        follows them, a prefill of other slots. Either may be absent.

        Args:
            tokens, positions: (T,) ids, and their places in their sequences
            slots: (T,) the cache slot that each token's key and value are written to
            at: (R,) rows to predict from; default: all
            targets: (R,) ids, for which logits are computed `chunk` rows at a time
        """
        x = self.model["embed_tokens"](tokens)  # (T, E)
        rope = rotary_angles(positions, self.config)
        n = len(tokens) - (segments.q_offsets[-1] if segments is not None else 0)
        step = Decoding(positions[:n], cache.longest, cache.length) if cache is not None and n else None
        context = Context(rope, self.backend(x), positions, segments, step, cache, slots)
        for block in self.model["layers"].children():
            x = block(x, context)
        if at is not None:
            x = x[at]  # (R, E)
        x = self.model["norm"](x)
        if targets is None:
            return fp32_logits(x, self.lm_head.weight)  # (R, V)
        return TokenLogps.apply(x, self.lm_head.weight, targets, chunk)


class Block(nn.Module):
    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.checkpointing = "none"  # a key of RECOMPUTED
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        if self.checkpointing == "none" or not torch.is_grad_enabled():
            return self._forward(x, context)
        kept: dict = {"context_fn": _keep_products} if self.checkpointing == "selective" else {}
        return checkpoint(self._forward, x, context, use_reentrant=False, preserve_rng_state=False, **kept)

    def _forward(self, x: Tensor, context: Context) -> Tensor:
        # No names for q, k, v, which would keep them in memory during `after`.
        return self.after(x, self.self_attn.attend(*self.before(x, context.rope), context))

    def before(self, x: Tensor, rope) -> tuple[Tensor, Tensor, Tensor]:
        """Everything before attention. This and `after` take plain tensors, so they can be compiled."""
        return self.self_attn.project(self.input_layernorm(x), rope)

    def after(self, x: Tensor, attended: Tensor) -> Tensor:
        """Everything after attention."""
        x = x + self.self_attn.o_proj(attended)  # (T, E)
        return x + self.mlp(self.post_attention_layernorm(x))


def _keep_products():
    products = [torch.ops.aten.mm.default, torch.ops.aten.addmm.default]
    return create_selective_checkpoint_contexts([*products, *attention_ops()])


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.layer, self.head_dim, self.window = layer, config.head_dim, config.sliding_window
        width, size, bias = config.hidden_size, config.head_dim, config.qkv_bias
        self.q_proj = nn.Linear(width, config.num_attention_heads * size, bias=bias)
        self.k_proj = nn.Linear(width, config.num_key_value_heads * size, bias=bias)
        self.v_proj = nn.Linear(width, config.num_key_value_heads * size, bias=bias)
        self.o_proj = nn.Linear(config.num_attention_heads * size, width, bias=False)
        self.q_norm = RMSNorm(size, config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(size, config.rms_norm_eps) if config.qk_norm else nn.Identity()

    def project(self, x: Tensor, rope) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries (T, H, D), rotated keys and values (T, K, D)."""
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (proj(x).unflatten(-1, (-1, self.head_dim)) for proj in projections)
        return Rotation.apply(self.q_norm(q), *rope), Rotation.apply(self.k_norm(k), *rope), v

    def attend(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
        """Attention of the decoding rows to the cache, and of the stream to itself: (T, H·D)."""
        step, cache = context.step, context.cache
        parts = []
        if cache is not None:
            cache.write(self.layer, k, v, context.slots, context.positions)
            if step is not None:
                n = len(step.lengths)
                k_cache, v_cache = cache.k[self.layer, :n], cache.v[self.layer, :n]  # (N, L, K, D)
                parts.append(attend_cached(q[:n], k_cache, v_cache, step, self.window, context.backend))
                q, k, v = q[n:], k[n:], v[n:]
        if context.segments is not None:
            parts.append(attend(q, k, v, context.segments, self.window, context.backend))
        out = parts[0] if len(parts) == 1 else torch.cat(parts)  # (T, H, D)
        return out.flatten(1)


class MLP(nn.Module):
    """The feed-forward network, with SwiGLU (arXiv 2002.05202)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(SwiGLU.apply(self.gate_proj(x), self.up_proj(x)))


def rotary_angles(positions: Tensor, config: ModelConfig) -> tuple[Tensor, Tensor]:
    """The rotary embedding (arXiv 2104.09864): cos, sin (T, 1, D) fp32, the first half of sin negated."""
    size, device = config.head_dim, positions.device
    frequencies = config.rope_theta ** (-torch.arange(0, size, 2, dtype=torch.float32, device=device) / size)
    if config.rope_scaling:
        frequencies = scaled_frequencies(frequencies, config.rope_scaling)
    angles = positions[:, None, None].float() * frequencies  # (T, 1, D/2)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)


def scaled_frequencies(frequencies: Tensor, scaling: dict) -> Tensor:
    """Rotary frequencies (D/2,) as Llama 3.1 changes them (arXiv 2407.21783) to read longer texts.

    Those with at most low_freq_factor turns in the original length are divided by `factor`, those with more
    than high_freq_factor are kept, and those between are interpolated.
    """
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * (kept + (1 - kept) / scaling["factor"])


class Rotation(torch.autograd.Function):
    """Rotate the pairs (x[d], x[d + D/2]) of x (T, heads, D) by `rotary_angles`, in fp32."""

    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        rotated = torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)
        return rotated if x.dtype == rotated.dtype else rotated.to(x.dtype)  # see SwiGLU: `to` may be a no-op

    @staticmethod
    def backward(ctx, grad: Tensor):
        cos, sin = ctx.saved_tensors
        back = torch.addcmul(grad * cos, grad.roll(grad.shape[-1] // 2, -1), sin, value=-1)
        return back.to(grad.dtype), None, None


class SwiGLU(torch.autograd.Function):
    """silu(gate) · up of gate, up (T, F), which saves less for the backward pass than autograd would."""

    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        # Not in place: torch 2.11's compile loses the gradient if the last operator returns its input.
        return F.silu(gate) * up

    @staticmethod
    def backward(ctx, grad: Tensor):
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), F.silu(gate).mul_(grad)


def fp32_logits(x: Tensor, weight: Tensor) -> Tensor:
    """x Wᵀ (R, V) in fp32: rounded to bf16, the two largest logits of a real model tie at 3% of positions."""
    if x.is_cuda and x.dtype != torch.float32 and not torch.is_grad_enabled():
        return torch.mm(x, weight.T, out_dtype=torch.float32)  # has no derivative, and no kernel for CPUs
    return (x @ weight.T).float()


class TokenLogps(torch.autograd.Function):
    """log softmax(x Wᵀ)[target] (R,) fp32 of x (R, E), weight (V, E), targets (R,), `chunk` rows at a time.

    The backward pass recomputes the logits: d logits = g · (onehot(target) − softmax(logits)).
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, targets: Tensor, chunk: int) -> Tensor:
        logps = torch.empty(len(x), dtype=torch.float32, device=x.device)
        for rows, logits, all_logps in _chunks(x, weight, chunk):
            torch.log_softmax(torch.mm(x[rows], weight.T, out=logits), -1, dtype=torch.float32, out=all_logps)
            logps[rows] = all_logps.gather(-1, targets[rows, None]).squeeze(-1)
        ctx.save_for_backward(x, weight, targets)
        ctx.chunk = chunk
        return logps

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight, targets = ctx.saved_tensors
        x_grad = torch.empty_like(x)
        # Summed over the chunks in fp32: in bf16, rounding would discard the later chunks.
        weight_grad = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        for rows, logits, logits_grad in _chunks(x, weight, ctx.chunk):
            g = grad[rows, None]
            torch.softmax(torch.mm(x[rows], weight.T, out=logits), -1, dtype=torch.float32, out=logits_grad)
            logits_grad = logits_grad.mul_(-g).scatter_add_(-1, targets[rows, None], g).to(x.dtype)
            x_grad[rows] = logits_grad @ weight
            if weight.dtype == torch.float32:
                weight_grad.addmm_(logits_grad.T, x[rows])
            else:
                weight_grad += logits_grad.T @ x[rows]
        return x_grad, weight_grad.to(weight.dtype), None, None


def _chunks(x: Tensor, weight: Tensor, size: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Slices of `size` rows of x, with buffers, which are reused, for logits in x's dtype and in fp32."""
    shape = (min(size, len(x)), len(weight))
    logits, fp32 = x.new_empty(shape), x.new_empty(shape, dtype=torch.float32)
    for start in range(0, len(x), size):
        rows = slice(start, min(start + size, len(x)))
        yield rows, logits[: rows.stop - start], fp32[: rows.stop - start]
