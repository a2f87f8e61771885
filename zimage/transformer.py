"""The Z-Image diffusion transformer, after the published model (diffusers' `ZImageTransformer2DModel`).

Shapes: B batch, C channels, H x W latent rows and columns, L tokens, D width, N heads, F caption width.
Module attributes carry the checkpoint's names, so a checkpoint's tensors load under the names they have.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

from zimage import caching, kernels, launching
from zimage.config import (
    FINAL_NORM_EPS,
    QK_NORM_EPS,
    TIMESTEP_HIDDEN,
    TIMESTEP_WIDTH,
    TransformerConfig,
)
from zimage.errors import InputError, require_seed
from zimage.kernels import flash, heads, stream
from zimage.modulation import Modulation, Modulations, Stacked
from zimage.patchify import PUBLISHED, Geometry, Layout, geometry, patchify, unpatchify

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

Captions = mx.array | Sequence[mx.array]


def _timestep_frequencies() -> mx.array:
    half = TIMESTEP_WIDTH // 2
    # The reference rounds the exponent to fp32 and so do we; exp itself in fp64, because MLX's fp32 exp differs from
    # torch's by enough to move the model's output by 3e-5.
    exponent = np.float32(-np.log(10000.0)) * np.arange(half, dtype=np.float32) / np.float32(half)
    return mx.array(np.exp(exponent.astype(np.float64)).astype(np.float32))


class TimestepEmbedder(nn.Module):
    """Sinusoids of a timestep through a two-layer MLP: [B] -> [B, temb_dim]."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.mlp = [
            kernels.Linear(TIMESTEP_WIDTH, TIMESTEP_HIDDEN),
            nn.SiLU(),
            kernels.Linear(TIMESTEP_HIDDEN, config.temb_dim),
        ]
        self._frequencies = _timestep_frequencies()

    def __call__(self, t: mx.array, dtype: mx.Dtype) -> mx.array:
        angles = t.astype(mx.float32)[:, None] * self._frequencies
        # The cast keeps an fp32 embedding from promoting every activation after it.
        x = mx.concatenate([mx.cos(angles), mx.sin(angles)], axis=-1).astype(dtype)
        return reduce(lambda y, layer: layer(y), self.mlp, x)


