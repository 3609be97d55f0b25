"""Promoted code computes what the same code written by hand in float64 computes.

Every case runs twice: with the dtypes that users write, under `promoted`, and with float64 in their
place, without it. The difference is counted in units of float64 roundoff.
"""

from __future__ import annotations

import collections
import copy
import dataclasses
import importlib
import io
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn
from torch.utils.checkpoint import checkpoint

from equivcheck.casting import promote_module, promote_tree
from equivcheck.promotion import promoted

pytestmark = [
    # Compiling is imported by set_stance; nested tensors and half complex numbers are prototypes.
    pytest.mark.filterwarnings("ignore::UserWarning:torch.*"),
    pytest.mark.filterwarnings("ignore:.*nested.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*ComplexHalf.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning"),
]

ROUNDOFF = torch.finfo(torch.float64).eps
SINGLE_ROUNDOFF = torch.finfo(torch.float32).eps
ALLOWED = 450  # units of roundoff, 1e-13; measured: at most 4 (a least-squares solve), mostly 0

AS_WRITTEN = SimpleNamespace(
    promoted=True, low=torch.bfloat16, half=torch.float16, single=torch.float32
)
BY_HAND = SimpleNamespace(
    promoted=False, low=torch.float64, half=torch.float64, single=torch.float64
)


def normal(*shape):
    """Standard normal numbers in float32, the same in every call."""
    generator = torch.Generator().manual_seed(3)
    return torch.randn(*shape, generator=generator, dtype=torch.float32)


def autocast(precision, dtype=torch.bfloat16):
    return torch.autocast("cpu", dtype=dtype, enabled=precision.promoted)


def state(module):
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    buffers = [b for b in module.buffers() if b.is_floating_point()]
    return [p.detach() for p in module.parameters()] + buffers + gradients


def roundoffs(expected, actual):
    """The largest relative difference of two lists of tensors in units of float64 roundoff."""
    assert len(expected) == len(actual) > 0
    worst = 0.0
    for left, right in zip(expected, actual, strict=True):
        assert right.dtype in {torch.float64, torch.complex128}
        left, right = left.to_dense(), right.to_dense()  # noqa: PLW2901
        assert bool(left.isfinite().all())
        norm = left.norm()
        difference = (left - right).norm() / norm if norm else right.norm()
        worst = max(worst, difference.item() / ROUNDOFF)
    return worst


def both(build, run, batch):
    """Run by hand and as written; return the two results and what could not be computed."""
    torch.manual_seed(0)
    module = build()
    twin = copy.deepcopy(module)
    torch.set_default_dtype(torch.float64)
    try:
        torch.manual_seed(1)
        expected = run(module.double(), batch.double(), BY_HAND)
    finally:
        torch.set_default_dtype(torch.float32)
    promote_module(twin)
    torch.manual_seed(1)
    with promoted() as mode:
        actual = run(twin, promote_tree(batch), AS_WRITTEN)
    return expected, actual, mode.lowered


def agrees(build, run, batch):
    expected, actual, lowered = both(build, run, batch)

    assert roundoffs(expected, actual) < ALLOWED
    assert lowered == {}


# Training loops


def perceptron():
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def without_bias():
    return nn.Sequential(nn.Linear(6, 8, bias=False), nn.Tanh(), nn.Linear(8, 3, bias=False))


LABELS = torch.arange(12) % 3


def training(make_optimizer, steps=3):
    def run(model, x, precision):
        optimizer = make_optimizer(model.parameters())

        def closure():
            optimizer.zero_grad()
            with autocast(precision):
                loss = F.cross_entropy(model(x), LABELS)
            loss.backward()
            return loss

        for _ in range(steps):
            optimizer.step(closure)
        return state(model)

    return run


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.01),
    "sgd_fused": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, fused=True),
    "sgd_fused_tensor_lr": lambda p: torch.optim.SGD(p, torch.tensor(0.125), fused=True),
    "adam": torch.optim.Adam,
    "adam_foreach": lambda p: torch.optim.Adam(p, foreach=True, amsgrad=True),
    "adam_fused": lambda p: torch.optim.Adam(p, fused=True, amsgrad=True),
    "adam_fused_tensor_lr": lambda p: torch.optim.Adam(p, torch.tensor(0.125), fused=True),
    "adamw_fused": lambda p: torch.optim.AdamW(p, fused=True),
    "adamw_fused_tensor_lr": lambda p: torch.optim.AdamW(p, torch.tensor(0.125), fused=True),
    "adagrad_fused": lambda p: torch.optim.Adagrad(p, fused=True),
    "lbfgs": lambda p: torch.optim.LBFGS(p, line_search_fn="strong_wolfe"),
    **{
        name.lower(): getattr(torch.optim, name)
        for name in (
            *("AdamW", "Adagrad", "RMSprop", "NAdam", "RAdam"),
            *("Adamax", "Adadelta", "ASGD", "Rprop", "Adafactor"),
        )
    },
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_trains_in_float64_under_autocast(name):
    agrees(perceptron, training(OPTIMIZERS[name]), normal(12, 6))


def test_capturable_adam_trains_in_float64(monkeypatch):
    """Its tensor step counts, too; torch only refuses it for the device."""
    adam = importlib.import_module("torch.optim.adam")  # torch.optim deletes the name
    monkeypatch.setattr(adam, "_get_capturable_supported_devices", lambda: ["cpu"])

    agrees(perceptron, training(lambda p: torch.optim.Adam(p, capturable=True)), normal(12, 6))


