"""Ask every head of Transformers that can be built tiny: does Trainer accumulate it to the full batch's gradient?

Each head runs in a process of its own, in float64 with dropout at zero, through Trainer's own `get_batch_samples` and
`training_step`: the full batch, the full batch with its rows in another order (the noise), each micro-batch alone, and
K micro-batches accumulated. The gradients are then fitted as weighted sums of those (equivcheck.attribution),
which names the fault. One JSON line for each head, written as it is finished.

    python heads.py OUT.jsonl [FAMILY ...] [--only SUBSTRING] [--accumulation-steps 4] [--limit SECONDS]
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import io
import json
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from shrink import VOCABULARY, shrink
from torch import Tensor
from transformers import Trainer, TrainingArguments
from transformers.models.auto import configuration_auto, modeling_auto
from transformers.trainer_callback import PrinterCallback

from equivcheck.attribution import solve
from equivcheck.casting import promote_module
from equivcheck.promotion import promoted

ROWS, LENGTH, CLASSES = 8, 12, 3
IGNORED = -100
LARGEST = 3_000_000  # parameters of a head that counts as tiny
SAME = 1e-9  # the gap is never close: correct heads measure 1e-16 to 1e-12, faults 1e-3 and more

Batch = dict[str, Tensor]


def words(generator: torch.Generator, rows: int = ROWS) -> tuple[Tensor, Tensor]:
    """Return ragged token rows [rows, LENGTH] of words 10 and up, and their mask, padded on the right."""
    tokens = torch.randint(10, VOCABULARY, (rows, LENGTH), generator=generator)
    lengths = torch.tensor([LENGTH, 4, 9, 5, 7, 3, 11, 4])[:rows]
    mask = (torch.arange(LENGTH)[None] < lengths[:, None]).long()
    return torch.where(mask.bool(), tokens, 1), mask


def causal(_: Any, g: torch.Generator) -> Batch:
    """Every valid token is a label."""
    tokens, mask = words(g)
    labels = tokens.masked_fill(mask == 0, IGNORED)
    return {"input_ids": tokens, "attention_mask": mask, "labels": labels}


def masked(_: Any, g: torch.Generator) -> Batch:
    """Some valid tokens of each row are labels, more in long rows."""
    batch = causal(_, g)
    hidden = (torch.arange(LENGTH)[None] + torch.arange(ROWS)[:, None]) % 3 == 0
    batch["labels"] = batch["labels"].masked_fill(~hidden, IGNORED)
    return batch


def seq2seq(model: Any, g: torch.Generator) -> Batch:
    """Source and target are ragged, and not in the same rows."""
    batch = causal(model, g)
    batch["labels"] = batch["labels"].flip(0)
    return batch


def sequence(model: Any, g: torch.Generator) -> Batch:
    """One class a row; the padding id is the model's own, by which some heads find the last word."""
    batch = causal(model, g)
    config = model.config.get_text_config()
    pad, end = (getattr(config, name, None) for name in ("pad_token_id", "eos_token_id"))
    if isinstance(end, int) and 0 <= end < 10:
        # Some heads pool at the end of the text, and ask for one in every row.
        last = batch["attention_mask"].sum(1, keepdim=True) - 1
        batch["input_ids"] = batch["input_ids"].scatter(1, last, end)
    if pad is not None and 0 <= pad < 10:
        batch["input_ids"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, pad)
    batch["labels"] = torch.randint(0, CLASSES, (ROWS,), generator=g)
    return batch


def regression(model: Any, g: torch.Generator) -> Batch:
    """One number a row."""
    return {**sequence(model, g), "labels": torch.randn(ROWS, generator=g)}


def multi_label(model: Any, g: torch.Generator) -> Batch:
    """Three yes or no a row."""
    return {
        **sequence(model, g),
        "labels": torch.randint(0, 2, (ROWS, CLASSES), generator=g).float(),
    }


