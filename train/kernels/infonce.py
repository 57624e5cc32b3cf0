"""InfoNCE over the queue in two kernels: loss, gradient to the queries, and the positives' ranks.

Each program holds a block of queries and walks through a range of the keys with an online softmax, so that no
logit reaches the memory; a second kernel puts the ranges together. No atomics: the same input gives the same
bytes. Keys in bfloat16 are widened in registers. Products are fp32, on tensor cores as three tf32 products.
Legend: N queries, K keys, C dimensions, S ranges of keys (splits).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from linerate.train.kernels import Unsuited

MAX_DIM = 256
_BLOCK_K = 64


@triton.jit  # type: ignore[untyped-decorator]
def _sweep(  # type: ignore[no-untyped-def]
    query,
    key,
    queue,
    partial_sums,
    partial_rows,
    num,
    num_keys,
    dim,
    keys_per_split,
    queue_stride,
    inverse_temperature,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(1)
    columns = tl.arange(0, BLOCK_C)
    inside = (rows < num)[:, None] & (columns < dim)[None, :]
    at = rows[:, None] * dim + columns[None, :]
    q = tl.load(query + at, mask=inside, other=0.0) * inverse_temperature
    positive = tl.sum(q * tl.load(key + at, mask=inside, other=0.0), axis=1)
    # The positive is one of the logits, so the maximum may start there.
    maximum = positive
    total = tl.zeros([BLOCK_N], dtype=tl.float32)
    beaten_by = tl.zeros([BLOCK_N], dtype=tl.float32)
    weighted = tl.zeros([BLOCK_N, BLOCK_C], dtype=tl.float32)
    first = split * keys_per_split
    last = tl.minimum(first + keys_per_split, num_keys)
    for start in range(first, last, BLOCK_K):
        places = start + tl.arange(0, BLOCK_K)
        valid = places < last
        k = tl.load(
            queue + places.to(tl.int64)[:, None] * queue_stride + columns[None, :],
            mask=valid[:, None] & (columns < dim)[None, :],
            other=0.0,
        ).to(tl.float32)
        logits = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        logits = tl.where(valid[None, :], logits, float("-inf"))
        beaten_by += tl.sum((logits > positive[:, None]).to(tl.float32), axis=1)
        higher = tl.maximum(maximum, tl.max(logits, axis=1))
        weights = tl.exp(logits - higher[:, None])
        shrink = tl.exp(maximum - higher)
        total = total * shrink + tl.sum(weights, axis=1)
        weighted = weighted * shrink[:, None] + tl.dot(weights, k, input_precision=PRECISION)
        maximum = higher
    place = split * num + rows
    splits = tl.num_programs(1)
    tl.store(partial_sums + place, maximum, mask=rows < num)
    tl.store(partial_sums + splits * num + place, total, mask=rows < num)
    tl.store(partial_sums + 2 * splits * num + place, beaten_by, mask=rows < num)
    tl.store(partial_rows + place.to(tl.int64)[:, None] * dim + columns[None, :], weighted, mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _combine(  # type: ignore[no-untyped-def]
    query,
    key,
    partial_sums,
    partial_rows,
    gradient,
    found,
    num,
    dim,
    splits,
    inverse_temperature,
    BLOCK_C: tl.constexpr,
):
    row = tl.program_id(0)
    columns = tl.arange(0, BLOCK_C)
    inside = columns < dim
    q = tl.load(query + row * dim + columns, mask=inside, other=0.0) * inverse_temperature
    k = tl.load(key + row * dim + columns, mask=inside, other=0.0)
    positive = tl.sum(q * k, axis=0)
    maximum = positive
    total = tl.exp(positive - maximum)
    beaten_by = total * 0.0
    weighted = tl.zeros([BLOCK_C], dtype=tl.float32)
    for split in range(0, splits):
        place = split * num + row
        its_maximum = tl.load(partial_sums + place)
        higher = tl.maximum(maximum, its_maximum)
        shrink = tl.exp(maximum - higher)
        its_shrink = tl.exp(its_maximum - higher)
        total = total * shrink + tl.load(partial_sums + splits * num + place) * its_shrink
        beaten_by += tl.load(partial_sums + 2 * splits * num + place)
        its_rows = tl.load(partial_rows + place.to(tl.int64) * dim + columns, mask=inside, other=0.0)
        weighted = weighted * shrink + its_rows * its_shrink
        maximum = higher
    own = tl.exp(positive - maximum) / total
    slope = (weighted / total + (own - 1.0) * k) * (inverse_temperature / num)
    tl.store(gradient + row * dim + columns, slope, mask=inside)
    tl.store(found + row, maximum - positive + tl.log(total))
    tl.store(found + num + row, (beaten_by < 1).to(tl.float32))
    tl.store(found + 2 * num + row, (beaten_by < 5).to(tl.float32))


def infonce_kernels(
    query: Tensor, key: Tensor, negatives: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss, its gradient to the queries (N, C), top1 and top5; two launches and three means.

    query, key: (N, C) float32; negatives: (K, C) float32 or bfloat16; C at most 256. Partial sums take at
    most 6 % of N x K floats, or 4 MiB. Raises Unsuited for other tensors.
    """
    _require_suited(query, key, negatives)
    query, key = query.contiguous(), key.contiguous()
    if negatives.stride(1) != 1:
        negatives = negatives.contiguous()
    (num, dim), num_keys = query.shape, len(negatives)
    block_n, splits = tiling(num, num_keys, dim, num_sms=_num_sms(query.device))
    # Whole blocks to each range; the last one may get fewer.
    keys_per_split = triton.cdiv(triton.cdiv(num_keys, splits), _BLOCK_K) * _BLOCK_K
    splits = max(1, triton.cdiv(num_keys, keys_per_split))
    sums, rows = query.new_empty(3, splits, num), query.new_empty(splits, num, dim)
    gradient, found = torch.empty_like(query), query.new_empty(3, num)
    block_c = max(16, triton.next_power_of_2(dim))
    _sweep[(triton.cdiv(num, block_n), splits)](
        query,
        key,
        negatives,
        sums,
        rows,
        num,
        num_keys,
        dim,
        keys_per_split,
        negatives.stride(0),
        1.0 / temperature,
        BLOCK_N=block_n,
        BLOCK_K=_BLOCK_K,
        BLOCK_C=block_c,
        PRECISION="tf32x3",
        num_warps=4 if block_c < MAX_DIM else 8,
        num_stages=2,
    )
    _combine[(num,)](
        query, key, sums, rows, gradient, found, num, dim, splits, 1.0 / temperature, BLOCK_C=block_c
    )
    # Three means, not views of one: the outputs of an operator share no memory.
    return found[0].mean(), gradient, found[1].mean(), found[2].mean()


