"""Run the user's loop once, in one role, and return what was seen."""

from __future__ import annotations

import random
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from equivcheck import bridges
from equivcheck.casting import promote_module
from equivcheck.comparers import Pieces
from equivcheck.entropy import OtherSeeds, seed_torch, watch_entropy
from equivcheck.errors import EquivcheckError, StepError, UsageError
from equivcheck.feed import Data, Feed, Key
from equivcheck.keyed import KeyedRandom, keyed_random
from equivcheck.modules import modules_restored
from equivcheck.neutral import functional_dropout_off, switch_off_modules
from equivcheck.noise import UNIT_ROUNDOFF
from equivcheck.observe import Observer
from equivcheck.promotion import promoted
from equivcheck.recorder import Recorder
from equivcheck.recording import Place, Recording
from equivcheck.subject import Code, Subject, arguments
from equivcheck.usercode import raised

if TYPE_CHECKING:
    from equivcheck.case import Case
    from equivcheck.interventions import Intervention


@dataclass
class Run:
    """How one role is to be run.

    Attributes:
        role: reference, control, candidate, pieces, native_reference or native_candidate.
        data: The full batches, in the arithmetic of the role.
        micro_batches: Samples of each micro-batch that the loader hands out.
        accumulation_steps, micro_batch_size: What `train` is told.
        is_promoted: Compute in float64.
        orders: For map-style access, the sample at each position, for each pass.
        length: What `len(loader)` says, if not the truth.
        prefetches: Whether the loop fetches ahead of what it uses; None where that is to be found out.
        in_order: Whether the full-batch run uses its batches in the order in which it fetched them.
        boundaries: Micro-batches used up at each step, known from the promoted run of the same role.
        own_length: Rows of the data set that the loop makes of all samples, known from the reference.
        seed_offset: Added to the seed of the training itself, not of the model.
        reseeds_within: Only from the first micro-batch on: what the loop draws to set itself up stays.
        rank: The rank that runs it.
        world_size: Ranks that run it together.
        part: Which part of the batch this rank has; 0 where every rank has all of it.
        share: The samples that this rank is given; None where it takes its own share of all.
        cut: Whether the ranks share out the model, and each has all of the batch.
    """

    role: str
    data: Data
    micro_batches: list[list[int]]
    accumulation_steps: int
    micro_batch_size: int
    is_promoted: bool = True
    orders: list[list[int]] | None = None
    prefetches: bool | None = None
    in_order: bool = False
    boundaries: list[list[int]] = field(default_factory=list)
    length: int | None = None
    seed_offset: int = 0
    reseeds_within: bool = False
    own_length: int | None = None
    optimizer_steps: int = 0
    interventions: list[Intervention] = field(default_factory=list)
    schedule: list[Place] = field(default_factory=list)
    rank: int = 0
    world_size: int = 1
    part: int = 0
    share: frozenset[int] | None = None
    cut: bool = False

    @property
    def name(self) -> str:
        """The role, with the rank where there are several."""
        return self.role if self.world_size == 1 else f"{self.role}, rank {self.rank}"


def execute(
    subject: Subject,
    case: Case,
    run: Run,
    observer: Observer,
    *,
    watch: Callable[[Recording], None] | None = None,
) -> Recording:
    """Run the user's loop once and return the recording.

    Args:
        subject: Code under test.
        case: The point of the matrix.
        run: The role, and what it is served with.
        observer: What is taken from it.
        watch: Told of everything that is seen, as it happens.

    Raises:
        StepError: The user's code raised; the message has the user's frames only.
        UsageError: `train` asks for a name that is not on offer, or `build` gives no module.
    """
    started = time.perf_counter()
    recording = Recording(role=run.role)

    def unseeded() -> None:
        recording.unseeded = True

    with process_state(), watch_entropy(unseeded), bridges.installed() as install_loaded:
        seed_all(case.seed)  # modules may draw while they are imported
        code = subject.fresh()
        if install_loaded():  # the first run in this process, a rank's
            seed_all(case.seed)
            code = subject.fresh()
        return _execute(subject, case, run, observer, code, recording, started, watch)


