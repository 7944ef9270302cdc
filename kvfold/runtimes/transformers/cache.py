"""The cache of a folded model: exactly the plan's numbers, grown in place, read where they lie."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from kvfold import registry
from kvfold.errors import PlanError
from kvfold.plan.cache_spec import CacheSpec, round_up
from kvfold.plan.plan import CachePlan
from kvfold.runtimes.kernels.packed_tokens import AgedTokens, IndexedTokens, Stored
from kvfold.runtimes.readers.base import Reader
from kvfold.runtimes.transformers.buffers import Buffer, GrowingBuffer
from kvfold.runtimes.transformers.head_runs import RunsMixin
from kvfold.runtimes.transformers.packed_buffers import buffer
from kvfold.runtimes.transformers.recent_buffer import RecentBuffer


class GrowingLayer(RunsMixin, CacheLayerMixin):
    """What one owning layer stores. Keys and values may differ in head count and width."""

    is_croppable = True
    is_compileable = False  # a growing shape would be compiled again for every block

    def __init__(self, spec: CacheSpec) -> None:
        super().__init__()
        self.spec = spec
        self.is_sliding = spec.window is not None
        self.record_past = False
        self.length = 0
        self.start_runs()
        self.k: Buffer = buffer(spec.k_bits)
        self.v: Buffer = self.k if spec.shared_latent else buffer(spec.v_bits)
        finer = spec.recent_sides[: 1 if spec.shared_latent else 2] if spec.recent else ()
        self.recent = [RecentBuffer(side.format, side.width, spec.recent) for side in finer]
        reading = spec.reading
        self.reader: Reader | None = registry.load("readers", reading.rule)(reading) if reading else None
        self.index = [GrowingBuffer(unit) for unit in (self.reader.units if self.reader else ())]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        *args: Any,
        begin_B: Tensor | None = None,
        worth_BCT: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Any, Any]:
        """Store z [B, C, T, E] and y [B, U, T, G]; return all tokens that the T queries may see. A shared latent is
        stored once, and returned as both. begin_B: the column where each sequence begins, behind padding (None: 0).
        worth_BCT: what the tokens are said to be worth, where that decides which stay."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._check(key_states, value_states)
        if self.runs:
            return self._update_kept(key_states, value_states, begin_B, worth_BCT)
        if self.again:
            keys = self.k.beside(key_states)
            return keys, keys if self.v is self.k else self.v.beside(value_states)
        if self.reader:
            return self._noted(*self._append(key_states, value_states), key_states.shape[2])
        if not self.spec.recent:
            return self._append(key_states, value_states)
        R, V = self.spec.head_dim, self.spec.v_head_dim
        new = zip(self.recent, (key_states, value_states), strict=False)
        near = [side.append(states[..., -side.width :], self.record_past) for side, states in new]
        far = self._append(key_states[..., :R], value_states[..., :V])
        k, *v = (AgedTokens(old, new, self.spec.recent) for old, new in zip(far, near, strict=False))
        return k, v[0] if v else k

    def _append(self, key_states: Tensor, value_states: Tensor) -> tuple[Stored, Stored]:
        self.length += key_states.shape[2]
        window, capacity = self.spec.window, self.spec.tokens_allocated(self.length)
        if window is not None and not self.record_past:
            k = self.k.slide(key_states, capacity, window)
            return k, k if self.v is self.k else self.v.slide(value_states, capacity, window)
        self.k.append(key_states, capacity)
        if self.v is not self.k:
            self.v.append(value_states, capacity)
        return self._last(None if window is None else window - 1 + key_states.shape[2])

    def _update_kept(
        self, key_states: Tensor, value_states: Tensor, begin_B: Tensor | None, worth_BCT: Tensor | None
    ) -> tuple[Any, Any]:
        """As `update`, where some tokens are dropped."""
        R, V = self.spec.head_dim, self.spec.v_head_dim
        new = zip(self.recent, (key_states, value_states), strict=False)
        near: list[Any] = [side.append(states[..., -side.width :], self.record_past) for side, states in new]
        k, v = self.update_runs(key_states[..., :R], value_states[..., :V], begin_B, worth_BCT)
        return (k._replace(near=near[0]), v._replace(near=near[-1])) if near else (k, v)

    def _noted(self, k: Stored, v: Stored, new: int) -> tuple[IndexedTokens, Stored]:
        assert self.reader is not None, "steps read some of the tokens"
        self.reader.note(self.index, k, new, self.spec.tokens_allocated(self.length))
        return IndexedTokens(k, tuple(note.tensor() for note in self.index), self.reader), v

    def live(self) -> tuple[Stored, Stored] | None:
        """What is stored now, z [B, C, S, R] and y [B, U, S, V]; None if nothing is."""
        if not self.length:
            return None
        return self._last(None if self.spec.window is None else min(self.length, self.spec.window - 1))

    def _last(self, tokens: int | None) -> tuple[Stored, Stored]:
        k = self.k.view(tokens)
        return k, k if self.v is self.k else self.v.view(tokens)

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1 if self.spec.window is None else self.spec.window

    get_max_cache_shape = get_max_length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(tokens that the next `query_length` queries may see, position of the first of them)."""
        if self.spec.window is None:
            return self.length + query_length, 0
        past = min(self.length, self.spec.window - 1)
        return past + query_length, self.length - past

    def activate_past_recording(self) -> None:
        """Keep tokens that left the window, are no longer recent, or would be dropped, until the next crop: assisted
        decoding needs them."""
        if self.spec.tokens is not None and (self.spec.tokens.scored or self.spec.tokens.foreseen):
            raise RuntimeError(
                "drafts cannot be taken back where tokens are dropped by what they are worth; generate without assisted"
                " decoding."
            )
        self.record_past = self.is_sliding or bool(self.recent) or bool(self.runs)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens: -n removes n; a positive n keeps n, as transformers 5.19 still allows."""
        n = self.removed(tokens_to_remove)
        self.length -= n
        for near in self.recent:
            near.forget(n)
        for side in self.buffers:
            side.forget(n, self.spec.window)
        if self.reader:
            self.reader.forget(self.index, self.length)
        self.settle_runs()

    def removed(self, tokens_to_remove: int) -> int:
        """How many tokens that is. Raises ValueError where there are fewer, RuntimeError if they cannot be taken back."""
        if not self.length:  # of an assistant that leaves early the later layers hold nothing
            return 0
        n = -tokens_to_remove if tokens_to_remove <= 0 else max(self.length - tokens_to_remove, 0)
        if n > self.length:
            raise ValueError(f"{n} tokens cannot be removed from a cache that holds {self.length}.")
        if self.spec.window is not None and n and self.length >= self.spec.window and not self.record_past:
            raise RuntimeError(
                f"{n} tokens cannot be removed: the sliding window of {self.spec.window} tokens has already forgotten what"
                " would come back into sight. Call activate_past_recording() before generating."
            )
        left = max(self.length - n, 0)
        self.check_removal(left)
        if any(max(near.count - n, 0) < min(left, self.spec.recent - 1) for near in self.recent):
            raise RuntimeError(
                f"{n} tokens cannot be removed: those before them are no longer kept in the finer form of the newest"
                f" {self.spec.recent}. Call activate_past_recording() before generating."
            )
        return n

    def reorder_cache(self, beam_idx: Tensor) -> None:
        for side in (*self.buffers, *self.index):
            side.select(beam_idx)
        for near in self.recent:
            near.select(beam_idx)
        for one in self.runs:
            one.select(beam_idx)
        self.begin_B = None if self.begin_B is None else self.begin_B[beam_idx.to(self.begin_B.device)]

    batch_select_indices = reorder_cache

    def batch_repeat_interleave(self, repeats: int) -> None:
        for side in (*self.buffers, *self.index):
            side.repeat(repeats)
        for near in self.recent:
            near.repeat(repeats)
        for one in self.runs:
            one.repeat(repeats)
        self.begin_B = None if self.begin_B is None else self.begin_B.repeat_interleave(repeats)

    def reset(self) -> None:
        self.__init__(self.spec)  # type: ignore[misc]

    @property
    def nbytes(self) -> int:
        """Bytes of the live tokens."""
        return sum(side.nbytes for side in (*self.buffers, *self.index)) + sum(near.nbytes for near in self.recent)

    @property
    def nbytes_allocated(self) -> int:
        """Bytes of the storage: what the plan's `kv_bytes` promises."""
        stored = sum(side.nbytes_allocated for side in (*self.buffers, *self.index))
        return stored + sum(near.nbytes for near in self.recent)

    @property
    def buffers(self) -> tuple[Buffer, ...]:
        """Of keys and of values, or the one of both; run by run where heads keep different tokens."""
        if self.runs:
            return tuple(side for one in self.runs for side in one.buffers)
        return (self.k,) if self.v is self.k else (self.k, self.v)

    def _check(self, z: Tensor, y: Tensor) -> None:
        s = self.spec
        width, v_width = s.made_widths
        expected = (s.num_kv_heads, width, s.num_v_heads, v_width)
        found = (z.shape[1], z.shape[3], y.shape[1], y.shape[3])
        if found != expected:
            raise PlanError(
                f"this cache stores (key heads, width, value heads, width) = {expected} but was given {found}: it was made"
                " for another model."
            )