class Attention(nn.Module):
    """Self-attention with QK norm and RoPE: [B, L, D] -> [B, L, D]. Grouped-query where n_kv_heads < n_heads."""

    norm_then_rotate = staticmethod(heads.norm_then_rotate)  # `fusing` puts a kernel in its place
    attend_to_all = staticmethod(flash.attend)  # and in this one's

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        D, head_dim = config.dim, config.head_dim
        self.n_heads, self.n_kv_heads, self.head_dim = config.n_heads, config.n_kv_heads, head_dim
        self.to_q = kernels.Linear(D, self.n_heads * head_dim, bias=False)
        self.to_k = kernels.Linear(D, self.n_kv_heads * head_dim, bias=False)
        self.to_v = kernels.Linear(D, self.n_kv_heads * head_dim, bias=False)
        self.to_out = [kernels.Linear(D, D, bias=False)]
        if config.qk_norm:
            self.norm_q = nn.RMSNorm(head_dim, eps=QK_NORM_EPS)
            self.norm_k = nn.RMSNorm(head_dim, eps=QK_NORM_EPS)

    def heads(self, x: mx.array) -> mx.array:
        """A projection's output [B, L, N * head_dim] as [B, L, N, head_dim]."""
        return x.reshape(*x.shape[:2], -1, self.head_dim)

    def project(self, x: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        """Queries [B, L, n_heads, head_dim], keys and values [B, L, n_kv_heads, head_dim]."""
        return self.heads(self.to_q(x)), self.heads(self.to_k(x)), self.heads(self.to_v(x))

    def norm(self, q: mx.array, k: mx.array) -> tuple[mx.array, mx.array]:
        """QK norm over each head, where the config has it."""
        return (self.norm_q(q), self.norm_k(k)) if "norm_q" in self else (q, k)

    def turned(self, q: mx.array, k: mx.array, rotation: mx.array) -> tuple[mx.array, mx.array]:
        """Queries and keys after QK norm and RoPE."""
        if "norm_q" not in self:
            return heads.rotate(q, rotation), heads.rotate(k, rotation)
        return self.norm_then_rotate(q, k, _norm(self.norm_q), _norm(self.norm_k), rotation)

    def attend(self, q: mx.array, k: mx.array, v: mx.array, mask: mx.array | None) -> mx.array:
        """What every head found, side by side: [B, L, n_heads * head_dim]."""
        scale = self.head_dim**-0.5
        masked = mask is not None  # and then it is of the stream's dtype, which may be wider than q's
        out = flash.attend(q, k, v, scale, _as(mask, q)) if masked else self.attend_to_all(q, k, v, scale)
        return out.reshape(*out.shape[:2], -1)

    def __call__(self, x: mx.array, rotation: mx.array, mask: mx.array | None = None) -> mx.array:
        q, k, v = self.project(x)
        q, k = self.turned(q, k, rotation)
        return self.to_out[0](self.attend(q, k, v, mask))


def _norm(norm: nn.RMSNorm) -> tuple[mx.array, float]:
    return norm.weight, norm.eps


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) * w3 x), [B, L, D] -> [B, L, D]."""

    swiglu = staticmethod(kernels.swiglu)  # `fusing` puts a kernel in its place
    rows_at_once: int | None = None  # `low_memory.chunk_feed_forward` sets it

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.w1 = kernels.Linear(config.dim, config.hidden_dim, bias=False)
        self.w2 = kernels.Linear(config.hidden_dim, config.dim, bias=False)
        self.w3 = kernels.Linear(config.dim, config.hidden_dim, bias=False)

    def gate_and_up(self, x: mx.array) -> tuple[mx.array, mx.array]:
        """The two halves of SwiGLU's input, each [B, L, hidden_dim]."""
        return self.w1(x), self.w3(x)

    def forward(self, x: mx.array) -> mx.array:
        """The output for all of x at once."""
        y: mx.array = self.w2(self.swiglu(*self.gate_and_up(x)))
        return y

    def __call__(self, x: mx.array) -> mx.array:
        return self.forward(x) if self.rows_at_once is None else launching.by_rows(self.forward, x, self.rows_at_once)


