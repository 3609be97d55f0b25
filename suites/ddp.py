"""Data parallelism: every rank holds the model and its share of the batch, and gradients are averaged.

R ranks, K micro-batches of each. One reduction per cycle is enough, because a mean over ranks is linear.
"""

from __future__ import annotations

from typing import Any

from equivcheck.suite import Theory, Workload, divergent, ends_in, equivalent, loses_precision, part

LOOPS = "../fixtures/trainers/ddp"
FAULTS = "../fixtures/mutants/ranks"
EVEN = ("even",)

linear = "sum over k of mean over r = mean over r of sum over k: Li et al., arXiv 2006.15704, 3.2.4"
pair = "the full batch is rank 0's own loop, so K = 1 differs by the ranks alone"


def row(
    name: str, *expect: Theory, folder: str = LOOPS, file: str | None = None, **more: Any
) -> Workload:
    """Return a row whose point is a loop of the fixtures."""
    path = f"{folder}/{file or name}.py"
    stated: dict[str, Any] = {
        "accumulation_steps": (2, 4),
        "world_sizes": (2, 4),
        "strategies": ("ddp",),
    }
    return Workload(
        name,
        expect,
        build=part(f"{path}:build"),
        batches=part(f"{path}:batches"),
        train=part(f"{path}:train"),
        **(stated | more),
    )


def fault(name: str, code: str, source: str, **more: Any) -> Workload:
    """Return a row with a fault of the fixtures."""
    return row(
        name, divergent(code, source=source), folder=FAULTS, file=f"{code.lower()}_{name}", **more
    )


WORKLOADS = [
    row(
        "token_weighted",
        equivalent("sums over ranks by the count of all ranks: " + linear),
        claims=("C1", "C14", "C16"),
    ),
    row("plain_mean", equivalent("equal shares: " + linear), splits=EVEN, claims=("C1", "C19")),
    row("sync_every", equivalent("more traffic, the same sum: " + linear), claims=("C19",)),
    row("hand_reduced", equivalent(linear)),
    row("composable", equivalent(linear)),
    row(
        "stepped_on_one_rank",
        equivalent("all ranks are given what one makes of the sum: " + linear),
    ),
    row("average_on_one_rank", equivalent("an average of its own changes no weight")),
    row("bucket_view", equivalent("only where gradients are stored")),
    row("small_buckets", equivalent("only how gradients are grouped")),
    row("static_graph", equivalent("only when reductions start")),
    row("find_unused", equivalent("an unused parameter's gradient is zero there")),
    row("used_on_one_rank", equivalent("an unused parameter's gradient is zero there")),
    row("buffers", equivalent("equal on all ranks before they are broadcast")),
    row("join", equivalent("nothing to shadow where all ranks have equally many batches")),
    row("distributed_sampler", equivalent("a sum does not mind who adds it"), splits=EVEN),
    row("clipped", equivalent("one clip, by the norm of the reduced gradient"), claims=("C10",)),
    row("scheduled", equivalent("one scheduler step per optimizer step"), claims=("C11",)),
    row("amp", equivalent("casts of one sample do not see the others"), claims=("C13",)),
    row("amp_scaler", equivalent("one loss scale per cycle, a power of two"), claims=("C13",)),
    row("fp16_hook", loses_precision("ranks are added in float16, gradients are float32")),
    row("bf16_hook", loses_precision("ranks are added in bfloat16, gradients are float32")),
    row("powersgd_warm_up", equivalent("not compressed yet: Vogels et al., arXiv 1905.13727")),
    row(
        "sync_batch_norm",
        equivalent("statistics of all ranks' rows: " + pair, accumulation_steps=1),
        divergent("EQ201", source="a micro-batch of all ranks is still a part of the batch"),
        accumulation_steps=(1, 2, 4),
        claims=("C4",),
    ),
    fault("batch_norm_per_rank", "EQ201", "Ioffe and Szegedy, arXiv 1502.03167", claims=("C4",)),
    fault("token_mean_per_rank", "EQ501", "a mean of ranks: 1/R against n_r/N", claims=("C16",)),
    row(
        "fourteen_thirds",
        divergent(
            "EQ501", source="(10/3 + 6/1)/2 = 14/3 against (10 + 6)/(3 + 1) = 4", world_size=2
        ),
        ends_in("invalid", "a rank that has no token divides by none of them"),
        folder=FAULTS,
        file="eq501_fourteen_thirds",
        world_sizes=(2,),
        claims=("C16",),
    ),
    fault("means_of_micro_steps", "EQ103", "a mean over micro-steps of means over their tokens"),
    fault(
        "reduced_again", "EQ109", "a sum of R equal sums, K - 1 times: R^(K-k) for micro-batch k"
    ),
    fault("zeroed_on_one_rank", "EQ301", "weight 0 for n_k/N, but in the last micro-batch"),
    fault("not_zeroed_on_one_rank", "EQ302", "one share of the step before in every sum"),
    fault("skipped_on_one_rank", "EQ305", "weight 0 for n_k/N"),
    fault("no_sync_to_the_end", "EQ502", "nobody hears of the others"),
    fault("wrapper_bypassed", "EQ502", "a reducer that no forward has prepared does nothing"),
    row(
        "forward_outside_no_sync",
        equivalent("more traffic, the same sum: " + linear),
        folder=FAULTS,
        file="eq503_forward_outside_no_sync",
        claims=("C19",),
    ),
    fault("global_count_averaged", "EQ504", "1/N, averaged: 1/(R N)"),
    fault("other_learning_rate", "EQ505", "equal gradients, other steps"),
    fault(
        "clip_before_the_reduction", "EQ506", "a mean of clipped gradients is not the clipped mean"
    ),
    fault(
        "clip_on_one_rank_before_the_reduction", "EQ506", "a mean of clipped and whole gradients"
    ),
    fault(
        "clip_by_hand_on_one_rank_before_the_reduction",
        "EQ506",
        "a mean of clipped and whole gradients",
    ),
    fault("clip_to_more_on_more_ranks", "EQ506", "the norm of a mean does not grow with R"),
    fault("clip_by_value_before_the_reduction", "EQ506", "a clip of each element is not linear"),
    fault(
        "clip_by_hand_before_the_reduction", "EQ506", "a mean of clipped gradients is not clipped"
    ),
    fault("clip_on_one_rank", "EQ505", "equal gradients, other steps"),
    fault("torch_clip_on_one_rank", "EQ505", "equal gradients, other steps"),
    fault("scheduler_per_rank", "EQ507", "lr(R t) for lr(t)"),
    fault("used_in_the_first_micro_batch", "EQ508", "the last backward completes no bucket"),
]
