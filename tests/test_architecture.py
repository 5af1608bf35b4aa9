"""The house rules that a machine can check: imports point down, nothing heavy at the door."""

import ast
import subprocess
import sys
from pathlib import Path

import bat

PACKAGE = Path(bat.__file__).parent

TIER = {
    "cli": 9,
    "api": 8,
    "train": 7,
    "shard": 7,
    "interfaces": 7,
    "eval": 6,
    "objectives": 5,
    "data": 4,
    "encoders": 4,
    "probes": 4,
    "report": 4,
    "weights": 5,
    "nn": 3,
    "audio": 3,
    "tasks": 3,
    "metrics": 3,
    "logs": 2,
    "lock": 2,
    "shutdown": 2,
    "io": 2,
    "registry": 2,
    "redact": 1,
    "errors": 1,
    "ranges": 1,
    "seeding": 1,
    "types": 1,
}


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """Rooms of ``bat`` that a file imports anywhere, ``bat`` itself as ''."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names = [f"{node.module}.{a.name}" for a in node.names]
        relative = isinstance(node, ast.ImportFrom) and node.level
        # files that are copied out of the package import each other so
        assert not relative or path.parent.name == "hf_files", f"{path}: relative import"
        for name in names:
            if name == "bat" or name.startswith("bat."):
                found.add(name.split(".")[1] if "." in name else "")
    return found


def test_imports_point_down_only() -> None:
    wrong = []
    for path in sorted(PACKAGE.rglob("*.py")):
        here = room(path)
        if here == "__init__":  # the public door: lazy, checked below
            continue
        for there in imported(path):
            if there in ("", "__version__", here):
                continue
            if there == "config":
                allowed = here in ("cli", "api", "train", "eval", "shard", "interfaces")
            elif here == "config":
                allowed = there in (
                    "errors",
                    "ranges",
                    "objectives",
                )  # whose settings lie beside them
            else:
                allowed = TIER[here] > TIER[there]
            if not allowed:
                wrong.append(f"{path.relative_to(PACKAGE)} imports bat.{there}")
    assert not wrong, "\n".join(wrong)


def test_every_room_is_in_the_plan() -> None:
    rooms = {room(p) for p in PACKAGE.rglob("*.py")} - {"__init__"}
    assert rooms == set(TIER) | {"config"}


def test_importing_bat_and_the_commands_is_light() -> None:
    code = (
        "import sys, bat, bat.cli.args, bat.cli.pretrain, bat.cli.probe, bat.cli.finetune, "
        "bat.cli.shard, bat.cli.export, bat.cli.embed, bat.cli.predict, bat.cli.bat, "
        "bat.interfaces, bat.config.schema; "
        "heavy = {'torch', 'numpy', 'lightning', 'webdataset', 'omegaconf'} & set(sys.modules); "
        "sys.exit(', '.join(sorted(heavy)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, f"imported: {done.stderr}"


def test_nothing_unpickles_freely() -> None:
    wrong = []
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            words = {k.arg: ast.unparse(k.value) for k in node.keywords}
            if called == "torch.load" and words.get("weights_only") != "True":
                wrong.append(f"{path}:{node.lineno} torch.load")
            if called in ("pickle.load", "pickle.loads") or words.get("allow_pickle") == "True":
                wrong.append(f"{path}:{node.lineno} {called}")
            shell = words.get("shell") == "True" or called == "os.system"
            if shell and path != PACKAGE / "data/pipes.py":  # behind --allow-pipe
                wrong.append(f"{path}:{node.lineno} {called}")
    assert not wrong, "\n".join(wrong)