class TransformerBlock(nn.Module):
    """Attention and feed-forward between sandwich norms, with AdaLN modulation by the timestep or without."""

    residual_norm_modulate = staticmethod(stream.residual_norm_modulate)  # `fusing` puts a kernel in its place
    compiled = False  # `transforms.compile_blocks` sets it
    modulation_place: int | None = None  # in the stack of all; `transforms.fuse_modulation` sets it
    streamed = False  # of `low_memory.StreamedBlock` it is True: its arrays are not in memory

    def __init__(self, config: TransformerConfig, modulation: bool) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.feed_forward = FeedForward(config)
        self.attention_norm1 = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.attention_norm2 = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.ffn_norm1 = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.ffn_norm2 = nn.RMSNorm(config.dim, eps=config.norm_eps)
        if modulation:
            self.adaLN_modulation = [kernels.Linear(config.temb_dim, 4 * config.dim)]

    def modulation(self, temb: mx.array | Modulation) -> Modulation:
        """Scale and gate of the attention, scale and gate of the feed-forward, each [B, 1, D], gates before tanh.

        temb: the timestep's embedding [B, temb_dim], or what is given back, computed for all blocks at once.
        """
        if isinstance(temb, tuple):
            return temb
        scale_msa, gate_msa, scale_mlp, gate_mlp = mx.split(self.adaLN_modulation[0](temb)[:, None, :], 4, axis=-1)
        return scale_msa, gate_msa, scale_mlp, gate_mlp

    def before_attention(self, x: mx.array, scale: mx.array | None) -> mx.array:
        """The attention's input: the stream normed and modulated."""
        _, normed = self.residual_norm_modulate(x, None, None, None, _norm(self.attention_norm1), scale)
        assert normed is not None
        return normed

    def before_feed_forward(self, x: mx.array, scale: mx.array | None) -> mx.array:
        """The feed-forward's input alone, as `after_attention` gives it with the stream."""
        _, normed = self.residual_norm_modulate(x, None, None, None, _norm(self.ffn_norm1), scale)
        assert normed is not None
        return normed

    def after_attention(
        self, x: mx.array, change: mx.array, gate: mx.array | None, scale: mx.array | None
    ) -> tuple[mx.array, mx.array]:
        """The stream with what the attention gave, and the feed-forward's input."""
        after, before = _norm(self.attention_norm2), _norm(self.ffn_norm1)
        x_new, normed = self.residual_norm_modulate(x, change, gate, after, before, scale)
        assert x_new is not None and normed is not None
        return x_new, normed

    def after_feed_forward(self, x: mx.array, change: mx.array, gate: mx.array | None) -> mx.array:
        """The stream with what the feed-forward gave."""
        x_new, _ = self.residual_norm_modulate(x, change, gate, _norm(self.ffn_norm2), None, None)
        assert x_new is not None
        return x_new

    def after_block(
        self, x: mx.array, change: mx.array, gate: mx.array | None, weight: mx.array, scale: mx.array | None
    ) -> tuple[mx.array, mx.array]:
        """The stream with what the feed-forward gave, and the attention's input of a block with that norm's weight."""
        after, before = _norm(self.ffn_norm2), (weight, self.attention_norm1.eps)
        x_new, normed = self.residual_norm_modulate(x, change, gate, after, before, scale)
        assert x_new is not None and normed is not None
        return x_new, normed

    def __call__(
        self,
        x: mx.array,
        rotation: mx.array,
        mask: mx.array | None = None,
        temb: mx.array | Modulation | None = None,
    ) -> mx.array:
        call: Callable[..., mx.array] = launching.compiled(self, "forward") if self.compiles else self.forward
        return call(x, rotation, mask, temb)

    @property
    def compiles(self) -> bool:
        """Whether it runs compiled: not where parts of it are computed at once, which no compiled function can do."""
        return self.compiled and self.feed_forward.rows_at_once is None

    def joined(
        self,
        x: mx.array,
        rotation: mx.array,
        mask: mx.array | None,
        temb: mx.array | Modulation,
        ahead: "Ahead | None",
        following: "tuple[TransformerBlock, mx.array | Modulation] | None",
    ) -> tuple[mx.array, "Ahead | None"]:
        """The block's output, from what the block before computed `ahead`, and that for the `following` block.

        following: with what it takes as its own temb. What was computed for another block, or for another input than x,
        is left.
        """
        if ahead is not None and not ahead.belongs_to(self, x):
            ahead = None
        modulation = self.modulation(temb) if ahead is None else ahead.modulation
        normed = self.before_attention(x, modulation[0]) if ahead is None else ahead.normed
        its = None if following is None else following[0].modulation(following[1])
        weight = None if following is None else following[0].attention_norm1.weight
        call = launching.compiled(self, "forward_joined") if self.compiles else self.forward_joined
        found = call(x, normed, rotation, mask, modulation[1:], weight, None if its is None else its[0])
        ahead = None if following is None or its is None else Ahead(following[0], found[0], its, found[1])
        return found[0], ahead

    def forward_joined(
        self,
        x: mx.array,
        normed: mx.array,
        rotation: mx.array,
        mask: mx.array | None,
        modulation: tuple[mx.array, mx.array, mx.array],
        weight: mx.array | None,
        scale: mx.array | None,
    ) -> list[mx.array]:
        """The output where the attention's input is known; with the next block's norm and scale also that one's."""
        gate_msa, scale_mlp, gate_mlp = modulation
        attended = self.attention(normed, rotation, mask)
        x, normed = self.after_attention(x, attended, gate_msa, scale_mlp)
        change = self.feed_forward(normed)
        if weight is None:
            return [self.after_feed_forward(x, change, gate_mlp)]
        return list(self.after_block(x, change, gate_mlp, weight, scale))

    def unpacked_bytes(self, itemsize: int) -> int:
        """Bytes that the block's packed weights take unpacked, where products need them so, `itemsize` a weight."""
        parts = [layer for part in (self.attention, self.feed_forward) for layer in part.values()]
        layers = [layer for part in parts for layer in (part if isinstance(part, list) else [part])]
        return sum(layer.unpacked_bytes(itemsize) for layer in layers if isinstance(layer, kernels.QuantizedLinear))

    def forward(
        self, x: mx.array, rotation: mx.array, mask: mx.array | None, temb: mx.array | Modulation | None
    ) -> mx.array:
        """The block's output, [B, L, D]."""
        scale_msa = gate_msa = scale_mlp = gate_mlp = None
        if "adaLN_modulation" in self:
            assert temb is not None
            scale_msa, gate_msa, scale_mlp, gate_mlp = self.modulation(temb)
        attended = self.attention(self.before_attention(x, scale_msa), rotation, mask)
        x, normed = self.after_attention(x, attended, gate_msa, scale_mlp)
        return self.after_feed_forward(x, self.feed_forward(normed), gate_mlp)


