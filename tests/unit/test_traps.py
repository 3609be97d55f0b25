"""The traps of the method: correct code that looks wrong to a comparison, and faults that hide from one.

Every subject is a file as a user writes it, decided by the engine end to end.
"""

from __future__ import annotations

import pytest

from equivcheck.case import Case
from equivcheck.decide import run_case
from equivcheck.subject import load_subject

HEAD = """
from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

def rows(seed, count, width=6):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))

def labels(seed, count, classes=3):
    return torch.randint(classes, (count,), generator=torch.Generator().manual_seed(100 + seed))

def build():
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))

def batches():
    return [{"x": rows(i, 16), "y": labels(i, 16)} for i in range(3)]
"""

PLAIN = """
def train(model, loader, accumulation_steps):
    optimizer = {optimizer}
    for index, batch in enumerate(loader):
        loss = F.cross_entropy(model(batch["x"]), batch["y"])
        ({loss}).backward()
        if (index + 1) % accumulation_steps == 0:
            {before_step}
            optimizer.step()
            optimizer.zero_grad()
"""


def plain(
    optimizer="torch.optim.SGD(model.parameters(), lr=0.1)",
    loss="loss / accumulation_steps",
    before_step="pass",
):
    return PLAIN.format(optimizer=optimizer, loss=loss, before_step=before_step)


@pytest.fixture
def decide(tmp_path):
    """Return a function that decides a subject given as text."""

    def run(*parts, accumulation_steps=4, expect=(), head=HEAD, **fields):
        path = tmp_path / "subject.py"
        path.write_text(head + "".join(parts), encoding="utf-8")
        subject = load_subject(str(path))
        case = Case(str(path), accumulation_steps, **fields)
        return run_case(subject, case, expect=expect)

    return run


def told(case):
    """Return what a case says in one line: its verdict and its causes with their status."""
    causes = [f"{each['code']} {each['status']}" for each in case["causes"]]
    return " ".join([case["verdict"], *causes])


EVERY_K = pytest.mark.parametrize("accumulation_steps", [2, 4])

