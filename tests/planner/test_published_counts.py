"""Published models, counted from their shapes alone: what their papers call their size comes out."""

from __future__ import annotations

import pytest
from support import model_config

from lumina.model.cost import Cost, count

# Layers, width, heads, key-value heads, head size, ffn, vocabulary, tied; billions published, and their digits.
# PaLM (Chowdhery et al. 2022, 2204.02311, table 1): SwiGLU, multi-query, tied, no biases; its blocks are parallel,
# which takes one of the two norms of a block away. Its digits are those of the matrices: with norms it is 540.36.
PALM = {
    "8B": (32, 4096, 16, 1, 256, 16384, 256_000, True, 8.63, 2),
    "62B": (64, 8192, 32, 1, 256, 32768, 256_000, True, 62.50, 2),
    "540B": (118, 18432, 48, 1, 256, 73728, 256_000, True, 540.35, 2),
}
# Llama (Touvron et al. 2023, 2302.13971, table 2), Llama 2's 70B (2307.09288) with grouped queries.
LLAMA = {
    "7B": (32, 4096, 32, 32, 128, 11008, 32_000, False, 6.7, 1),
    "13B": (40, 5120, 40, 40, 128, 13824, 32_000, False, 13.0, 1),
    "33B": (60, 6656, 52, 52, 128, 17920, 32_000, False, 32.5, 1),
    "2 70B": (80, 8192, 64, 8, 128, 28672, 32_000, False, 69.0, 1),
}


def counted(layers: int, width: int, heads: int, kv: int, head_dim: int, ffn: int, vocab: int, tied: bool) -> Cost:
    shape = {"layers": layers, "width": width, "heads": heads, "kv_heads": kv, "head_dim": head_dim, "ffn": ffn}
    return count(model_config("dense", **shape, vocab=vocab, tied=tied))


@pytest.mark.parametrize("shape", [*PALM.values(), *LLAMA.values()], ids=[*PALM, *LLAMA])
def test_published_totals_come_out_in_all_their_digits(shape: tuple[int, ...]) -> None:
    *dimensions, billions, digits = shape
    cost = counted(*dimensions)  # type: ignore[arg-type]
    matrices = cost.matrices + cost.total - cost.non_embedding
    assert round(matrices / 1e9, digits) == billions
    assert 0 < cost.total - matrices < 1e-4 * cost.total  # the norms


def test_llama_to_the_parameter() -> None:
    """What is ours beyond it is named: two vectors of a head's size a layer, that normalise queries and keys."""
    sizes = {"7B": 6_738_415_616, "13B": 13_015_864_320, "2 70B": 68_976_648_192}  # of the published weights
    for name, published in sizes.items():
        *dimensions, _, _ = LLAMA[name]
        assert counted(*dimensions).total - dimensions[0] * 2 * dimensions[4] == published  # type: ignore[arg-type]


def test_65b_is_rounded_down_in_the_paper() -> None:
    total = counted(80, 8192, 64, 64, 128, 22016, 32_000, False).total
    assert total - 80 * 2 * 128 == 65_285_660_672  # of the published weights; the paper's table says 65.2


def test_the_four_counts_of_one_model() -> None:
    tied, untied = (counted(2, 64, 4, 2, 16, 128, 260, tied) for tied in (True, False))
    table, block = 260 * 64, 2 * (64 * 16 * 2 * 6 + 3 * 64 * 128)
    norms = 2 * (2 * 64 + 2 * 16) + 64
    assert tied.non_embedding == untied.non_embedding == block + norms
    assert tied.total == table + block + norms
    assert untied.total == tied.total + table
    assert tied.active == untied.active == table + block