class ReaderLayer(CacheLayerMixin):
    """The place of a layer that reads another's cache: it stores nothing, and answers questions as its owner does."""

    is_croppable = True
    is_compileable = False

    def __init__(self, owner: GrowingLayer) -> None:
        self.owner, self.is_sliding = owner, owner.is_sliding
        self.keys = self.values = None

    @property
    def is_initialized(self) -> bool:
        return self.owner.is_initialized

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        raise AssertionError("a reader stores nothing")

    update = lazy_initialization

    def get_seq_length(self) -> int:
        return self.owner.get_seq_length()

    def get_max_length(self) -> int:
        return self.owner.get_max_length()

    get_max_cache_shape = get_max_length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.owner.get_mask_sizes(query_length)

    def _nothing(self, *args: Any) -> None:
        """What changes the storage is done by its owner, once."""

    crop = reorder_cache = batch_select_indices = batch_repeat_interleave = _nothing
    reset = activate_past_recording = offload = prefetch = _nothing


class FoldedCache(Cache):
    """One storage per owning layer."""

    def __init__(self, plan: CachePlan) -> None:
        owned = {index: GrowingLayer(spec) for index, spec in enumerate(plan.caches) if spec is not None}
        layers = [owned.get(index) or ReaderLayer(owned[plan.owner(index)]) for index in range(plan.num_layers)]
        super().__init__(layers=layers)
        self.positions = GrowingBuffer() if plan.position_bytes else None

    def see(self, positions_BT: Tensor, rows: int) -> Tensor:
        """Note the positions of new tokens, [B, T] or along several axes [A, B, T]; return those of all tokens, with S for T.
        Once per forward."""
        assert self.positions is not None, "this plan does not rotate on read"
        along_ABT = positions_BT.expand(*positions_BT.shape[:-2], rows, -1).reshape(-1, rows, positions_BT.shape[-1])
        new = along_ABT.transpose(0, 1).to(torch.int32)[..., None]
        self.positions.append(new, round_up(self.positions.end + new.shape[2]))
        seen_ABS = self.positions.tensor()[..., 0].transpose(0, 1).long()
        return seen_ABS if positions_BT.ndim == 3 else seen_ABS[0]

    def crop(self, tokens_to_remove: int) -> None:
        for layer in self.owned:  # all or none
            layer.removed(tokens_to_remove)
        super().crop(tokens_to_remove)
        if self.positions is not None and self.positions.data is not None:
            self.positions.end = self.owned[0].length

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        if self.positions is not None:
            self.positions.select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        if self.positions is not None:
            self.positions.select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        if self.positions is not None:
            self.positions.repeat(repeats)

    def reset(self) -> None:
        super().reset()
        if self.positions is not None:
            self.positions = GrowingBuffer()

    @property
    def owned(self) -> list[GrowingLayer]:
        """The layers that store something."""
        return [layer for layer in self.layers if isinstance(layer, GrowingLayer)]

    @property
    def waits(self) -> bool:
        """Whether a prompt was read of which nothing was chosen yet."""
        return any(layer.waits for layer in self.owned)

    @contextlib.contextmanager
    def reading_again(self) -> Iterator[None]:
        """Tokens see what is held and each other, and are not stored."""
        for layer in self.owned:
            layer.again = True
        try:
            yield
        finally:
            for layer in self.owned:
                layer.again = False

    @property
    def share_read(self) -> float:
        """Of the stored tokens, by the steps of few queries so far, in the mean over them and layers; nan without any."""
        readers = [layer.reader for layer in self.owned if layer.reader]
        steps = sum(reader.steps for reader in readers)
        return float(sum(reader.read for reader in readers) / steps) if steps else math.nan

    @property
    def nbytes(self) -> int:
        """Bytes of the live tokens of all layers, and of their positions where those are kept."""
        return sum(layer.nbytes for layer in self.owned) + (self.positions.nbytes if self.positions else 0)

    @property
    def nbytes_allocated(self) -> int:
        """Bytes of all storage, unfilled blocks included; equals `plan.kv_bytes(tokens, batch_size=B)`."""
        positions = self.positions.nbytes_allocated if self.positions else 0
        return sum(layer.nbytes_allocated for layer in self.owned) + positions