@contextmanager
def process_state() -> Iterator[None]:
    """Put back what user code, or a seed of ours, sets for the whole process.

    The default dtype, the gradient mode, the random states of torch (cpu), numpy and Python, and the modules that
    were executed again, so that a check inside a test leaves the test's own imports alone.
    """
    dtype, enabled = torch.get_default_dtype(), torch.is_grad_enabled()
    drawn, legacy, python = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002 - as below
    try:
        with modules_restored():
            yield
    finally:
        torch.set_default_dtype(dtype)
        torch.set_grad_enabled(enabled)
        torch.set_rng_state(drawn)
        np.random.set_state(legacy)  # noqa: NPY002 - as below
        random.setstate(python)


def _execute(
    subject: Subject,
    case: Case,
    run: Run,
    observer: Observer,
    code: Code,
    recording: Recording,
    started: float,
    watch: Callable[[Recording], None] | None,
) -> Recording:
    seed_all(case.seed)
    model, bridge = _build(code, subject)
    first = next((p for p in model.parameters()), None)
    recording.dtype = str(first.dtype).removeprefix("torch.") if first is not None else "float32"
    recording.parameters = sum(p.numel() for p in model.parameters())
    is_keyed = case.rng == "per-sample"
    if not is_keyed:
        recording.dropout = switch_off_modules(model)
    working = torch.get_default_dtype()
    if run.is_promoted:
        promote_module(model)
    feed = Feed(run.data, run.micro_batches, run.orders, own_length=run.own_length)
    offers = {**code.offers, **_offers(model, feed, case, run)}
    if bridge is not None:
        offers["model"] = bridge.model(promoted=run.is_promoted)
    _tell_horizon(offers)
    given = arguments(code.train, offers, subject.target)

    def seen() -> None:
        recording.dropout = True

    seed_all(case.seed + 1 + (0 if run.reseeds_within else run.seed_offset))
    states = _random_states()
    with ExitStack() as stack:
        if not is_keyed:
            stack.enter_context(functional_dropout_off(seen if run.is_promoted else None))
        recorder = stack.enter_context(
            Recorder(
                model,
                recording,
                observer,
                interventions=run.interventions,
                schedule=run.schedule,
                world_size=run.world_size,
            )
        )
        recorder.usage.prefetches = run.prefetches
        recorder.usage.boundaries = run.boundaries
        recorder.usage.in_order = run.in_order
        recorder.is_promoted = run.is_promoted
        recorder.usage.by_sample = lambda: feed.singly
        if run.is_promoted:
            # A hook on modules would break the graph of a compiled one; promoted runs do not compile.
            feed.on_served = recorder.usage.served
            stack.enter_context(recorder.usage.watching_use())
        recorder.rank, recorder.part, recorder.share = run.rank, run.part, run.share
        recorder.cut = run.cut
        recorder.watch = watch
        recorder.code = code
        recorder.data = run.data

        if bridge is not None:
            stack.enter_context(bridge.watched(recorder, promoted=run.is_promoted))

        def fetched(keys: list[Key]) -> None:
            if bridge is not None:
                bridge.settle()
            recorder.fetched(keys)
            if not run.prefetches:
                entered(keys)

        def entered(keys: list[Key]) -> None:
            if isinstance(observer, Pieces):
                observer.enter(recorder, keys[0])

        feed.on_fetch = fetched
        feed.on_again = recorder.usage.unused
        if "dataset" in given:
            feed.on_own = recorder.usage.forget
            stack.enter_context(feed.watching_own())
        if run.prefetches:
            # The state is set when a micro-batch is used. In other loops when it is fetched: what
            # a loss is made of may have been computed before the forward, from the parameters.
            recorder.usage.on_use = entered
        observer.start(recorder)
        if run.is_promoted:
            mode = stack.enter_context(promoted(working))
        if is_keyed:
            keyed = KeyedRandom(case.seed, run.seed_offset, first=run.role == "reference")

            def idle() -> bool:
                ahead = run.prefetches or recording.prefetched
                known = run.prefetches is False
                return known or (not ahead and recorder.backwards >= len(recording.fetched) - 1)

            _key(stack, feed, keyed, idle)
        if run.seed_offset:
            seeds = OtherSeeds(run.seed_offset, awake=not run.reseeds_within)
            stack.enter_context(seeds.opened())
            if run.reseeds_within:
                _reseed_at_first(feed, lambda: _draw_otherwise(seeds, case, run))
        try:
            returned = _call_train(code, given)
            if bridge is not None:
                bridge.settle()
        except EquivcheckError:
            raise
        except (Exception, SystemExit) as error:
            if isinstance(error, Exception) and _is_ours(error):
                raise
            raise _step_error(error, recording, run) from error
        finally:
            recording.seconds = time.perf_counter() - started
        with torch.no_grad():
            for each in run.interventions:
                each.finish(recorder)
            observer.finish(recorder)
        if not run.is_promoted and recorder.trained:
            recording.dtype = _coarsest(recorder.trained)
        recording.autocast = _coarsest(recorder.autocast) if recorder.autocast else ""
        recording.random_drawn = not _equal_states(states, _random_states())
        if run.is_promoted:
            recording.asked = _coarsest(mode.asked) if mode.asked else ""
            recording.lowered = {
                name: str(dtype).removeprefix("torch.") for name, dtype in mode.lowered.items()
            }
    if feed.singly:
        recording.join_samples()
    recording.logged = _logged(returned)
    recording.own_length = feed.own_length if feed.has_own else None
    recording.seconds = time.perf_counter() - started
    return recording


