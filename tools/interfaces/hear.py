"""Checks ``bat-export hear`` with the package hearvalidator, in a throwaway environment.

    python tools/interfaces/hear.py

The package wants Python below 3.9 and TensorFlow, to know TensorFlow models by their type. It is
installed without its requirements, and an empty module stands in for TensorFlow: its checks of a
PyTorch model run as they are.
"""

import io
import sys
import tempfile
import types
import warnings
from contextlib import redirect_stdout
from importlib.metadata import version
from pathlib import Path


def check() -> str:
    import torch

    from bat.encoders.bat import BAT
    from bat.interfaces import export
    from bat.weights import export as save

    stand_in = types.ModuleType("tensorflow")
    stand_in.Module = type("Module", (), {})
    sys.modules["tensorflow"] = stand_in
    from hearvalidator.validate import ValidateModel

    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        model = BAT(width=48, depth=2, heads=2)
        weights = {"student": model.state_dict()}
        run = save(
            Path(folder) / "run", backbone="bat", encoder=model.config(), weights=weights, meta={}
        )
        (module,) = export("hear", str(run), Path(folder) / "out").glob("*.py")
        sys.path.insert(0, str(module.parent))
        said = io.StringIO()
        with redirect_stdout(said), warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            ValidateModel(module.stem, "", device="cpu")()
    checks = sum(line.startswith("Checking") for line in said.getvalue().splitlines())
    doubts = [str(w.message).split() for w in warned if "IMPORTANT" not in str(w.message)]
    assert not doubts, doubts
    return f"hearvalidator {version('hearvalidator')}: {checks} checks passed, no warning"


if __name__ == "__main__":
    if sys.argv[1:] == ["--inside"]:
        print(check())
    else:
        from throwaway import main

        main(__file__, "numpy", alone=("hearvalidator",))
