"""Training as people do it, around a model whose attentions are fused: what wraps the step sees what it saw before.

The rewritten graphs go through AOTAutograd, without code generation: what matters here, saving for the backward,
recomputing and hooks, is decided there.
"""

import copy
import functools
import os
import subprocess
import sys

import pytest
import torch
from functorch.compile import min_cut_rematerialization_partition
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.backends.debugging import boxed_nop
from torch.nn import functional as F
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from fa3_inductor import Reason, Report, config
from fa3_inductor.rewrite import rewrite_graph

WIDTH, HEADS, LENGTH = 32, 2, 24
TARGETS = pytest.mark.parametrize("target", ["sdpa", "reference"])
FORWARD = torch.ops.fa3.attention.default


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.out = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("later", torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1))

    def forward(self, x):
        y = self.norm(x)
        q, k, v = (f(y).unflatten(-1, (-1, WIDTH // HEADS)).transpose(1, 2) for f in (self.q, self.k, self.v))
        scores = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(self.later, float("-inf"))
        return x + self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


class Model(nn.Module):
    """``around`` is what calls a block: `checkpoint` in one of its forms."""

    def __init__(self, around=None):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.around = around

    def forward(self, x):
        for block in self.blocks:
            x = block(x) if self.around is None else self.around(block, x)
        return x


def compiled(model, target, compiler=boxed_nop):
    """The pass, and AOTAutograd after it, whose graphs go to ``compiler``."""
    report = Report()

    def backend(gm, inputs):
        with config.patch(target=target):
            report.graphs.append(rewrite_graph(gm))
        aot = aot_autograd(fw_compiler=compiler, partition_fn=min_cut_rematerialization_partition)
        return aot(gm, inputs)

    return torch.compile(model, backend=backend), report


def fused(report):
    assert {s.status for s in report.sites} == {"fused"}, str(report)
    return len(report.sites)


def batches(count=3):
    return [torch.randn(2, LENGTH, WIDTH, requires_grad=True) for _ in range(count)]


def loss_of(model, x):
    return F.mse_loss(model(x), x.detach().roll(1, 1))


def step_through(model, data, step):
    """The weights after an optimiser has gone through ``data`` by ``step(model, optimizer, x)``."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for x in data:
        step(model, optimizer, x)
    return [p.detach() for p in model.parameters()]


def plain_step(model, optimizer, x):
    loss_of(model, x).backward()
    optimizer.step()
    optimizer.zero_grad()


def assert_trains_alike(model, target, step, atol=1e-5):
    """Returns how many attentions were fused on the way."""
    eager = copy.deepcopy(model)
    data = batches()
    ours, report = compiled(model, target)
    torch.testing.assert_close(
        step_through(ours, data, step), step_through(eager, data, step), atol=atol, rtol=1e-4 if atol < 1e-4 else 1e-2
    )
    return fused(report)


@TARGETS
def test_a_step(target):
    assert assert_trains_alike(Model(), target, plain_step) == 2


@TARGETS
def test_gradients_are_accumulated(target):
    def step(model, optimizer, x):
        for part in x.split(1):
            (loss_of(model, part) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()

    assert assert_trains_alike(Model(), target, step) == 2


@TARGETS
def test_autocast(target):
    def step(model, optimizer, x):
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model, x)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    assert assert_trains_alike(Model(), target, step, atol=2e-3) == 2


@TARGETS
def test_grad_scaler(target):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)

    def step(model, optimizer, x):
        with torch.autocast("cpu", torch.float16):
            loss = loss_of(model, x)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    assert assert_trains_alike(Model(), target, step, atol=2e-3) == 2
    assert scaler.get_scale() == 2.0**12  # no step was skipped


@TARGETS
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints(target, reentrant):
    around = functools.partial(checkpoint, use_reentrant=reentrant)
    assert assert_trains_alike(Model(around), target, plain_step) >= 2


@pytest.mark.parametrize("kept", [True, False])
def test_a_selective_checkpoint_that_names_the_operator(kept):
    def policy(_ctx, op, *args, **kwargs):
        return CheckpointPolicy.MUST_SAVE if op is FORWARD and kept else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = functools.partial(create_selective_checkpoint_contexts, policy)
    model = Model(functools.partial(checkpoint, use_reentrant=False, context_fn=contexts))
    graphs = []

    def compiler(gm, inputs):
        graphs.append([n.target for n in gm.graph.nodes].count(FORWARD))
        return boxed_nop(gm, inputs)

    ours, report = compiled(model, "reference", compiler)
    (x,) = batches(1)
    loss_of(ours, x).backward()
    assert fused(report) == 2
    assert graphs == [2, 0 if kept else 2]


@TARGETS
def test_compiled_autograd(target):
    """Backward graphs that autograd's own capture hands to the compiler."""
    with torch._dynamo.config.patch(compiled_autograd=True):
        assert assert_trains_alike(Model(), target, plain_step) == 2


@TARGETS
def test_a_backward_that_runs_twice(target):
    def step(model, optimizer, x):
        loss = loss_of(model, x)
        loss.backward(retain_graph=True)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    assert assert_trains_alike(Model(), target, step) == 2


@TARGETS
def test_a_second_derivative_is_refused(target):
    model, _ = compiled(Model(), target)
    (x,) = batches(1)
    (grad,) = torch.autograd.grad(loss_of(model, x), x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        grad.sum().backward()


@TARGETS
@pytest.mark.parametrize("transform", ["grad", "functional_call", "vmap"])
def test_transforms_inside_the_compiled_function(target, transform):
    """Fused, or left as written with a reason; right in any case."""
    model = Model()
    weights = dict(model.named_parameters())
    (x,) = batches(1)

    def call(weights, x):
        return torch.func.functional_call(model, weights, (x,))

    functions = {
        "grad": lambda: torch.func.grad(lambda w: call(w, x).square().mean())(weights),
        "functional_call": lambda: call(weights, x),
        "vmap": lambda: torch.func.vmap(lambda x: call(weights, x[None])[0])(x),
    }
    ours, report = compiled(functions[transform], target)
    torch.testing.assert_close(ours(), functions[transform](), atol=1e-5, rtol=1e-4)
    if transform == "grad":
        assert "derivatives are taken inside the compiled code" in report.graphs[0].error
    elif transform == "vmap":
        assert [s.reason for s in report.sites] == [Reason.OPAQUE] * 2
        assert "a vmapped function" in report.sites[0].detail and "softmax(-1)" in report.sites[0].code
    else:
        assert fused(report) == 2


WRAPPED = """
import copy, functools, sys
import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from tests.test_training import Model, batches, compiled, fused, plain_step, step_through

how = sys.argv[1]
distributed.init_process_group("gloo")
torch.manual_seed(0)
parallel = how == "tensor parallel in checkpoints"
model, data = Model(functools.partial(checkpoint, use_reentrant=False) if parallel else None), batches()
eager = step_through(copy.deepcopy(model), data, plain_step)
mine = [x.detach()[distributed.get_rank()][None] for x in data]  # the mean of these gradients is that of the batch
if how == "ddp of compiled":
    model, report = compiled(model, "reference")
    model = DistributedDataParallel(model)
elif parallel:
    mesh, mine = init_device_mesh("cpu", (2,)), [x.detach() for x in data]
    for block in model.blocks:  # a head a process
        parallelize_module(block, mesh, {"out": RowwiseParallel(), **{name: ColwiseParallel() for name in "qkv"}})
    model, report = compiled(model, "reference")
elif how == "compiled ddp":
    model, report = compiled(DistributedDataParallel(model), "reference")
else:
    reports = []
    for block in model.blocks:
        if how == "fsdp of compiled blocks":
            block.forward, report = compiled(block.forward, "reference")
            reports.append(report)
        fully_shard(block)
    fully_shard(model)
    if how == "compiled fsdp":
        model, report = compiled(model, "reference")
        reports.append(report)
ours = step_through(model, mine, plain_step)
ours = [x.full_tensor() if isinstance(x, DTensor) else x for x in ours]
if "fsdp" in how:
    assert sum(fused(r) for r in reports) == 2, reports
else:
    assert fused(report) >= 2  # torch 2.11 compiles a DDP model at each of the first calls
torch.testing.assert_close(ours, eager, atol=1e-5, rtol=1e-4)
print("as alone")
distributed.destroy_process_group()
"""


@pytest.mark.parametrize(
    "how",
    ["ddp of compiled", "compiled ddp", "fsdp of compiled blocks", "compiled fsdp", "tensor parallel in checkpoints"],
)
def test_on_two_processes(how, root, tmp_path):
    """DDP and FSDP2, around compiled code and inside it, and tensor parallelism train as one process does."""
    script = tmp_path / "wrapped.py"
    script.write_text(WRAPPED)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script), how],
        env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("as alone") == 2
