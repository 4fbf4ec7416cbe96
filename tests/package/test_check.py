"""`python -m contrastive_kernels check`: right where the losses are right, red where one is not."""

import functools
import importlib
import inspect
import os
import re
import subprocess
import sys

import pytest
import torch

import contrastive_kernels as ck
import python_ref
from contrastive_kernels.__main__ import main
from contrastive_kernels.check import cases, command, measure
from contrastive_kernels.check.cases import CASES
from contrastive_kernels.compat.check.command import main as compat_main
from contrastive_kernels.engine.backends import BACKENDS, ENVIRONMENT_VARIABLE
from contrastive_kernels.engine.backends.cpp import build
from contrastive_kernels.engine.backends.triton import first_use, tune
from contrastive_kernels.primitives import shards
from tests.support.testing import ROOT, backends, differentiate, supports

FILES = {path.stem for path in (ROOT / "contrastive_kernels" / "losses").glob("*.py") if path.stem[0] != "_"}
HERE = [getattr(name, "values", (name,))[0] for name in backends()]
QUICK = ("check", "--backend", "torch", "--dtype", "float32")


def row(text, loss):
    """Return the cells of a loss."""
    return re.search(rf"^{loss} +(.*)$", text, re.MULTILINE).group(1).split("  ")


def test_a_wrong_kernel_is_checked_itself(monkeypatch):
    """PyTorch does not stand in for it."""
    monkeypatch.setenv(first_use.ENVIRONMENT_VARIABLE, "1")
    monkeypatch.delenv(ENVIRONMENT_VARIABLE, raising=False)
    with measure._only("torch"):
        assert first_use.switched_off() and os.environ[ENVIRONMENT_VARIABLE] == "torch"
    assert not first_use.switched_off() and ENVIRONMENT_VARIABLE not in os.environ


def test_every_loss_is_checked():
    assert {case.loss for case in CASES} == FILES
    assert set(command.LOSSES) == FILES


@pytest.mark.parametrize("loss", command.LOSSES)
def test_every_loss_is_right(loss, capsys):
    """On all backends and in all dtypes that they have."""
    assert main(["check", "--loss", loss]) == 0, capsys.readouterr().out
    text = capsys.readouterr().out
    assert "all right" in text
    for backend in HERE:
        assert f"{backend} (" in text


def reference(case, tensors):
    """Return the loss of the reference, which knows one method and takes a polarization."""
    options = {name: value for name, value in case.options.items() if name not in ("method", "share")}
    if "reduction" in inspect.signature(cases._function(case.loss)).parameters:
        options["reduction"] = case.reduction
    if case.loss == "lmcl":
        band = ck.Polarization(options.pop("lower"), options.pop("upper"), case.options["share"])
        z0, z1, scale = tensors.values()
        return python_ref.nt_xent_loss(z0, z1, logit_scale=scale, polarization=band, reduction="none", **options)
    function = getattr(python_ref, f"{case.loss}_loss", None) or getattr(python_ref, case.loss)
    return function(**cases.arguments_of(tensors), **options)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_plain_form_is_the_reference(case):
    """In float64, value and gradients: what the losses are checked with is checked itself."""
    tensors = case.tensors(9, 7, 5, torch.float64, 0)
    plain = differentiate(lambda **t: case.dense(t), tensors)
    expected = differentiate(lambda **t: reference(case, t), tensors)
    torch.testing.assert_close(plain.value, expected.value, rtol=1e-9, atol=1e-12)
    for name in case.differentiable:
        ours, theirs = (
            torch.zeros_like(tensors[name]) if gradient is None else gradient
            for gradient in (plain.gradients[name], expected.gradients[name])
        )
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.skipif(not supports("cpp", torch.float32), reason="no extension")
@pytest.mark.parametrize("wrong", HERE)
def test_a_wrong_backend_is_red(wrong, monkeypatch, capsys):
    """A relative error of 1e-4 in its log-sum-exps; the other backend is still right."""
    sweep = importlib.import_module("contrastive_kernels.primitives.sweep")  # not the function of that name
    right = sweep.sweep_forward

    def spoiled(inputs, what, maximum, save_scores, backend):
        out = right(inputs, what, maximum, save_scores, backend)
        return (out[0] * (1 + 1e-4), *out[1:]) if backend == wrong else out

    monkeypatch.setattr(sweep, "sweep_forward", spoiled)
    assert main(["check", "--loss", "info_nce", "alignment", "--dtype", "float32"]) == 1
    text = capsys.readouterr().out
    red = [line for line in text.splitlines() if line.startswith("  info_nce(")]
    assert red and all(f"; {wrong} (" in line and "times the bound" in line for line in red)
    assert sum("wrong" in cell for cell in row(text, "info_nce")) == 1
    assert not any("wrong" in cell for cell in row(text, "alignment"))