def tokens(model: Any, g: torch.Generator) -> Batch:
    """A class for every valid token."""
    batch = causal(model, g)
    classes = torch.randint(0, CLASSES, (ROWS, LENGTH), generator=g)
    batch["labels"] = classes.masked_fill(batch["attention_mask"] == 0, IGNORED)
    return batch


def question(model: Any, g: torch.Generator) -> Batch:
    """A span in every row."""
    batch = causal(model, g)
    del batch["labels"]
    start = torch.randint(0, 2, (ROWS,), generator=g)
    return {**batch, "start_positions": start, "end_positions": start + 1}


def choice(model: Any, g: torch.Generator) -> Batch:
    """Two continuations a row."""
    first, second = causal(model, g), causal(model, g)
    both = {k: torch.stack([first[k], second[k]], 1) for k in ("input_ids", "attention_mask")}
    return {**both, "labels": torch.randint(0, 2, (ROWS,), generator=g)}


def next_sentence(model: Any, g: torch.Generator) -> Batch:
    """Whether the second half follows the first."""
    return {**causal(model, g), "labels": torch.randint(0, 2, (ROWS,), generator=g)}


def images(model: Any, g: torch.Generator) -> Tensor:
    """Return pixels [ROWS, channels, side, side] as the configuration wants them."""
    config = model.config
    side = getattr(config, "image_size", 32)
    side = side[0] if isinstance(side, (list, tuple)) else side
    return torch.randn(ROWS, getattr(config, "num_channels", 3), side, side, generator=g)


def image_class(model: Any, g: torch.Generator) -> Batch:
    """One class an image."""
    labels = torch.randint(0, CLASSES, (ROWS,), generator=g)
    return {"pixel_values": images(model, g), "labels": labels}


def image_multi_label(model: Any, g: torch.Generator) -> Batch:
    """Three yes or no an image."""
    labels = torch.randint(0, 2, (ROWS, CLASSES), generator=g).float()
    return {"pixel_values": images(model, g), "labels": labels}


def segmentation(model: Any, g: torch.Generator) -> Batch:
    """A class for every pixel; unequal parts carry the index that these heads ignore."""
    pixels = images(model, g)
    labels = torch.randint(0, CLASSES, (ROWS, *pixels.shape[2:]), generator=g)
    ignored = getattr(model.config, "semantic_loss_ignore_index", 255)
    for row in range(ROWS):
        labels[row, : 2 * row] = ignored
    return {"pixel_values": pixels, "labels": labels}


def speech(g: torch.Generator) -> Batch:
    """Return a second of noise a row, 4000 values."""
    return {"input_values": torch.randn(ROWS, 4000, generator=g)}


def audio_class(_: Any, g: torch.Generator) -> Batch:
    """One class a recording."""
    return {**speech(g), "labels": torch.randint(0, CLASSES, (ROWS,), generator=g)}


def ctc(_: Any, g: torch.Generator) -> Batch:
    """A short text a recording, of unequal length."""
    labels = torch.randint(10, VOCABULARY, (ROWS, 4), generator=g)
    lengths = torch.tensor([4, 1, 3, 2, 4, 1, 2, 3])
    return {
        **speech(g),
        "labels": labels.masked_fill(torch.arange(4)[None] >= lengths[:, None], IGNORED),
    }


def names(kind: str) -> dict[str, str]:
    """Return model type to head class of one of the library's own tables."""
    return dict(getattr(modeling_auto, f"MODEL_FOR_{kind}_MAPPING_NAMES"))


