"""What runs in a watched process: everything is put in place once torch is there, and written as the script goes.

A script's exit code and output stay what they are; only a run that has shown all it was asked for is ended early.
"""

from __future__ import annotations

import atexit
import os
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any, NoReturn

import torch
import torch.distributed
from torch.optim.optimizer import register_optimizer_step_post_hook

from equivcheck.attach.digests import Rule
from equivcheck.attach.groups import never_freed
from equivcheck.attach.looks import counted, loaders_of_length, watch_targets
from equivcheck.attach.observers import Contributor, Follower, Shaken, Watcher, Writer
from equivcheck.attach.seeds import random_states, same_states
from equivcheck.attach.spec import Spec
from equivcheck.attach.store import Facts, load, save, with_kept
from equivcheck.attach.watch import ProcessRecorder, Samples
from equivcheck.feed import Key
from equivcheck.neutral import functional_dropout_off
from equivcheck.noise import UNIT_ROUNDOFF
from equivcheck.observe import Observer
from equivcheck.promotion import Promotion, promoted
from equivcheck.recorder import Recorder
from equivcheck.recording import Recording
from equivcheck.result import environment

# Time between two times of writing, in units of what the last one took.
WRITING = 1000.0
# Left in a run's folder by every process that was reached, whether it trains or not.
ATTACHED = "attached"
_OURS = str(Path(__file__).parents[1]) + os.sep


def attach() -> None:
    """Start watching this process, as the specification that its environment names asks for."""
    path = Path(os.environ["EQUIVCHECK_SPEC"])
    try:
        path.with_name(ATTACHED).touch()
        Attachment(Spec.read(path)).start()
    except Exception:  # noqa: BLE001 - a script that is watched must not fail for that; its run is refused later
        failed = path.parent / f"failed-{os.getpid()}.txt"
        failed.write_text(traceback.format_exc(), encoding="utf-8")


