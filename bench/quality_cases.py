"""What `bench.quality` trains: each case is one training run, and says everything that its result depends on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial

from actors.codecs import CODECS
from actors.data import Microbatch, TokenSource
from actors.model.spec import ModelSpec
from actors.optim import OptimConfig
from actors.settings import BatchSpec, DataConfig
from actors.spec import Kind
from actors.token_shards import Split
from bench.quality_outer import OuterLoop, OuterMethod
from bench.quality_trainer import ReadMicrobatch, Trainer, Wire

VOCAB_SIZE = 2048
SEQ_LEN = 128
EVAL_BATCH = BatchSpec(seq_len=SEQ_LEN, microbatch_size=8, num_microbatches=1)
# Held-out microbatches for a point of a curve: the first of those at the end.
NUM_CURVE_MICROBATCHES = 16
CANARY_EVERY = 20


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A model and how it is trained; `num_steps` are a pipeline's, or one replica's local steps."""

    model: ModelSpec
    split: tuple[int, ...]
    batch: BatchSpec
    optim: OptimConfig
    num_steps: int
    # Steps, or rounds, from one point of the held-out curve to the next.
    curve_every: int
    num_final_microbatches: int


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What one case showed; losses are held-out ones, in nats a token."""

    final_loss: float
    # Steps, or rounds, done, and the loss there on a part of the held-out tokens.
    curve: list[tuple[int, float]]
    num_skipped: int
    # Of a pipeline: relative error and cosine of decoded activations and gradients.
    codec_errors: dict[str, dict[str, float]]


@dataclass(frozen=True, kw_only=True)
class PipelineCase:
    """One pair of boundary codecs with one seed."""

    recipe: Recipe
    forward: str
    backward: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.forward}/{self.backward}"

    @property
    def key(self) -> str:
        return f"pipeline-{self.forward}-{self.backward}-seed{self.seed}"

    @property
    def cost(self) -> float:
        """Floating-point operations, about."""
        return 6.0 * self.recipe.model.num_params * self.recipe.batch.step_tokens * self.recipe.num_steps

    def run(self, data: DataConfig, tell: Callable[[str], None]) -> Measured:
        recipe = self.recipe
        source = _source(data, "train", recipe.batch, self.seed)
        wire = Wire(
            forward=CODECS[self.forward],
            backward=CODECS[self.backward],
            run=f"quality-seed{self.seed}",
            canary_every=CANARY_EVERY,
        )
        trainer = _trainer(recipe, self.seed, source.microbatch, wire)
        held_out = _held_out(data, recipe.num_final_microbatches)
        curve: list[tuple[int, float]] = []
        for step in range(1, recipe.num_steps + 1):
            trainer.step()
            if step % recipe.curve_every == 0:
                curve.append((step, trainer.evaluate(held_out[:NUM_CURVE_MICROBATCHES])))
                tell(f"step {step}/{recipe.num_steps}, held-out loss {curve[-1][1]:.4f}")
        return Measured(
            final_loss=trainer.evaluate(held_out),
            curve=curve,
            num_skipped=trainer.num_skipped,
            codec_errors={
                "activations": asdict(trainer.codec_error(Kind.ACTIVATION)),
                "gradients": asdict(trainer.codec_error(Kind.GRADIENT)),
            },
        )


@dataclass(frozen=True, kw_only=True)
class OuterCase:
    """One way of exchanging pseudo-gradients with one seed."""

    recipe: Recipe
    method: OuterMethod
    num_replicas: int
    num_local_steps: int
    seed: int

    @property
    def name(self) -> str:
        return self.method.name

    @property
    def key(self) -> str:
        return f"outer-{self.method.name}-seed{self.seed}"

    @property
    def num_rounds(self) -> int:
        return self.recipe.num_steps // self.num_local_steps

    @property
    def cost(self) -> float:
        """Floating-point operations, about."""
        steps = self.recipe.num_steps * self.num_replicas
        return 6.0 * self.recipe.model.num_params * self.recipe.batch.step_tokens * steps

    def run(self, data: DataConfig, tell: Callable[[str], None]) -> Measured:
        recipe = self.recipe
        source = _source(data, "train", recipe.batch, self.seed)
        raw = Wire(forward=CODECS["none"], backward=CODECS["none"], run="", canary_every=recipe.num_steps)
        replicas = [
            _trainer(recipe, self.seed, partial(replica_microbatch, source, self.num_replicas, replica), raw)
            for replica in range(self.num_replicas)
        ]
        outer = OuterLoop(self.method, replicas)
        held_out = _held_out(data, recipe.num_final_microbatches)
        curve: list[tuple[int, float]] = []
        for done in range(1, self.num_rounds + 1):
            outer.round(self.num_local_steps)
            if done % recipe.curve_every == 0:
                curve.append((done, replicas[0].evaluate(held_out[:NUM_CURVE_MICROBATCHES])))
                tell(f"round {done}/{self.num_rounds}, held-out loss {curve[-1][1]:.4f}")
        return Measured(
            final_loss=replicas[0].evaluate(held_out),
            curve=curve,
            num_skipped=sum(replica.num_skipped for replica in replicas),
            codec_errors={},
        )


Case = PipelineCase | OuterCase


def _source(data: DataConfig, split: Split, batch: BatchSpec, seed: int) -> TokenSource:
    return TokenSource(data, split, batch, seed=seed, vocab_size=VOCAB_SIZE)


def _held_out(data: DataConfig, num_microbatches: int) -> list[Microbatch]:
    source = _source(data, "val", EVAL_BATCH, seed=0)
    return [source.microbatch(0, microbatch) for microbatch in range(num_microbatches)]


def replica_microbatch(source: TokenSource, num_replicas: int, replica: int, step: int, microbatch: int) -> Microbatch:
    """Return what one replica reads: of the shuffled tokens each has every `num_replicas`-th step's."""
    return source.microbatch(step * num_replicas + replica, microbatch)