@dataclass(frozen=True)
class Ahead:
    """What was computed of a block together with its input x [B, L, D]: its modulation, and its attention's input."""

    block: TransformerBlock
    x: mx.array
    modulation: Modulation
    normed: mx.array

    def belongs_to(self, block: TransformerBlock, x: mx.array) -> bool:
        """Whether it is of this block and this input."""
        return self.block is block and self.x is x


class FinalLayer(nn.Module):
    """Modulated LayerNorm and a projection to patches: [B, L, D] -> [B, L, p * p * C]."""

    def __init__(self, config: TransformerConfig, patch: int) -> None:
        super().__init__()
        self.linear = kernels.Linear(config.dim, patch * patch * config.in_channels)
        self.adaLN_modulation = [nn.SiLU(), kernels.Linear(config.temb_dim, config.dim)]

    def __call__(self, x: mx.array, temb: mx.array) -> mx.array:
        activation, linear = self.adaLN_modulation
        scale = linear(activation(temb))[:, None, :]
        return self.linear(mx.fast.layer_norm(x, None, None, FINAL_NORM_EPS) * (1 + scale))


@dataclass(frozen=True)
class State:
    """What lies between two stages: the inputs, and those activations that later stages still need.

    temb [B, temb_dim]; image [B, L_image, D] and caption [B, L_caption, D] until the first main block joins them into
    joint [B, L_image + L_caption, D]; the modulations of all blocks, where one product gives them; what a joined block
    computes `ahead`, which is no part of its output; velocity [B, C, H, W] at the end.
    """

    latents: mx.array
    timestep: mx.array
    caption_features: Captions
    temb: mx.array | None = None
    modulations: Modulations | None = None
    image: mx.array | None = None
    caption: mx.array | None = None
    joint: mx.array | None = None
    ahead: Ahead | None = None
    velocity: mx.array | None = None

    def arrays(self) -> list[mx.array]:
        """What the stages so far have computed and must be evaluated for their work to be done."""
        first = None if self.modulations is None else self.modulations.pieces[0]  # of one product with the others
        computed = (self.temb, first, self.image, self.caption, self.joint, self.velocity)
        return [a for a in computed if a is not None]

    def of_timestep(self, block: TransformerBlock) -> mx.array | Modulation | None:
        """What a block is given as its temb: its modulation where that is computed already."""
        if self.modulations is None or block.modulation_place is None:
            return self.temb
        return self.modulations.of(block.modulation_place, block.adaLN_modulation[0]) or self.temb


