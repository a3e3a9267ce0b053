"""The probe sees what changed, changes nothing, and goes on after an interruption as if there had been none."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support import model_config, settings

from lumina.data.loader import Batch
from lumina.model.transformer import Transformer
from lumina.run.folder import Run
from lumina.training import probe as module
from lumina.training.precision import Precision
from lumina.training.probe import Probe
from lumina.training.trainer import Trainer


def text(sequences: int = 2) -> Batch:
    ids = torch.randint(0, 260, (sequences, 65), generator=torch.Generator().manual_seed(0))
    return Batch(ids[:, :-1], ids[:, 1:], torch.zeros(sequences, 64, dtype=torch.int32), torch.arange(sequences))


def test_churn_is_the_share_of_tokens_that_have_other_experts() -> None:
    model = Transformer(model_config("moe"))
    probe = Probe(model, text(), Precision("fp32", "fp32", "cpu"))
    first = probe(text())
    assert first.churn is None
    assert probe(text()) == replace(first, churn=[0.0] * len(model.moes))
    before = probe.chosen_LTA.clone()
    model.moes[-1].router.bias_E[0] = 10.0  # now every token takes expert 0 there
    *others, last = probe(text()).churn or []
    assert others == [0.0] * (len(model.moes) - 1)
    assert last is not None
    had = (before[-1] == 0).any(-1).float().mean().item()
    assert last >= 1 - had - 1e-4  # who had it may have lost its other one
    assert last > 0.2
    assert not model.moes[0].router._forward_hooks  # nothing is left behind


def test_churn_is_of_the_tokens_that_a_routed_block_computes() -> None:
    model = Transformer(model_config("hybrid"))
    routed = next(i for i, block in enumerate(model.units) if block.router is not None)
    router = model.routers[0]
    probe = Probe(model, text(), Precision("fp32", "fp32", "cpu"))
    router.quantile.fill_(-100.0)  # takes all
    probe(text())
    model.moes[routed].router.bias_E[0] = 10.0
    churn = probe(text()).churn or []
    assert (churn[routed] or 0) > 0.2
    model.moes[routed].router.bias_E[0] = 0.0
    router.quantile.fill_(100.0)  # takes none: what its experts would have done is nobody's
    assert (probe(text()).churn or [])[routed] is None


def test_a_model_without_experts_has_a_loss_and_no_churn() -> None:
    probe = Probe(Transformer(model_config("dense")), text(), Precision("fp32", "fp32", "cpu"))
    assert probe(text()).churn is None
    assert probe.tensors() == {}


@pytest.mark.parametrize("at_once", [2**22, 4 * 64 * 5])
def test_the_largest_attention_logit_is_that_of_what_a_query_may_see(
    at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LOGITS", at_once)
    model = Transformer(model_config("dense"))
    seen: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def watched(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **how: Any) -> torch.Tensor:
        seen.append((query, key, how["attn_mask"]))
        return attention(query, key, value, **how)

    attention = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    model.units[1].attn.q_norm.weight.data *= 7
    found = Probe(model, text(), Precision("fp32", "fp32", "cpu"))(text())
    wanted = []
    for q, k, mask in seen[: len(model.units)]:
        logits = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT / q.shape[-1] ** 0.5
        wanted.append(logits.masked_fill(~mask, -torch.inf).max().item())
    assert found.attention == pytest.approx(wanted, rel=1e-5)
    look = found.look(4, ("data: torn",))
    assert (look.attention, found.attention.index(look.attention)) == (max(found.attention), 1)
    assert (look.step, look.golden, look.churn, look.broken) == (4, found.golden, (), ("data: torn",))


def test_the_golden_batch_tells_of_data_and_the_agreement_of_the_predictor() -> None:
    model = Transformer(model_config("hybrid"))
    probe = Probe(model, text(), Precision("fp32", "fp32", "cpu"))
    (router,) = model.routers[:1]
    first = probe(text())
    assert first.golden == first.loss
    shifted = replace(text(), targets_BS=text().targets_BS.roll(1, 1))
    assert probe(shifted).golden != first.loss
    assert probe(shifted).loss == first.loss
    for one in model.routers:
        one.quantile.fill_(100.0)  # takes none: agrees on all that are not among the top C
    share = 1 - router.capacity
    assert probe(text()).agree == pytest.approx(share, abs=1e-4)


def run(folder: Path, every: int, listeners: Any = (), **keys: Any) -> Run:
    request = settings(folder) | {"train.steps": 9, "checkpoint.every": 3, "orchestrator.probe_every": every} | keys
    return Trainer("tiny", root=folder / f"runs-{every}", listeners=listeners, **request).fit()


def of(run: Run, kind: str) -> list[dict[str, Any]]:
    return [event for event in run.events() if event["t"] == kind]


def test_a_run_with_probes_is_the_run_without(tmp_path: Path) -> None:
    watched, alone = (run(tmp_path, every) for every in (2, 0))
    assert [event["loss"] for event in of(watched, "step")] == [event["loss"] for event in of(alone, "step")]
    assert [event["step"] for event in of(watched, "probe")] == [2, 4, 6, 8]
    assert of(alone, "probe") == []
    assert of(watched, "probe")[0]["churn"] is None
    shares = [share for event in of(watched, "probe")[1:] for share in event["churn"]]
    assert all(share is None or 0 <= share <= 1 for share in shares)


def test_an_interruption_does_not_make_it_forget(tmp_path: Path) -> None:
    whole = run(tmp_path, 2)

    def crash(event: dict[str, Any]) -> None:
        if event["t"] == "step" and event["step"] == 4:
            raise RuntimeError("power cut")

    (tmp_path / "again").mkdir()
    with pytest.raises(RuntimeError, match="power cut"):
        run(tmp_path / "again", 2, listeners=[crash])
    again = run(tmp_path / "again", 2)
    for name in ("step", "loss", "churn"):
        assert [event[name] for event in of(again, "probe")] == [event[name] for event in of(whole, "probe")]
