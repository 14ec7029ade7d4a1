"""Triton kernels of ``shared_prefix_attention``, forward and backward; ``triton.py`` launches them.

*Forward* and *grad_query*: a program owns a tile of queries of one head and one group. Tokens of a group are
contiguous, so a tile of completion queries may span several completions: all these tiles but the group's last are full,
however short the completions are. For one query head, a group's completions together read the prompt's keys
ceil(tokens of all completions / BLOCK_M) times; attention over separate sequences reads them ceil(tokens / BLOCK_M)
times for *each* completion. There are two loops. The first needs no mask: it takes the tiles of keys that every query
of the tile sees (the prompt up to its last whole tile, or for a prompt's own queries the whole tiles of keys before
them). The second takes the rest with a mask: the remaining prompt keys, and the keys of each query's own segment up to
the query itself.

*grad_key* and *grad_value*: a program owns a tile of keys. The queries that see a prompt's key are contiguous in the
packed order: from the key itself to the group's end. One program goes through all of them in order, head after head and
completion after completion, so sums over completions need no atomics and give the same bits every time. If that makes
too few programs for the device, the query heads are split over programs that write float32 parts, which are added in
order.

Softmax statistics, scores and sums are in float32. Operands of products have the tensors' own dtype; float32 products
use IEEE precision, never TF32. Tokens and heads are addressed with 64-bit offsets. A head of size 80 or 96 is held as
64 + 16 or 64 + 32 columns, so nothing is padded to 128; other sizes are padded to the next such split. This module is
imported only where Triton kernels run.
"""

from __future__ import annotations

import triton
import triton.language as tl

from balcaprl.kernels.support.triton_products import narrowed, product

_LN2: tl.constexpr = tl.constexpr(0.6931471805599453)
_LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def _load_rows(
    base, begin, end, stride, COLUMN: tl.constexpr, WIDTH: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr,
    CHECK: tl.constexpr,
):  # fmt: skip
    """Loads a tile (BLOCK, WIDTH) of rows from ``begin`` on and columns from COLUMN on.

    Values at or beyond row ``end`` or column SIZE are 0. ``base`` points at row 0. CHECK False means that every row of
    the tile lies before ``end``.
    """
    rows, columns = tl.arange(0, BLOCK), COLUMN + tl.arange(0, WIDTH)
    pointers = base + tl.cast(begin, tl.int64) * stride + (rows[:, None] * stride + columns[None, :])
    if COLUMN + WIDTH > SIZE:
        tile = tl.load(pointers, mask=(begin + rows < end)[:, None] & (columns < SIZE)[None, :], other=0.0)
    elif CHECK:
        tile = tl.load(pointers, mask=(begin + rows < end)[:, None], other=0.0)
    else:
        tile = tl.load(pointers)
    return tile


@triton.jit
def _store_rows(
    base, values, begin, end, stride, COLUMN: tl.constexpr, WIDTH: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr
):
    """Writes a tile (BLOCK, WIDTH), but only rows before ``end`` and columns before SIZE."""
    rows, columns = tl.arange(0, BLOCK), COLUMN + tl.arange(0, WIDTH)
    pointers = base + tl.cast(begin, tl.int64) * stride + (rows[:, None] * stride + columns[None, :])
    mask = (begin + rows < end)[:, None]
    if COLUMN + WIDTH > SIZE:
        mask = mask & (columns < SIZE)[None, :]
    tl.store(pointers, narrowed(values, base.dtype.element_ty), mask=mask)


