"""What, beside parameters and tokens, the loss of a run depends on: a law holds for runs that agree in it.

Text and tokenizer themselves belong to it, too (`points`), but of a run that did not begin only the size of the
vocabulary is known.
"""

from __future__ import annotations

from lumina.config.schema.config import Config
from lumina.planner.laws import Law


def traits(config: Config) -> dict[str, str]:
    """By key, in words; empty where a model has no such part."""
    model, train = config.model, config.train
    return {
        "model.kind": model.kind,
        "model.seq_len": str(model.seq_len),
        "model.vocab": str(model.vocab),
        "model.moe": f"{model.moe.top_k} of {model.moe.experts} experts" if model.moe else "",
        "model.mod": f"capacity {model.mod.capacity} every {model.mod.every}" if model.mod else "",
        "data.mode": config.data.mode,
        "train.optimizer": train.optimizer,
        "train.schedule": train.schedule,
    }


def mismatch(law: Law, config: Config) -> str:
    """In what `config` differs from the runs that `law` was fitted to, empty if in nothing that is known of both."""
    known, here = dict(law.traits), traits(config)
    found = [
        f"{name} {known[name] or 'none'}, not {value or 'none'}"
        for name, value in here.items()
        if known.get(name, value) != value
    ]
    return f"the law {law.name} was fitted to runs of {'; '.join(found)}" if found else ""
