"""Mistral as a flat stream of tokens: no batch dimension, no padding.

T packed tokens, R rows at which something is predicted, H query heads, K key/value heads, D head size, E
width, F feed-forward width, V vocabulary. Parameter names and the rotary layout are Hugging Face's.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from model.attention import Decoding, Segments, attend, attend_cached, attention_ops, choose_backend
from model.config import ModelConfig
from model.kv_cache import KVCache, Prefix


class RMSNorm(nn.Module):
    """Root mean square normalisation (arXiv 1910.07467), computed in fp32."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)  # on a GPU one kernel


def rotary_angles(positions: Tensor, size: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the rotary embedding (arXiv 2104.09864) at integer positions (T,), as `Rotation`
    takes them.
    """
    frequencies = theta ** (-torch.arange(0, size, 2, dtype=torch.float32, device=positions.device) / size)
    angles = positions[:, None, None].float() * frequencies
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)


class Rotation(torch.autograd.Function):
    """Rotate the pairs (x[d], x[d + D/2]) of x (T, heads, D): Hugging Face's split-half layout, in fp32.

    cos, sin: (T, 1, D) fp32, the first half of sin negated. The gradient is rotated back.
    """

    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        rotated = torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)
        # `to` might return its input: see SwiGLU
        return rotated if x.dtype == rotated.dtype else rotated.to(x.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor):
        cos, sin = ctx.saved_tensors
        return (
            torch.addcmul(grad * cos, grad.roll(grad.shape[-1] // 2, -1), sin, value=-1).to(grad.dtype),
            None,
            None,
        )


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.layer, self.head_dim, self.window = layer, config.head_dim, config.sliding_window
        width, size = config.hidden_size, config.head_dim
        self.q_proj = nn.Linear(width, config.num_attention_heads * size, bias=False)
        self.k_proj = nn.Linear(width, config.num_key_value_heads * size, bias=False)
        self.v_proj = nn.Linear(width, config.num_key_value_heads * size, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * size, width, bias=False)

    def project(self, x: Tensor, rope) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries (T, H, D), rotated keys and values (T, K, D)."""
        q, k, v = (
            proj(x).unflatten(-1, (-1, self.head_dim)) for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        return Rotation.apply(q, *rope), Rotation.apply(k, *rope), v

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        backend: str,
        segments: Segments | None,
        step: Decoding | None,
        cache: KVCache | None,
        slots,
        positions,
        prefix: Prefix | None = None,
    ) -> Tensor:
        """What each token takes from those it sees (T, H·D)."""
        if prefix is not None:
            k, v = prefix.before(self.layer, k, v)
        n = 0 if step is None else len(step.lengths)
        parts = []
        if cache is not None:
            cache.write(self.layer, k, v, slots, positions)
            if step is not None:
                parts.append(attend_cached(q[:n], *cache.read(self.layer, n), step, self.window, backend))
        if segments is not None:
            if n:  # a slice from 0 on would cost a copy in the backward pass
                q, k, v = q[n:], k[n:], v[n:]
            parts.append(attend(q, k, v, segments, self.window, backend))
        out = parts[0] if len(parts) == 1 else torch.cat(parts)  # (T, H, D)
        return out.flatten(1)


class SwiGLU(torch.autograd.Function):
    """silu(gate) · up, which keeps gate and up alone for its backward pass: a quarter less than autograd
    would.
    """

    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor) -> Tensor:
        """gate, up: (T, F) → (T, F)"""
        ctx.save_for_backward(gate, up)
        # Not in place: where a forward pass ends with an operator that returns its input, torch 2.11's
        # compile loses the gradient.
        return F.silu(gate) * up

    @staticmethod
    def backward(ctx, grad: Tensor):
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), F.silu(gate).mul_(grad)