FAMILIES: dict[str, tuple[str, Callable[..., Batch], dict[str, Any]]] = {
    "causal": ("CAUSAL_LM", causal, {}),
    "causal_aux": ("CAUSAL_LM", causal, {"output_router_logits": True}),
    "masked": ("MASKED_LM", masked, {}),
    "seq2seq": ("SEQ_TO_SEQ_CAUSAL_LM", seq2seq, {}),
    "sequence": ("SEQUENCE_CLASSIFICATION", sequence, {}),
    "regression": ("SEQUENCE_CLASSIFICATION", regression, {"num_labels": 1}),
    "multi_label": (
        "SEQUENCE_CLASSIFICATION",
        multi_label,
        {"problem_type": "multi_label_classification"},
    ),
    "token": ("TOKEN_CLASSIFICATION", tokens, {}),
    "question": ("QUESTION_ANSWERING", question, {}),
    "choice": ("MULTIPLE_CHOICE", choice, {}),
    "next_sentence": ("NEXT_SENTENCE_PREDICTION", next_sentence, {}),
    "image": ("IMAGE_CLASSIFICATION", image_class, {}),
    "image_multi_label": (
        "IMAGE_CLASSIFICATION",
        image_multi_label,
        {"problem_type": "multi_label_classification"},
    ),
    "segmentation": ("SEMANTIC_SEGMENTATION", segmentation, {}),
    "audio": ("AUDIO_CLASSIFICATION", audio_class, {}),
    "ctc": ("CTC", ctc, {}),
}


def build(model_type: str, head: str, fields: dict[str, Any]) -> Any:
    """Return the head with a tiny configuration, in training mode, with every dropout at zero."""
    config_class = getattr(
        transformers, configuration_auto.CONFIG_MAPPING_NAMES.get(model_type, ""), None
    )
    if config_class is None:
        raise LookupError(f"no configuration named for {model_type}")
    config = shrink(config_class())
    if "output_router_logits" in fields and not hasattr(config, "output_router_logits"):
        raise LookupError("no output_router_logits in its configuration")
    config.num_labels = CLASSES
    for name, value in fields.items():
        setattr(config, name, value)
    text = config.get_text_config()
    if getattr(text, "pad_token_id", None) is None:
        text.pad_token_id = config.pad_token_id = 0
    if hasattr(config, "is_decoder") and head.endswith(("CausalLM", "LMHeadModel")):
        config.is_decoder = not config.is_encoder_decoder
    cls = getattr(transformers, head)
    with torch.device("meta"), contextlib.suppress(RuntimeError, NotImplementedError, ValueError):
        count = sum(p.numel() for p in cls(config).parameters())
        if count > LARGEST:
            raise MemoryError(f"{count:,} parameters: the rules do not make it tiny")
    torch.manual_seed(0)
    model = cls(config)
    for module in model.modules():
        if "Dropout" in type(module).__name__ and hasattr(module, "p"):
            module.p = 0.0
    return model.train()


class Rig:
    """One head under Trainer's own accumulation."""

    def __init__(self, model: Any, batch: Batch, folder: str) -> None:
        accepted = inspect.signature(model.forward).parameters
        open_ended = any(p.kind is p.VAR_KEYWORD for p in accepted.values())
        self.batch = {
            k: v for k, v in batch.items() if k in accepted or open_ended or k == "labels"
        }
        self.model, self.folder = model, folder
        self.trainers: dict[int, Any] = {}

    def trainer(self, accumulation_steps: int) -> Any:
        """Return a Trainer of the library."""
        if accumulation_steps not in self.trainers:
            args = TrainingArguments(
                output_dir=self.folder,
                gradient_accumulation_steps=accumulation_steps,
                use_cpu=True,
                report_to=[],
                disable_tqdm=True,
            )
            made = Trainer(model=self.model, args=args, train_dataset=[0])
            made.remove_callback(PrinterCallback)
            self.trainers[accumulation_steps] = made
        return self.trainers[accumulation_steps]

    def gradient(self, rows: list[Tensor]) -> tuple[Tensor, float]:
        """Return the flat gradient [n] and the logged loss of one optimizer step over these micro-batches."""
        trainer = self.trainer(len(rows))
        self.model.zero_grad(set_to_none=True)
        for name, buffer in self.model.named_buffers():
            buffer.copy_(self.buffers[name])
        torch.manual_seed(1)
        micro = [{k: v[index] for k, v in self.batch.items()} for index in rows]
        samples, count = trainer.get_batch_samples(iter(micro), len(micro), torch.device("cpu"))
        trainer.current_gradient_accumulation_steps = len(samples)
        loss = sum(float(trainer.training_step(self.model, dict(each), count)) for each in samples)
        parts = [
            torch.zeros_like(p).flatten() if p.grad is None else p.grad.to_dense().flatten()
            for p in self.model.parameters()
            if p.requires_grad
        ]
        return torch.cat(parts).double(), loss

    @property
    def buffers(self) -> dict[str, Tensor]:
        """The buffers as they were at first."""
        if not hasattr(self, "_buffers"):
            self._buffers = {n: b.detach().clone() for n, b in self.model.named_buffers()}
        return self._buffers