EQUIVALENT = {
    "a first batch looked at before": """
def train(model, loader, accumulation_steps):
    model(next(iter(loader))["x"])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for index, batch in enumerate(loader):
        (F.cross_entropy(model(batch["x"]), batch["y"]) / accumulation_steps).backward()
        if (index + 1) % accumulation_steps == 0:
            optimizer.step()
            optimizer.zero_grad()
""",
    "preference pairs in neighbouring rows": """
def train(model, loader, accumulation_steps):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for index, batch in enumerate(loader):
        scores = model(batch["x"])[:, 0]
        chosen, rejected = scores[0::2], scores[1::2]
        loss = -F.logsigmoid(chosen - rejected).mean()
        (loss / accumulation_steps).backward()
        if (index + 1) % accumulation_steps == 0:
            optimizer.step()
            optimizer.zero_grad()
""",
    "groups of four rows, normalised within": """
def train(model, loader, accumulation_steps):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for index, batch in enumerate(loader):
        rewards = batch["x"][:, 0].view(-1, 4)
        advantages = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)
        logp = F.log_softmax(model(batch["x"]), dim=-1).gather(1, batch["y"][:, None])[:, 0]
        loss = -(advantages.flatten() * logp).mean()
        (loss / accumulation_steps).backward()
        if (index + 1) % accumulation_steps == 0:
            optimizer.step()
            optimizer.zero_grad()
""",
    "a trainer that shuffles by itself": """
def train(model, dataset, accumulation_steps, micro_batch_size):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loader = torch.utils.data.DataLoader(
        dataset, batch_size=micro_batch_size, shuffle=True, generator=torch.Generator().manual_seed(7)
    )
    for index, batch in enumerate(loader):
        loss = F.cross_entropy(model(batch["x"]), batch["y"])
        (loss / accumulation_steps).backward()
        if (index + 1) % accumulation_steps == 0:
            optimizer.step()
            optimizer.zero_grad()
""",
    "a trainer that fetches a whole cycle first": """
def train(model, dataset, accumulation_steps, micro_batch_size):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loader = iter(torch.utils.data.DataLoader(
        dataset, batch_size=micro_batch_size, shuffle=True, generator=torch.Generator().manual_seed(7)
    ))
    while True:
        cycle = [batch for _, batch in zip(range(accumulation_steps), loader)]
        if not cycle:
            break
        for batch in cycle:
            loss = F.cross_entropy(model(batch["x"]), batch["y"])
            (loss / accumulation_steps).backward()
        optimizer.step()
        optimizer.zero_grad()
""",
    "a loop that fetches a whole cycle first": """
def train(model, loader, accumulation_steps):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    stream = iter(loader)
    while cycle := [batch for _, batch in zip(range(accumulation_steps), stream)]:
        total = sum(len(batch["y"]) for batch in cycle)
        for batch in cycle:
            (F.cross_entropy(model(batch["x"]), batch["y"], reduction="sum") / total).backward()
        optimizer.step()
        optimizer.zero_grad()
""",
    "a counter at module level": """
seen = 0

def train(model, loader, accumulation_steps):
    global seen
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for batch in loader:
        loss = F.cross_entropy(model(batch["x"]), batch["y"])
        (loss / accumulation_steps * (1 + 0.01 * (seen // accumulation_steps))).backward()
        seen += 1
        if seen % accumulation_steps == 0:
            optimizer.step()
            optimizer.zero_grad()
""",
    "a scaler at module level": """
scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)

def train(model, loader, accumulation_steps):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for index, batch in enumerate(loader):
        loss = F.cross_entropy(model(batch["x"]), batch["y"])
        scaler.scale(loss / accumulation_steps).backward()
        if (index + 1) % accumulation_steps == 0:
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
""",
    "an optimizer cached at module level": """
cache = {}

def train(model, loader, accumulation_steps):
    if "optimizer" not in cache:
        cache["optimizer"] = torch.optim.Adam(model.parameters(), lr=1e-2)
    optimizer = cache["optimizer"]
    for index, batch in enumerate(loader):
        loss = F.cross_entropy(model(batch["x"]), batch["y"])
        (loss / accumulation_steps).backward()
        if (index + 1) % accumulation_steps == 0:
            optimizer.step()
            optimizer.zero_grad()
""",
    "a head made in train": """
def train(model, loader, accumulation_steps):
    head = nn.Linear(3, 3)
    optimizer = torch.optim.Adam([*model.parameters(), *head.parameters()], lr=1e-2)
    for index, batch in enumerate(loader):
        loss = F.cross_entropy(head(model(batch["x"])), batch["y"])
        (loss / accumulation_steps).backward()
        if (index + 1) % accumulation_steps == 0:
            optimizer.step()
            optimizer.zero_grad()
""",
    "a model initialised again in train": """
def train(model, loader, accumulation_steps):
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for index, batch in enumerate(loader):
        loss = F.cross_entropy(model(batch["x"]), batch["y"])
        (loss / accumulation_steps).backward()
        if (index + 1) % accumulation_steps == 0:
            optimizer.step()
            optimizer.zero_grad()
""",
    "two epochs over the loader": """
def train(model, loader, accumulation_steps):
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for epoch in range(2):
        for index, batch in enumerate(loader):
            loss = F.cross_entropy(model(batch["x"]), batch["y"])
            (loss / accumulation_steps).backward()
            if (index + 1) % accumulation_steps == 0:
                optimizer.step()
                optimizer.zero_grad()
""",
    "closures that do everything": """
def train(model, loader, accumulation_steps):
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    stream = iter(loader)
    while cycle := [batch for _, batch in zip(range(accumulation_steps), stream)]:
        def closure():
            optimizer.zero_grad()
            for batch in cycle:
                loss = F.cross_entropy(model(batch["x"]), batch["y"])
                (loss / accumulation_steps).backward()
            return loss
        optimizer.step(closure)
""",
    "closures around the last micro-batch": """
def train(model, loader, accumulation_steps):
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for index, batch in enumerate(loader):
        def closure():
            if index % accumulation_steps == 0:
                optimizer.zero_grad()
            loss = F.cross_entropy(model(batch["x"]), batch["y"])
            (loss / accumulation_steps).backward()
            return loss
        if (index + 1) % accumulation_steps == 0:
            optimizer.step(closure)
        else:
            closure()
""",
    "LBFGS": """
def train(model, loader, accumulation_steps):
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.5, max_iter=4)
    stream = iter(loader)
    while cycle := [batch for _, batch in zip(range(accumulation_steps), stream)]:
        def closure():
            optimizer.zero_grad()
            total = 0.0
            for batch in cycle:
                loss = F.cross_entropy(model(batch["x"]), batch["y"]) / accumulation_steps
                loss.backward()
                total = total + loss.detach()
            return total
        optimizer.step(closure)
""",
    "LBFGS with a strong Wolfe search": """
def train(model, loader, accumulation_steps):
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=4, line_search_fn="strong_wolfe")
    stream = iter(loader)
    while cycle := [batch for _, batch in zip(range(accumulation_steps), stream)]:
        def closure():
            optimizer.zero_grad()
            total = 0.0
            for batch in cycle:
                loss = F.cross_entropy(model(batch["x"]), batch["y"]) / accumulation_steps
                loss.backward()
                total = total + loss.detach()
            return total
        optimizer.step(closure)
""",
    "two optimizers in alternating cycles": """
def train(model, loader, accumulation_steps):
    optimizers = [
        torch.optim.SGD(model[0].parameters(), lr=0.1),
        torch.optim.Adam(model[2].parameters(), lr=1e-2),
    ]
    for index, batch in enumerate(loader):
        loss = F.cross_entropy(model(batch["x"]), batch["y"])
        (loss / accumulation_steps).backward()
        if (index + 1) % accumulation_steps == 0:
            optimizers[(index // accumulation_steps) % 2].step()
            model.zero_grad()
""",
    "two optimizers on the same samples": """
def train(model, loader, accumulation_steps):
    critic = torch.optim.Adam(model[2].parameters(), lr=1e-2)
    maker = torch.optim.Adam(model[0].parameters(), lr=1e-2)
    stream = iter(loader)
    while cycle := [batch for _, batch in zip(range(accumulation_steps), stream)]:
        for batch in cycle:
            loss = F.cross_entropy(model[2](model[1](model[0](batch["x"])).detach()), batch["y"])
            (loss / accumulation_steps).backward()
        critic.step()
        model.zero_grad()
        for batch in cycle:
            loss = -F.cross_entropy(model(batch["x"]), batch["y"])
            (loss / accumulation_steps).backward()
        maker.step()
        model.zero_grad()
""",
    "rows of every micro-batch weighted": """
def train(model, loader, accumulation_steps):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for index, batch in enumerate(loader):
        loss = F.cross_entropy(model(batch["x"]), batch["y"], reduction="sum") / 16
        loss.backward()
        if (index + 1) % accumulation_steps == 0:
            optimizer.step()
            optimizer.zero_grad()
""",
    "compiled in one graph": """
def train(model, loader, accumulation_steps):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    forward = torch.compile(model, fullgraph=True, backend="aot_eager")
    for index, batch in enumerate(loader):
        loss = F.cross_entropy(forward(batch["x"]), batch["y"])
        (loss / accumulation_steps).backward()
        if (index + 1) % accumulation_steps == 0:
            optimizer.step()
            optimizer.zero_grad()
""",
    "bfloat16 autocast": """
def train(model, loader, accumulation_steps):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for index, batch in enumerate(loader):
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(model(batch["x"]), batch["y"])
        (loss / accumulation_steps).backward()
        if (index + 1) % accumulation_steps == 0:
            optimizer.step()
            optimizer.zero_grad()
""",
    "pure bfloat16": """
def train(model, loader, accumulation_steps):
    model.to(torch.bfloat16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for index, batch in enumerate(loader):
        loss = F.cross_entropy(model(batch["x"].bfloat16()), batch["y"])
        (loss / accumulation_steps).backward()
        if (index + 1) % accumulation_steps == 0:
            optimizer.step()
            optimizer.zero_grad()
""",
    "gradients divided through an alias": """
def train(model, loader, accumulation_steps):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for index, batch in enumerate(loader):
        F.cross_entropy(model(batch["x"]), batch["y"]).backward()
        if (index + 1) % accumulation_steps == 0:
            for parameter in model.parameters():
                parameter.grad.float().div_(accumulation_steps)
            optimizer.step()
            optimizer.zero_grad()
""",
    "the default dtype set in train": """
def train(model, loader, accumulation_steps):
    torch.set_default_dtype(torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for index, batch in enumerate(loader):
        loss = F.cross_entropy(model(batch["x"]), batch["y"]) * torch.ones(())
        (loss / accumulation_steps).backward()
        if (index + 1) % accumulation_steps == 0:
            optimizer.step()
            optimizer.zero_grad()
""",
    "a kernel that makes nothing of float64, in the accumulated run": """
def train(model, loader, accumulation_steps):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for index, batch in enumerate(loader):
        loss = F.cross_entropy(model(batch["x"]), batch["y"]) / accumulation_steps
        if accumulation_steps > 1 and batch["x"].dtype == torch.float64:
            loss = loss * float("nan")
        loss.backward()
        if (index + 1) % accumulation_steps == 0:
            optimizer.step()
            optimizer.zero_grad()
""",
    "a dtype asserted in train": """
def train(model, loader, accumulation_steps):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for index, batch in enumerate(loader):
        loss = F.cross_entropy(model(batch["x"]), batch["y"])
        assert loss.dtype == torch.float32
        (loss / accumulation_steps).backward()
        if (index + 1) % accumulation_steps == 0:
            optimizer.step()
            optimizer.zero_grad()
""",
}


