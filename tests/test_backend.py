"""The ways into the pass, seen from outside: which way in rewrites what, what options mean, what the caches serve."""

import subprocess
import sys
import threading

import pytest
import torch
from torch._dynamo.utils import counters
from torch._inductor import config as inductor_config
from torch._inductor.custom_graph_pass import CustomGraphPass

import fa3_inductor
from fa3_inductor import config, disable, enable, enabled, explain, reports
from fa3_inductor.backend import fa3_inductor as backend


def attend(q, k, v):
    return torch.softmax(q @ k.transpose(-2, -1) * 0.25, -1) @ v


def qkv(seq=16, **kwargs):
    return [torch.randn(2, 3, seq, 16, **kwargs) for _ in range(3)]


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = torch.nn.Linear(16, 48)

    def forward(self, x):
        return attend(*(t.view(2, -1, 2, 8).transpose(1, 2) for t in self.qkv(x).split(16, -1)))


@pytest.fixture(autouse=True)
def fresh_caches(tmp_path, monkeypatch):
    """No test is served what another one has compiled."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    counters.clear()


@pytest.fixture
def switched_off():
    yield
    disable()


@pytest.fixture
def patches(monkeypatch):
    """The config that Inductor is called with, in place of compiling anything."""
    seen = []

    def compile_fx(gm, example_inputs, config_patches=None, **rest):
        with inductor_config.patch(config_patches):
            seen.append(inductor_config.get_config_copy())
        return gm.forward

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", compile_fx)
    return seen


def sites():
    return [(site.status, site.target) for site in reports().sites]


# The backend.


def test_backend_is_found_by_name_and_fuses():
    inputs = qkv()
    torch.testing.assert_close(torch.compile(attend, backend="fa3_inductor")(*inputs), attend(*inputs))
    assert sites() == [("fused", "sdpa")]


def test_backend_needs_no_import(installed, python):
    code = """