def test_muon_trains_in_float64(monkeypatch):
    """Its bfloat16 iteration becomes a float64 one."""

    def orthogonal(gradient, coefficients, steps, eps):
        a, b, c = coefficients
        x = gradient.T if gradient.size(0) > gradient.size(1) else gradient
        x = x / x.norm().clamp(min=eps)
        for _ in range(steps):
            gram = x @ x.T
            x = a * x + (b * gram + c * gram @ gram) @ x
        return x.T if gradient.size(0) > gradient.size(1) else x

    expected, actual, _ = both(without_bias, training(torch.optim.Muon), normal(12, 6))
    assert roundoffs(expected, actual) > ALLOWED  # by hand it is bfloat16 still
    _, actual, _ = both(without_bias, training(torch.optim.Muon), normal(12, 6))
    monkeypatch.setattr("torch.optim._muon._zeropower_via_newtonschulz", orthogonal)
    expected, _, _ = both(without_bias, training(torch.optim.Muon), normal(12, 6))

    assert roundoffs(expected, actual) < ALLOWED


@pytest.mark.parametrize("optimizer", ["SGD", "Adagrad", "SparseAdam"])
def test_sparse_gradients_train_in_float64(optimizer):
    def run(model, _x, precision):
        step = getattr(torch.optim, optimizer)(model.parameters(), 0.1)
        for _ in range(3):
            step.zero_grad()
            for rows in torch.tensor([[1, 2, 2, 5], [1, 0, 9, 5]]):
                (model(rows).to(precision.low) ** 2).sum().backward()
            step.step()
        return state(model)

    agrees(lambda: nn.Embedding(10, 4, sparse=True), run, normal(1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("overflow", [False, True])
def test_a_scaler_scales_unscales_skips_and_grows(dtype, fused, clip, overflow):
    def run(model, x, precision):
        optimizer = torch.optim.AdamW(model.parameters(), fused=fused)
        scaler = torch.amp.GradScaler(
            "cpu", init_scale=1024.0, growth_interval=2, enabled=precision.promoted
        )
        scales = []
        for optimizer_step in range(5):
            optimizer.zero_grad()
            for rows, labels in zip(x.chunk(3), LABELS.chunk(3), strict=True):
                with autocast(precision, dtype):
                    loss = F.cross_entropy(model(rows), labels) / 3
                scaler.scale(loss).backward()
            if overflow and optimizer_step == 2:
                if not precision.promoted:
                    continue  # the step that has to be skipped
                model[0].weight.grad[0, 0] = float("inf")
            if clip:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), 0.3)
            scaler.step(optimizer)
            scaler.update()
            scales.append(scaler.get_scale())
        if precision.promoted:
            grown = [1024, 2048, 1024, 1024, 2048] if overflow else [1024, 2048, 2048, 4096, 4096]
            assert scales == grown
        return [p.detach() for p in model.parameters()]

    agrees(perceptron, run, normal(12, 6))


def test_a_scaler_unscales_sparse_gradients():
    def run(model, _x, precision):
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=precision.promoted)
        scaler.scale((model(torch.tensor([1, 2, 2, 5])) ** 2).sum()).backward()
        scaler.unscale_(optimizer)
        gradient = model.weight.grad.clone()
        scaler.step(optimizer)
        scaler.update()
        return [model.weight.detach(), gradient]

    agrees(lambda: nn.Embedding(10, 4, sparse=True), run, normal(1))


def test_explicit_casts_and_low_precision_buffers_compute_in_float64():
    def run(model, x, precision):
        sums = {p: torch.zeros_like(p, dtype=precision.low) for p in model.parameters()}
        for rows, labels in zip(x.chunk(3), LABELS.chunk(3), strict=True):
            model.zero_grad()
            hidden = model[1](model[0](rows.to(precision.low).to(precision.single)))
            logits = model[2](hidden.to(precision.half).to(precision.single))
            F.cross_entropy(logits, labels, reduction="sum").backward()
            for p, total in sums.items():
                total.add_(p.grad.to(precision.single).to(precision.low))
        for p, total in sums.items():
            p.grad = total.to(p.dtype) / 12
        torch.optim.SGD(model.parameters(), 0.1).step()
        return state(model)

    agrees(perceptron, run, normal(12, 6))


def test_a_model_cast_to_bfloat16_with_master_weights_computes_in_float64():
    def run(model, x, precision):
        model.to(precision.low)
        masters = [p.detach().clone().to(precision.single) for p in model.parameters()]
        for _ in range(3):
            model.zero_grad()
            model(x.to(precision.low)).to(precision.single).pow(2).mean().backward()
            for master, p in zip(masters, model.parameters(), strict=True):
                master.sub_(p.grad.to(precision.single), alpha=0.1)
                p.data.copy_(master)
        return state(model)

    agrees(perceptron, run, normal(12, 6))


def test_averages_schedules_copies_and_checkpoints_keep_float64():
    def run(model, x, precision):
        average = torch.optim.swa_utils.AveragedModel(model)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=5)
        for _ in range(3):
            optimizer.zero_grad()
            model(x.to(precision.low)).to(precision.single).pow(2).mean().backward()
            optimizer.step()
            schedule.step()
            average.update_parameters(model)
        twin, file = copy.deepcopy(model), io.BytesIO()
        torch.save(average.module.state_dict(), file)
        file.seek(0)
        twin.load_state_dict(torch.load(file))
        return state(model) + state(twin)

    agrees(perceptron, run, normal(12, 6))


def test_accumulated_equals_full_batch_to_roundoff_under_bfloat16_autocast():
    """The point of it all: 1e-15, where bfloat16 itself differs by 1e-3."""

    def gradients(accumulation_steps, *, promote):
        torch.manual_seed(0)
        model, x = perceptron(), normal(12, 6)
        if promote:
            promote_module(model)
            x = promote_tree(x)
        for rows, labels in zip(
            x.chunk(accumulation_steps), LABELS.chunk(accumulation_steps), strict=True
        ):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = F.cross_entropy(model(rows), labels)
            (loss / accumulation_steps).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()]).double()

    with promoted():
        full, accumulated = gradients(1, promote=True), gradients(4, promote=True)
    native, native_accumulated = gradients(1, promote=False), gradients(4, promote=False)

    assert (full - accumulated).norm() / full.norm() < 5 * ROUNDOFF  # 1e-15
    assert (native - native_accumulated).norm() / native.norm() > SINGLE_ROUNDOFF
    assert SINGLE_ROUNDOFF < (native - full).norm() / full.norm() < torch.finfo(torch.bfloat16).eps