@triton.jit
def _query_tile(pid, cu_groups, cu_prompts, starts_T, num_tiles, num_kv_heads, repeats, BLOCK_M: tl.constexpr,
                BLOCK_N: tl.constexpr):  # fmt: skip
    """Which queries a program owns, and which keys they see.

    Returns, in this order: query head; key head; first query; end of the queries that may be in the tile (nothing to do
    if it is not above the first query); first key; end of the keys that the first, unmasked loop takes; end of the
    prompt; 1 if the prompt of completion queries ends with a partial tile, otherwise 0; begin and end of the keys that
    need a causal mask.
    """
    head = pid % repeats
    # The last tiles see the most keys, so their programs start first.
    tile = num_tiles - 1 - pid // repeats % num_tiles
    kv_head = pid // repeats // num_tiles % num_kv_heads
    group = pid // repeats // num_tiles // num_kv_heads
    first_key, group_end = tl.load(cu_groups + group), tl.load(cu_groups + group + 1)
    prompt = tl.load(cu_prompts + group + 1) - tl.load(cu_prompts + group)
    prompt_end = first_key + prompt
    prompt_tiles = tl.cdiv(prompt, BLOCK_M)
    is_prompt = tile < prompt_tiles
    begin = tl.where(is_prompt, first_key + tile * BLOCK_M, prompt_end + (tile - prompt_tiles) * BLOCK_M)
    end = tl.where(is_prompt, prompt_end, group_end)
    seen = tl.where(is_prompt, begin - first_key, prompt)
    full_end = first_key + seen // BLOCK_N * BLOCK_N
    tails = tl.where(is_prompt, 0, (prompt % BLOCK_N != 0).to(tl.int32))
    own_begin = tl.where(is_prompt, full_end, tl.load(starts_T + begin, mask=begin < end, other=0))
    own_end = tl.minimum(begin + BLOCK_M, end)
    return kv_head * repeats + head, kv_head, begin, end, first_key, full_end, prompt_end, tails, own_begin, own_end


@triton.jit
def _masked_keys(index, tails, full_end, prompt_end, own_begin, own_end, rows, row_starts, BLOCK_N: tl.constexpr):
    """The index-th tile of the second loop's keys: its begin, its end, and a (BLOCK_M, BLOCK_N) mask of which query
    sees which key."""
    in_tail = index < tails
    begin = tl.where(in_tail, full_end, own_begin + (index - tails) * BLOCK_N)
    end = tl.where(in_tail, prompt_end, own_end)
    keys = begin + tl.arange(0, BLOCK_N)
    own = (keys[None, :] >= row_starts[:, None]) & (keys[None, :] <= rows[:, None])
    return begin, end, (keys < end)[None, :] & (own | in_tail)


@triton.jit
def _scores(x0, x1, y0, y1, D1: tl.constexpr):
    """The product x y^T in float32, summed over both parts of the columns."""
    result = product(x0, tl.trans(y0), None)
    if D1 > 0:
        result = product(x1, tl.trans(y1), result)
    return result


@triton.jit
def _add_products(sum0, sum1, weights, y0, y1, D1: tl.constexpr):
    """Returns sum + weights y for each of the two parts of the columns."""
    weights = narrowed(weights, y0.dtype)
    sum0 = product(weights, y0, sum0)
    if D1 > 0:
        sum1 = product(weights, y1, sum1)
    return sum0, sum1


@triton.jit
def _load_both(base, begin, end, stride, D0: tl.constexpr, D1: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr,
               CHECK: tl.constexpr):  # fmt: skip
    """Loads both parts of a tile's columns. If there is no second part, it returns the first twice."""
    part0 = _load_rows(base, begin, end, stride, 0, D0, SIZE, BLOCK, CHECK)
    part1 = part0
    if D1 > 0:
        part1 = _load_rows(base, begin, end, stride, D0, D1, SIZE, BLOCK, CHECK)
    return part0, part1


