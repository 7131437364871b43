"""The package as it is installed: what lands where, that every way of having it imports, and what that costs."""

import importlib.metadata
import re
import sysconfig

import pytest

IMPORT_ALL = """
import fa3_inductor, fa3_inductor.kernels.reference, fa3_inductor.patterns.reasons as reasons
print(fa3_inductor.__file__, fa3_inductor.kernels.__file__, reasons.__file__, sep="\\n")
assert fa3_inductor.Reason is reasons.Reason
"""

LAZY = """
import sys
import fa3_inductor
assert not [name for name in sys.modules if name.split(".")[0] in ("torch", "sympy", "triton")]
assert fa3_inductor.__version__
"""

# CPU time, since wall time on a busy machine says little.
AUTOLOAD = """
import sys, time
start = time.process_time()
import fa3_inductor.autoload
fa3_inductor.autoload.autoload()
print(time.process_time() - start)
assert "torch" not in sys.modules
"""


def test_wheel_holds_every_source_file_and_nothing_else(installed, source):
    assert {path.name for path in installed.iterdir() if path.suffix != ".dist-info"} == {"fa3_inductor"}
    wanted = {"py.typed"}
    for inside, folder in ((".", "fa3_inductor"), ("kernels", "kernels"), ("patterns", "patterns")):
        wanted |= {f"{inside}/{path.relative_to(source / folder)}" for path in (source / folder).rglob("*.py")}
    found = {path for path in installed.glob("fa3_inductor/**/*") if path.suffix in (".py", ".typed")}
    assert found == {installed / "fa3_inductor" / path for path in wanted}


def test_wheel_imports(installed, python):
    lines = python(IMPORT_ALL, installed).splitlines()
    assert lines and all(line.startswith(str(installed)) for line in lines)


def test_checkout_imports_without_being_installed(source, python):
    lines = python(IMPORT_ALL, source).splitlines()
    assert [line.removeprefix(str(source)) for line in lines] == [
        "/fa3_inductor/__init__.py",
        "/kernels/__init__.py",
        "/patterns/reasons.py",
    ]


def test_editable_install_imports_from_the_checkout(source, installed_editable, python):
    # -S leaves out this environment's own .pth files, among which there may be one of an editable install of ours.
    code = f"""
import site, sys
site.addsitedir({str(installed_editable)!r})
sys.path.append({sysconfig.get_path("purelib")!r})
"""
    lines = python(code + IMPORT_ALL, "", "-S").splitlines()
    assert lines and all(line.startswith(str(source)) for line in lines)


def test_entry_points_resolve(installed):
    (found,) = importlib.metadata.distributions(name="fa3-inductor", path=[str(installed)])
    points = {(point.group, point.name): point for point in found.entry_points}
    assert set(points) == {("torch_dynamo_backends", "fa3_inductor"), ("torch.backends", "fa3_inductor")}
    assert all(callable(point.load()) for point in points.values())


def test_importing_the_package_imports_nothing_heavy(installed, python):
    python(LAZY, installed)


def test_public_names_resolve():
    import fa3_inductor

    assert all(getattr(fa3_inductor, name) is not None for name in fa3_inductor.__all__)
    assert set(fa3_inductor.__all__) <= set(dir(fa3_inductor))
    with pytest.raises(AttributeError, match="no_such_name"):
        getattr(fa3_inductor, "no_such_name")  # noqa: B009


def test_autoload_costs_nothing_when_it_is_off(installed, python):
    python(AUTOLOAD, installed)  # writes the bytecode
    seconds = sorted(float(python(AUTOLOAD, installed)) for _ in range(5))
    assert seconds[2] < 0.005, f"importing and calling autoload took {seconds} s"


@pytest.mark.parametrize("value, imported", [(None, False), ("0", False), ("1", True)])
def test_torch_calls_autoload(installed, python, value, imported):
    """torch imports nothing of ours but the autoload module until Inductor is; then the pass stands in front of it."""
    env = {} if value is None else {"FA3_INDUCTOR": value}
    code = """
import sys, torch
assert "fa3_inductor.autoload" in sys.modules
assert "fa3_inductor.backend" not in sys.modules and "torch._inductor.compile_fx" not in sys.modules
import torch._inductor.compile_fx
print("fa3_inductor.backend" in sys.modules)
import fa3_inductor
print(fa3_inductor.config.enabled)
"""
    hooked, enabled = python(code, installed, **env).split()
    assert enabled == str(imported)
    assert hooked == str(value is not None)


@pytest.mark.parametrize("first", ["fa3_inductor.config", "fa3_inductor.report", "fa3_inductor.backend", "torch"])
def test_any_module_can_be_imported_first(installed, python, first):
    """Importing one of ours imports torch, which calls autoload while that one is only half imported."""
    python(f"import {first}, fa3_inductor.backend, torch._inductor.compile_fx", installed, FA3_INDUCTOR="1")


def test_torch_logs_knows_the_package(installed, python):
    code = "import logging, torch; print(logging.getLogger('fa3_inductor.report').getEffectiveLevel())"
    assert python(code, installed, TORCH_LOGS="+fa3_inductor") == str(10)


def test_readme_example_prints_what_the_readme_says(root, source, python, tmp_path):
    readme = (root / "README.md").read_text()
    code, output = re.search(r"this file\n\n```python\n(.*?)```\n\nprints\n\n```text\n(.*?)```", readme, re.S).groups()
    (tmp_path / "model.py").write_text(code)
    assert python("import model", source) == output.strip()


def test_ci_runs_the_readmes_commands(root):
    readme, ci = (root / "README.md").read_text(), (root / ".ci" / "run").read_text()
    install, example = re.search(r"```sh\npip install (.*?) && (.*?)\n```", readme).groups()
    assert f"pip install --quiet --editable {install.removeprefix('-e ')}\n" in ci and example in ci
    assert "\npython -m pytest\n" in readme