@dataclass(frozen=True)
class Stage:
    """One named step of the forward pass, State -> State."""

    name: str
    run: Callable[[State], State]
    module: nn.Module
    pad_token: mx.array | None = None

    def __call__(self, state: State) -> State:
        return self.run(state)

    @property
    def parameters(self) -> int:
        """How many weights the stage has, counted before quantization packs them."""
        return count_parameters(self.module) + (0 if self.pad_token is None else self.pad_token.size)

    @property
    def weight_bytes(self) -> int:
        """Bytes its weights take as they are stored."""
        return weight_bytes(self.module) + (0 if self.pad_token is None else self.pad_token.nbytes)


class Transformer(nn.Module):
    """A Z-Image DiT. A new one has seeded synthetic weights, scaled so that activations stay near one.

    `model(latents, timestep, caption_features)` takes latents [B, C, H, W], timestep [B] in [0, 1] and caption_features
    [B, L, F] or a list of B arrays [L_i, F]; it gives the velocity [B, C, H, W] with the model's own sign, in the
    weights' dtype. `patch_size` may be left out where the config has one. Raises InputError for inputs of other shapes.
    """

    submission: launching.Policy | None = None  # `transforms.submit_early` and `execution` set it
    kept_captions: caching.KeptCaptions | None = None  # `transforms.keep_captions` sets it
    joined = False  # `transforms.join_blocks` sets it
    stacked_modulation: Stacked | None = None  # `transforms.fuse_modulation` sets it
    compiled = False  # `execution.compile_step` sets it
    layout: Layout = PUBLISHED  # `details` sets it, and in what a trajectory's latents are kept between steps
    latents_dtype: mx.Dtype = mx.float32

    def __init__(self, config: TransformerConfig, seed: int = 0, dtype: mx.Dtype = mx.float32) -> None:
        super().__init__()
        self.config = config
        self.t_embedder = TimestepEmbedder(config)
        self.all_x_embedder = {
            f"{p}-1": kernels.Linear(p * p * config.in_channels, config.dim) for p in config.all_patch_size
        }
        self.cap_embedder = [
            nn.RMSNorm(config.cap_feat_dim, eps=config.norm_eps),
            kernels.Linear(config.cap_feat_dim, config.dim),
        ]
        self.x_pad_token = mx.zeros((1, config.dim))
        self.cap_pad_token = mx.zeros((1, config.dim))
        self.noise_refiner = [TransformerBlock(config, modulation=True) for _ in range(config.n_refiner_layers)]
        self.context_refiner = [TransformerBlock(config, modulation=False) for _ in range(config.n_refiner_layers)]
        self.layers = [TransformerBlock(config, modulation=True) for _ in range(config.n_layers)]
        self.all_final_layer = {f"{p}-1": FinalLayer(config, p) for p in config.all_patch_size}
        self.update(_synthetic(self, seed, dtype))
        self.freeze()

    @property
    def dtype(self) -> mx.Dtype:
        """The dtype of the residual stream."""
        return self.x_pad_token.dtype

    def stages(
        self, latents: mx.array, timestep: mx.array, caption_features: Captions, patch_size: int | None = None
    ) -> list[Stage]:
        """The forward pass for inputs of these shapes, as named steps; `__call__` is their fold over a State."""
        patch = self._patch_size(patch_size)
        lengths = self._check(latents, timestep, caption_features)
        geo = geometry(self.config, (latents.shape[2], latents.shape[3]), patch, lengths, self.layout)
        key = f"{patch}-1"
        steps = [
            Stage("t_embedder", self._embed_timestep, self.t_embedder),
            Stage("x_embedder", self._embed_latents(geo, patch), self.all_x_embedder[key], self.x_pad_token),
        ]
        embedding, *refining = self._caption_stages(geo, caption_features)
        steps.append(embedding)
        for i, block in enumerate(self.noise_refiner):
            steps.append(Stage(f"noise_refiner.{i}", _refine_image(block, geo), block))
        steps += refining
        for i, block in enumerate(self.layers):
            joined = self.joined and not block.streamed
            run = _joined_block(block, geo, self._following(i)) if joined else _main_block(block, geo)
            steps.append(Stage(f"layers.{i}", run, block))
        final = self.all_final_layer[key]
        return [*steps, Stage("final_layer", _finish(final, patch), final)]

    def _in_parts(self) -> bool:
        """Whether some block computes a part of itself at once, whoever calls it: from disk, or some rows at a time."""
        every = [*self.noise_refiner, *self.context_refiner, *self.layers]
        return any(block.streamed or block.feed_forward.rows_at_once is not None for block in every)

    def _following(self, number: int) -> TransformerBlock | None:
        """The main block after that of this number, where its weights are there."""
        following: list[TransformerBlock] = self.layers[number + 1 : number + 2]
        return next((block for block in following if not block.streamed), None)

    def __call__(
        self, latents: mx.array, timestep: mx.array, caption_features: Captions, patch_size: int | None = None
    ) -> mx.array:
        if self.compiled and (self.submission is not None or self.kept_captions is not None or self._in_parts()):
            raise InputError(
                "a step that is compiled as a whole cannot be handed over in parts, wait for parts of itself or keep "
                "captions; leave compile_step or those transforms out, fast among them"
            )
        call: Callable[..., mx.array] = launching.compiled(self, "forward") if self.compiled else self.forward
        return call(latents, timestep, caption_features, patch_size)

    def forward(
        self, latents: mx.array, timestep: mx.array, caption_features: Captions, patch_size: int | None
    ) -> mx.array:
        """The velocity [B, C, H, W]."""
        stages = self.stages(latents, timestep, caption_features, patch_size)
        state = self.through(stages, State(latents, timestep, caption_features))
        assert state.velocity is not None
        return state.velocity

    def through(self, stages: Sequence[Stage], state: State) -> State:
        """The state after stages of this model, handed to the device in parts where the model does that."""
        policy = self.submission
        submit: Callable[..., None] | None = None if policy is None else policy.start()
        for stage in stages:
            state = stage(state)
            if policy is None or submit is None:
                continue
            block = stage.module if isinstance(stage.module, TransformerBlock) else None
            if block is not None or policy.every_stage:
                submit(state.arrays(), 0 if block is None else block.unpacked_bytes(self.dtype.size))
        return state

    def _caption_stages(self, geo: Geometry, captions: Captions) -> list[Stage]:
        """The stages of the caption branch; where its result is kept, the first gives it and the others leave it."""
        steps = [Stage("cap_embedder", self._embed_captions(geo), self.cap_embedder, self.cap_pad_token)]
        for i, block in enumerate(self.context_refiner):
            steps.append(Stage(f"context_refiner.{i}", _refine_caption(block, geo), block))
        kept = self.kept_captions
        if kept is None:
            return steps
        known = kept.get(captions)
        if known is not None:
            steps = [replace(step, run=lambda state: state) for step in steps]
            return [replace(steps[0], run=lambda state: replace(state, caption=known)), *steps[1:]]
        last = steps[-1]

        def run(state: State) -> State:
            state = last(state)
            assert state.caption is not None
            kept.keep(captions, self, state.caption)
            return state

        return [*steps[:-1], replace(last, run=run)]

    def _patch_size(self, patch_size: int | None) -> int:
        known = self.config.all_patch_size
        if patch_size is None:
            if len(known) > 1:
                raise InputError(f"this model has several patch sizes, {list(known)}: say patch_size=")
            return known[0]
        if isinstance(patch_size, bool) or not isinstance(patch_size, int) or patch_size not in known:
            raise InputError(f"patch_size {patch_size!r} is not one of this model's {list(known)}")
        return patch_size

    def _check(self, latents: mx.array, timestep: mx.array, captions: Captions) -> tuple[int, ...]:
        """Token counts of the captions, after refusing inputs of the wrong shape."""
        C, F = self.config.in_channels, self.config.cap_feat_dim
        latent_shape = _shape(latents)
        if len(latent_shape) != 4 or latent_shape[0] < 1 or latent_shape[1] != C:
            raise InputError(f"latents must be an MLX array [B, {C}, H, W], found {_found(latents)}")
        B = latent_shape[0]
        if _shape(timestep) != (B,):
            raise InputError(f"timestep must be an MLX array [{B}], one for each item, found {_found(timestep)}")
        if isinstance(captions, mx.array):
            shapes = [captions.shape[1:]] * captions.shape[0] if captions.ndim == 3 else []
        else:
            shapes = [_shape(c) for c in captions] if isinstance(captions, (list, tuple)) else []
        if len(shapes) != B or any(len(s) != 2 or s[1] != F for s in shapes):
            raise InputError(
                f"caption_features must be an MLX array [{B}, L, {F}] or a list of {B} arrays [L_i, {F}], "
                f"found {_found(captions)}"
            )
        return tuple(s[0] for s in shapes)

    def _embed_timestep(self, state: State) -> State:
        temb = self.t_embedder(state.timestep.astype(mx.float32) * self.config.t_scale, self.dtype)
        stacked = self.stacked_modulation
        return replace(state, temb=temb, modulations=None if stacked is None else stacked.at(temb))

    def _embed_latents(self, geo: Geometry, patch: int) -> Callable[[State], State]:
        def run(state: State) -> State:
            image = self.all_x_embedder[f"{patch}-1"](patchify(state.latents.astype(self.dtype), patch))
            padding = geo.image_length - geo.image_tokens
            if padding:
                pad = mx.broadcast_to(self.x_pad_token, (image.shape[0], padding, image.shape[2]))
                image = mx.concatenate([image, pad], axis=1)
            return replace(state, image=image)

        return run

    def _embed_captions(self, geo: Geometry) -> Callable[[State], State]:
        def run(state: State) -> State:
            norm, linear = self.cap_embedder
            rows = _stack(state.caption_features, self.layout.caption_rows)
            caption = linear(norm(rows.astype(self.dtype)))
            if geo.caption_is_token is not None:
                missing = geo.caption_length - caption.shape[1]
                caption = mx.pad(caption, [(0, 0), (0, missing), (0, 0)])
                caption = mx.where(geo.caption_is_token, caption, self.cap_pad_token)
            return replace(state, caption=caption)

        return run


