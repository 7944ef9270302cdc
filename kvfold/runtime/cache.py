"""The cache of a folded model: exactly the plan's numbers, grown in place, read where they lie."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from kvfold.errors import PlanError
from kvfold.plan import CachePlan, CacheSpec, round_up


class GrowingBuffer:
    """A tensor [B, heads, capacity, width] of which the tokens start:end are live. Growing never touches the live ones."""

    def __init__(self) -> None:
        self.data: Tensor | None = None
        self.start = 0
        self.end = 0

    def append(self, new_BCTR: Tensor, capacity: int) -> None:
        """Write T new tokens behind the live ones, in a storage of at least `capacity` tokens."""
        tokens = new_BCTR.shape[2]
        if self.data is None:
            self.data = new_BCTR.new_empty(*new_BCTR.shape[:2], 0, new_BCTR.shape[3])
        if max(capacity, self.end + tokens) > self.data.shape[2]:
            self._make_room(tokens, capacity)
        if torch.is_grad_enabled() and new_BCTR.requires_grad:
            self._append_differentiably(new_BCTR)
        else:
            self.data[:, :, self.end : self.end + tokens] = new_BCTR
        self.end += tokens

    def view(self) -> Tensor:
        """The live tokens [B, heads, end - start, width], without a copy."""
        assert self.data is not None, "nothing was stored yet"
        return self.data[:, :, self.start : self.end]

    def select(self, rows: Tensor) -> None:
        """Keep these rows of the batch, in this order. The usual beam step that changes nothing copies nothing."""
        if self.data is None:
            return
        identity = torch.arange(self.data.shape[0], device=rows.device)
        if rows.shape != identity.shape or not torch.equal(rows, identity):
            self.data = self.data.index_select(0, rows.to(self.data.device))

    def repeat(self, repeats: int) -> None:
        if self.data is not None:
            self.data = self.data.repeat_interleave(repeats, dim=0)

    @property
    def nbytes(self) -> int:
        return 0 if self.data is None else self.view().numel() * self.data.element_size()

    @property
    def nbytes_allocated(self) -> int:
        return 0 if self.data is None else self.data.untyped_storage().nbytes()

    def _make_room(self, tokens: int, capacity: int) -> None:
        assert self.data is not None
        live = self.view()
        count = live.shape[2]
        room = max(capacity, round_up(count + tokens))
        if room <= self.data.shape[2]:  # a window slid far enough: back to the front of the same storage
            self.data[:, :, :count] = live.clone()
        else:
            B, C, _, R = self.data.shape
            grown = self.data.new_empty(B, C, room, R)
            grown[:, :, :count] = live
            self.data = grown
        self.start, self.end = 0, count

    def _append_differentiably(self, new_BCTR: Tensor) -> None:
        # Writing in place would invalidate what an earlier forward saved for its backward pass.
        assert self.data is not None
        unused = self.data[:, :, self.end + new_BCTR.shape[2] :].detach()
        self.data = torch.cat([self.data[:, :, : self.end], new_BCTR, unused], dim=2)


class GrowingLayer(CacheLayerMixin):
    """What one owning layer stores. Keys and values may differ in head count and width."""

    is_croppable = True
    is_compileable = False  # a growing shape would be compiled again for every block

    def __init__(self, spec: CacheSpec) -> None:
        super().__init__()
        self.spec = spec
        self.is_sliding = spec.window is not None
        self.record_past = False
        self.length = 0
        self.k, self.v = GrowingBuffer(), GrowingBuffer()

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store z [B, C, T, R] and y [B, U, T, V]; return all tokens that the T queries may see."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._check(key_states, value_states)
        self.length += key_states.shape[2]
        if self.spec.window is not None and not self.record_past:
            return self._update_window(key_states, value_states, self.spec.window)
        capacity = self.spec.tokens_allocated(self.length)
        self.k.append(key_states, capacity)
        self.v.append(value_states, capacity)
        if self.spec.window is None:
            return self.k.view(), self.v.view()
        visible = self.spec.window - 1 + key_states.shape[2]
        return self.k.view()[:, :, -visible:], self.v.view()[:, :, -visible:]

    def live(self) -> tuple[Tensor, Tensor] | None:
        """What is stored now, z [B, C, S, R] and y [B, U, S, V]; None if nothing is."""
        if not self.length:
            return None
        visible = slice(None) if self.spec.window is None else slice(-min(self.length, self.spec.window - 1), None)
        return self.k.view()[:, :, visible], self.v.view()[:, :, visible]

    def _update_window(self, key_states: Tensor, value_states: Tensor, window: int) -> tuple[Tensor, Tensor]:
        """Beyond the window only its last tokens are kept; a long prompt passes through without ever being stored whole."""
        full = []
        capacity = self.spec.tokens_allocated(self.length)
        for buffer, new in ((self.k, key_states), (self.v, value_states)):
            if new.shape[2] == 1 or self.length <= window:
                buffer.append(new, capacity)
                full.append(buffer.view())
            else:
                seen = new if buffer.data is None else torch.cat([buffer.view(), new], dim=2)
                full.append(seen)
                buffer.start = buffer.end = 0  # the tokens that stay are written again, from `seen`
                buffer.append(seen[:, :, seen.shape[2] - window + 1 :], capacity)
            buffer.start = max(buffer.start, buffer.end - window + 1)
        return full[0], full[1]

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
        """Keep tokens that left the window until the next crop, as assisted decoding needs."""
        self.record_past = self.is_sliding

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens: -n removes n; a positive n keeps n, as transformers 5.19 still allows."""
        n = -tokens_to_remove if tokens_to_remove <= 0 else max(self.length - tokens_to_remove, 0)
        if self.spec.window is not None and n and self.length >= self.spec.window and not self.record_past:
            raise RuntimeError(
                f"{n} tokens cannot be removed: the sliding window of {self.spec.window} tokens has already forgotten what"
                " would come back into sight. Call activate_past_recording() before generating."
            )
        self.length -= n
        for buffer in (self.k, self.v):
            buffer.end -= n
            if self.spec.window is not None:
                buffer.start = max(buffer.start, buffer.end - self.spec.window + 1)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        for buffer in (self.k, self.v):
            buffer.select(beam_idx)

    batch_select_indices = reorder_cache

    def batch_repeat_interleave(self, repeats: int) -> None:
        for buffer in (self.k, self.v):
            buffer.repeat(repeats)

    def reset(self) -> None:
        self.__init__(self.spec)  # type: ignore[misc]

    @property
    def nbytes(self) -> int:
        """Bytes of the live tokens."""
        return self.k.nbytes + self.v.nbytes

    @property
    def nbytes_allocated(self) -> int:
        """Bytes of the storage: what the plan's `kv_bytes` promises."""
        return self.k.nbytes_allocated + self.v.nbytes_allocated

    def _check(self, z: Tensor, y: Tensor) -> None:
        s = self.spec
        expected = (s.num_kv_heads, s.head_dim, s.num_v_heads, s.v_head_dim)
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
    """One storage per owning layer. Raises PlanError if the plan is one that this runtime does not serve."""

    def __init__(self, plan: CachePlan) -> None:
        if obstacle := plan.servable_by()["transformers"]:
            raise PlanError(obstacle)
        owned = {index: GrowingLayer(spec) for index, spec in enumerate(plan.caches) if spec is not None}
        layers = [owned.get(index) or ReaderLayer(owned[plan.owner(index)]) for index in range(plan.num_layers)]
        super().__init__(layers=layers)
        self.positions = GrowingBuffer() if plan.position_bytes else None

    def see(self, positions_BT: Tensor, rows: int) -> Tensor:
        """Note the positions of new tokens; return those of all tokens [B, S]. Once per forward."""
        assert self.positions is not None, "this plan does not rotate on read"
        new = positions_BT.expand(rows, -1).to(torch.int32)[:, None, :, None]
        self.positions.append(new, round_up(self.positions.end + new.shape[2]))
        return self.positions.view()[:, 0, :, 0].long()

    def crop(self, *args: Any, **kwargs: Any) -> None:
        super().crop(*args, **kwargs)
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
    def nbytes(self) -> int:
        """Bytes of the live tokens of all layers, and of their positions where those are kept."""
        return sum(layer.nbytes for layer in self.owned) + (self.positions.nbytes if self.positions else 0)

    @property
    def nbytes_allocated(self) -> int:
        """Bytes of all storage, unfilled blocks included; equals `plan.kv_bytes(tokens, batch_size=B)`."""
        positions = self.positions.nbytes_allocated if self.positions else 0
        return sum(layer.nbytes_allocated for layer in self.owned) + positions