def test_a_compiled_module_runs_eagerly_in_float64():
    def run(model, x, precision):
        compiled = torch.compile(model) if precision.promoted else model
        return training(torch.optim.SGD)(compiled, x, precision)

    agrees(perceptron, run, normal(12, 6))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_layers_compute_in_float64(reentrant):
    def run(model, x, precision):
        x.requires_grad_()
        with autocast(precision):
            y = checkpoint(model, x, use_reentrant=reentrant)
        y.to(precision.single).pow(2).sum().backward()
        return [*state(model), x.grad]

    agrees(perceptron, run, normal(12, 6))


class Exponential(torch.autograd.Function):
    """An operator with casts of its own."""

    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu", cast_inputs=torch.float32)
    def forward(ctx, x, low):
        ctx.low = low
        ctx.save_for_backward(x.to(low).exp())
        return x.to(low).exp().to(x.dtype)

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")
    def backward(ctx, gradient):
        (y,) = ctx.saved_tensors
        return (gradient.to(ctx.low) * y).to(gradient.dtype), None


def test_a_custom_function_with_casts_computes_in_float64():
    def run(_model, x, precision):
        x.requires_grad_()
        with autocast(precision):
            Exponential.apply(x, precision.low).sum().backward()
        return [x.grad]

    agrees(nn.Identity, run, normal(12, 6))


def test_function_transforms_compute_in_float64():
    def run(model, x, precision):
        weights = {name: p.detach() for name, p in model.named_parameters()}

        def loss(weights, row, label):
            row = row[None].to(precision.low).to(precision.single)
            return F.cross_entropy(torch.func.functional_call(model, weights, (row,)), label[None])

        gradients = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(weights, x, LABELS)
        curvature = torch.func.hessian(lambda v: (v.to(precision.low) ** 3).sum())(x[0])
        tangents = torch.func.jvp(lambda v: v.to(precision.half).sin(), (x,), (x,))
        return [*gradients.values(), curvature, *tangents]

    agrees(perceptron, run, normal(12, 6))


def test_double_backward_computes_in_float64():
    def run(model, x, precision):
        x.requires_grad_()
        with autocast(precision):
            y = model(x).sum()
        (gradient,) = torch.autograd.grad(y, x, create_graph=True)
        gradient.pow(2).sum().backward()
        return [*state(model), x.grad]

    agrees(perceptron, run, normal(12, 6))


def test_a_default_dtype_that_the_code_sets_changes_nothing():
    def run(model, x, precision):
        if precision.promoted:
            torch.set_default_dtype(torch.float32)
        trained = training(torch.optim.Adam)(model, x, precision)
        return [*trained, x * (torch.arange(1, 7) / 3) + torch.zeros(6) + torch.linspace(0, 1, 6)]

    agrees(perceptron, run, normal(12, 6))


def test_a_float32_leaf_from_outside_gets_a_float64_gradient():
    def run(_model, x, precision):
        weight = normal(6, 6) if precision.promoted else normal(6, 6).double()
        weight.requires_grad_()
        ((x @ weight).tanh().sum() + (x @ weight.to(precision.low)).sum()).backward()
        return [weight.grad]

    agrees(nn.Identity, run, normal(12, 6))


# Layers and operators


def passes(module, x, precision, call=None):
    """Two forwards and backwards under autocast; outputs, gradients, parameters and buffers."""
    x.requires_grad_()
    outputs = []
    for _ in range(2):
        with autocast(precision):
            result = (call or module)(x)
        result = result if isinstance(result, (tuple, list)) else (result,)
        nested = [t for part in result for t in (part if isinstance(part, tuple) else (part,))]
        inexact = [t for t in nested if t.is_floating_point() or t.is_complex()]
        loss = sum(t.abs().pow(2).sum() + t.real.sin().sum() for t in inexact)
        if loss.requires_grad:
            loss.backward()
        outputs += [t.detach() for t in inexact]
    return [*outputs, *state(module), *([] if x.grad is None else [x.grad])]


IMAGE, SEQUENCE = (4, 6, 8, 8), (2, 5, 8)
LAYERS = {
    "conv1d": (SEQUENCE, lambda: nn.Conv1d(5, 3, 3)),
    "conv2d": (IMAGE, lambda: nn.Conv2d(6, 4, 3, padding=1, stride=2)),
    "conv2d_grouped": (IMAGE, lambda: nn.Conv2d(6, 6, 3, groups=6)),
    "conv_transposed": (IMAGE, lambda: nn.ConvTranspose2d(6, 4, 3, stride=2)),
    "conv3d": ((2, 2, 4, 4, 4), lambda: nn.Conv3d(2, 3, 2)),
    "batch_norm": (IMAGE, lambda: nn.BatchNorm2d(6)),
    "group_norm": (IMAGE, lambda: nn.GroupNorm(2, 6)),
    "instance_norm": (
        IMAGE,
        lambda: nn.InstanceNorm2d(6, affine=True, track_running_stats=True),
    ),
    "layer_norm": (SEQUENCE, lambda: nn.LayerNorm(8)),
    "rms_norm": (SEQUENCE, lambda: nn.RMSNorm(8)),
    "spectral_norm": (
        SEQUENCE,
        lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(8, 4)),
    ),
    "weight_norm": (SEQUENCE, lambda: nn.utils.parametrizations.weight_norm(nn.Linear(8, 4))),
    "lstm": (SEQUENCE, lambda: nn.LSTM(8, 6, 2, batch_first=True, bidirectional=True)),
    "lstm_projected": (SEQUENCE, lambda: nn.LSTM(8, 6, proj_size=3)),
    "gru": (SEQUENCE, lambda: nn.GRU(8, 6, 2)),
    "rnn": (SEQUENCE, lambda: nn.RNN(8, 6)),
    "encoder_layer": (
        SEQUENCE,
        lambda: nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True),
    ),
    "max_pool": (IMAGE, lambda: nn.MaxPool2d(2)),
    "average_pool": (IMAGE, lambda: nn.AdaptiveAvgPool2d(3)),
    "upsample": (IMAGE, lambda: nn.Upsample(scale_factor=2, mode="bicubic")),
    "prelu": (IMAGE, lambda: nn.PReLU(6)),
    "activations": (
        SEQUENCE,
        lambda: nn.Sequential(nn.SiLU(), nn.GELU(), nn.Softplus(), nn.RReLU().eval(), nn.SELU()),
    ),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_computes_in_float64(name):
    shape, build = LAYERS[name]

    agrees(build, passes, normal(*shape))


