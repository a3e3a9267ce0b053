"""What `auto` will be where a plan's run begins, as far as that is known without trying: the same rules as in training.

Precision, threads, the size of a micro-batch and the number of steps follow from the machine and the batch. Whether
grouped matmul and the compiler work is found by trying, so that is left open.
"""

from __future__ import annotations

from lumina.compat import usable_cores
from lumina.config.schema.base import nearest_divisor
from lumina.config.schema.config import Config
from lumina.errors import UserError
from lumina.planner.hardware import Fleet
from lumina.planner.memory import MICRO_TOKENS


def settled(config: Config, fleet: Fleet) -> Config:
    """The configuration with what the machine decides filled in; `train.tokens` becomes steps, `train.time` stays.

    Raises `UserError` if the batch does not divide among the devices, or the device lacks the precision.
    """
    device, asked = fleet.device, config.precision.mode
    mode: str = device.precision if asked == "auto" else asked
    device.rate(mode)
    evaluated = mode.removesuffix("_pure") if config.precision.eval == "auto" else config.precision.eval
    threads, train = config.parallel.threads, config.train
    changes: dict[str, object] = {}
    if train.micro_batch == "auto":
        limit = max(1, MICRO_TOKENS // config.model.seq_len)
        changes["micro_batch"] = micro_batch(config, fleet.count, limit)
    if isinstance(train.tokens, int):
        changes |= {"steps": max(1, round(train.tokens / train.batch_tokens)), "tokens": None}
    where: dict[str, object] = {}
    if config.parallel.device == "auto":
        where["device"] = "cpu" if device.is_cpu else "cuda"
    if threads == "auto":
        where["threads"] = max(1, usable_cores() // fleet.count)
    return config.model_copy(
        update={
            "precision": config.precision.model_copy(update={"mode": mode, "eval": evaluated}),
            "parallel": config.parallel.model_copy(update=where),
            "train": train.model_copy(update=changes),
        }
    )


def micro_batch(config: Config, processes: int, limit: int) -> int:
    """The largest number of sequences, at most `limit`, that divides a process's part of the batch.

    Raises `UserError` if the batch does not divide among the processes.
    """
    sequences = config.train.batch_tokens // config.model.seq_len
    own, rest = divmod(sequences, processes)
    if rest or not own:
        raise UserError(
            f"train.batch_tokens={config.train.batch_tokens}: its {sequences} sequences do not divide among "
            f"{processes} processes",
            fix=f"start {nearest_divisor(processes, sequences)} processes, or change train.batch_tokens",
        )
    return next(n for n in range(min(limit, own), 0, -1) if own % n == 0)
