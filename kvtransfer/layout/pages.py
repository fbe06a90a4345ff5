"""How KV pages lie in memory."""

from __future__ import annotations

import dataclasses
import hashlib

import msgpack

from fabric import InvalidArgument

from ._check import check

ITEM_BYTES = {
    "float64": 8,
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "uint8": 1,
}

#: Upper bounds of the fields; they keep every product below 2**63.
BOUNDS = {"layers": 1024, "kv_heads": 1024, "head_dim": 4096, "page_tokens": 4096}

#: Most pages of one region, so that a page row fits the int32 of a paged write.
MAX_CAPACITY = 1 << 30


@dataclasses.dataclass(frozen=True)
class KvLayout:
    """The shape of a KV cache whose region holds `capacity` pages of every layer.

    Layers follow each other. With K and V separate a layer is all its K pages, then all its V
    pages; joined, a page holds the K and then the V of its tokens. Heads come before tokens, so
    the whole region is an array of shape

    - separate: ``(layers, 2, capacity, kv_heads, page_tokens, head_dim)``
    - joined: ``(layers, capacity, 2, kv_heads, page_tokens, head_dim)``

    `capacity` belongs to the region and not to the layout: both sides of a transfer have the
    same layout, but as many pages as they like.

    Raises:
        InvalidArgument: a field is out of its bounds; the text starts with its name.
    """

    layers: int
    kv_heads: int
    head_dim: int
    page_tokens: int
    dtype: str
    joined: bool = False

    def __post_init__(self) -> None:
        for name, bound in BOUNDS.items():
            check(name, getattr(self, name), 1, bound)
        if self.dtype not in ITEM_BYTES:
            raise InvalidArgument(
                f"dtype: must be one of {', '.join(ITEM_BYTES)}, not {self.dtype!r}"
            )
        if type(self.joined) is not bool:
            raise InvalidArgument(f"joined: must be a bool, not {self.joined!r}")

    @property
    def parts(self) -> int:
        """Pieces that a page of one layer has in memory: K and V, or 1 where they are joined."""
        return 1 if self.joined else 2

    @property
    def page_bytes(self) -> int:
        """Bytes of one part of one page of one layer, which lie together: one range."""
        halves = 2 if self.joined else 1
        values = halves * self.kv_heads * self.page_tokens * self.head_dim
        return values * ITEM_BYTES[self.dtype]

    @property
    def fingerprint(self) -> str:
        """16 hex digits that differ wherever two layouts do."""
        fields = msgpack.packb(dataclasses.astuple(self))
        return hashlib.sha256(fields).hexdigest()[:16]

    def pages_for(self, tokens: int) -> int:
        """Pages that hold `tokens` tokens."""
        return -(-tokens // self.page_tokens)

    def layer_bytes(self, capacity: int) -> int:
        """Bytes of one layer in a region of `capacity` pages; the stride from layer to layer."""
        return self.parts * capacity * self.page_bytes

    def region_bytes(self, capacity: int) -> int:
        """Bytes of a region of `capacity` pages."""
        return self.layers * self.layer_bytes(capacity)

    def shape(self, capacity: int) -> tuple[int, int, int, int, int, int]:
        """Shape of a region of `capacity` pages as an array of `dtype`."""
        page = (self.kv_heads, self.page_tokens, self.head_dim)
        if self.joined:
            return (self.layers, capacity, 2, *page)
        return (self.layers, 2, capacity, *page)

    def difference(self, other: KvLayout) -> str | None:
        """Name of the first field in which `other` differs, or None."""
        for field in dataclasses.fields(self):
            if getattr(self, field.name) != getattr(other, field.name):
                return field.name
        return None