@pytest.mark.parametrize("mode", ["train", "weights", "causal", "eval"])
def test_attention_computes_in_float64_on_every_path(mode):
    def run(module, x, precision):
        mask = nn.Transformer.generate_square_subsequent_mask(5, dtype=precision.single)
        module.train(mode != "eval")
        options = {
            "attn_mask": mask if mode == "causal" else None,
            "is_causal": mode == "causal",
            "need_weights": mode == "weights",
        }
        with torch.set_grad_enabled(mode != "eval"):  # the fused path needs both
            return passes(module, x, precision, lambda x: module(x, x, x, **options)[:1])

    agrees(lambda: nn.MultiheadAttention(8, 2, batch_first=True), run, normal(*SEQUENCE))


def test_the_fused_encoder_computes_in_float64():
    def run(module, x, precision):
        module.eval()
        with torch.no_grad():
            return passes(module, x, precision)

    agrees(LAYERS["encoder_layer"][1], run, normal(*SEQUENCE))


def filled(x, _precision):
    """A preallocated buffer, written through views."""
    buffer = torch.zeros(2, 5, 8)
    buffer[0] = x[0]
    buffer[1, ::2] = x[1, ::2] * 2
    buffer[:, 1] += 1 / 3
    return buffer


def positive(x):
    return x[0] @ x[0].T + torch.eye(5)