def _refine_image(block: TransformerBlock, geo: Geometry) -> Callable[[State], State]:
    def run(state: State) -> State:
        assert state.image is not None
        return replace(state, image=block(state.image, geo.image_rotation, None, state.of_timestep(block)))

    return run


def _refine_caption(block: TransformerBlock, geo: Geometry) -> Callable[[State], State]:
    def run(state: State) -> State:
        assert state.caption is not None
        return replace(state, caption=block(state.caption, geo.caption_rotation, _as(geo.caption_mask, state.caption)))

    return run


def _main_block(block: TransformerBlock, geo: Geometry) -> Callable[[State], State]:
    def run(state: State) -> State:
        joint = _joint(state)
        joint = block(joint, geo.joint_rotation, _as(geo.joint_mask, joint), state.of_timestep(block))
        return replace(state, image=None, caption=None, joint=joint)

    return run


def _joined_block(
    block: TransformerBlock, geo: Geometry, following: TransformerBlock | None
) -> Callable[[State], State]:
    def run(state: State) -> State:
        joint = _joint(state)
        known = state.ahead is not None and state.ahead.belongs_to(block, joint)
        temb = state.temb if known else state.of_timestep(block)
        its = None if following is None else state.of_timestep(following)
        assert temb is not None
        mask, after = _as(geo.joint_mask, joint), None if following is None or its is None else (following, its)
        joint, ahead = block.joined(joint, geo.joint_rotation, mask, temb, state.ahead, after)
        return replace(state, image=None, caption=None, joint=joint, ahead=ahead)

    return run