def rank_of() -> tuple[int, int]:
    """Return this process's rank and the world size: of the process group, or as the launcher has set them."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


class Attachment:
    """One process that is watched, from the import of torch to its end.

    Args:
        spec: What is asked for.
    """

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self.recording = Recording(role=spec.role)
        self.facts = Facts(
            promoted=spec.promoted,
            command=list(getattr(sys, "orig_argv", sys.argv)),
            launched=spec.launched,
            environment=environment(),
            started=time.time(),
        )
        self.rule = Rule(**spec.rule)
        self.recorder: ProcessRecorder
        self._folder: Path | None = None
        self._pid = os.getpid()
        self._stack = ExitStack()
        self._promotion: Promotion | None = None
        self._began = time.perf_counter()
        self._states = random_states()
        self._is_done = False
        self._passed = 0
        self._saved = self._cost = 0.0
        self._reached_last = False
        # A second optimizer steps on what the first has used, too: the first step counts.
        self._cycle_of = {
            number: cycle
            for cycle, numbers in reversed([*enumerate(spec.step_samples)])
            for number in numbers
        }

    # ---- starting ------------------------------------------------------------------------------

    def start(self) -> None:
        """Put everything in place."""
        spec = self.spec

        def seen() -> None:
            self.recording.dropout = True

        if spec.neutral:
            self._stack.enter_context(functional_dropout_off(seen if spec.promoted else None))
        self.recorder = ProcessRecorder(
            self.recording,
            _Later(self),
            interventions=[*spec.interventions],
            schedule=spec.schedule,
            rule=self.rule,
            samples=self._samples(0, 1),
            is_neutral=spec.neutral,
            seed_offset=spec.seed_offset,
            on_enter=self._entered,
            on_called=self._called,
        )
        self.recorder.is_promoted = spec.promoted
        self._stack.enter_context(self.recorder)
        self._stack.callback(register_optimizer_step_post_hook(self._stepped).remove)
        watch_targets(self._stack, self._counted)
        never_freed(self._stack)
        if spec.length is not None:
            loaders_of_length(self._stack, spec.length)
        if spec.promoted:
            self._promotion = self._stack.enter_context(promoted(torch.get_default_dtype()))
        atexit.register(self.finish, "exit")
        os.register_at_fork(after_in_child=self._forked)
        self._leave: Callable[[int], NoReturn] = os._exit
        os._exit = self._exit  # type: ignore[assignment]
        self._hook = sys.excepthook
        sys.excepthook = self._raised

    def _samples(self, rank: int, world_size: int) -> Samples:
        if self.spec.digests is None:
            return Samples(None, rank=rank, world_size=world_size)
        known = list(zip(self.spec.digests, self.spec.numbers, strict=True))
        return Samples(known, rank=rank, world_size=world_size)

    def adopt(self) -> Observer:
        """Return the observer, now that the rank is known."""
        rank, world_size = rank_of()
        self.facts.rank, self.facts.world_size = rank, world_size
        self.recorder.rank, self.recorder.part, self.recorder.world_size = rank, rank, world_size
        self.recorder.samples = self._samples(rank, world_size)
        self._folder = _own_folder(Path(self.spec.output), rank)
        kind = self.spec.observer
        if kind == "write":
            return Writer(self._folder)
        if kind == "watch":
            return Watcher(self.facts.contributions, self.facts.after)
        source = Path(self.spec.reference) / f"rank-{rank}"
        if not source.exists():
            source = Path(self.spec.reference) / "rank-0"
        reference = with_kept(source, load(source)[0])
        for step, numbers in zip(reference.steps, self.spec.step_samples, strict=False):
            step.samples = frozenset((0, number) for number in numbers)
        comparer: Follower
        if kind == "perturb":
            comparer = Shaken(reference, self.spec.perturbation)
        elif kind == "contribute":
            comparer = Contributor(reference, self.facts.contributions, native=self.spec.native)
        else:
            comparer = Follower(reference, native=self.spec.native)
        comparer.match_by = self.spec.boundaries
        return comparer

    # ---- while it runs -------------------------------------------------------------------------

    def _entered(self, keys: list[Key]) -> bool:
        """See the samples of a micro-batch that is about to be used; end the run if it has shown enough."""
        if self._is_done or os.getpid() != self._pid:
            return False
        if self._is_over(keys):
            # They were recognised and will not be used: no other run is to wait for them.
            del self.recorder.samples.digests[-len(keys) :]
            self._over()
            return False
        self._passed += len(keys)
        if isinstance(self.recorder.observer, Contributor):
            self.recorder.observer.enter(
                self.recorder, -1 if keys[0][0] else self._cycle_of.get(keys[0][1], -1)
            )
        cycles = [self._cycle_of.get(number, -1) for is_other, number in keys if not is_other]
        self._reached_last |= max(cycles, default=-1) == len(self.spec.step_samples) - 1
        return True

    def _is_over(self, keys: list[Key]) -> bool:
        spec = self.spec
        # A step that is open runs its forward in a closure: it is not over before that.
        steps = self.recording.steps[: len(self.recording.steps) - self.recorder.steps.open_count]
        if spec.digests is None:
            taken = sum(step.optimizer == steps[0].optimizer for step in steps)
            return taken >= spec.optimizer_steps
        if spec.stop_cycle is not None and any(
            not is_other and self._cycle_of.get(number, spec.stop_cycle) >= spec.stop_cycle
            for is_other, number in keys
        ):
            return True
        if spec.boundaries is not None:
            return len(steps) >= len(spec.boundaries) > 0
        total = -(-len(spec.digests) // self.facts.world_size)
        return self._passed >= total or (self._reached_last and all(key[0] for key in keys))

    def _called(self, named: list[tuple[str, torch.Tensor]], rows: int, joins: bool) -> None:
        if not self.facts.shapes:
            self.facts.shapes = {path: list(tensor.shape) for path, tensor in named}
        if not joins or not self.facts.counts:
            self.facts.counts.append({})
        for label, count in counted(named, rows).items():
            self._counted(label, count)

    def _counted(self, label: str, count: int) -> None:
        if self.facts.counts:
            counts = self.facts.counts[-1]
            counts[label] = counts.get(label, 0) + count

    def _stepped(self, *_: Any) -> None:
        if self._is_done or self.recorder.is_paused:
            return
        # Everything is written anew each time: as seldom as keeps the cost to a thousandth, and at the end.
        began = time.perf_counter()
        if began - self._saved >= WRITING * self._cost:
            self._save()
            self._saved = time.perf_counter()
            self._cost = self._saved - began

    def _over(self) -> None:
        if self.spec.ends:
            self.finish("limit")
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
            self._leave(0)
        self.finish("limit", detach=not self.spec.promoted)

    # ---- ending --------------------------------------------------------------------------------

    def finish(self, ended: str, *, detach: bool = True) -> None:
        """Write what is left to write, once, and let go of the process."""
        if self._is_done or os.getpid() != self._pid:
            return
        self._is_done = True
        recorder = self.recorder
        with torch.no_grad():
            if recorder.is_adopted:
                for each in recorder.interventions:
                    each.finish(recorder)
                recorder.observer.finish(recorder)
        self.facts.ended = ended
        self._save()
        recorder.is_paused = True
        if detach:
            self._stack.close()

    def _save(self) -> None:
        if self._folder is None:
            return
        recording, recorder = self.recording, self.recorder
        if not self.spec.promoted and recorder.trained:
            recording.dtype = _coarsest(recorder.trained)
        recording.autocast = _coarsest(recorder.autocast) if recorder.autocast else ""
        recording.random_drawn = not same_states(self._states, random_states())
        if self._promotion is not None:
            recording.lowered = {
                name: str(dtype).removeprefix("torch.")
                for name, dtype in self._promotion.lowered.items()
            }
        recording.seconds = time.perf_counter() - self._began
        self.facts.environment["packages"] = _packages()
        self.facts.digests = recorder.samples.digests
        self.facts.rule = self.rule.as_dict()
        # A sum that was divided is one that was made a mean by hand.
        first = recording.backwards[0].reduction if recording.backwards else None
        self.facts.reduction = first.kind if first is not None and first.factor == 1.0 else ""
        self.facts.states = self.spec.interventions
        save(self._folder, recording, self.facts)

    def _forked(self) -> None:
        """Leave a process that was forked off alone: a worker of a loader does not train."""
        self._is_done = True
        self.recorder.is_paused = True

    def _exit(self, code: int) -> NoReturn:
        self.finish("exit")
        self._leave(code)

    def _raised(
        self, kind: type[BaseException], error: BaseException, trace: TracebackType | None
    ) -> None:
        """Note the exception that ends the script, and show it as Python would without us."""
        own = _without_ours(trace)
        if own is not None:
            error.__traceback__ = trace = own
        self.facts.error = f"{kind.__name__}: {error}"
        self.facts.traceback = "".join(traceback.format_exception(kind, error, trace))
        if self._folder is None and not self._is_done and os.getpid() == self._pid:
            rank, _ = rank_of()
            self._folder = _own_folder(Path(self.spec.output), rank)
        self.finish("exception")
        self._hook(kind, error, trace)


class _Later(Observer):
    """Stands for the observer until the model is found."""

    def __init__(self, attachment: Attachment) -> None:
        self._attachment = attachment

    def start(self, recorder: Recorder) -> None:
        recorder.observer = self._attachment.adopt()
        recorder.observer.start(recorder)


def _own_folder(output: Path, rank: int) -> Path:
    """Make and return a folder for this process; a second one of the same rank gets a number of its own."""
    for count in range(1000):
        folder = output / (f"rank-{rank}" if not count else f"rank-{rank}.{count}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        return folder
    raise FileExistsError(str(output))


def _packages() -> dict[str, str]:
    """Return the versions of what the script has imported, as the packages themselves say."""
    found = {}
    for name, module in list(sys.modules.items()):
        if "." in name or name.startswith("_") or not isinstance(module, ModuleType):
            continue
        version = vars(module).get("__version__")
        if version is None and type(module) is not ModuleType:
            with suppress(Exception):  # A lazy module, as that of Transformers, keeps it elsewhere.
                version = module.__version__
        if isinstance(version, str):
            found[name] = version
    return dict(sorted(found.items()))


def _coarsest(dtypes: set[torch.dtype]) -> str:
    return str(max(dtypes, key=lambda dtype: UNIT_ROUNDOFF.get(dtype, 0.0))).removeprefix("torch.")


def _without_ours(trace: TracebackType | None) -> TracebackType | None:
    """Return a traceback without the frames of our own wrappers."""
    kept = []
    while trace is not None:
        if not trace.tb_frame.f_code.co_filename.startswith(_OURS):
            kept.append(trace)
        trace = trace.tb_next
    chain = None
    for each in reversed(kept):
        chain = TracebackType(chain, each.tb_frame, each.tb_lasti, each.tb_lineno)
    return chain
