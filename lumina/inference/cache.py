"""Keys and values of earlier tokens, one cache per layer, ragged: a routed block stores only the tokens it took.

Row b of a layer holds `length[b]` entries, each with the position of its token. Slots beyond the length are never
visible: filling holes with zeros would give them softmax mass. A layer has room for what it is expected to store, and
makes more when that is full: depth routing saves memory, not only work.

Shapes: B batch, S new tokens, N stored tokens, G key-value heads, K head dim.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lumina.config.schema.model import ModelConfig
from lumina.model.cost import chosen, is_routed

SPARE_ROOM = 1.5  # times the share that a routed layer was trained to take: the causal rule takes more now and then


class LayerCache:
    """One layer's keys, values and positions, with `room` for so many of the `most` tokens of `batch` sequences."""

    def __init__(self, batch: int, room: int, most: int, kv_heads: int, head_dim: int, like: Tensor) -> None:
        self.most = most
        self.k_BNGK = like.new_zeros(batch, room, kv_heads, head_dim)
        self.v_BNGK = torch.zeros_like(self.k_BNGK)
        self.position_BN = torch.zeros(batch, room, dtype=torch.int64, device=like.device)
        self.length_B = torch.zeros(batch, dtype=torch.int64, device=like.device)
        self.next_position = 0

    def extend(self, k_BSGK: Tensor, v_BSGK: Tensor, keep_BS: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Stores the kept rows; returns the visible part of the cache and who may see what.

        A query sees the stored tokens at or before its own position. A query that was not kept sees the same, or
        nothing at all; its output is discarded by the caller, so it is given one slot to keep its softmax finite.
        """
        B, S = k_BSGK.shape[:2]
        if keep_BS is None:
            keep_BS = torch.ones(B, S, dtype=torch.bool, device=k_BSGK.device)
        position_S = self.next_position + torch.arange(S, device=k_BSGK.device)
        slot_BS = self.length_B.unsqueeze(1) + keep_BS.cumsum(1) - 1
        b, s = keep_BS.nonzero(as_tuple=True)
        n = slot_BS[b, s]
        self.length_B += keep_BS.sum(1)
        N = max(1, int(self.length_B.max()))
        if self.position_BN.shape[1] < N:
            self._make_room(N)
        self.k_BNGK[b, n] = k_BSGK[b, s].to(self.k_BNGK.dtype)
        self.v_BNGK[b, n] = v_BSGK[b, s].to(self.v_BNGK.dtype)
        self.position_BN[b, n] = position_S[s]
        stored_BN = torch.arange(N, device=k_BSGK.device) < self.length_B.unsqueeze(1)
        before_BSN = self.position_BN[:, None, :N] <= position_S[None, :, None]
        mask_BSN = stored_BN.unsqueeze(1) & before_BSN
        mask_BSN[..., 0] |= ~mask_BSN.any(-1)
        return self.k_BNGK[:, :N].to(k_BSGK.dtype), self.v_BNGK[:, :N].to(k_BSGK.dtype), mask_BSN

    def _make_room(self, least: int) -> None:
        """Twice as much as before, or what is needed now, and never more than the context."""
        room = self.position_BN.shape[1]
        more = max(least, min(self.most, 2 * room)) - room
        self.k_BNGK, self.v_BNGK = (F.pad(t, (0, 0, 0, 0, 0, more)) for t in (self.k_BNGK, self.v_BNGK))
        self.position_BN = F.pad(self.position_BN, (0, more))


class Cache:
    """All layers' caches, advanced together."""

    def __init__(self, config: ModelConfig, batch: int, like: Tensor) -> None:
        S = config.seq_len
        routed = min(S, chosen(SPARE_ROOM * config.mod.capacity, S)) if config.mod else S
        rooms = [routed if is_routed(config, layer) else S for layer in range(config.layers)]
        self.layers = [LayerCache(batch, room, S, config.kv_heads, config.head_dim, like) for room in rooms]
        self.capacity = config.seq_len
        self.position = 0

    def advance(self, tokens: int) -> None:
        """Moves on, also the layers that took none of these tokens."""
        self.position += tokens
        for layer in self.layers:
            layer.next_position = self.position

    @property
    def entries(self) -> list[int]:
        """Stored tokens per layer, summed over the batch."""
        return [int(layer.length_B.sum()) for layer in self.layers]
