"""What the layers of one forward pass share."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from kvfold.runtimes.kernels.packed_tokens import Stored
from kvfold.runtimes.kernels.rotary import Tables
from kvfold.runtimes.transformers.position_tables import PositionTables


class ForwardState:
    """What the layers of one forward pass share: the keys and values of owners, for their readers.

    A plain class on purpose: dictionaries and dataclasses among a module's arguments are rebuilt by FSDP and accelerate, so
    what an owner writes would never reach its readers. A keyword argument, not an attribute, so that gradient checkpointing,
    threads and two forwards before one backward each see their own.
    """

    def __init__(self, rotary: Callable[..., Tables] | None = None, kept: PositionTables | None = None) -> None:
        self.stored: dict[int, tuple[Stored, Stored]] = {}
        self.rotary, self.kept = rotary, kept
        self.past: dict[int, tuple[Stored, Stored] | None] = {}
        self.positions_BS: Tensor | None = None
        self.along_ABT: Tensor | None = None
        self.made: dict[Any, Any] = {}

    def once(self, name: Any, make: Callable[[], Any]) -> Any:
        """What layers share, made by the first that asks."""
        if name not in self.made:
            self.made[name] = make()
        return self.made[name]

    def turns_evenly(self) -> bool:
        """Whether in every row positions follow each other, from the first token on that is no padding."""
        assert self.positions_BS is not None, "positions were seen"
        if self.positions_BS.is_cuda and torch.cuda.is_current_stream_capturing():  # nobody can wait for an answer
            return False
        one_more = self.positions_BS.diff(dim=-1) == 1
        return bool((one_more[..., 1:] >= one_more[..., :-1]).all())

    def note(self, positions_ABT: Tensor) -> None:
        """Where the tokens of this forward stand, perhaps along several axes: what the model's own tables are made for."""
        self.along_ABT = positions_ABT if self.along_ABT is None else self.along_ABT

    def tables_of_all(
        self,
        hidden_BTD: Tensor,
        positions_BT: Tensor | None,
        cache: Any,
        kind: str | None,
        way: tuple[Any, Callable[[Any], Tables]],
    ) -> Tables:
        """cos and sin [B or 1, S, r] of every token that is or was seen, made once per forward, kind of layer and way: its
        name, and what it makes of the rotary module's tables. Of a model that is spread over devices, once for each."""
        (name, finish), device = way, hidden_BTD.device
        cos, sin = self.once(
            ("of all", kind, name), lambda: self._tables(hidden_BTD, positions_BT, cache, kind, name, finish)
        )
        return self.once(("of all", kind, name, device), lambda: (cos.to(device), sin.to(device)))

    def _tables(
        self, hidden_BTD: Tensor, positions_BT: Tensor | None, cache: Any, kind: str | None, name: Any, finish: Any
    ) -> Tables:
        rotary, of_kind = self.rotary, [] if kind is None else [kind]
        positions_BT = positions_BT if self.along_ABT is None else self.along_ABT
        if positions_BT is None or rotary is None or not hasattr(cache, "see"):
            raise ValueError(
                "keys that are rotated on read need the whole ...ForCausalLM model and kvfold's own cache: leave"
                " past_key_values out, or pass kvfold.FoldedCache(model.kv_plan)."
            )
        if self.positions_BS is None:
            self.positions_BS = cache.see(positions_BT, len(hidden_BTD))
        like = torch.empty(0, dtype=hidden_BTD.dtype, device=self.positions_BS.device)
        if self.kept is None or self.positions_BS.ndim != 2 or self.positions_BS.device.type != "cpu":
            made: Tables = finish(self.once(("rotary", kind), lambda: rotary(like, self.positions_BS, *of_kind)))
            return made
        of_all, made_by = (kind, name, hidden_BTD.dtype), rotary.buffers() if isinstance(rotary, nn.Module) else ()
        return self.kept.of(of_all, self.positions_BS, lambda at: finish(rotary(like, at, *of_kind)), tuple(made_by))


def note_positions(rotary: Any, arguments: tuple[Any, ...]) -> None:
    """A hook before the rotary modules of families whose layers are not told positions."""
    if (state := CURRENT_STATE.get()) is not None:
        state.note(arguments[1])


CURRENT_STATE: ContextVar[ForwardState | None] = ContextVar("kvfold_state", default=None)
"""The state of the forward that runs now, for families whose layers drop keyword arguments (BLOOM)."""
