"""What one rank holds of a cache tensor, and where each byte of it is."""

from __future__ import annotations

import dataclasses

from fabric import InvalidArgument

from ._check import check

#: Granule of a tensor that has one item for a whole sequence, however long: the state of a
#: recurrent or linear-attention layer.
SEQUENCE = 0

#: Upper bounds of the fields; they keep every offset of a region below 2**63.
BOUNDS = {
    "layers": 1024,
    "heads": 1024,
    "parts": 2,
    "item_bytes": 1 << 24,
    "granule": 4096,
    "ranks": 1024,
    "page_tokens": 4096,
    "capacity": 1 << 30,
}
MAX_REGION_BYTES = 1 << 56


@dataclasses.dataclass(frozen=True)
class CacheTensor:
    """A tensor that every layer of a model's cache has, whoever holds it.

    An item is what one head keeps of one token: ``head_dim`` values of K, the latent of MLA, the
    scale of an fp8 cache. It is never cut.

    Attributes:
        name: said in errors, such as "kv" or "k_scale".
        layers: how many layers have it, counted without those of another kind.
        heads: of the whole model; 1 where there is nothing to cut (MLA), which every rank then
            holds whole.
        item_bytes: bytes of one item.
        parts: 2 where K and V are two items of the same shape, else 1.
        granule: tokens that can move only together, 1 as a rule; the page where what is in it is
            opaque (packed for a CPU's instructions) or has one value for all (scales per page),
            with `item_bytes` the mean bytes a token; `SEQUENCE` for a state.

    Raises:
        InvalidArgument: a field is out of its bounds; the text starts with its name.
    """

    name: str
    layers: int
    heads: int
    item_bytes: int
    parts: int = 2
    granule: int = 1

    def __post_init__(self) -> None:
        for name in ("layers", "heads", "item_bytes", "parts"):
            check(name, getattr(self, name), 1, BOUNDS[name])
        check("granule", self.granule, 0, BOUNDS["granule"])


@dataclasses.dataclass(frozen=True)
class Shard:
    """What rank `rank` of `ranks` holds of a tensor: pages of all its layers in one region.

    With at least as many heads as ranks, each rank has ``heads / ranks`` of them, in order. With
    more ranks than heads each head is held by ``ranks / heads`` neighbouring ranks, as vLLM and
    SGLang do it. Layers follow each other from `offset` on; a layer of a shard is an array of shape

    - separate: ``(parts, capacity, *page)``
    - joined: ``(capacity, parts, *page)``

    where `page` is ``(heads, page_tokens, item)``, or ``(page_tokens, heads, item)`` token-major.

    Attributes:
        tensor: what it is a shard of.
        page_tokens: tokens of a page; 1 for a state, whose pages are whole states.
        capacity: pages of each layer.
        rank, ranks: its place among those that share a layer (tensor parallelism).
        joined: K and V of a page lie together.
        token_major: a token's heads lie together, and not a head's tokens.
        first_layer, layers: which layers it has (pipeline parallelism); all by default.
        offset: byte of the region where the first of them starts.
        layer_stride: bytes from a layer to the next; 0: they touch.

    Raises:
        InvalidArgument: a field is out of its bounds or does not fit the tensor; the text starts
            with its name.
    """

    tensor: CacheTensor
    page_tokens: int
    capacity: int
    rank: int = 0
    ranks: int = 1
    joined: bool = False
    token_major: bool = False
    first_layer: int = 0
    layers: int = 0
    offset: int = 0
    layer_stride: int = 0

    def __post_init__(self) -> None:
        if not self.layers:
            object.__setattr__(self, "layers", self.tensor.layers - self.first_layer)
        for name in ("page_tokens", "capacity", "ranks", "layers"):
            check(name, getattr(self, name), 1, BOUNDS[name])
        check("rank", self.rank, 0, self.ranks - 1)
        check("first_layer", self.first_layer, 0, self.tensor.layers - self.layers)
        self._check_ranks()
        self._check_pages()
        if not self.layer_stride:
            object.__setattr__(self, "layer_stride", self.layer_bytes)
        check("layer_stride", self.layer_stride, self.layer_bytes, MAX_REGION_BYTES)
        most = MAX_REGION_BYTES - self.layers * self.layer_stride
        if most < 0:
            raise InvalidArgument(
                f"capacity: {self.layers} layers of {self.layer_stride} bytes are more than "
                f"{MAX_REGION_BYTES}"
            )
        check("offset", self.offset, 0, most)

    def _check_ranks(self) -> None:
        heads = self.tensor.heads
        if heads % self.ranks and self.ranks % heads:
            raise InvalidArgument(
                f"ranks: {heads} heads of {self.tensor.name} cannot be shared evenly by "
                f"{self.ranks}"
            )

    def _check_pages(self) -> None:
        granule = self.tensor.granule
        if granule == SEQUENCE and self.page_tokens != 1:
            raise InvalidArgument(
                f"page_tokens: a state such as {self.tensor.name} has pages of 1, not "
                f"{self.page_tokens}"
            )
        if granule > 1 and self.page_tokens % granule:
            raise InvalidArgument(
                f"page_tokens: {self.page_tokens} is no multiple of the {granule} tokens of "
                f"{self.tensor.name} that can move only together"
            )
        if granule > 1 and self.token_major:
            raise InvalidArgument(
                f"token_major: {granule} tokens of a head of {self.tensor.name} must lie together"
            )

    @property
    def copies(self) -> int:
        """Ranks that hold the same heads as this one, with itself."""
        return max(1, self.ranks // self.tensor.heads)

    @property
    def copy(self) -> int:
        """Which of those it is."""
        return self.rank % self.copies

    @property
    def heads(self) -> range:
        """The heads that it holds, by their number in the model."""
        count = max(1, self.tensor.heads // self.ranks)
        first = self.rank // self.copies * count
        return range(first, first + count)

    @property
    def layer_range(self) -> range:
        """The layers that it holds, by their number in the model."""
        return range(self.first_layer, self.first_layer + self.layers)

    @property
    def block_bytes(self) -> int:
        """Bytes of one part of one page."""
        return len(self.heads) * self.page_tokens * self.tensor.item_bytes

    @property
    def page_stride(self) -> int:
        """Bytes from a page of a part to the next page."""
        return self.block_bytes * (self.tensor.parts if self.joined else 1)

    @property
    def part_stride(self) -> int:
        """Bytes from the K of a page to its V."""
        return self.block_bytes * (1 if self.joined else self.capacity)

    @property
    def head_stride(self) -> int:
        """Bytes from a head of a page to the next head."""
        return self.tensor.item_bytes * (1 if self.token_major else self.page_tokens)

    @property
    def token_stride(self) -> int:
        """Bytes from a token of a page to the next token."""
        return self.tensor.item_bytes * (len(self.heads) if self.token_major else 1)

    @property
    def layer_bytes(self) -> int:
        """Bytes of one layer."""
        return self.tensor.parts * self.capacity * self.block_bytes

    def layer_offset(self, layer: int) -> int:
        """Byte of the region where layer `layer` of the model starts.

        Raises:
            InvalidArgument: the shard does not have it.
        """
        if layer not in self.layer_range:
            raise InvalidArgument(
                f"layer: {layer} of {self.tensor.name} is not among {self.layer_range}"
            )
        return self.offset + (layer - self.first_layer) * self.layer_stride

    def pages_for(self, tokens: int) -> int:
        """Pages that hold the first `tokens` tokens of a sequence."""
        if self.tensor.granule == SEQUENCE:
            return min(1, tokens)
        return -(-tokens // self.page_tokens)