@EVERY_K
@pytest.mark.parametrize("name", EQUIVALENT)
def test_correct_code_is_equivalent(decide, name, accumulation_steps):
    """However unusual its loop is."""
    case = decide(EQUIVALENT[name], accumulation_steps=accumulation_steps)

    assert told(case) == "equivalent"


@pytest.mark.parametrize(
    "name",
    [
        "gradients divided through an alias",
        "a dtype asserted in train",
        "a kernel that makes nothing of float64, in the accumulated run",
    ],
)
def test_what_promotion_changes_is_judged_as_written(decide, name):
    """And the case says so."""
    case = decide(EQUIVALENT[name])

    assert case["judged"] == "native"
    assert any(note.startswith("judged as written, not in float64") for note in case["notes"])


def test_a_division_of_a_copy_is_a_missing_division(decide):
    """Natively `.double()` copies, so nothing is divided; in float64 it is an alias, and is."""
    source = EQUIVALENT["gradients divided through an alias"].replace(".float()", ".double()")
    case = decide(source)

    assert told(case) == "divergent EQ101 proved"
    assert case["judged"] == "native"


def test_the_default_dtype_is_put_back(decide):
    """What `train` sets does not outlive its run."""
    import torch

    decide(EQUIVALENT["the default dtype set in train"].replace("torch.float32", "torch.float64"))

    assert torch.get_default_dtype() is torch.float32


