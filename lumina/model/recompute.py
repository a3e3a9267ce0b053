"""Activations computed again in the backward pass: memory for time (Chen et al. 2016, 1604.06174).

`full` keeps a block's input; `selective` also keeps the outputs of its matrix products and of attention, so that
only the cheap operations between them run twice (Korthikanti et al. 2022, 2205.05198). Both keep what the routers
chose: a second choice that differed in one near-tie would send gradients to experts that never saw the token.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import lumina.model.grouped
import lumina.model.router  # noqa: F401 - both register operators in torch.ops.lumina

aten = torch.ops.aten
CHOICES = frozenset({aten.topk.default, aten.sort.default, aten.sort.stable, torch.ops.lumina.count_experts.default})
PRODUCTS = frozenset(
    {
        aten.mm.default,
        aten.addmm.default,
        aten.bmm.default,
        aten.baddbmm.default,
        torch.ops.lumina.grouped_mm.default,
        aten._scaled_dot_product_flash_attention_for_cpu.default,
        aten._scaled_dot_product_flash_attention.default,
        aten._scaled_dot_product_efficient_attention.default,
        aten._scaled_dot_product_cudnn_attention.default,
    }
)
KEPT = {"full": CHOICES, "selective": CHOICES | PRODUCTS}


def recomputed(mode: str, function: Callable[..., Any], *args: Any) -> Any:
    """`function(*args)`, keeping for the backward pass only what `mode` (full, selective) keeps."""
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False, context_fn=_contexts[mode])


def _policy(kept: frozenset[Any], context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in kept else CheckpointPolicy.PREFER_RECOMPUTE


# The compiler warns that what is computed again must not change its input in place. It does not: test_compile.py.
logging.getLogger("torch._higher_order_ops.wrap").addFilter(lambda record: "context_fn" not in record.getMessage())
_contexts = {mode: partial(create_selective_checkpoint_contexts, partial(_policy, kept)) for mode, kept in KEPT.items()}
