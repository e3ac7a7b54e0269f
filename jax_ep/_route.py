"""Routing: which row of which rank each (token, k) goes to."""

from __future__ import annotations

from jax_ep import _ffi, _reference


def route(spec, topk_ids):
    """Exchanges `topk_ids` int32 [T, K] between the ranks and lays out every rank's rows.

    Returns (routing, num_tokens_per_expert [L], offsets [G + 1], num_dropped [], recv_topk_ids [C, K] or None).
    All integers: nothing here is differentiated.
    """
    if spec.is_reference:
        return _reference.route(spec, topk_ids)
    tables, num_tokens_per_expert, offsets, num_dropped, recv_topk_ids = _ffi.route(spec, topk_ids)
    return tables, num_tokens_per_expert, offsets, num_dropped, recv_topk_ids if recv_topk_ids.size else None