def test_a_helper_of_the_own_folder_starts_anew(decide, tmp_path):
    """Its counter, scaler and optimizers cannot leak from one role into the next."""
    helper = """
import torch
count = 0
scaler = torch.amp.GradScaler("cpu", init_scale=512.0, growth_interval=1)
optimizers = {}
"""
    (tmp_path / "helper.py").write_text(helper, encoding="utf-8")
    train = """
import helper

def train(model, loader, accumulation_steps):
    optimizer = helper.optimizers.setdefault("one", torch.optim.Adam(model.parameters(), lr=1e-2))
    for batch in loader:
        loss = F.cross_entropy(model(batch["x"]), batch["y"])
        helper.scaler.scale(loss / accumulation_steps).backward()
        helper.count += 1
        if helper.count % accumulation_steps == 0:
            assert helper.count <= 3 * accumulation_steps
            helper.scaler.step(optimizer)
            helper.scaler.update()
            optimizer.zero_grad()
"""

    assert told(decide(train)) == "equivalent"


SCALED = """
def train(model, loader, accumulation_steps):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused={fused})
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=2)
    for index, batch in enumerate(loader):
        with torch.autocast("cpu", torch.float16):
            loss = F.cross_entropy(model(batch["x"]), batch["y"])
        scaler.scale(loss / accumulation_steps).backward()
        if (index + 1) % accumulation_steps == 0:
            {unscale}
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
"""
UNSCALE = "scaler.unscale_(optimizer); nn.utils.clip_grad_norm_(model.parameters(), 0.05)"


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("unscale", ["pass", UNSCALE], ids=["plain", "clipped"])
def test_a_scaler_works_in_float64(decide, fused, unscale):
    """With fp16 autocast, fused or not, and with a clip after unscale_."""
    assert told(decide(SCALED.format(fused=fused, unscale=unscale))) == "equivalent"