def tiling(num: int, num_keys: int, dim: int, *, num_sms: int) -> tuple[int, int]:
    """Queries of a program, and into how many ranges the keys are cut so that two programs share an SM."""
    block_n = 64 if num >= 1024 else 32 if num > 16 else 16
    wanted = triton.cdiv(2 * num_sms, triton.cdiv(num, block_n))
    # The ranges' partial rows: 6 % of the logits, or 4 MiB where that is more.
    affordable = max(num_keys * 6 // (100 * dim), 2**20 // (num * dim))
    return block_n, max(1, min(wanted, affordable, triton.cdiv(num_keys, _BLOCK_K)))


def _require_suited(query: Tensor, key: Tensor, negatives: Tensor) -> None:
    if query.dtype != torch.float32 or key.dtype != torch.float32:
        raise Unsuited(f"queries and keys are {query.dtype} and {key.dtype}, it takes float32")
    if negatives.dtype not in (torch.float32, torch.bfloat16):
        raise Unsuited(f"negatives are {negatives.dtype}, it takes float32 and bfloat16")
    if query.shape[1] > MAX_DIM:
        raise Unsuited(f"C={query.shape[1]} is above the {MAX_DIM} that it holds in registers")


def _num_sms(device: torch.device) -> int:
    if device.type != "cuda":
        return 4
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
