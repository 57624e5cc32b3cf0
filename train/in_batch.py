"""The end-to-end dictionary: the keys are the batch itself, and the gradient flows through them.

The paper's Figure 2a lets both encoders learn by back-propagation and leaves open whether they are one. Here
f_k is f_q: one network, as InvaSpread and SimCLR have it, with half the parameters of two. Keys are encoded
by their own forward with shuffled BN, so a key and its query never share BN statistics by design.
Legend: N queries on this rank, B keys in the global batch, C dimensions. Source: MoCo, parts 3.2 and 4.1.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from linerate.train.infonce import InfoNce
from linerate.train.negatives import Contrast, KeyDictionary, Lookup


class InBatch(KeyDictionary):
    """K = B keys: a query's own and the K - 1 of the other images, from all ranks. It has no state."""

    has_key_encoder = False
    trains_keys = True

    def open(self, lookup: Lookup) -> Contrast:
        assert lookup.keys is not None
        keys, temperature = lookup.keys, lookup.temperature

        def contrast(queries: Tensor, start: int) -> InfoNce:
            return in_batch_infonce(queries, keys, first=lookup.first + start, temperature=temperature)

        return contrast


def in_batch_infonce(query: Tensor, keys: Tensor, *, first: int, temperature: float) -> InfoNce:
    """InfoNCE whose positive of query i is key first + i and whose negatives are all other keys.

    query: (N, C), keys: (B, C), unit rows; both get a gradient. The N x B logits are in memory: backward
    needs them, and B is a batch. ln(B) at chance.
    """
    logits = query @ keys.T / temperature
    labels = torch.arange(first, first + len(query), device=query.device)
    loss = cross_entropy(logits, labels)
    with torch.no_grad():
        beaten_by = (logits > logits.gather(1, labels[:, None])).sum(1)
        top1, top5 = ((beaten_by < most).to(logits.dtype).mean() for most in (1, 5))
    return InfoNce(loss, top1, top5)