def _joint(state: State) -> mx.array:
    """The joint sequence, which the first main block makes of the other two, image first."""
    if state.joint is not None:
        return state.joint
    assert state.image is not None and state.caption is not None
    return mx.concatenate([state.image, state.caption], axis=1)


def _finish(final: FinalLayer, patch: int) -> Callable[[State], State]:
    def run(state: State) -> State:
        assert state.joint is not None and state.temb is not None
        size = (state.latents.shape[2], state.latents.shape[3])
        tokens = final(state.joint[:, : size[0] * size[1] // patch**2], state.temb)
        return replace(state, temb=None, modulations=None, joint=None, velocity=unpatchify(tokens, size, patch))

    return run


def _shape(value: Any) -> tuple[int, ...]:
    return value.shape if isinstance(value, mx.array) else ()


def _found(value: Any) -> str:
    """What a caller gave instead of arrays of the right shapes, in a few words."""
    if isinstance(value, mx.array):
        return str(list(value.shape))
    if isinstance(value, (list, tuple)) and len(value) <= 16:
        return f"[{', '.join(_found(v) for v in value)}]"
    return type(value).__name__


def _as(mask: mx.array | None, activations: mx.array) -> mx.array | None:
    """A mask as attention takes it beside these activations: additive of their dtype, or boolean as it is."""
    return mask if mask is None or mask.dtype == mx.bool_ else mask.astype(activations.dtype)


def _stack(captions: Captions, least: int) -> mx.array:
    """Captions as one array [B, longest, F] of `least` rows or more, zeros after the shorter ones."""
    if isinstance(captions, mx.array) and captions.shape[1] >= least:
        return captions
    longest = max(least, *(c.shape[0] for c in captions))
    return mx.stack([mx.pad(c, [(0, longest - c.shape[0]), (0, 0)]) for c in captions])


def random_key(seed: int) -> mx.array:
    """MLX's random key of a seed. Raises InputError for what is no seed."""
    require_seed(seed)
    return mx.random.key(seed)


def _synthetic(model: nn.Module, seed: int, dtype: mx.Dtype) -> Any:
    """Seeded weights for every parameter of `model`, not computed until something evaluates them."""
    named = tree_flatten(model.parameters())
    keys = mx.random.split(random_key(seed), len(named))
    weights = []
    for (name, array), key in zip(named, keys, strict=True):
        noise = mx.random.normal(array.shape, dtype=dtype, key=key)
        if name.endswith("pad_token"):
            value = noise
        elif array.ndim == 2:
            value = noise * array.shape[1] ** -0.5
        elif name.endswith("bias"):
            value = noise * 0.02
        else:  # norms
            value = 1 + noise * 0.1
        weights.append((name, value))
    return tree_unflatten(weights)


def _own_arrays(modules: Any) -> list[tuple[nn.Module, str, mx.array]]:
    found = modules.modules() if isinstance(modules, nn.Module) else [m for part in modules for m in part.modules()]
    return [(m, k, v) for m in found for k, v in m.items() if isinstance(v, mx.array) and not k.startswith("_")]


def count_parameters(modules: Any) -> int:
    """Weights of a module, or a list of modules, counted before quantization packs them."""
    total = 0
    for module, name, array in _own_arrays(modules):
        bits = getattr(module, "bits", None)
        if bits is None:
            total += array.size
        elif name == "weight":
            total += array.size * array.itemsize * 8 // bits
        elif name == "bias":
            total += array.size
    return total


def weight_bytes(modules: Any) -> int:
    """Bytes the weights of a module, or a list of modules, take as they are stored."""
    return sum(array.nbytes for _, _, array in _own_arrays(modules))