def spoil(monkeypatch, loss, change):
    """Let `change` call a loss."""
    find = cases._function

    def spoiled(name):
        function = find(name)
        return functools.wraps(function)(functools.partial(change, function)) if name == loss else function

    monkeypatch.setattr(cases, "_function", spoiled)


def crash(function, **arguments):
    raise RuntimeError("an illegal access\nsomewhere")


def not_a_number(function, **arguments):
    return function(**arguments) * torch.nan


def wrong_gradient(function, *, query, **arguments):
    return function(query=query * (1 + 1e-4) - 1e-4 * query.detach(), **arguments)


def one_number(function, **arguments):
    return function(**arguments).mean()


def a_rounding(function, **arguments):
    return function(**arguments) * (1 + 1e-8)


@pytest.mark.parametrize(
    ("change", "cell", "line"),
    [
        (crash, "error", "RuntimeError: an illegal access"),
        (not_a_number, "error", "value is not finite"),
        (one_number, "error", "ValueError: the shape is (), not ("),
        (wrong_gradient, "wrong", "gradient of query"),
    ],
)
def test_a_wrong_loss_is_red_and_the_others_are_checked(change, cell, line, monkeypatch, capsys):
    spoil(monkeypatch, "moco", change)
    assert main([*QUICK, "--loss", "info_nce", "moco", "decoupled"]) == 1
    text = capsys.readouterr().out
    assert cell in row(text, "moco")[-1]
    for loss in ("info_nce", "decoupled"):
        assert float(row(text, loss)[-1]) <= 1
    red = [each for each in text.splitlines() if each.startswith("  moco(")]
    assert red and all(line in each for each in red)
    assert f": {len(red)} wrong\n" in text


def test_a_plain_form_that_fails_is_red(monkeypatch, capsys):
    monkeypatch.setattr(cases.dense, "moco", lambda **tensors: 1 / 0)
    assert main([*QUICK, "--loss", "moco"]) == 1
    assert "plain PyTorch, ZeroDivisionError" in capsys.readouterr().out


def test_a_small_error_is_within_the_bound(monkeypatch, capsys):
    """What rounding may do is not red: the check would be one of luck."""
    spoil(monkeypatch, "moco", a_rounding)
    assert main([*QUICK, "--loss", "moco"]) == 0, capsys.readouterr().out


