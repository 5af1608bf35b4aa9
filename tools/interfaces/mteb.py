"""Checks ``bat-export mteb`` with the package mteb, in a throwaway environment.

    python tools/interfaces/mteb.py

``mteb.mock_run``: every mock task of audio alone, which no data is fetched for. datasets below 4
reads audio with soundfile; later ones need FFmpeg's libraries.
"""

import sys
import tempfile
from importlib.metadata import version
from pathlib import Path


def check() -> str:
    import mteb
    import torch
    from mteb.results.task_result import TaskResult

    from bat.encoders.bat import BAT
    from bat.interfaces import export
    from bat.weights import export as save

    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        model = BAT(width=48, depth=2, heads=2)
        weights = {"student": model.state_dict()}
        run = save(
            Path(folder) / "run", backbone="bat", encoder=model.config(), weights=weights, meta={}
        )
        (file,) = export("mteb", str(run), Path(folder) / "out").glob("*.py")
        sys.path.insert(0, str(file.parent))
        module = __import__(file.stem)
        loaded = module.model_meta().load_model(device="cpu")
        assert type(loaded).__mro__[2].__name__ == "AbsEncoder"
        results = mteb.mock_run(module.load_model(device="cpu"))
    tried = {name: status for name, status in results.items() if status is not None}
    failed = {n: s.exception for n, s in tried.items() if not isinstance(s, TaskResult)}
    assert not failed, failed
    return f"mteb {version('mteb')}: mock_run passed {len(tried)} of {len(tried)} audio tasks"


if __name__ == "__main__":
    if sys.argv[1:] == ["--inside"]:
        print(check())
    else:
        from throwaway import main

        main(__file__, "mteb[audio]", "datasets<4")