import torch
f = torch.compile(lambda x: x + 1, backend="fa3_inductor")
assert f(torch.zeros(2)).tolist() == [1, 1]
"""
    python(code, installed)


def test_default_backend(switched_off):
    if not hasattr(torch.compiler, "set_default_backend"):
        pytest.skip("torch.compiler.set_default_backend is new in torch 2.13")
    torch.compiler.set_default_backend("fa3_inductor")
    try:
        torch.compile(attend)(*qkv())
    finally:
        torch.compiler.set_default_backend(None)
    assert sites() == [("fused", "sdpa")]


def test_training_step():
    block = Block()
    x = torch.randn(2, 8, 16)
    want = torch.autograd.grad(block(x).square().sum(), list(block.parameters()))
    got = torch.autograd.grad(torch.compile(block, backend="fa3_inductor")(x).square().sum(), list(block.parameters()))
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w)
    assert sites() == [("fused", "sdpa")]


def test_dynamic_shapes_compile_once():
    compiled = torch.compile(attend, backend="fa3_inductor", dynamic=True, fullgraph=True)
    for seq in (20, 24, 40):
        inputs = qkv(seq)
        torch.testing.assert_close(compiled(*inputs), attend(*inputs))
    assert sites() == [("fused", "sdpa")]


def test_mode_means_what_it_means_for_inductor(patches):
    torch.compile(attend, backend="fa3_inductor", mode="reduce-overhead")(*qkv())
    torch._dynamo.reset()
    torch.compile(attend, backend="fa3_inductor", mode="max-autotune-no-cudagraphs")(*qkv())
    first, second = ((p["triton.cudagraphs"], p["max_autotune"]) for p in patches)
    assert first == (True, inductor_config.max_autotune)
    assert second == (inductor_config.triton.cudagraphs, True)


def test_options_are_parted(patches):
    options = {"target": "reference", "fa3_inductor.empty_rows": "relaxed", "max-autotune": True}
    torch.compile(attend, backend="fa3_inductor", options=options)(*qkv())
    assert patches[0]["max_autotune"] is True
    assert sites() == [("fused", "reference")]
    assert (config.target, config.empty_rows) == ("auto", "exact")


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"no_such_option": 1}, RuntimeError, "Unexpected optimization option no_such_option"),
        ({"fa3_inductor.no_such": 1}, RuntimeError, "Unexpected optimization option fa3_inductor.no_such.*target"),
        ({"max_autotune": "yes"}, RuntimeError, "Unexpected type of attr max_autotune, got str should be bool"),
        ({"target": "hoper"}, ValueError, "config.target is one of 'auto', 'hopper', .*, got 'hoper'"),
        ({"dump_dir": 3}, ValueError, "config.dump_dir is the path of a folder or None, got 3"),
        ({"enabled": True}, RuntimeError, "Unexpected optimization option enabled"),
    ],
)
def test_bad_options(options, error, message):
    with pytest.raises(Exception, match=message) as raised:
        torch.compile(attend, backend="fa3_inductor", options=options)(*qkv())
    assert type(raised.value.inner_exception) is error


def test_bad_mode():
    with pytest.raises(Exception, match="Unrecognized mode=fastest, should be one of"):
        torch.compile(attend, backend="fa3_inductor", mode="fastest")(*qkv())


def test_our_settings_hide_none_of_inductors():
    assert not set(config.get_config_copy()) & {name.split(".")[0] for name in inductor_config.get_config_copy()}


def test_reset_drops_cuda_graphs(monkeypatch):
    from torch._inductor import cudagraph_trees

    torch.compile(attend, backend="fa3_inductor")(*qkv())
    calls = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(cudagraph_trees, "reset_cudagraph_trees", lambda: calls.append(1))
    backend.reset()
    assert calls == [1]


# The stock backend.


def test_stock_backend_is_left_alone_unless_enabled(switched_off):
    for switch, expected in ((lambda: None, 0), (enable, 1), (disable, 1), (enable, 2)):
        switch()
        torch._dynamo.reset()
        torch.compile(attend)(*qkv())
        assert len(reports().sites) == expected


def test_enabled_is_scoped():
    with enabled():
        torch.compile(attend)(*qkv())
    assert not config.enabled
    torch._dynamo.reset()
    torch.compile(attend)(*qkv())
    assert sites() == [("fused", "sdpa")]


def test_both_ways_in_at_once_rewrite_once():
    with enabled():
        torch.compile(attend, backend="fa3_inductor")(*qkv())
    assert sites() == [("fused", "sdpa")]


def test_enable_holds_for_other_threads(switched_off):
    def compile_it():
        torch.compile(attend)(*qkv())

    enable()
    thread = threading.Thread(target=compile_it)
    thread.start()
    thread.join()
    assert len(reports().sites) == 1
    disable()
    torch._dynamo.reset()
    thread = threading.Thread(target=compile_it)
    thread.start()
    thread.join()
    assert len(reports().sites) == 1


def test_environment_variable_reaches_an_unmodified_program(installed, python):
    program = """
import torch
def attend(q, k, v):
    return torch.softmax(q @ k.transpose(-2, -1) * 0.25, -1) @ v
torch.compile(attend)(*(torch.randn(1, 2, 8, 8) for _ in range(3)))
"""
    # Only the last line, which looks at what happened, knows the package.
    look = "import fa3_inductor; print([site.status for site in fa3_inductor.reports().sites])"
    assert python(program + look, installed, FA3_INDUCTOR="1") == "['fused']"
    assert python(program + look, installed, FA3_INDUCTOR="0") == "[]"
    assert python(program + look, installed) == "[]"
    prepared = "import torch._dynamo as d, warnings; print(warnings.warn in d.config.reorderable_logging_functions)"
    assert python(prepared, installed, FA3_INDUCTOR="1") == "True" and python(prepared, installed) == "False"


def test_environment_variable_with_a_bad_value(installed, python):
    with pytest.raises(AssertionError, match="config.enabled is one of True, False, got 'yes'"):
        python("import torch, fa3_inductor; fa3_inductor.config", installed, FA3_INDUCTOR="yes")


def test_mode_and_options_of_the_stock_backend_stay(switched_off, monkeypatch):
    enable()
    seen = []
    from torch._inductor import compile_fx

    def main(*args, **kwargs):
        seen.append((inductor_config.max_autotune, inductor_config.cpp_wrapper))
        return original(*args, **kwargs)

    original = compile_fx._compile_fx_main
    monkeypatch.setattr(compile_fx, "_compile_fx_main", main)
    torch.compile(attend, options={"max_autotune": True, "max_autotune_gemm_backends": "ATEN"})(*qkv())
    assert seen == [(True, False)]
    assert len(reports().graphs) == 1


# In a child: on some machines torch 2.11 dies of loading any package of AOTInductor's.
RUN_PACKAGE = """
import sys, torch
inputs, out = torch.load(sys.argv[1] + "/example.pt")
with torch.no_grad():
    torch.testing.assert_close(torch._inductor.aoti_load_package(sys.argv[1] + "/model.pt2")(*inputs), out)