def test_verbose_prints_every_comparison(capsys):
    assert main([*QUICK, "--loss", "moco", "--verbose"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  moco(")]
    assert len(lines) == len(measure.SHAPES)
    assert "query ND, key ND, queue MD); torch (cpu), float32, N = 2, M = 3, D = 1: " in lines[0]


def test_a_backend_that_is_not_here_is_named(monkeypatch, capsys):
    monkeypatch.setattr(BACKENDS["cpp"], "not_supported_reasons", lambda x: ["it was never built"])
    assert main(["check", "--loss", "alignment", "--dtype", "float32"]) == 0
    assert "cpp does not run here: it was never built" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        main(["check", "--backend", "cpp"])
    assert ended.value.code == 2
    assert "argument --backend: cpp does not run here: it was never built" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--backend", "cuda"], "argument --backend: invalid choice: 'cuda'"),
        (["--loss", "hinge"], "argument --loss: invalid choice: 'hinge'"),
        (["--dtype", "int8"], "argument --dtype: invalid choice: 'int8'"),
        (["--device", "nowhere"], "argument --device: 'nowhere' cannot be used"),
        (["--device", "meta"], "argument --device: 'meta' cannot be used"),
    ],
)
def test_a_bad_option_is_refused(arguments, message, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["check", *arguments])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


CHOICES = {
    ENVIRONMENT_VARIABLE: "'triton', 'cpp', 'torch'",
    shards.ENVIRONMENT_VARIABLE: "'exchange', 'even'",
    "CONTRASTIVE_KERNELS_BUILD": "'0', '1'",
    first_use.ENVIRONMENT_VARIABLE: "'0', '1'",
    tune.ENVIRONMENT_VARIABLE: "'0', '1'",
}
# The compiler takes any flags, or says what is wrong.
FLAGS = {build.COMPILER_FLAGS, build.LINKER_FLAGS}
TABLE = re.findall(r"^\|.*?\|", (ROOT / "docs" / "install.md").read_text(), re.MULTILINE)
VARIABLES = {variable for cell in TABLE for variable in re.findall(r"CONTRASTIVE_KERNELS_\w+", cell)}


def test_the_variables_are_found():
    assert {*CHOICES, *FLAGS} < VARIABLES and len(VARIABLES) == 10


@pytest.mark.parametrize("arguments", [[], ["check"]], ids=["report", "check"])
@pytest.mark.parametrize("variable", sorted(VARIABLES - FLAGS))
def test_a_bad_environment_variable_is_named(variable, arguments, monkeypatch, tmp_path, capsys):
    value = "nonsense"
    if variable == build.CACHE_VARIABLE:  # any name is that of a folder, unless a file has it
        (tmp_path / value).touch()
        value = str(tmp_path / value)
    monkeypatch.setenv(variable, value)
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert f"{variable}={value!r} " in error
    assert CHOICES.get(variable, "") in error
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("variable", "read"),
    [
        (ENVIRONMENT_VARIABLE, lambda: ck.clip_loss(*torch.randn(2, 3, 4), 1.0)),
        (shards.ENVIRONMENT_VARIABLE, shards._are_promised),
        (first_use.ENVIRONMENT_VARIABLE, first_use.switched_off),
        (tune.ENVIRONMENT_VARIABLE, tune.is_on),
    ],
)
def test_a_bad_choice_is_named_where_it_is_read(variable, read, monkeypatch):
    monkeypatch.setenv(variable, "nonsense")
    with pytest.raises(ValueError, match=f"^{variable}='nonsense' is unknown; choose one of {CHOICES[variable]}$"):
        read()


@pytest.mark.parametrize(
    ("run", "arguments", "says"),
    [
        (main, [], "what this installation can run"),
        (main, ["check"], "with dense PyTorch in float64"),
        (main, ["build"], "takes about a minute.*CONTRASTIVE_KERNELS_CACHE.*_CXXFLAGS.*_LDFLAGS"),
        (compat_main, [], "List the adapters"),
        (compat_main, ["check"], "exit status is 1 if anything differs"),
    ],
)
def test_help_is_for_users(run, arguments, says, capsys):
    with pytest.raises(SystemExit) as ended:
        run([*arguments, "--help"])
    assert ended.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert re.search(says, text)
    assert "setup.py" not in text


@pytest.mark.skipif("triton" in HERE, reason="triton can run")
def test_the_report_says_that_the_backend_asked_for_does_not_run(monkeypatch, capsys):
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "triton")
    assert main([]) == 0
    assert "default backend for float32: none" in capsys.readouterr().out


def test_the_environment_stays_as_it_is(monkeypatch):
    """Every backend is checked, whichever is asked for."""
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "torch")
    before = torch.get_rng_state()
    assert main(["check", "--loss", "uniformity", "--dtype", "float32"]) == 0
    assert os.environ[ENVIRONMENT_VARIABLE] == "torch"
    assert torch.equal(torch.get_rng_state(), before)


def test_colours_are_for_terminals(monkeypatch, capsys):
    assert main([*QUICK, "--loss", "alignment"]) == 0
    assert "\033" not in capsys.readouterr().out
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert main([*QUICK, "--loss", "alignment"]) == 0
    assert f"{command.GREEN}all right{command.PLAIN}" in capsys.readouterr().out


def test_help():
    run = subprocess.run(
        [sys.executable, "-m", "contrastive_kernels", "--help"], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert "compare every loss on every backend with float64" in run.stdout