@triton.jit
def _zeros_both(BLOCK: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    """Zero sums for both parts of the columns. If there is no second part, its sum is the scalar 0."""
    sum1 = 0.0
    if D1 > 0:
        sum1 = tl.zeros((BLOCK, D1), tl.float32)
    return tl.zeros((BLOCK, D0), tl.float32), sum1


@triton.jit
def _online_softmax(scores, v0, v1, out0, out1, highest, total, D1: tl.constexpr):
    """Updates output, maximum and sum of the online softmax with one tile of scores, given as exponents of 2."""
    higher = tl.maximum(highest, tl.max(scores, axis=1))
    weights = tl.exp2(scores - higher[:, None])
    correction = tl.exp2(highest - higher)
    total = total * correction + tl.sum(weights, axis=1)
    out0 = out0 * correction[:, None]
    if D1 > 0:
        out1 = out1 * correction[:, None]
    out0, out1 = _add_products(out0, out1, weights, v0, v1, D1)
    return out0, out1, higher, total


@triton.jit
def _attend(
    key, value, begin, end, key_stride_T, value_stride_T, seen, q0, q1, out0, out1, highest, total, scale_log2,
    HEAD_DIM: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Updates output, maximum and sum of a tile of queries with the tile of keys from ``begin`` on.

    ``seen`` (BLOCK_M, BLOCK_N) masks which query sees which key; None means a whole tile that all of them see.
    """
    CHECK: tl.constexpr = seen is not None
    k0, k1 = _load_both(key, begin, end, key_stride_T, D0, D1, HEAD_DIM, BLOCK_N, CHECK)
    scores = _scores(q0, q1, k0, k1, D1) * scale_log2
    if CHECK:
        scores = tl.where(seen, scores, float("-inf"))
    v0, v1 = _load_both(value, begin, end, value_stride_T, D0, D1, HEAD_DIM, BLOCK_N, CHECK)
    return _online_softmax(scores, v0, v1, out0, out1, highest, total, D1)


@triton.jit(do_not_specialize=["num_tokens", "num_tiles"])
def _shared_prefix_fwd_kernel(
    query, key, value, out, lse_HT,
    starts_T, cu_groups, cu_prompts,
    query_stride_T, query_stride_H, key_stride_T, key_stride_H, value_stride_T, value_stride_H,
    num_tokens, num_tiles, num_kv_heads, repeats, scale,
    HEAD_DIM: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Writes out (T, H, HEAD_DIM), contiguous, and lse (H, T), natural logarithms, for one tile of queries."""
    head, kv_head, begin, end, first_key, full_end, prompt_end, tails, own_begin, own_end = _query_tile(
        tl.program_id(0), cu_groups, cu_prompts, starts_T, num_tiles, num_kv_heads, repeats, BLOCK_M, BLOCK_N
    )
    if begin >= end:
        return
    key += kv_head.to(tl.int64) * key_stride_H
    value += kv_head.to(tl.int64) * value_stride_H
    query += head.to(tl.int64) * query_stride_H
    q0, q1 = _load_both(query, begin, end, query_stride_T, D0, D1, HEAD_DIM, BLOCK_M, True)
    out0, out1 = _zeros_both(BLOCK_M, D0, D1)
    # Every query sees a key of the first tile, so the maximum is finite from then on.
    highest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    scale_log2 = scale * _LOG2E

    for k_begin in range(first_key, full_end, BLOCK_N):
        out0, out1, highest, total = _attend(
            key, value, k_begin, full_end, key_stride_T, value_stride_T, None, q0, q1, out0, out1, highest, total,
            scale_log2, HEAD_DIM, D0, D1, BLOCK_N
        )  # fmt: skip

    rows = begin + tl.arange(0, BLOCK_M)
    row_starts = tl.load(starts_T + rows, mask=rows < end, other=0)
    for index in range(tails + tl.cdiv(own_end - own_begin, BLOCK_N)):
        k_begin, k_end, seen = _masked_keys(
            index, tails, full_end, prompt_end, own_begin, own_end, rows, row_starts, BLOCK_N
        )
        out0, out1, highest, total = _attend(
            key, value, k_begin, k_end, key_stride_T, value_stride_T, seen, q0, q1, out0, out1, highest, total,
            scale_log2, HEAD_DIM, D0, D1, BLOCK_N
        )  # fmt: skip

    num_heads = num_kv_heads * repeats
    stride = num_heads * HEAD_DIM
    out += head.to(tl.int64) * HEAD_DIM
    _store_rows(out, out0 / total[:, None], begin, end, stride, 0, D0, HEAD_DIM, BLOCK_M)
    if D1 > 0:
        _store_rows(out, out1 / total[:, None], begin, end, stride, D0, D1, HEAD_DIM, BLOCK_M)
    lse_HT += head.to(tl.int64) * num_tokens
    tl.store(lse_HT + rows, (highest + tl.log2(total)) * _LN2, mask=rows < end)


@triton.jit(do_not_specialize=["num_tokens"])
def _shared_prefix_delta_kernel(
    out, grad_out, delta_HT,
    grad_stride_T, grad_stride_H,
    num_tokens, num_heads,
    HEAD_DIM: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Writes delta (H, T) = sum of grad_out * out over a head's columns, for a tile of tokens of one head."""
    head = tl.program_id(0) % num_heads
    begin = tl.program_id(0) // num_heads * BLOCK_T
    out += head.to(tl.int64) * HEAD_DIM
    grad_out += head.to(tl.int64) * grad_stride_H
    o0, o1 = _load_both(out, begin, num_tokens, num_heads * HEAD_DIM, D0, D1, HEAD_DIM, BLOCK_T, True)
    g0, g1 = _load_both(grad_out, begin, num_tokens, grad_stride_T, D0, D1, HEAD_DIM, BLOCK_T, True)
    delta = tl.sum(o0.to(tl.float32) * g0.to(tl.float32), axis=1)
    if D1 > 0:
        delta += tl.sum(o1.to(tl.float32) * g1.to(tl.float32), axis=1)
    rows = begin + tl.arange(0, BLOCK_T)
    tl.store(delta_HT + head.to(tl.int64) * num_tokens + rows, delta, mask=rows < num_tokens)


@triton.jit
def _add_query_gradient(
    key, value, begin, end, key_stride_T, value_stride_T, seen, q0, q1, g0, g1, lse_log2, delta, sum0, sum1, scale_log2,
    HEAD_DIM: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Adds the share of a tile of keys to the gradient of a tile of queries; ``seen`` is as in ``_attend``."""
    CHECK: tl.constexpr = seen is not None
    k0, k1 = _load_both(key, begin, end, key_stride_T, D0, D1, HEAD_DIM, BLOCK_N, CHECK)
    v0, v1 = _load_both(value, begin, end, value_stride_T, D0, D1, HEAD_DIM, BLOCK_N, CHECK)
    scores = _scores(q0, q1, k0, k1, D1) * scale_log2
    if CHECK:
        scores = tl.where(seen, scores, float("-inf"))
    weights = tl.exp2(scores - lse_log2[:, None])
    grad_scores = weights * (_scores(g0, g1, v0, v1, D1) - delta[:, None])
    return _add_products(sum0, sum1, grad_scores, k0, k1, D1)


@triton.jit(do_not_specialize=["num_tokens", "num_tiles"])
def _shared_prefix_dq_kernel(
    query, key, value, grad_out, lse_HT, delta_HT, grad_query,
    starts_T, cu_groups, cu_prompts,
    query_stride_T, query_stride_H, key_stride_T, key_stride_H, value_stride_T, value_stride_H,
    grad_stride_T, grad_stride_H,
    num_tokens, num_tiles, num_kv_heads, repeats, scale,
    HEAD_DIM: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Writes grad_query (T, H, HEAD_DIM), contiguous, for one tile of queries; tiles are formed as in the forward."""
    head, kv_head, begin, end, first_key, full_end, prompt_end, tails, own_begin, own_end = _query_tile(
        tl.program_id(0), cu_groups, cu_prompts, starts_T, num_tiles, num_kv_heads, repeats, BLOCK_M, BLOCK_N
    )
    if begin >= end:
        return
    key += kv_head.to(tl.int64) * key_stride_H
    value += kv_head.to(tl.int64) * value_stride_H
    query += head.to(tl.int64) * query_stride_H
    grad_out += head.to(tl.int64) * grad_stride_H
    q0, q1 = _load_both(query, begin, end, query_stride_T, D0, D1, HEAD_DIM, BLOCK_M, True)
    g0, g1 = _load_both(grad_out, begin, end, grad_stride_T, D0, D1, HEAD_DIM, BLOCK_M, True)
    rows = begin + tl.arange(0, BLOCK_M)
    row_starts = tl.load(starts_T + rows, mask=rows < end, other=0)
    statistics = head.to(tl.int64) * num_tokens + rows
    lse_log2 = tl.load(lse_HT + statistics, mask=rows < end, other=0.0) * _LOG2E
    delta = tl.load(delta_HT + statistics, mask=rows < end, other=0.0)
    sum0, sum1 = _zeros_both(BLOCK_M, D0, D1)
    scale_log2 = scale * _LOG2E

    for k_begin in range(first_key, full_end, BLOCK_N):
        sum0, sum1 = _add_query_gradient(
            key, value, k_begin, full_end, key_stride_T, value_stride_T, None, q0, q1, g0, g1, lse_log2, delta, sum0, sum1,
            scale_log2, HEAD_DIM, D0, D1, BLOCK_N
        )  # fmt: skip

    for index in range(tails + tl.cdiv(own_end - own_begin, BLOCK_N)):
        k_begin, k_end, seen = _masked_keys(
            index, tails, full_end, prompt_end, own_begin, own_end, rows, row_starts, BLOCK_N
        )
        sum0, sum1 = _add_query_gradient(
            key, value, k_begin, k_end, key_stride_T, value_stride_T, seen, q0, q1, g0, g1, lse_log2, delta, sum0, sum1,
            scale_log2, HEAD_DIM, D0, D1, BLOCK_N
        )  # fmt: skip

    stride = num_kv_heads * repeats * HEAD_DIM
    grad_query += head.to(tl.int64) * HEAD_DIM
    _store_rows(grad_query, sum0 * scale, begin, end, stride, 0, D0, HEAD_DIM, BLOCK_M)
    if D1 > 0:
        _store_rows(grad_query, sum1 * scale, begin, end, stride, D0, D1, HEAD_DIM, BLOCK_M)


@triton.jit
def _key_tile(pid, cu_groups, cu_prompts, ends_T, num_tiles, num_kv_heads, BLOCK_N: tl.constexpr):
    """Which keys a program owns, and which queries see them.

    Returns, in this order: key head; first key; end of the keys that may be in the tile (nothing to do if it is not
    above the first key); whether the keys belong to a prompt; end of the queries that see any of the keys.
    """
    tile = pid % num_tiles
    kv_head = pid // num_tiles % num_kv_heads
    group = pid // num_tiles // num_kv_heads
    group_begin, group_end = tl.load(cu_groups + group), tl.load(cu_groups + group + 1)
    prompt = tl.load(cu_prompts + group + 1) - tl.load(cu_prompts + group)
    prompt_end = group_begin + prompt
    prompt_tiles = tl.cdiv(prompt, BLOCK_N)
    is_prompt = tile < prompt_tiles
    begin = tl.where(is_prompt, group_begin + tile * BLOCK_N, prompt_end + (tile - prompt_tiles) * BLOCK_N)
    end = tl.where(is_prompt, prompt_end, group_end)
    last = tl.minimum(begin + BLOCK_N, end) - 1
    # Queries up to the end of the completion see a completion's key; queries up to the end of the group see a prompt's.
    own_end = tl.load(ends_T + last, mask=begin < end, other=0)
    return kv_head, begin, end, is_prompt, tl.where(is_prompt, group_end, own_end)


@triton.jit(do_not_specialize=["num_tokens", "num_tiles"])
def _shared_prefix_dkdv_kernel(
    query, key, value, grad_out, lse_HT, delta_HT, grad_key, grad_value,
    ends_T, cu_groups, cu_prompts,
    query_stride_T, query_stride_H, key_stride_T, key_stride_H, value_stride_T, value_stride_H,
    grad_stride_T, grad_stride_H, part_stride,
    num_tokens, num_tiles, num_kv_heads, repeats, heads_per_part, scale,
    HEAD_DIM: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Writes grad_key and grad_value (parts, T, H_kv, HEAD_DIM), contiguous, for one tile of keys and one part of the
    query heads."""
    part = tl.program_id(1)
    kv_head, begin, end, is_prompt, queries_end = _key_tile(
        tl.program_id(0), cu_groups, cu_prompts, ends_T, num_tiles, num_kv_heads, BLOCK_N
    )
    if begin >= end:
        return
    key += kv_head.to(tl.int64) * key_stride_H
    value += kv_head.to(tl.int64) * value_stride_H
    k0, k1 = _load_both(key, begin, end, key_stride_T, D0, D1, HEAD_DIM, BLOCK_N, True)
    v0, v1 = _load_both(value, begin, end, value_stride_T, D0, D1, HEAD_DIM, BLOCK_N, True)
    dk0, dk1 = _zeros_both(BLOCK_N, D0, D1)
    dv0, dv1 = _zeros_both(BLOCK_N, D0, D1)
    keys = begin + tl.arange(0, BLOCK_N)
    # The mask uses an end per key, not a beginning per query: keys are the rows of ``seen``; a thread holds few rows.
    own_ends = tl.load(ends_T + keys, mask=keys < end, other=0)
    keys_seen_to = tl.where(is_prompt, queries_end, own_ends)
    scale_log2 = scale * _LOG2E

    for repeat in range(part * heads_per_part, tl.minimum((part + 1) * heads_per_part, repeats)):
        head = (kv_head * repeats + repeat).to(tl.int64)
        query_h, grad_h = query + head * query_stride_H, grad_out + head * grad_stride_H
        lse_T, delta_T = lse_HT + head * num_tokens, delta_HT + head * num_tokens

        for q_begin in range(begin, queries_end, BLOCK_M):
            q0, q1 = _load_both(query_h, q_begin, queries_end, query_stride_T, D0, D1, HEAD_DIM, BLOCK_M, True)
            g0, g1 = _load_both(grad_h, q_begin, queries_end, grad_stride_T, D0, D1, HEAD_DIM, BLOCK_M, True)
            rows = q_begin + tl.arange(0, BLOCK_M)
            inside = rows < queries_end
            # Rows past the last query get an infinite log-sum-exp, so their weights are 0.
            lse_log2 = tl.load(lse_T + rows, mask=inside, other=float("inf")) * _LOG2E
            delta = tl.load(delta_T + rows, mask=inside, other=0.0)
            seen = (keys[:, None] <= rows[None, :]) & (rows[None, :] < keys_seen_to[:, None])
            scores = tl.where(seen, _scores(k0, k1, q0, q1, D1) * scale_log2, float("-inf"))
            weights = tl.exp2(scores - lse_log2[None, :])
            dv0, dv1 = _add_products(dv0, dv1, weights, g0, g1, D1)
            grad_scores = weights * (_scores(v0, v1, g0, g1, D1) - delta[None, :])
            dk0, dk1 = _add_products(dk0, dk1, grad_scores, q0, q1, D1)

    stride = num_kv_heads * HEAD_DIM
    offset = part.to(tl.int64) * part_stride + kv_head.to(tl.int64) * HEAD_DIM
    _store_rows(grad_key + offset, dk0 * scale, begin, end, stride, 0, D0, HEAD_DIM, BLOCK_N)
    _store_rows(grad_value + offset, dv0, begin, end, stride, 0, D0, HEAD_DIM, BLOCK_N)
    if D1 > 0:
        _store_rows(grad_key + offset, dk1 * scale, begin, end, stride, D0, D1, HEAD_DIM, BLOCK_N)
        _store_rows(grad_value + offset, dv1, begin, end, stride, D0, D1, HEAD_DIM, BLOCK_N)
