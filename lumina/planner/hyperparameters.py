"""Learning rate, batch and warm-up as published laws have them: a band, for they differ by a factor of 2 and more.

All were fitted with AdamW. Muon here is scaled so that a step is as large as AdamW's (`match_rms_adamw`, Liu et al.
2025, 2502.16982, who took over AdamW's learning rate), and has the one `train.lr`; no law was fitted to it.
"""

from __future__ import annotations

from typing import NamedTuple

STEP_LAW = "StepLaw"
DEEPSEEK = "DeepSeek LLM"
POWER_LINES = "Power Lines"
SOURCES = {
    STEP_LAW: "Li et al. 2025 (2503.04715)",
    DEEPSEEK: "DeepSeek-AI 2024 (2401.02954), equation 1",
    POWER_LINES: "Bergsma et al. 2025 (2505.13738)",
}
POWER_LINES_SEQUENCE = 2048  # tokens of the sequences in which it counts batches


class Band(NamedTuple):
    """What one source would choose; it has no law for a learning rate that is None."""

    source: str
    lr: float | None
    batch_tokens: float


class Range(NamedTuple):
    """What the runs behind a law span; what is not known is None."""

    params: tuple[float, float] | None = None
    tokens: tuple[float, float] | None = None
    flops: tuple[float, float] | None = None


class Warmup(NamedTuple):
    """A warm-up in steps, and who advises it."""

    source: str
    steps: float


RANGES = {
    STEP_LAW: Range(params=(2.15e8, 1.07e9), tokens=(4e9, 1e11)),  # of the dense runs that its authors published
    DEEPSEEK: Range(flops=(1e17, 2e19)),
    POWER_LINES: Range(params=(1.11e8, 3.3e9)),
}


def bands(params: float, tokens: float, flops: float) -> list[Band]:
    """Peak learning rate and tokens a batch by each source.

    StepLaw takes parameters without embeddings (of a MoE the active ones) and tokens, DeepSeek LLM the FLOPs of all
    training, Power Lines tokens; the last tunes its learning rate another way (μP) and has no law for it.
    """
    return [
        Band(STEP_LAW, 1.79 * params**-0.713 * tokens**0.307, 0.58 * tokens**0.571),
        Band(DEEPSEEK, 0.3118 * flops**-0.1250, 0.2920 * flops**0.3271),
        Band(POWER_LINES, None, POWER_LINES_SEQUENCE * 0.0306 * tokens**0.383),
    ]


def disagreement(values: list[float]) -> float:
    """The largest over the smallest."""
    return max(values) / min(values)


def outside(params: float, tokens: float, flops: float) -> list[str]:
    """A sentence for each law that is asked about what none of its runs was like."""
    found = []
    for source, known in RANGES.items():
        asked = (
            ("parameters", params, known.params),
            ("tokens", tokens, known.tokens),
            ("FLOPs", flops, known.flops),
        )
        wide = [
            f"{value:.3g} {what} outside of {span[0]:.3g} to {span[1]:.3g}"
            for what, value, span in asked
            if span and not span[0] <= value <= span[1]
        ]
        if wide:
            found.append(f"{source} is extrapolated: {', '.join(wide)}")
    return found


def critical_batch(tokens: float) -> float:
    """Tokens a batch beyond which twice the batch saves much less than half of the steps (Power Lines)."""
    return POWER_LINES_SEQUENCE * 0.0471 * float(tokens**0.462)


def timescale(params: float, tokens: float) -> float:
    """AdamW's best memory of its own updates, B/(lr·weight decay·D), as a share of the run (Power Lines)."""
    return 1.084 * float((tokens / params) ** -0.527)


def weight_decay(params: float, tokens: float, batch_tokens: float, lr: float) -> float:
    """The decoupled weight decay with which AdamW at `lr` has that timescale."""
    return batch_tokens / (lr * timescale(params, tokens) * tokens)


def warmup(params: float, batch_tokens: float, beta2: float = 0.95) -> list[Warmup]:
    """Linear warm-up by two sources: what the second moment needs to settle, and what small models can spare."""
    return [
        Warmup("Ma and Yarats 2021 (1910.04209): 2/(1-β2) steps", 2 / (1 - beta2)),
        Warmup("Porian et al. 2024 (2406.19146): as many tokens as parameters", params / batch_tokens),
    ]