"""


def run_package(program, inputs, folder):
    """The return code of a process that runs the packaged program; negative if it was killed by a signal."""
    with torch.no_grad():
        torch._inductor.aoti_compile_and_package(program, package_path=str(folder / "model.pt2"))
        torch.save((inputs, program.module()(*inputs)), folder / "example.pt")
    return subprocess.run([sys.executable, "-c", RUN_PACKAGE, str(folder)], cwd=folder).returncode


def test_exported_programs_are_rewritten_once(switched_off, tmp_path):
    """AOTInductor comes in through the same door, with a graph that torch.export made."""
    inputs = tuple(qkv())
    block = torch.nn.Module()
    block.forward = attend
    with torch.no_grad():
        program = torch.export.export(block, inputs)
    with enabled():
        code = run_package(program, inputs, tmp_path)
    assert sites() == [("fused", "sdpa")]
    if code < 0 and run_package(program, inputs, tmp_path) == code:
        pytest.skip("AOTInductor's packages cannot be loaded here, with the pass or without")
    assert code == 0


# Living with others.


class Seen(CustomGraphPass):
    def __init__(self, name):
        self.name, self.graphs = name, 0

    def __call__(self, graph):
        self.graphs += 1

    def uuid(self):
        return self.name


def single_or_list(found):
    # A list of passes is new in torch 2.13.
    return [found] if hasattr(torch._inductor.custom_graph_pass, "get_custom_graph_passes") else found


HOOKS = ["joint_custom_pre_pass", "joint_custom_post_pass", "post_grad_custom_pre_pass", "pre_grad_custom_pass"]


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("make", [lambda found: found, single_or_list], ids=["one", "list"])
def test_passes_of_others_keep_working(hook, make):
    in_config, in_options = Seen("in_config"), Seen("in_options")
    with inductor_config.patch({hook: make(in_config)}):
        torch.compile(attend, backend="fa3_inductor")(*qkv())
        torch._dynamo.reset()
        torch.compile(attend, backend="fa3_inductor", options={hook: make(in_options)})(*qkv())
    assert (in_config.graphs, in_options.graphs) == (1, 1)


def cache_events(function, *args, **options):
    """(misses, hits, bypasses) of both caches for one compile in a Dynamo that remembers nothing."""
    torch._dynamo.reset()
    counters.clear()
    torch.compile(function, **options)(*args)
    return tuple(
        counters["inductor"][f"fxgraph_cache_{event}"] + counters["aot_autograd"][f"autograd_cache_{event}"]
        for event in ("miss", "hit", "bypass")
    )


MISS, HIT = (2, 0, 0), (0, 1, 0)


def test_caches_serve_a_configuration_only_to_itself(switched_off):
    inputs = qkv()
    ours = {"backend": "fa3_inductor"}
    assert cache_events(attend, *inputs) == MISS
    assert cache_events(attend, *inputs, **ours) == MISS
    assert cache_events(attend, *inputs, **ours, options={"target": "reference"}) == MISS
    assert cache_events(attend, *inputs, **ours, options={"empty_rows": "relaxed"}) == MISS
    for options in (None, {"target": "reference"}, {"empty_rows": "relaxed"}, {"dump_dir": ""}):
        misses, hits, bypasses = cache_events(attend, *inputs, **ours, options=options)
        assert (misses, bypasses) == (0, 0) and hits > 0
    misses, hits, bypasses = cache_events(attend, *inputs)
    assert (misses, bypasses) == (0, 0) and hits > 0
    # The stock backend with the pass on makes the same thing as our backend.
    with enabled():
        misses, hits, bypasses = cache_events(attend, *inputs)
    assert (misses, bypasses) == (0, 0) and hits > 0


def test_graphs_without_attention_are_cached_apart_too():
    """What the shield keeps away depends on it alone when there is nothing to rewrite."""

    def refused(q, k, v):
        return torch.softmax(q @ k.transpose(-2, -1) * 0.25, -2) @ v

    inputs = qkv()
    stock = cache_events(refused, *inputs)
    ours = cache_events(refused, *inputs, backend="fa3_inductor")
    assert stock == ours == MISS
    assert [site.status for site in reports().sites] == ["rejected"]


def test_our_sources_are_part_of_the_key(monkeypatch):
    from fa3_inductor import backend as module

    inputs = qkv()
    assert cache_events(attend, *inputs, backend="fa3_inductor") == MISS
    monkeypatch.setattr(module, "_source_hash", lambda: "another version")
    assert cache_events(attend, *inputs, backend="fa3_inductor") == MISS


def test_sdpa_backends_are_part_of_the_key():
    from torch.nn.attention import SDPBackend, sdpa_kernel

    inputs = qkv()
    assert cache_events(attend, *inputs, backend="fa3_inductor") == MISS
    with sdpa_kernel(SDPBackend.MATH):
        assert cache_events(attend, *inputs, backend="fa3_inductor") == MISS


def test_source_hash_covers_all_three_folders(root):
    from fa3_inductor.backend import _sources

    found = {path.relative_to(root).as_posix() for path in _sources()}
    assert {"fa3_inductor/ops.py", "kernels/reference.py", "patterns/reasons.py"} <= found
    assert not [name for name in found if name.split("/")[0] not in ("fa3_inductor", "kernels", "patterns")]


def test_a_pass_without_identity_forbids_caching_as_it_does_without_us():
    class Nameless(Seen):
        def uuid(self):
            return None

    with inductor_config.patch(joint_custom_pre_pass=Nameless("")):
        for options in ({}, {"backend": "fa3_inductor"}):
            assert cache_events(attend, *qkv(), **options)[2] > 0


# explain.


def test_explain_reports_without_recording():
    inputs = qkv()
    report = explain(attend, *inputs)
    (site,) = report.fused
    assert site.source.startswith(__file__) and site.reason is None and site.target == "sdpa"
    assert reports().graphs == [] and report.graph_breaks == []
    assert "test_backend.py" in str(report)


def test_explain_modules_compiled_or_not():
    block = Block()
    x = torch.randn(2, 8, 16)
    compiled = torch.compile(block, backend="fa3_inductor")
    compiled(x)
    for model in (block, compiled, torch.compile(attend, backend="eager")):
        assert len(explain(model, *(qkv() if model not in (block, compiled) else [x])).fused) == 1


def test_explain_leaves_compiled_code_alone():
    compiled = torch.compile(attend, backend="fa3_inductor")
    inputs = qkv()
    compiled(*inputs)
    for seq in (16, 24, 32):
        assert len(explain(attend, *qkv(seq)).fused) == 1
    counters.clear()
    compiled(*inputs)
    assert counters["stats"]["unique_graphs"] == 0
    with torch._dynamo.config.patch(recompile_limit=1, fail_on_recompile_limit_hit=True):
        compiled(*inputs)


def test_explain_keeps_gradients():
    seen = []

    def loss(q, k, v):
        seen.append(attend(q, k, v).sum())
        return seen[-1]

    inputs = qkv(requires_grad=True)
    explain(loss, *inputs)
    seen[-1].backward()
    assert all(x.grad is not None for x in inputs)


def test_explain_names_graph_breaks():
    def broken(q, k, v):
        scores = torch.softmax(q @ k.transpose(-2, -1), -1)
        torch._dynamo.graph_break()
        return scores @ v

    report = explain(broken, *qkv())
    assert len(report.graphs) == 2 and report.fused == []
    (why,) = report.graph_breaks
    assert __file__ in why
    assert "graph break 1: " in str(report)


def test_explain_passes_exceptions_on():
    def fails(x):
        raise KeyError("of the model")

    with pytest.raises(KeyError, match="of the model"):
        explain(fails, torch.zeros(1))


# Settings.


@pytest.mark.parametrize(
    "name, value",
    [
        ("target", "cpu"),
        ("empty_rows", "zero"),
        ("enabled", 1),
        ("dump_dir", 1),
        ("fp8", "on"),
        ("fp8_incoherent_seed", True),
    ],
)
def test_settings_are_checked(name, value):
    with pytest.raises(ValueError, match=f"config.{name} is .*, got {value!r}"):
        setattr(config, name, value)
    with pytest.raises(ValueError), config.patch({name: value}):
        pass
    with pytest.raises(AttributeError, match="no_such"):
        config.no_such = 1


def test_package_level_names():
    assert fa3_inductor.config is config and fa3_inductor.explain is explain