def _draw_otherwise(seeds: OtherSeeds, case: Case, run: Run) -> None:
    seeds.wake()
    seed_all(case.seed + 1 + run.seed_offset)


def _reseed_at_first(feed: Feed, reseed: Callable[[], None]) -> None:
    """Call `reseed` before the first micro-batch is handed out."""
    fetched = feed.on_fetch

    def on_fetch(given: list[Key]) -> None:
        feed.on_fetch = fetched
        reseed()
        fetched(given)

    feed.on_fetch = on_fetch


def _key(stack: ExitStack, feed: Feed, mode: KeyedRandom, idle: Callable[[], bool]) -> None:
    """Key what the loop draws by the samples that it is served."""
    fetched, served = feed.on_fetch, feed.on_served
    keys: list[Key] = []

    def on_fetch(given: list[Key]) -> None:
        keys[:] = given
        fetched(given)

    def on_served(micro_batch: Any) -> None:
        mode.served(keys, micro_batch, is_next=idle())
        served(micro_batch)

    feed.on_fetch, feed.on_served = on_fetch, on_served
    stack.enter_context(keyed_random(mode))


def _coarsest(dtypes: Iterable[torch.dtype]) -> str:
    """Return the name of the dtype with the largest rounding."""
    return str(max(dtypes, key=lambda dtype: UNIT_ROUNDOFF.get(dtype, 0.0))).removeprefix("torch.")


def _call_train(code: Code, given: Mapping[str, object]) -> Any:
    returned = code.train(**given)
    if hasattr(returned, "__next__"):
        returned = list(returned)
    return returned


def _build(code: Code, subject: Subject) -> tuple[nn.Module, bridges.Bridge | None]:
    """Return the module that is watched, and the bridge to the model where that is another framework's."""
    try:
        model = code.build()
    except (Exception, SystemExit) as error:
        raise raised("build", error, f"build() of {subject.target}") from error
    bridge = bridges.across(model)
    if bridge is not None:
        model = bridge.module
    if not isinstance(model, nn.Module):
        raise UsageError(
            f"no-module: build() returned {type(model).__name__}",
            where=subject.target,
            expected="a torch.nn.Module, a tree of JAX arrays, or a module of flax nnx or Keras",
            fix="return model",
        )
    if not any(p.requires_grad for p in model.parameters()):
        raise UsageError(
            "no-trainable-parameter: the model has 0 parameters that require a gradient",
            where=f"build() of {subject.target}",
            expected="at least one parameter with requires_grad=True",
            because="every parameter is frozen, or the model has none: nothing could be compared",
        )
    return model, bridge