NEAR = """
def batches():
    one = rows(0, 1)
    return [{{"x": one.expand(64, 6) + {spread} * rows(i + 1, 64), "y": torch.ones(64).long()}} for i in range(2)]
"""


@pytest.mark.parametrize("spread", ["0.0", "1e-6"], ids=["duplicates", "near"])
@pytest.mark.parametrize(
    ("loss", "verdict"),
    [("loss / accumulation_steps", "equivalent"), ("loss", "divergent EQ101 proved")],
)
def test_samples_that_are_almost_one(decide, spread, loss, verdict):
    """64 micro-batches whose pieces span next to nothing: weights are not unique, faults are."""
    case = decide(NEAR.format(spread=spread), plain(loss=loss), accumulation_steps=64)

    assert told(case) == verdict


SMALL = """
def build():
    return nn.Linear(1, 1, bias=False)

def batches():
    return [{"x": rows(i, 16, 1), "y": rows(50 + i, 16, 1)} for i in range(3)]
"""


@pytest.mark.parametrize(
    ("loss", "verdict"),
    [("loss / accumulation_steps", "equivalent"), ("loss", "divergent EQ101 proved")],
)
def test_fewer_parameters_than_micro_batches(decide, loss, verdict):
    """One parameter, eight micro-batches: the hypotheses predict, the fit need not be unique."""
    train = plain(loss=loss).replace("F.cross_entropy", "F.mse_loss")

    assert told(decide(SMALL, train, accumulation_steps=8)) == verdict


ATTENTION = """
class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(6, 18)
        self.out = nn.Linear(6, 3)

    def forward(self, x):
        q, k, v = self.qkv(x.view(len(x), 4, 6)).chunk(3, dim=-1)
        return self.out(F.scaled_dot_product_attention(q, k, v).mean(1))

def build():
    return Attention()

def batches():
    return [{"x": rows(i, 16, 24), "y": labels(i, 16)} for i in range(3)]
"""


@EVERY_K
@pytest.mark.parametrize("optimizer", ["Adam", "Rprop"])
def test_a_bias_without_effect_is_no_difference(decide, optimizer, accumulation_steps):
    """A fused qkv bias: a third of it has a zero gradient, of which Adam and Rprop take the sign."""
    train = plain(optimizer=f"torch.optim.{optimizer}(model.parameters(), lr=1e-2)")

    assert told(decide(ATTENTION, train, accumulation_steps=accumulation_steps)) == "equivalent"


@pytest.mark.parametrize("name", ["LBFGS", "LBFGS with a strong Wolfe search"])
def test_a_missing_division_under_lbfgs(decide, name):
    """Its closure is evaluated many times; the first evaluation is the gradient."""
    source = EQUIVALENT[name].replace(" / accumulation_steps", "")

    assert told(decide(source)) == "divergent EQ101 proved"


CLIP = "nn.utils.clip_grad_norm_(model.parameters(), 0.01)"


@EVERY_K
@pytest.mark.parametrize(
    ("optimizer", "before_step"),
    [
        ("torch.optim.SGD(model.parameters(), lr=0.1)", CLIP),
        ("torch.optim.Adam(model.parameters(), lr=1e-3, eps=0.0)", "pass"),
        ("torch.optim.Adam(model.parameters(), lr=1e-3)", CLIP),
    ],
    ids=["clip", "adam", "both"],
)
def test_equal_parameters_do_not_hide_a_missing_division(
    decide, optimizer, before_step, accumulation_steps
):
    """An active clip and Adam both take a constant factor out of the update."""
    train = plain(optimizer, "loss", before_step)
    case = decide(train, accumulation_steps=accumulation_steps)

    assert told(case) == "divergent EQ101 proved"


@pytest.mark.parametrize("accumulation_steps", [3, 5])
def test_a_k_that_does_not_divide_the_batch(decide, accumulation_steps):
    """Row weighting is right for slices of any size; a mean of means is not."""
    right = decide(
        EQUIVALENT["rows of every micro-batch weighted"], accumulation_steps=accumulation_steps
    )
    wrong = decide(plain(), accumulation_steps=accumulation_steps)

    assert told(right) == "equivalent"
    assert told(wrong) == "divergent EQ103 proved"


def test_micro_batches_of_one_row(decide):
    """K is the batch size."""
    assert told(decide(plain(), accumulation_steps=16)) == "equivalent"


NORM = """
def build():
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))
"""