def _trainer(recipe: Recipe, seed: int, read: ReadMicrobatch, wire: Wire) -> Trainer:
    return Trainer(
        recipe.model,
        recipe.split,
        recipe.optim,
        seed=seed,
        num_steps=recipe.num_steps,
        num_microbatches=recipe.batch.num_microbatches,
        read=read,
        wire=wire,
    )


# What is trained

BASELINE_PAIR = ("none", "none")
# Forward, backward.
PAIRS = (
    BASELINE_PAIR,
    ("q8", "q8"),
    ("hq4", "q8"),
    ("q8", "hq4-stochastic"),
    ("hq4", "hq4-stochastic"),
    ("hq4", "hq4"),
)

# DiLoCo's published outer optimizer, and SparseLoCo's.
NESTEROV_LR, NESTEROV_MOMENTUM = 0.7, 0.9
FEEDBACK_LR, FEEDBACK_BETA = 1.0, 0.95
DENSE = OuterMethod(name="dense", codec="none", lr=NESTEROV_LR, momentum=NESTEROV_MOMENTUM)
# What `tk2` would be if it sent everything: what its sparseness costs is the difference to this one.
DENSE_MEAN = OuterMethod(name="dense-mean", codec="none", lr=FEEDBACK_LR, momentum=0.0)
METHODS = (
    DENSE,
    replace(DENSE, name="q8", codec="q8"),
    replace(DENSE, name="hq4", codec="hq4"),
    DENSE_MEAN,
    replace(DENSE_MEAN, name="tk2-128", codec="tk2-128", beta=FEEDBACK_BETA),
    replace(DENSE_MEAN, name="tk2", codec="tk2", beta=FEEDBACK_BETA),
)

PIPELINE_RECIPE = Recipe(
    model=ModelSpec(
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        num_layers=8,
        num_heads=4,
        num_kv_heads=2,
        ffn_size=352,
        max_positions=SEQ_LEN,
    ),
    split=(2, 2, 2, 2),
    batch=BatchSpec(seq_len=SEQ_LEN, microbatch_size=8, num_microbatches=2),
    # At three times this rate, runs that differ in the last bit come apart by more than any codec does.
    optim=OptimConfig(lr=1e-3, warmup_steps=20, schedule="wsd", decay_ratio=0.3),
    num_steps=320,
    curve_every=40,
    num_final_microbatches=144,
)
NUM_REPLICAS = 4
NUM_LOCAL_STEPS = 10
OUTER_RECIPE = Recipe(
    model=replace(PIPELINE_RECIPE.model, num_layers=4),
    split=(4,),
    batch=BatchSpec(seq_len=SEQ_LEN, microbatch_size=2, num_microbatches=1),
    optim=OptimConfig(lr=1e-3, warmup_steps=20, schedule="cosine"),
    num_steps=64 * NUM_LOCAL_STEPS,
    curve_every=4,
    num_final_microbatches=144,
)

SEEDS = (1, 2, 3)
# Whether DiLoCo's outer rate suits this model is looked at with dense, on a seed that nothing else uses.
CHECK_SEED = 9
CHECKED_LRS = (0.4, 0.7, 1.0)


def full_cases() -> tuple[Case, ...]:
    """Return every case: the pairs, then the outer step, each one seed after another, so that early ends compare."""
    seeded = [case for seed in SEEDS for case in _cases_of_seed(PIPELINE_RECIPE, OUTER_RECIPE, seed)]
    return (*sorted(seeded, key=lambda case: isinstance(case, OuterCase)), *check_cases())


def quick_cases() -> tuple[Case, ...]:
    """Return one seed's cases, too short to judge a codec by, long enough to see that all of it works."""
    return _cases_of_seed(
        replace(PIPELINE_RECIPE, num_steps=32, curve_every=16, num_final_microbatches=32),
        replace(OUTER_RECIPE, num_steps=4 * NUM_LOCAL_STEPS, num_final_microbatches=32),
        SEEDS[0],
    )


def check_cases() -> tuple[OuterCase, ...]:
    """Return dense with other outer rates beside its own."""
    return tuple(
        _outer_case(OUTER_RECIPE, replace(DENSE, name=f"dense-lr{lr}", lr=lr), CHECK_SEED) for lr in CHECKED_LRS
    )


def _cases_of_seed(pipeline: Recipe, outer: Recipe, seed: int) -> tuple[Case, ...]:
    return (
        *(PipelineCase(recipe=pipeline, forward=ahead, backward=back, seed=seed) for ahead, back in PAIRS),
        *(_outer_case(outer, method, seed) for method in METHODS),
    )


def _outer_case(recipe: Recipe, method: OuterMethod, seed: int) -> OuterCase:
    return OuterCase(
        recipe=recipe, method=method, num_replicas=NUM_REPLICAS, num_local_steps=NUM_LOCAL_STEPS, seed=seed
    )
