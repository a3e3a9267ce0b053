"""What training takes in memory on each device, counted from a configuration alone: no torch, no device.

Not the sum of everything: the most that is held at one time. A step has moments (the forward pass of each block, its
backward pass, the optimizer, an evaluation between steps), each holds other things, and the largest is the peak. What
a block holds follows from `lumina.planner.footprint`, a model of the model in which tensors are sizes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib.metadata import PackageNotFoundError, version

from lumina.config.schema.config import Config
from lumina.config.schema.model import ModelConfig
from lumina.model.cost import CHUNK_ELEMENTS, block_parameters, has_experts, is_routed, state_bytes
from lumina.planner.footprint import units
from lumina.planner.footprint.layers import Net
from lumina.planner.footprint.operators import FLAG, INDEX, WIDE
from lumina.planner.footprint.optimizer import muon
from lumina.planner.footprint.tape import ACTIVATIONS, CASTS, GRADIENTS, Tape
from lumina.planner.footprint.units import Bytes, Unit
from lumina.planner.hardware import has_fast_bf16

RESTORE_POINTS = 2  # in memory, so that one lies before a step that is suspected when the next has been taken
MICRO_TOKENS = 8192  # of a micro-batch, if it is not configured: more gains nothing on a CPU and costs memory
EVAL_TOKENS = 16384  # evaluated at once
NEWEST_TORCH = (2, 13)
WIDE_NORMS = (2, 12)  # from here on autocast computes RMSNorm in fp32 on CUDA
SHORT = 4  # bytes of an int32
WEIGHTS, OPTIMIZER, SPARE, GATHERED, WORKSPACE = "weights", "optimizer", "spare slots", "gathered", "workspace"
# Bytes that libraries take for themselves. On a CPU the code that is paged in, and oneDNN's buffers: the mean over four
# configurations (benchmarks/planner).
LIBRARIES = {"cpu": 72 << 20, "cuda": 0}


@dataclass(frozen=True)
class Memory:
    """Bytes on one device at the peak, by part, and the most of each moment; and of main memory beside a GPU.

    Parts: weights (fp32, the master copy, in every mode but bf16_pure), their low-precision copies, gradients,
    optimizer (its moments and what a step holds for a while), activations, logits, experts, spare slots (with their
    gradients and moments), gathered (of blocks that are shared out), workspace (of libraries).
    """

    parts: Mapping[str, int]
    moments: Mapping[str, int]  # the peak of each: forward, backward, optimizer, evaluation
    host: int  # bytes of main memory that a save stages, and restore points, for each process

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    @property
    def training(self) -> int:
        """The peak of the steps alone: an evaluation that does not fit into a GPU is done again in smaller batches."""
        return max(self.moments[moment] for moment in self.moments if moment != "evaluation")

    @property
    def moment(self) -> str:
        """When the peak is reached."""
        return max(self.moments, key=self.moments.__getitem__)


def memory(
    config: Config,
    processes: int = 1,
    device: str = "cpu",
    attention: str | None = None,
    torch: tuple[int, int] | None = None,
) -> Memory:
    """The peak of training `config` on each of `processes` devices.

    What the configuration leaves to the machine is filled in as `lumina train` would. `attention` names PyTorch's
    kernel (flash, cudnn, efficient, math) where it is known; see `attention_kernel`. `torch` is its version, by default
    that of the one installed here.
    """
    return _Step(config, processes, device, attention, torch or _torch()).memory()


def peak(config: Config, processes: int = 1, device: str = "cpu") -> int:
    """Bytes that have to be there on each device: of `memory` the `total`, on a GPU what `training` takes."""
    return _Step(config, processes, device, None, _torch()).peak(evaluation=device == "cpu")


@cache
def _torch() -> tuple[int, int]:
    """The installed version, without an import; the newest that is known if there is none."""
    try:
        return major_minor(version("torch"))
    except PackageNotFoundError:
        return NEWEST_TORCH


def major_minor(text: str) -> tuple[int, int]:
    """`(2, 13)` of `2.13.0+cpu`."""
    major, minor = text.split(".")[:2]
    return int(major), int(minor)


def mode(config: Config, device: str) -> str:
    """The configured number format, or the one that `lumina train` chooses."""
    if config.precision.mode != "auto":
        return config.precision.mode
    return "bf16" if device == "cuda" or has_fast_bf16() else "fp32"


def attention_kernel(config: Config, device: str, precision: str | None = None) -> str:
    """Which of PyTorch's kernels computes attention with our masks in `precision` (default: that of training).

    Flash on a CPU. On CUDA flash takes no mask and the memory-efficient one no fewer key-value heads than query heads
    (PyTorch 2.11); cuDNN's takes both, in half precision, and is preferred on compute capability 9 and 10 with cuDNN
    above 9.15 (`check_prefer_cudnn_attention` in ATen's sdp_utils.cpp). What none of them takes is computed by
    products that hold the square of the sequence.
    """
    model = config.model
    if device != "cuda":
        return "flash"
    half = (precision or mode(config, device)) != "fp32"
    if half and model.head_dim <= 128 and model.head_dim % 8 == 0 and not config.train.deterministic:
        return "cudnn"
    return "efficient" if model.heads == model.kv_heads else "math"


def micro_batches(config: Config, processes: int = 1) -> list[int]:
    """Every size of a micro-batch in sequences that divides a process's part of the batch, the largest first."""
    own = config.train.batch_tokens // config.model.seq_len // processes
    return [n for n in range(own, 0, -1) if own % n == 0]


def micro_batch(config: Config, processes: int = 1) -> int:
    """The configured one, or the largest of at most `MICRO_TOKENS` tokens."""
    if config.train.micro_batch != "auto":
        return int(config.train.micro_batch)
    limit = max(1, MICRO_TOKENS // config.model.seq_len)
    return next((n for n in micro_batches(config, processes) if n <= limit), 1)


def _autocast(precision: str, size: int) -> int | None:
    """Bytes of an element that autocast multiplies in, None where that is the weights' own format."""
    return 2 if size == WIDE and precision != "fp32" else None


class _Step:
    """A training step of one configuration, moment by moment."""

    def __init__(
        self, config: Config, processes: int, device: str, attention: str | None, torch: tuple[int, int]
    ) -> None:
        self.config, self.model, self.processes, self.device = config, config.model, processes, device
        precision = mode(config, device)
        self.size = 2 if precision == "bf16_pure" else WIDE
        held_out = precision if config.precision.eval == "auto" else config.precision.eval
        self.how = {
            training: (_autocast(one, self.size), attention or attention_kernel(config, device, one))
            for training, one in ((True, precision), (False, held_out))
        }
        self.wide_norms = torch >= WIDE_NORMS
        self.rank = config.train.lora.rank
        self.batch = micro_batch(config, processes)
        own = max(1, config.train.batch_tokens // config.model.seq_len // processes)
        self.later = own > self.batch  # a micro-batch after the first finds gradients
        self.largest_block = max(block_parameters(self.model, layer) for layer in range(self.model.layers))
        self.state = state_bytes(config.model, config.train.optimizer, precision, self.rank)

    def peak(self, evaluation: bool) -> int:
        moments = self._moments() if evaluation else self._of_a_step()
        return max(held.total() for _, moment in moments for held in moment) + LIBRARIES[self.device]

    def memory(self) -> Memory:
        found = {name: max(moment, key=Counter.total) for name, moment in self._moments()}
        peak = max(found.values(), key=Counter.total)
        parts = self._spare(peak) + Bytes({WORKSPACE: LIBRARIES[self.device]})
        totals = {name: held.total() + LIBRARIES[self.device] for name, held in found.items()}
        return Memory({part: value for part, value in parts.items() if value}, totals, self._copies())

    def _moments(self) -> Iterator[tuple[str, list[Bytes]]]:
        yield from self._of_a_step()
        yield "evaluation", list(self._evaluation())

    def _of_a_step(self) -> Iterator[tuple[str, list[Bytes]]]:
        training = self._training()
        yield "forward", list(self._forward(training))
        yield "backward", list(self._backward(training))
        yield "optimizer", [self._own(gradients=True) + self._batch() + Bytes({OPTIMIZER: self._directions()})]

    # -- what is held all the time -------------------------------------------------------------------------------------

    def _own(self, gradients: bool) -> Bytes:
        """This process's share of the state."""
        n = self.processes
        held = Bytes({WEIGHTS: self.state.weights // n, OPTIMIZER: self.state.moments // n})
        return held + Bytes({GRADIENTS: self.state.gradients // n}) if gradients else held

    def _batch(self) -> Bytes:
        """Token ids, targets and documents: of the whole batch on a CPU, of a micro-batch on a GPU."""
        sequences = self.config.train.batch_tokens // self.model.seq_len if self.device == "cpu" else self.batch
        return Bytes({ACTIVATIONS: sequences * self.model.seq_len * (2 * INDEX + SHORT)})

    def _view(self, batch: int, mask: bool) -> Bytes:
        """Rope and noise keys of a micro-batch, and which token may see which."""
        tokens = batch * self.model.seq_len
        rope = tokens * self.model.head_dim * WIDE + tokens * INDEX
        return Bytes({ACTIVATIONS: rope + mask * tokens * self.model.seq_len * FLAG})

    def _gathered(self, blocks: int) -> Bytes:
        """What FSDP puts together of weights that are shared out: the head all the time, and so many blocks at once.

        Forward: the block that computes, and the next one. Backward also the one before, whose gradients are under way.
        """
        if self.processes == 1:
            return Bytes()
        whole = blocks * self.largest_block + self.model.vocab * self.model.width
        return Bytes({GATHERED: whole * self.size})

    # -- the moments ---------------------------------------------------------------------------------------------------

    def _training(self) -> list[Unit]:
        return list(self._units(self.batch, training=True))

    def _forward(self, walked: list[Unit]) -> Iterator[Bytes]:
        held = self._own(gradients=self.later) + self._batch() + self._view(self.batch, mask=True) + self._gathered(2)
        for unit in walked:
            yield held + unit.forward
            held += unit.held

    def _backward(self, walked: list[Unit]) -> Iterator[Bytes]:
        mask = self.config.train.recompute != "none"
        held = self._own(gradients=self.later) + self._batch() + self._view(self.batch, mask) + self._gathered(3)
        for unit in walked:
            held += unit.stays
        following = self._gathered(2) - self._gathered(0)  # gradients of a block before, while they are summed
        for turn, unit in enumerate(reversed(walked)):
            held -= unit.stays
            yield held + unit.backward + (following if turn > 1 else Bytes())
            shared = self.processes if turn else 1  # the head's are given away when all is over
            held += Bytes({GRADIENTS: unit.gradients // shared})

    def _evaluation(self) -> Iterator[Bytes]:
        batch = max(1, EVAL_TOKENS // self.model.seq_len)
        held = self._own(gradients=True) + self._batch() + self._gathered(2)
        stream = Bytes({ACTIVATIONS: batch * self.model.seq_len * self.model.width * self.size})
        *before, head = self._units(batch, training=False)
        for unit in before:
            yield held + stream + self._view(batch, mask=True) + unit.forward
            if self.processes == 1:  # of weights that are put together anew autocast keeps none
                held += Bytes({CASTS: unit.held[CASTS]})
        yield held + stream + head.forward

    def _units(self, batch: int, training: bool) -> Iterator[Unit]:
        """The embedding, every block and the head; blocks of one sort are walked once."""
        low, attention = self.how[training]
        recompute = self.config.train.recompute if training else None
        shape = _Shape(
            self.model, batch, self.size, low, self.device, self.rank, self.later, attention, self.wide_norms,
            CHUNK_ELEMENTS[self.device], recompute,
        )  # fmt: skip
        yield _end(shape, first=True)
        for layer in range(self.model.layers):
            learns = layer > 0 or self.rank == 0
            yield _block(shape, is_routed(self.model, layer), has_experts(self.model, layer), learns)
        yield _end(shape, first=False)

    def _directions(self) -> int:
        if self.config.train.optimizer != "muon" or self.rank:
            return 0
        return muon(self.model, self.size, self.processes)

    # -- beside --------------------------------------------------------------------------------------------------------

    def _spare(self, held: Bytes) -> Bytes:
        """The same, with what spare slots take of it told apart."""
        moe = self.model.moe
        if not moe or not moe.spare or self.rank:
            return held
        layers = sum(has_experts(self.model, layer) for layer in range(self.model.layers))
        expert = 3 * self.model.width * moe.ffn
        numel = layers * moe.spare * (expert + self.model.width) // self.processes
        moments = layers * moe.spare * (expert * (1 if self.config.train.optimizer == "muon" else 2)) // self.processes
        apart = Bytes({WEIGHTS: numel, OPTIMIZER: moments, GRADIENTS: numel if held[GRADIENTS] else 0})
        spare = Bytes({part: value * self.size for part, value in apart.items()})
        return held - spare + Bytes({SPARE: spare.total()})

    def _copies(self) -> int:
        """Copies of weights and moments: one if files are written in the background, those to go back to, and that of a
        replay."""
        write, watch = self.config.checkpoint.write, self.config.orchestrator
        background = write == "background" or (write == "auto" and self.device != "cpu")
        points = RESTORE_POINTS + 1 if watch.mode != "off" and watch.snapshot_every else 0
        return (background + points) * (self.state.weights + self.state.moments) // self.processes


@dataclass(frozen=True)
class _Shape:
    """All that a walk through a unit depends on; the cached ones know nothing else."""

    model: ModelConfig
    batch: int
    size: int
    low: int | None
    device: str
    rank: int
    later: bool
    attention: str
    wide_norms: bool
    chunk: int  # logits that are computed at once
    recompute: str | None  # None: no gradients at all

    def net(self) -> Net:
        tape = Tape(self.low, self.device)
        return Net(self.model, tape, self.size, self.rank, self.later, self.attention, self.wide_norms, self.chunk)


@lru_cache(256)
def _block(shape: _Shape, routed: bool, experts: bool, learns: bool) -> Unit:
    sizes = shape.batch, shape.model.seq_len, routed, experts
    if shape.recompute is None:
        return units.deciding(shape.net(), *sizes)
    return units.block(shape.net(), *sizes, shape.recompute, learns)


@lru_cache(256)
def _end(shape: _Shape, first: bool) -> Unit:
    tokens = shape.batch * shape.model.seq_len
    if first:
        return units.embedding(shape.net(), tokens)
    return units.deciding_head(shape.net(), tokens) if shape.recompute is None else units.head(shape.net(), tokens)