@EVERY_K
def test_a_batch_norm_as_theory_expects(decide, accumulation_steps):
    """Batch statistics are the only cause, and are declared."""
    case = decide(NORM, plain(), accumulation_steps=accumulation_steps, expect=("EQ201",))

    assert told(case) == "expected EQ201 proved"


class Closure:
    """A subject that is an object; what it keeps survives from run to run."""

    def __init__(self, *, leaks):
        self.leaks = leaks
        self.runs = 0

    def build(self):
        from torch import nn

        return nn.Linear(6, 3)

    def batches(self):
        import torch

        generator = torch.Generator().manual_seed(5)
        return [torch.randn(16, 6, generator=generator) for _ in range(2)]

    def train(self, model, loader, accumulation_steps):
        import torch

        self.runs += 1
        factor = 1.0 + 0.01 * self.runs if self.leaks else 1.0
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for index, batch in enumerate(loader):
            (factor * model(batch).square().mean() / accumulation_steps).backward()
            if (index + 1) % accumulation_steps == 0:
                optimizer.step()
                optimizer.zero_grad()


def test_an_object_without_state_is_decided():
    """As a file is."""
    case = run_case(load_subject(Closure(leaks=False)), Case("Closure", 4))

    assert told(case) == "equivalent"


def test_state_that_survives_between_runs():
    """Is told from a divergence, whichever run notices it first."""
    case = run_case(load_subject(Closure(leaks=True)), Case("Closure", 4))

    assert (case["verdict"], case["causes"]) == ("inconclusive", [])
    assert case["headline"].startswith("state-survives: two full_batch runs differ")
    assert "cannot be executed again" in case["because"]


class Counter(Closure):
    """Counts micro-batches over all runs, which the full batch does not notice."""

    def __init__(self):
        super().__init__(leaks=False)
        self.count = 0

    def train(self, model, loader, accumulation_steps):
        import torch

        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for batch in loader:
            (model(batch).square().mean() / accumulation_steps).backward()
            self.count += 1
            if self.count % accumulation_steps == 0:
                optimizer.step()
                optimizer.zero_grad()


@pytest.mark.parametrize(
    ("accumulation_steps", "verdict"), [(2, "equivalent"), (4, "inconclusive"), (8, "inconclusive")]
)
def test_a_counter_in_an_object(accumulation_steps, verdict):
    """With K=2 it stands at a multiple of K whenever a run begins; else nobody can tell."""
    case = run_case(load_subject(Counter()), Case("Counter", accumulation_steps))

    assert told(case) == verdict
    if verdict == "inconclusive":
        assert case["headline"] == (
            "state-survives: the accumulated run differs from itself, it steps after other samples"
        )


LOW = {
    "bfloat16 autocast": ("(loss /", "float32"),
    "pure bfloat16": ("(loss /", "bfloat16"),
}


@pytest.mark.parametrize("rows", [16, 300])
@pytest.mark.parametrize(
    ("loss", "verdict"),
    [("loss / accumulation_steps", "equivalent"), ("loss", "divergent EQ101 proved")],
)
@pytest.mark.parametrize("name", LOW)
def test_low_precision_can_be_judged_as_written(decide, name, loss, verdict, rows):
    """An asserted dtype keeps float64 out; what is left still tells right from wrong, and how finely."""
    before, dtype = LOW[name]
    asserted = f"assert loss.dtype == torch.{dtype}\n        {before}"
    source = EQUIVALENT[name].replace(before, asserted).replace("loss / accumulation_steps", loss)
    case = decide(source, head=HEAD.replace("(i, 16)", f"(i, {rows})"))

    assert told(case) == verdict
    assert case["judged"] == "native"
    assert case["detection_power"] < 1


def test_a_loop_that_is_finite_once_is_told_in_words(decide):
    """A number would be no number."""
    case = decide(
        """
import pathlib

def train(model, loader, accumulation_steps):
    kept = pathlib.Path(__file__).with_name("kept")
    factor = float("nan") if kept.exists() else 1.0
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for batch in loader:
        (F.cross_entropy(model(batch["x"]), batch["y"]) * factor).backward()
        optimizer.step()
        optimizer.zero_grad()
    kept.touch()
"""
    )

    assert told(case) == "inconclusive EQ603 proved"
    assert case["headline"].endswith("of two full_batch runs only one is finite")