def _offers(model: nn.Module, feed: Feed, case: Case, run: Run) -> dict[str, object]:
    return {
        "model": model,
        "loader": feed.loader(run.length),
        "dataset": feed.dataset(),
        "accumulation_steps": run.accumulation_steps,
        "micro_batch_size": run.micro_batch_size,
        "rank": run.rank,
        "world_size": run.world_size,
        "device": torch.device(case.device),
        "strategy": case.strategy,
        "precision": case.precision,
        "optimizer_steps": run.optimizer_steps or len(run.data.rows),
    }


def _tell_horizon(offers: Mapping[str, object]) -> None:
    """Let a suite's scheduler know how many optimizer steps the batches make."""
    if "scheduler" in offers:
        vars(offers["scheduler"])["optimizer_steps"] = offers["optimizer_steps"]


# What calls back into torch's or the user's code shows their frame last, so a last frame here is a fault of ours.
_HERE = Path(__file__).parent
_HOOKS = tuple(
    str(_HERE / name)
    for name in (
        "recorder.py",
        "observe.py",
        "states.py",
        "shadow.py",
        "parts.py",
        "differences.py",
        "hooks/",
    )
)


def _is_ours(error: Exception) -> bool:
    """Return whether an exception was raised by our own hooks, not by the code under test."""
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and frames[-1].filename.startswith(_HOOKS)


def _step_error(error: BaseException, recording: Recording, run: Run) -> StepError:
    steps = len(recording.steps)
    last = recording.steps[-1] if recording.steps else None
    taken = frozenset(key for step in recording.steps for key in step.samples)
    since = sum(1 for keys in recording.fetched if keys[0] not in taken)
    micro_step = max(since - 1, 0) if last is not None else max(len(recording.fetched) - 1, 0)
    where = f"{run.name}, optimizer_step {steps}, micro_step {micro_step}"
    failure = raised("train", error, where)
    failure.optimizer_step = steps
    return failure


def _logged(returned: Any) -> list[float] | None:
    """Return the losses that `train` returned or yielded, as numbers; None if it gave none."""
    if isinstance(returned, Mapping):
        returned = next(
            (returned[key] for key in ("loss", "losses", "train_loss") if key in returned), None
        )
    if isinstance(returned, (torch.Tensor, np.ndarray)):
        returned = returned.tolist()
    if isinstance(returned, (int, float)) and not isinstance(returned, bool):
        return [float(returned)]
    if not isinstance(returned, Iterable) or isinstance(returned, (str, bytes)):
        return None
    numbers: list[float] = []
    for each in returned:
        value = each.get("loss") if isinstance(each, Mapping) else each
        if isinstance(value, torch.Tensor) and value.numel() == 1:
            value = value.item()
        if not isinstance(value, (int, float, np.floating)) or isinstance(value, bool):
            return None
        numbers.append(float(value))
    return numbers


def seed_all(seed: int) -> None:
    """Seed every global random generator: of torch, numpy and Python."""
    seed_torch(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - user code draws from the legacy generator too
    random.seed(seed)


def _random_states() -> tuple[Any, ...]:
    return torch.get_rng_state(), np.random.get_state(legacy=True)[1:3], random.getstate()  # type: ignore[index]  # noqa: NPY002


def _equal_states(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
    return (
        bool(torch.equal(a[0], b[0]))
        and a[1][1] == b[1][1]
        and bool(np.array_equal(a[1][0], b[1][0]))
        and a[2] == b[2]
    )