TOKENS = torch.arange(10) % 8
OPERATORS = {
    "attention": lambda x, _: F.scaled_dot_product_attention(x[None], x[None], x[None]),
    "attention_masked": lambda x, p: F.scaled_dot_product_attention(
        x[None], x[None], x[None], attn_mask=torch.zeros(5, 5, dtype=p.low)
    ),
    "fft": lambda x, _: torch.fft.rfft(x),
    "ifft": lambda x, p: torch.fft.irfft(torch.fft.fft(x.to(p.single))),
    "stft": lambda x, _: torch.stft(
        x.reshape(1, -1), 16, return_complex=True, window=torch.hann_window(16)
    ),
    "complex": lambda x, _: torch.complex(x, x) * torch.polar(torch.ones_like(x), x),
    "complex_view": lambda x, _: torch.view_as_complex(x.reshape(2, 5, 4, 2)) * (1 + 2j),
    "cumsum": lambda x, p: x.cumsum(1, dtype=p.single),
    "cummax": lambda x, _: x.cummax(-1),
    "topk": lambda x, _: x.topk(3),
    "sort": lambda x, _: x.sort(),
    "quantile": lambda x, _: x.quantile(0.3, dim=-1),
    "einsum": lambda x, _: torch.einsum("abc,adc->abd", x, x),
    "baddbmm": lambda x, _: torch.baddbmm(torch.ones(5, 5), x, x.mT),
    "scatter_add": lambda x, p: torch.zeros(2, 5, 8, dtype=p.low).scatter_add(
        2, torch.ones(2, 5, 8).long(), x.to(p.low)
    ),
    "index_add_": lambda x, _: torch.zeros(5, 8).index_add_(0, torch.arange(5) // 2, x[0]),
    "index_put_": lambda x, _: torch.zeros(5, 8).index_put_(
        (torch.arange(5) // 2,), x[0], accumulate=True
    ),
    "views": filled,
    "cross_entropy": lambda x, _: F.cross_entropy(
        x.reshape(10, 8), TOKENS, label_smoothing=0.1, weight=torch.arange(1.0, 9.0)
    ),
    "kl_div": lambda x, _: F.kl_div(x.log_softmax(-1), x.softmax(-1), reduction="batchmean"),
    "binary_cross_entropy": lambda x, _: F.binary_cross_entropy_with_logits(
        x, torch.ones(2, 5, 8), pos_weight=torch.full((8,), 3.0)
    ),
    "mse": lambda x, p: F.mse_loss(x.to(p.half).to(p.single), torch.zeros(2, 5, 8)),
    "ctc": lambda x, _: F.ctc_loss(
        x.transpose(0, 1).log_softmax(-1), torch.tensor([[1, 2], [3, 3]]), [5, 5], [2, 2]
    ),
    "softmax_dtype": lambda x, p: x.softmax(-1, dtype=p.single),
    "log_softmax_dtype": lambda x, p: F.log_softmax(x, -1, dtype=p.single),
    "sum_dtype": lambda x, p: x.sum(-1, dtype=p.single),
    "norm_dtype": lambda x, p: torch.linalg.vector_norm(x, dtype=p.single),
    "solve": lambda x, _: torch.linalg.solve(positive(x), x[0]),
    "cholesky": lambda x, _: torch.linalg.cholesky(positive(x)),
    "singular_values": lambda x, _: torch.linalg.svdvals(x),
    "lstsq": lambda x, _: torch.linalg.lstsq(x[0].T, x[1].T)[0],
    "where": lambda x, p: torch.where(x > 0, x, torch.tensor(0.0, dtype=p.low)),
    "masked_softmax": lambda x, p: x.masked_fill(x > 0, torch.finfo(p.low).min).softmax(1),
    "special": lambda x, _: torch.lgamma(x.abs() + 1) + torch.special.erfcx(x),
    "cdist": lambda x, _: torch.cdist(x, x * 2),
    "foreach": lambda x, _: torch._foreach_addcmul([x], [x], [torch.ones(2, 5, 8)], 1.5),
    "foreach_norm": lambda x, _: torch._foreach_norm([x, x.abs()]),
    "numpy": lambda x, _: (
        x + torch.from_numpy(x.detach().numpy()) + torch.from_numpy(np.ones((2, 5, 8), np.float32))
    ),
    "lists": lambda x, _: x * torch.tensor(x.tolist()) * x.sum().item(),
    "integers": lambda x, _: x * (torch.arange(1, 9) / 3),
    "factories": lambda x, p: (
        x * (torch.arange(8, dtype=p.low) + torch.linspace(0, 1, 8) + torch.full((8,), 1 / 3))
    ),
    "new": lambda x, _: x * x.new_tensor([1 / 3]) + x.new_zeros(8) + x.new_full((8,), 1 / 7),
    "cat": lambda x, p: torch.cat([x, torch.zeros(2, 5, 1, dtype=p.half)], -1),
    "weight_norm": lambda x, _: torch._weight_norm(x[0], torch.ones(5, 1), 0),
    "embedding_bag": lambda x, _: F.embedding_bag(torch.tensor([1, 2, 2]), x[0], torch.tensor([0])),
    "out": lambda x, p: torch.add(x.detach(), 1 / 3, out=torch.empty(2, 5, 8, dtype=p.low)) * x,
}


@pytest.mark.parametrize("name", OPERATORS)
def test_an_operator_computes_in_float64(name):
    def run(module, x, precision):
        return passes(module, x, precision, lambda x: OPERATORS[name](x, precision))

    agrees(nn.Identity, run, normal(*SEQUENCE))


# Random numbers

SHAPE = (5, 7)
OPERAND = torch.linspace(-1, 1, 35).reshape(SHAPE)
DRAWS = {
    "randn": lambda: torch.randn(SHAPE),
    "randn_bfloat16": lambda: torch.randn(SHAPE, dtype=torch.bfloat16),
    "randn_complex": lambda: torch.randn(SHAPE, dtype=torch.complex64),
    "randn_generator": lambda: torch.randn(SHAPE, generator=torch.Generator().manual_seed(3)),
    "randn_out": lambda: torch.randn(SHAPE, out=torch.empty(0)),
    "randn_of_dtype": lambda: torch.randn(SHAPE, dtype=torch.zeros(1).dtype),
    "rand": lambda: torch.rand(SHAPE),
    "rand_float16": lambda: torch.rand(SHAPE, dtype=torch.float16),
    "rand_like": lambda: torch.rand_like(torch.zeros(SHAPE)),
    "randn_like": lambda: torch.randn_like(torch.zeros(SHAPE)),
    "randn_like_dtype": lambda: torch.randn_like(torch.zeros(SHAPE), dtype=torch.bfloat16),
    "randint": lambda: torch.randint(0, 10, SHAPE),
    "randint_float": lambda: torch.randint(0, 10, SHAPE, dtype=torch.float32),
    "randperm": lambda: torch.randperm(10),
    "normal_": lambda: torch.zeros(40, 40).normal_(1, 2),
    # The operand is made under the mode, in the call.
    "normal_strided": lambda: torch.zeros(5, 14)[:, ::2].normal_(),  # noqa: PLW0108
    "uniform_": lambda: torch.zeros(SHAPE).uniform_(-1, 1),
    "uniform_transposed": lambda: torch.zeros(7, 5).t().uniform_(),
    "bernoulli_": lambda: torch.zeros(SHAPE).bernoulli_(0.3),
    "bernoulli_mask": lambda: torch.empty(SHAPE, dtype=torch.bool).bernoulli_(0.3),
    "bernoulli_tensor_": lambda: torch.zeros(SHAPE).bernoulli_(torch.sigmoid(OPERAND)),
    "bernoulli": lambda: torch.bernoulli(torch.full(SHAPE, 0.3)),
    "bernoulli_p": lambda: torch.bernoulli(torch.zeros(SHAPE), 0.3),
    "exponential_": lambda: torch.empty(SHAPE).exponential_(),
    "geometric_": lambda: torch.empty(SHAPE).geometric_(0.3),
    "cauchy_": lambda: torch.empty(SHAPE).cauchy_(),
    "log_normal_": lambda: torch.empty(SHAPE).log_normal_(),
    "random_": lambda: torch.empty(SHAPE).random_(),
    "normal": lambda: torch.normal(1.0, 2.0, SHAPE),
    "linear": lambda: nn.Linear(5, 6).weight.data,
    "conv": lambda: nn.Conv2d(3, 4, 3).weight.data,
    "embedding": lambda: nn.Embedding(9, 5).weight.data,
    "truncated": lambda: nn.init.trunc_normal_(torch.empty(SHAPE)),
    "multinomial": lambda: torch.multinomial(OPERAND.abs() + 0.1, 3),
    "multinomial_replaced": lambda: torch.multinomial(OPERAND.abs() + 0.1, 3, replacement=True),
    "poisson": lambda: torch.poisson(OPERAND.abs() * 5),
    "binomial": lambda: torch.binomial(torch.full(SHAPE, 10.0), torch.sigmoid(OPERAND)),
    "categorical": lambda: torch.distributions.Categorical(logits=OPERAND).sample(),
    "default_bfloat16": lambda: (torch.set_default_dtype(torch.bfloat16), torch.randn(SHAPE))[1],
}
# The draw is the same; what is computed with it is float64, and so differs by float32 rounding.
COMPUTED_DRAWS = {
    "normal_mean": lambda: torch.normal(OPERAND),
    "normal_mean_std": lambda: torch.normal(OPERAND, 2.0),
    "normal_std_tensor": lambda: torch.normal(1.0, OPERAND.abs()),
    "normal_tensors": lambda: torch.normal(OPERAND[0], OPERAND.abs()),
    "native_dropout": lambda: torch.native_dropout(OPERAND, 0.3, True)[0],
    "dropout": lambda: F.dropout(OPERAND, 0.3),
    "alpha_dropout": lambda: F.alpha_dropout(OPERAND, 0.3, training=True),
    "rrelu": lambda: F.rrelu(OPERAND, training=True),
    "rrelu_": lambda: F.rrelu(OPERAND.clone(), training=True, inplace=True),
    "gamma": lambda: torch.distributions.Gamma(OPERAND.abs() + 1, 2.0).sample(),
    "reparametrised": lambda: torch.distributions.Normal(OPERAND, 0.1).rsample(),
    "attention_dropout": lambda: F.scaled_dot_product_attention(
        OPERAND[None], OPERAND[None], OPERAND[None], dropout_p=0.5
    ),
}


@pytest.mark.parametrize("name", [*DRAWS, *COMPUTED_DRAWS])
def test_a_seed_gives_the_numbers_and_the_state_of_the_unpromoted_code(name):
    draw = {**DRAWS, **COMPUTED_DRAWS}[name]
    torch.manual_seed(0)
    try:
        expected = draw()
    finally:
        torch.set_default_dtype(torch.float32)
    state_afterwards = torch.get_rng_state()
    torch.manual_seed(0)
    with promoted():
        actual = draw()

    assert torch.equal(state_afterwards, torch.get_rng_state())
    assert actual.dtype in {torch.float64, torch.complex128, torch.int64, torch.bool}
    if name in DRAWS:
        assert torch.equal(expected, actual.to(expected.dtype))
    else:
        assert (expected - actual).abs().max() < 2 * SINGLE_ROUNDOFF * expected.abs().max()


def test_dropout_keeps_the_mask_and_computes_in_float64():
    x = normal(*SHAPE)
    torch.manual_seed(0)
    _, expected = torch.native_dropout(x, 0.3, True)
    torch.manual_seed(0)
    with promoted():
        y, mask = torch.native_dropout(x.double() / 3, 0.3, True)
        quiet, _ = torch.native_dropout(x.double() / 3, 0.3, False)

    assert torch.equal(expected, mask)
    assert roundoffs([x.double() / 3 * expected / 0.7], [y]) <= 1
    assert torch.equal(x.double() / 3, quiet)


def test_the_working_dtype_says_what_code_without_a_dtype_draws():
    torch.manual_seed(0)
    expected = torch.randn(SHAPE, dtype=torch.bfloat16)
    torch.manual_seed(0)
    with promoted(torch.bfloat16):
        actual = torch.randn(SHAPE)

    assert torch.equal(expected.double(), actual)


def test_a_draw_that_moves_with_its_operand_is_named():
    with promoted() as mode:
        torch._standard_gamma(torch.ones(3))

    assert mode.lowered == {"aten._standard_gamma.default": torch.float32}


# Operators that the mode computes itself, or that have no float64 kernel


def amp_state(scale, tracker=0, found=0.0, dtype=torch.float32):
    return (
        torch.tensor([scale], dtype=dtype),
        torch.tensor([tracker], dtype=torch.int32),
        torch.tensor([found], dtype=dtype),
    )


@pytest.mark.parametrize(
    ("scale", "tracker", "found", "growth"),
    [
        pytest.param(1024.0, 0, 0.0, 2.0, id="not yet"),
        pytest.param(1024.0, 2, 0.0, 2.0, id="grows"),
        pytest.param(1000.0, 2, 0.0, 1.1, id="rounds to float32"),
        pytest.param(2.0**127, 2, 0.0, 2.0, id="would overflow float32"),
        pytest.param(1024.0, 2, 1.0, 2.0, id="backs off"),
    ],
)
def test_a_loss_scale_is_updated_as_torch_does(scale, tracker, found, growth):
    native, promoted_state = amp_state(scale, tracker, found), amp_state(scale, tracker, found)
    promoted_state = promote_tree(promoted_state)
    torch._amp_update_scale_(*native, growth, 0.3, 3)
    with promoted():
        torch._amp_update_scale_(*promoted_state, growth, 0.3, 3)

    assert [t.item() for t in native] == [t.item() for t in promoted_state]


@pytest.mark.parametrize("value", [1.0, float("inf"), float("nan")])
@pytest.mark.parametrize("inverse", [1.0, 0.25])
@pytest.mark.parametrize("found", [0.0, 1.0])
def test_gradients_are_unscaled_as_torch_does(value, inverse, found):
    results = []
    for dtype in (torch.float32, torch.float64):
        gradients = [torch.tensor([2.0, value], dtype=dtype), torch.tensor([3.0], dtype=dtype)]
        found_inf = torch.tensor([found], dtype=dtype)
        arguments = (gradients, found_inf, torch.tensor([inverse], dtype=dtype))
        if dtype is torch.float32:
            torch._amp_foreach_non_finite_check_and_unscale_(*arguments)
        else:
            with promoted():
                torch._amp_foreach_non_finite_check_and_unscale_(*arguments)
        results.append(torch.cat([*gradients, found_inf]).double())

    assert torch.equal(results[0].nan_to_num(), results[1].nan_to_num())


def test_a_grouped_matrix_product_computes_in_the_best_it_has_and_is_named():
    left, right = normal(6, 16).double(), normal(2, 16, 8).double()
    left.requires_grad_()
    ends = torch.tensor([2, 6], dtype=torch.int32)
    expected = torch.cat([left[:2] @ right[0], left[2:] @ right[1]])
    (gradient,) = torch.autograd.grad(expected.pow(2).sum(), left)
    with promoted() as mode:
        for _ in range(2):  # the second call knows the way
            actual = torch._grouped_mm(left.bfloat16(), right.bfloat16(), offs=ends)
        (actual_gradient,) = torch.autograd.grad(actual.pow(2).sum(), left)

    assert mode.lowered == {"aten._grouped_mm.default": torch.float32}
    assert actual.dtype == actual_gradient.dtype == torch.float64
    assert roundoffs([expected, gradient], [actual, actual_gradient]) < 8 * (
        SINGLE_ROUNDOFF / ROUNDOFF
    )


@pytest.mark.parametrize("scales", ["tensor", "rows"])
def test_a_scaled_matrix_product_computes_in_float64(scales):
    left = normal(16, 32).to(torch.float8_e4m3fn)
    right = normal(16, 32).to(torch.float8_e4m3fn).t()
    by_rows = scales == "rows"
    left_scale = torch.rand(16, 1) if by_rows else torch.tensor(2.0)
    right_scale = torch.rand(1, 16) if by_rows else torch.tensor(3.0)
    with promoted() as mode:
        actual = torch._scaled_mm(left, right, left_scale, right_scale, out_dtype=torch.bfloat16)
    expected = left.double() @ right.double() * (left_scale.double() * right_scale.double())

    assert roundoffs([expected], [actual]) < 2
    assert mode.lowered == {}


def test_an_operator_that_fails_in_every_precision_raises_what_float64_raised():
    with promoted() as mode:
        with pytest.raises(RuntimeError, match="mat1 and mat2 shapes"):
            torch.ones(2, 3) @ torch.ones(2, 3)
        with pytest.raises(NotImplementedError, match="'Long'"):
            torch.ones(2).long().softmax(0)

    assert mode.lowered == {}


# Aliases


def test_low_precision_from_outside_stays_and_is_named_when_written():
    buffer, matrix = torch.zeros(3, dtype=torch.bfloat16), torch.zeros(3, 4)
    with promoted() as mode:
        untouched = dict(mode.lowered)
        view = matrix[0]
        view.add_(torch.ones(4) / 3)
        matrix.t()[1].mul_(3)
        matrix.index_add_(0, torch.tensor([1]), torch.ones(1, 4) / 3)
        buffer.add_(torch.full((3,), 1 / 3))
        torch.add(torch.zeros(3), 1 / 7, out=buffer[:])
        read = matrix * 1
        file = io.BytesIO()
        torch.save(copy.deepcopy(matrix), file)
        file.seek(0)
        loaded = torch.load(file)

    third = torch.tensor(1 / 3).item()
    assert untouched == {}
    assert [third, 3 * third, third, third] == pytest.approx(matrix[0].tolist(), SINGLE_ROUNDOFF)
    assert view.data_ptr() == matrix.data_ptr()
    assert torch.equal(matrix[1], torch.full((4,), 1 / 3))
    assert torch.equal(buffer, torch.full((3,), 1 / 7, dtype=torch.bfloat16))
    assert (matrix.dtype, read.dtype) == (torch.float32, torch.float64)
    assert torch.equal(loaded, matrix)
    assert mode.lowered == {
        "in-place write to torch.bfloat16": torch.bfloat16,
        "in-place write to torch.float32": torch.float32,
    }


def test_a_cast_of_a_promoted_tensor_is_a_copy():
    with promoted():
        x = torch.ones(3)
        for cast in (x.float(), x.to(torch.bfloat16), x.half(), x.to(torch.float64, copy=True)):
            cast.zero_()

    assert torch.equal(torch.ones(3, dtype=torch.float64), x)


def test_batch_statistics_are_written_to_low_precision_buffers():
    """native_batch_norm does not say in its schema that it writes them."""
    mean, variance = torch.zeros(6), torch.ones(6)
    with promoted() as mode:
        F.batch_norm(normal(8, 6).double(), mean, variance, training=True, momentum=1.0)

    assert torch.equal(normal(8, 6).double().mean(0).float(), mean)
    assert mode.lowered == {"in-place write to torch.float32": torch.float32}


def test_bits_are_read_as_they_are():
    with promoted():
        one = torch.tensor([0x3F800000], dtype=torch.int32).view(torch.float32)
        double = torch.ones(1).view(torch.float32)
        value = one * 1

    assert value.item() == 1.0
    assert double.dtype is torch.float64


def test_subclasses_and_nested_tensors_pass_through(tmp_path):
    """DTensor: the wrapper and the local tensor it holds both become float64."""
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    store = distributed.FileStore(str(tmp_path / "store"), 1)
    distributed.init_process_group("gloo", rank=0, world_size=1, store=store)
    try:
        mesh = init_device_mesh("cpu", (1,))
        weight = distribute_tensor(normal(4, 4), mesh, [Shard(0)])
        with promoted() as mode:
            x = distribute_tensor(torch.ones(4, 4) / 3, mesh, [Shard(0)]).requires_grad_()
            y = x.to(torch.bfloat16) @ weight
            y.float().pow(2).sum().backward()
            torch.optim.AdamW([x]).step()
            jagged = torch.nested.nested_tensor(
                [torch.ones(2, 3), torch.ones(4, 3)], layout=torch.jagged
            ).bfloat16()
    finally:
        distributed.destroy_process_group()

    held = [y, y.to_local(), x, x.to_local(), x.grad, x.grad.to_local(), jagged, jagged.values()]
    assert [torch.float64] * 8 == [tensor.dtype for tensor in held]
    assert mode.lowered == {}


def test_control_flow_operators_compute_in_float64():
    with promoted():
        x = torch.cond(
            torch.ones(1).sum() > 0, lambda x: x.float() / 3, lambda x: x, (torch.ones(2),)
        )

    assert torch.equal(torch.full((2,), 1 / 3, dtype=torch.float64), x)


# The block's end


def stance():
    return torch._dynamo.eval_frame._stance.stance


class Bystander(torch.utils._python_dispatch.TorchDispatchMode):
    """A mode that the user's code forgets to leave."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def leave_a_mess():
    assert (torch.get_default_dtype(), stance()) == (torch.float64, "force_eager")
    Bystander().__enter__()
    torch.set_default_dtype(torch.float16)
    raise ZeroDivisionError


def test_everything_is_restored_whatever_the_block_leaves_behind():
    before = stance()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with pytest.raises(ZeroDivisionError), promoted():
            leave_a_mess()
        after = torch.get_default_dtype()
    finally:
        torch.set_default_dtype(torch.float32)

    assert after is torch.bfloat16
    assert stance() == before
    assert torch._C._len_torch_dispatch_stack() == 0
    assert torch.zeros(1).dtype is torch.float32


# Modules and batches


class Odd(nn.Module):
    """Every way in which a module holds tensors."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(4, 3, dtype=torch.bfloat16)
        self.decoder = nn.Linear(4, 3)
        self.decoder.weight = self.encoder.weight
        flat = torch.zeros(8)
        self.head = nn.Parameter(flat[:4])
        self.rest = nn.Parameter(flat[4:], requires_grad=False)
        self.register_buffer("phase", torch.ones(2, dtype=torch.complex64))
        self.register_buffer("count", torch.tensor(0))
        self.table = torch.ones(2)
        self.tables = {"a": [torch.ones(2, dtype=torch.float16)], "name": "x"}


def test_a_module_is_promoted_in_place_and_tied_weights_stay_tied():
    module = Odd()
    before = list(module.parameters())
    module.head.grad = torch.ones(4)
    promote_module(module)

    assert all(old is new for old, new in zip(before, module.parameters(), strict=True))
    assert {torch.float64} == {p.dtype for p in module.parameters()}
    assert module.encoder.weight is module.decoder.weight
    assert module.head.untyped_storage()._cdata == module.rest.untyped_storage()._cdata
    assert module.head.data_ptr() + 4 * 8 == module.rest.data_ptr()
    assert (module.head.requires_grad, module.rest.requires_grad) == (True, False)
    assert module.head.grad.dtype is torch.float64
    assert (module.phase.dtype, module.count.dtype) == (torch.complex128, torch.int64)
    assert module.table.dtype is module.tables["a"][0].dtype is torch.float64


def test_lazy_layers_materialise_in_float64():
    module = nn.Sequential(nn.LazyLinear(4), nn.LazyBatchNorm1d())
    promote_module(module)
    with promoted() as mode:
        module(normal(5, 3)).sum().backward()

    assert {torch.float64} == {p.grad.dtype for p in module.parameters()}
    assert module[1].running_mean.dtype is torch.float64
    assert mode.lowered == {}


def test_gradients_that_view_a_low_precision_buffer_stay_in_it():
    """The user's flat buffer, made under the mode, is one float64 storage with its views."""
    with promoted():
        flat = torch.zeros(6, dtype=torch.bfloat16)
        weight = nn.Parameter(torch.ones(3))
        weight.grad = flat[:3]
        (weight / 3).sum().backward()

    assert weight.grad.data_ptr() == flat.data_ptr()
    assert torch.equal(flat[:3], torch.full((3,), 1 / 3, dtype=torch.float64))


class Pair(NamedTuple):
    """A batch as a namedtuple."""

    x: object
    y: object


@dataclasses.dataclass
class Record:
    """A batch as a dataclass."""

    x: object
    y: object = None


def test_a_batch_is_promoted_in_any_nesting():
    shared = torch.ones(2)
    batch = {
        "ordered": collections.OrderedDict(x=shared),
        "pair": Pair(shared, [torch.ones(1, dtype=torch.bfloat16), torch.ones(1).long()]),
        "record": Record((np.ones(2, np.float32), np.arange(2)), "text"),
        "dict": collections.UserDict(x=torch.ones(1, dtype=torch.complex64)),
        "none": None,
    }
    done = promote_tree(batch)

    assert type(done["ordered"]) is collections.OrderedDict
    assert type(done["dict"]) is collections.UserDict
    assert done["ordered"]["x"] is done["pair"].x
    assert done["pair"].x.dtype is done["pair"].y[0].dtype is torch.float64
    assert done["pair"].y[1] is batch["pair"].y[1]
    assert isinstance(done["record"], Record)
    assert [np.float64, np.int64] == [array.dtype for array in done["record"].x]
    assert done["dict"]["x"].dtype is torch.complex128
    assert shared.dtype is batch["pair"].x.dtype is torch.float32
    assert done["none"] is None


def test_dtypes_that_the_code_names_are_told():
    """A cast is promoted, and what it asked for is known: a wrapper may cast where the full batch does not."""
    with promoted() as mode:
        torch.ones(2).to(torch.bfloat16)
        torch.zeros(2, dtype=torch.float64)

    assert mode.asked == {torch.bfloat16}


def test_a_count_kept_in_low_precision_loses_nothing():
    """An optimizer that resumes holds its steps in float32: whole numbers, by which nothing is rounded."""
    count, sum_ = torch.zeros(()), torch.zeros(())
    with promoted() as mode:
        count.fill_(3.0)
        count += 1
        count.copy_(count + 1)
        exact = dict(mode.lowered)
        sum_ += 0.1

    assert count.item() == 5.0
    assert exact == {}
    assert mode.lowered == {"in-place write to torch.float32": torch.float32}
