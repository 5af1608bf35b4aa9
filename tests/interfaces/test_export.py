"""``bat-export``: formats by file, errors with their remedy, nothing left behind."""

import subprocess
import sys

import pytest
import torch

import bat.interfaces
from bat import weights
from bat.cli.export import main
from bat.encoders.bat import BAT
from bat.errors import UserError
from bat.interfaces import export, formats, require
from bat.types import Grid


@pytest.fixture
def run(tmp_path):
    """A finished run."""
    torch.manual_seed(0)
    encoder = BAT(width=48, depth=1, heads=2, grid=Grid(4, 8))
    weights.export(
        tmp_path / "run/export",
        backbone="bat",
        encoder=encoder.config(),
        weights={"student": encoder.state_dict()},
        meta={},
    )
    return tmp_path / "run"


def test_export__help_imports_nothing_heavy_and_lists_the_formats():
    code = (
        "import sys; from bat.cli.export import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "sys.exit(', '.join({'torch', 'transformers', 'numpy'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name, about in formats().items():
        assert f"{name} " in done.stdout
        assert about
        assert about in done.stdout


def test_export__writes_the_folder(run, tmp_path, capsys):
    assert main(["hf", str(run), str(tmp_path / "out")]) == 0
    assert "model.safetensors" in capsys.readouterr().out
    bat.load_encoder(tmp_path / "out")


def test_export__unknown_format_is_suggested(run, tmp_path, capsys):
    assert main(["onxn", str(run), str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "onxn" in error
    assert "'onnx'" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_export__out_that_exists_is_refused(run, tmp_path, kind):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("kept")
    given = out if kind == "folder" else out / "mine"
    with pytest.raises(UserError, match=str(given)):
        export("hf", str(run), given)
    assert (out / "mine").read_text() == "kept"
    (out / "mine").unlink()
    assert export("hf", str(run), out) == out  # an empty folder is taken


def test_export__checkpoint_without_weights_is_named(run, tmp_path):
    (run / "export/model.safetensors").unlink()
    with pytest.raises(UserError, match=r"model\.safetensors"):
        export("hf", str(run), tmp_path / "out")
    with pytest.raises(UserError, match="nowhere"):
        export("hf", str(tmp_path / "nowhere"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("before", [False, True])
def test_export__failure_leaves_nothing(tmp_path, monkeypatch, before):
    def write(checkpoint, out):
        (out / "half").write_text("half")
        raise OSError("full")

    monkeypatch.setattr(bat.interfaces, "find_export", lambda name: write)
    out = tmp_path / "out"
    if before:
        out.mkdir()
    with pytest.raises(OSError, match="full"):
        export("hf", "anything", out)
    assert out.exists() == before
    assert not before or not list(out.iterdir())


def test_require__missing_package_says_the_command():
    require("hf", "json")
    with pytest.raises(UserError, match=r"no_such_package.*bat-audio\[onnx\]"):
        require("onnx", "json", "no_such_package")


def test_onnx__missing_package_says_the_command(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    real = bat.interfaces.importlib.util.find_spec
    monkeypatch.setattr(
        bat.interfaces.importlib.util,
        "find_spec",
        lambda name: None if name == "onnxruntime" else real(name),
    )
    with pytest.raises(UserError, match=r"onnxruntime.*bat-audio\[onnx\]"):
        export("onnx", str(run), tmp_path / "out")
