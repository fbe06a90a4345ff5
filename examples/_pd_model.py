"""The demo's model: a small Llama with seeded weights, its paged cache, and greedy decoding."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
from typing import TYPE_CHECKING, Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from kvtransfer import KvLayout

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

VOCAB = 4096
PAGE_TOKENS = 16


@dataclasses.dataclass(frozen=True)
class Workload:
    """What all three processes agree on.

    Attributes:
        layers, seed: of the model. About 10 M parameters at 8 layers.
        prompt_tokens: length of the first prompt; each further one is 13 tokens shorter, so that
            requests have unequal numbers of pages and partly filled last pages.
        new_tokens: tokens to generate for each request.
    """

    layers: int
    prompt_tokens: int
    requests: int
    new_tokens: int
    seed: int

    def prompts(self) -> list[list[int]]:
        """Random token ids, the same in every process."""
        source = torch.Generator().manual_seed(self.seed + 1)
        lengths = [max(1, self.prompt_tokens - 13 * i) for i in range(self.requests)]
        return [torch.randint(VOCAB, (n,), generator=source).tolist() for n in lengths]

    def model(self) -> LlamaForCausalLM:
        """The model, float32 on one CPU thread, the same in every process."""
        torch.set_num_threads(1)
        torch.manual_seed(self.seed)
        config = LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=256,
            intermediate_size=768,
            num_hidden_layers=self.layers,
            num_attention_heads=8,
            num_key_value_heads=4,
            head_dim=64,
            max_position_embeddings=self.prompt_tokens + self.new_tokens + 1,
            # Wider than usual: an untrained model must attend to something in particular, or
            # its tokens would hardly depend on the cache that this demo checks by them.
            initializer_range=0.1,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=None,
        )
        return LlamaForCausalLM(config).eval()

    def layout(self) -> KvLayout:
        """How the KV pages of this model lie in memory."""
        return KvLayout(
            layers=self.layers,
            kv_heads=4,
            head_dim=64,
            page_tokens=PAGE_TOKENS,
            dtype="float32",
        )


def fingerprint(model: LlamaForCausalLM) -> str:
    """16 hex digits over every weight."""
    digest = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(weight.contiguous().numpy().data)
    return digest.hexdigest()[:16]


class PagedCache(DynamicCache):  # type: ignore[misc]
    """A cache that also copies each layer's K and V into pages, and says when it has.

    Args:
        pages: tensor of shape (layers, 2, capacity, kv_heads, page_tokens, head_dim).
        indices: the pages of this sequence, in token order.
        layer_ready: called with the layer's number once its pages are complete. The layer's
            attention and MLP are still to be computed then.
    """

    def __init__(
        self, pages: torch.Tensor, indices: Sequence[int], layer_ready: Callable[[int], None]
    ) -> None:
        super().__init__()
        self._pages = pages
        self._indices = torch.tensor(indices)
        self._layer_ready = layer_ready

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        for part, states in enumerate((keys, values)):
            self._pages[layer_idx, part, self._indices] = self._paged(states[0])
        self._layer_ready(layer_idx)
        return keys, values

    def _paged(self, states: torch.Tensor) -> torch.Tensor:
        """(kv_heads, tokens, head_dim) -> (pages, kv_heads, page_tokens, head_dim), zero-padded."""
        heads, tokens, dim = states.shape
        padded = states.new_zeros(heads, len(self._indices) * PAGE_TOKENS, dim)
        padded[:, :tokens] = states
        return padded.view(heads, -1, PAGE_TOKENS, dim).transpose(0, 1)


def cache_from_pages(pages: torch.Tensor, indices: Sequence[int], tokens: int) -> DynamicCache:
    """The cache of the first `tokens` tokens, gathered from pages (see `PagedCache`)."""
    cache = DynamicCache()
    chosen = torch.tensor(indices)
    for layer in range(pages.shape[0]):
        keys, values = (
            pages[layer, part, chosen].transpose(0, 1).flatten(1, 2)[None, :, :tokens].contiguous()
            for part in range(2)
        )
        cache.update(keys, values, layer)
    return cache


def prefill(model: LlamaForCausalLM, prompt: Sequence[int], cache: PagedCache) -> torch.Tensor:
    """Run the prompt. Returns the last token's hidden state, shape (hidden,). Samples nothing."""
    with torch.inference_mode():
        ids = torch.tensor([prompt])
        hidden = model.model(input_ids=ids, past_key_values=cache).last_hidden_state
        return hidden[0, -1].contiguous()


@dataclasses.dataclass(frozen=True)
class Generated:
    """Greedy tokens, and the logit that each of them won with."""

    tokens: list[int]
    logits: list[float]

    def deviation(self, other: Generated) -> float:
        """Largest difference of a logit; infinite where the tokens differ."""
        if self.tokens != other.tokens:
            return math.inf
        return max(abs(a - b) for a, b in zip(self.logits, other.logits, strict=True))


def decode(
    model: LlamaForCausalLM, hidden: torch.Tensor, cache: DynamicCache, new_tokens: int
) -> Generated:
    """Generate greedily, from the prompt's cache and its last hidden state alone."""
    made = Generated([], [])
    with torch.inference_mode():
        logits = model.lm_head(hidden)
        while True:
            best = logits.max(dim=-1)
            made.tokens.append(int(best.indices))
            made.logits.append(float(best.values))
            if len(made.tokens) == new_tokens:
                return made
            ids = torch.tensor([made.tokens[-1:]])
            logits = model(input_ids=ids, past_key_values=cache).logits[0, -1]


def undivided(model: LlamaForCausalLM, prompt: Sequence[int], new_tokens: int) -> Generated:
    """The reference: the same by plain `transformers`, in one process and one call."""
    ids = torch.tensor([prompt])
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return Generated(
        output.sequences[0, len(prompt) :].tolist(), [float(step.max()) for step in output.logits]
    )