class MLP(nn.Module):
    """The feed-forward network, with SwiGLU (arXiv 2002.05202)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(SwiGLU.apply(self.gate_proj(x), self.up_proj(x)))


class Block(nn.Module):
    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.checkpointing = "none"  # what the backward pass recomputes: see RECOMPUTED
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, *context) -> Tensor:
        if self.checkpointing == "none" or not torch.is_grad_enabled():
            return self._forward(x, *context)
        kept: dict = {"context_fn": _keep_products} if self.checkpointing == "selective" else {}
        return checkpoint(self._forward, x, *context, use_reentrant=False, preserve_rng_state=False, **kept)

    def _forward(self, x: Tensor, rope, *context) -> Tensor:
        return self.after(x, self.self_attn.attend(*self.before(x, rope), *context))

    def before(self, x: Tensor, rope) -> tuple[Tensor, Tensor, Tensor]:
        """All that comes before attention. This and `after` have plain tensors alone, so they can be
        compiled.
        """
        return self.self_attn.project(self.input_layernorm(x), rope)

    def after(self, x: Tensor, attended: Tensor) -> Tensor:
        """All that comes after attention."""
        x = x + self.self_attn.o_proj(attended)  # (T, E)
        return x + self.mlp(self.post_attention_layernorm(x))


# Activation checkpointing: what a block's backward pass computes again, and what is kept for it instead.
RECOMPUTED = {
    "none": "nothing",
    "selective": "norms, rotations, SiLU and products of elements; results of matrix products and of "
    "attention are kept",
    "full": "the block, from its input",
}


def _keep_products():
    """For torch.utils.checkpoint: keep what is dear to compute."""
    return create_selective_checkpoint_contexts([torch.ops.aten.mm.default, *attention_ops()])


class Mistral(nn.Module):
    """The decoder with its language-model head. `attention` is a backend of model/attention.py, or "auto"."""

    def __init__(self, config: ModelConfig, attention: str = "auto"):
        super().__init__()
        self.config, self.attention = config, attention
        self.model = nn.ModuleDict(
            {
                "embed_tokens": nn.Embedding(config.vocab_size, config.hidden_size),
                "layers": nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers)),
                "norm": RMSNorm(config.hidden_size, config.rms_norm_eps),
            }
        )
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.get_parameter("model.embed_tokens.weight")

    def draw_weights(self, seed: int) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Each parameter with fresh fp32 values: matrices from N(0, initializer_range²), as Mistral's; norms
        are 1.

        The values depend on the seed and the whole parameters' shapes alone, so a sharded model's parameters
        may be given their rows of them.
        """
        generator = torch.Generator().manual_seed(seed)
        for weight in self.parameters():
            values = torch.ones(weight.shape)
            if weight.dim() > 1:
                values.normal_(0, self.config.initializer_range, generator=generator)
            yield weight, values

    def backend(self, x: Tensor) -> str:
        """The attention backend for activations like x."""
        return choose_backend(self.attention, x.device.type, x.dtype, self.config.head_dim)

    @torch.no_grad()
    def init_weights(self, seed: int) -> "Mistral":
        """Take freshly drawn weights. Returns self."""
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
        prefix: Prefix | None = None,
    ) -> Tensor:
        """Logits, or the log-probabilities of given targets.

        Training and scoring read a packed stream (`segments`). The sampler gives `cache` and `slots` too:
        then rows 0..N-1 are decoding steps of the slots 0..N-1, which see what the cache has for them, and
        the stream of `segments` comes after them, a prefill of other slots; either may be absent.

        Args:
            tokens, positions: (T,) ids, and places in their sequences
            slots: (T,) the cache slot that each token's key and value go to
            at: (R,) the rows to predict from; all if absent
            targets: (R,) ids
            chunk: with `targets`, logits exist for this many rows at a time, never as a whole (R, V) tensor
            prefix: what the whole stream goes on from, where `segments` says so

        Returns: logits (R, V), or with `targets` log p(target) (R,) in nats; both fp32.
        """
        x = self.model["embed_tokens"](tokens)  # (T, E)
        rope = rotary_angles(positions, self.config.head_dim, self.config.rope_theta)
        backend = self.backend(x)
        decoding = len(tokens) - (segments.q_offsets[-1] if segments is not None else 0)
        step = None
        if decoding:
            assert cache is not None
            step = cache.decoding(positions[:decoding])
        for block in self.model["layers"].children():
            x = block(x, rope, backend, segments, step, cache, slots, positions, prefix)
        if at is not None:
            x = x[at]  # (R, E)
        x = self.model["norm"](x)
        if targets is None:
            return self.lm_head(x).float()  # (R, V)
        return TokenLogps.apply(x, self.lm_head.weight, targets, chunk)


class TokenLogps(torch.autograd.Function):
    """log softmax(x Wᵀ)[target] row by row, in fp32, without ever holding more than `chunk` rows of logits.

    The backward pass computes the logits again: d logits = g · (onehot(target) − softmax(logits)).
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, targets: Tensor, chunk: int) -> Tensor:
        """x (R, E), weight (V, E), targets (R,) → (R,) fp32."""
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
        # Summed over the chunks in fp32: in bf16 the later chunks would be rounded away.
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
    """Rows of x, `size` at a time, each with room for their logits, in x's dtype and in fp32: the same room
    every time.
    """
    shape = (min(size, len(x)), len(weight))
    logits, fp32 = x.new_empty(shape), x.new_empty(shape, dtype=torch.float32)
    for start in range(0, len(x), size):
        rows = slice(start, min(start + size, len(x)))
        yield rows, logits[: rows.stop - start], fp32[: rows.stop - start]