def relative(a: Tensor, b: Tensor) -> float:
    """Return |a - b| / |b|."""
    return float((a - b).norm() / b.norm())


def measure(rig: Rig, k: int) -> dict[str, Any]:
    """Return what one head does with K micro-batches."""
    everything = torch.arange(ROWS)
    slices = list(everything.split(ROWS // k))
    order = torch.cat([slices[i] for i in (*range(1, k), 0)])
    full, full_loss = rig.gradient([everything])
    if not full.isfinite().all() or not full.any():
        return {
            "outcome": "not run",
            "reason": "the gradient of the full batch is zero or not finite",
        }
    control, _ = rig.gradient([order])
    repeat, _ = rig.gradient([everything])
    candidate, loss = rig.gradient(slices)
    pieces = torch.stack([rig.gradient([each])[0] for each in slices])
    found = {
        "accumulation_steps": k,
        "relative": relative(candidate, full),
        "scale": float(candidate @ full / (full @ full)),
        "cosine": float(candidate @ full / (candidate.norm() * full.norm())),
        "control": relative(control, full),
        "repeat": relative(repeat, full),
        "loss": [full_loss, loss],
        "accepts_loss_kwargs": bool(rig.trainer(k).model_accepts_loss_kwargs),
        "parameters": full.numel(),
    }
    v, w = solve(pieces, full), solve(pieces, candidate)
    found |= {
        "reference_weights": v.solution,
        "candidate_weights": w.solution,
        "reference_residual": v.residual,
        "candidate_residual": w.residual,
    }
    found["outcome"], found["cause"] = name_it(found, k)
    return found


def name_it(found: dict[str, Any], k: int) -> tuple[str, str]:
    """Return equivalent, or divergent and the code of the fault that the weights show."""
    if found["repeat"] > SAME:
        return "inconclusive", "EQ602"
    limit = max(SAME, 100 * found["control"])
    if found["control"] > 1e-6:
        return "inconclusive", "rows in another order give another gradient"
    if found["relative"] <= limit:
        return "equivalent", ""
    if abs(found["cosine"] - 1) < 1e-9:
        if abs(found["scale"] - k) < 1e-6:
            return "divergent", "EQ101"
        return "divergent", "EQ102" if abs(found["scale"] * k - 1) < 1e-6 else "EQ104"
    coupled = (found["reference_residual"] or 0.0) > 1e-6
    if coupled:
        return "divergent", "EQ201 or EQ202"
    if (found["candidate_residual"] or 0.0) > 1e-6:
        return "divergent", "EQ309 or EQ106"
    if max(abs(w * k - 1) for w in found["candidate_weights"]) < 1e-6:
        return "divergent", "EQ103"
    if max(abs(w - 1) for w in found["candidate_weights"]) < 1e-6:
        return "divergent", "EQ101 on EQ103"
    return "divergent", "EQ000"


def one(family: str, model_type: str, head: str, k: int) -> dict[str, Any]:
    """Return the finding of one head; what raised is the reason why it was not run."""
    _, make, fields = FAMILIES[family]
    try:
        model = build(model_type, head, fields)
        generator = torch.Generator().manual_seed(3)
        rig = Rig(model, make(model, generator), tempfile.mkdtemp())
        return attempt(rig, k)
    except BaseException as error:  # noqa: BLE001 - the reason, whatever it is
        last = traceback.extract_tb(error.__traceback__)[-1]
        said = " ".join(str(error).split())[:160]
        where = f"{Path(last.filename).name}:{last.lineno}"
        return {"outcome": "not run", "reason": f"{type(error).__name__}: {said} ({where})"}


def attempt(rig: Rig, k: int) -> dict[str, Any]:
    """Measure in float64; a head that raises when promoted is measured as it is, in float32."""
    state = {name: value.clone() for name, value in rig.model.state_dict().items()}
    try:
        promote_module(rig.model)
        rig.batch = {n: t.double() if t.is_floating_point() else t for n, t in rig.batch.items()}
        with promoted():
            return {**measure(rig, k), "arithmetic": "float64"}
    except Exception:  # noqa: BLE001 - what promotion breaks is measured as written
        rig.model.float()
        rig.model.load_state_dict(state)
        rig.trainers.clear()
        if hasattr(rig, "_buffers"):
            del rig._buffers
        rig.batch = {n: t.float() if t.is_floating_point() else t for n, t in rig.batch.items()}
        found = measure(rig, k)
        # Rounding of float32 is 1e-7 and a fault 1e-3 and more: between them nothing is said.
        if found["outcome"] == "divergent" and found["relative"] < 1e-4:
            found["outcome"], found["cause"] = "equivalent", ""
        return {**found, "arithmetic": "float32"}


def isolated(limit: int, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return what `work` returns in a forked process, or why there is no answer within `limit` seconds."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        silent = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silent, 1)
        os.dup2(silent, 2)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            found = work()
        with os.fdopen(write, "w") as pipe:
            json.dump(found, pipe)
        os._exit(0)
    os.close(write)

    def end(*_: Any) -> None:
        os.kill(child, signal.SIGKILL)

    signal.signal(signal.SIGALRM, end)
    signal.alarm(limit)
    try:
        with os.fdopen(read) as pipe:
            text = pipe.read()
    finally:
        signal.alarm(0)
        os.waitpid(child, 0)
    return json.loads(text) if text else {"outcome": "not run", "reason": f"no answer in {limit} s"}


def heads(families: list[str], only: str) -> Iterator[tuple[str, str, str]]:
    """Yield family, model type and class of every head."""
    for family in families:
        seen = set()
        for model_type, found in sorted(names(FAMILIES[family][0]).items()):
            for head in found if isinstance(found, (list, tuple)) else [found]:
                if (
                    head not in seen
                    and only.lower() in head.lower()
                    and hasattr(transformers, head)
                ):
                    seen.add(head)
                    yield family, model_type, head


def main() -> None:
    """Write one line for each head that is not in the file yet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("families", nargs="*")
    parser.add_argument("--only", default="")
    parser.add_argument("--accumulation-steps", type=int, default=4)
    parser.add_argument("--limit", type=int, default=120)
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    done = set()
    if options.out.exists():
        known = [json.loads(line) for line in options.out.read_text().splitlines()]
        done = {(each["family"], each["head"]) for each in known}
    with options.out.open("a") as out:
        for family, model_type, head in heads(options.families or list(FAMILIES), options.only):
            if (family, head) in done:
                continue
            started = time.perf_counter()
            found = isolated(
                options.limit, partial(one, family, model_type, head, options.accumulation_steps)
            )
            entry = {"family": family, "model": model_type, "head": head, **found}
            entry["seconds"] = round(time.perf_counter() - started, 2)
            out.write(json.dumps(entry) + "\n")
            out.flush()
            shown = entry.get("cause") or entry.get("reason", "")
            print(f"{family:14} {head:44} {entry['outcome']:12} {shown}", file=sys.stderr)


if __name__ == "__main__":
    main()
