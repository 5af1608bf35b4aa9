"""Checks ``bat-export s3prl`` with the package s3prl, in a throwaway environment.

    python tools/interfaces/s3prl.py

``S3PRLUpstream`` and its ``Featurizer`` on clips of several lengths, alone and padded, one of
exactly 2,560 samples among them. For models of its own, s3prl 0.4.18 imports two names that
torchaudio 2.11 has no more, ``set_audio_backend`` and ``sox_effects``: empty ones stand in.
"""

import sys
import tempfile
import types
from importlib.metadata import version
from pathlib import Path


def check() -> str:
    import torch
    import torchaudio

    torchaudio.set_audio_backend = lambda name: None
    effects = types.ModuleType("torchaudio.sox_effects")
    effects.apply_effects_tensor = None
    sys.modules.setdefault("torchaudio.sox_effects", effects)
    from s3prl import hub
    from s3prl.nn import Featurizer, S3PRLUpstream

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
        out = export("s3prl", str(run), Path(folder) / "out")
        sys.path.insert(0, str(out))
        import hubconf

        (entry,) = (name for name in dir(hubconf) if not name.startswith("_"))
        setattr(hub, entry, getattr(hubconf, entry))
        upstream = S3PRLUpstream(entry).eval()
    featurizer = Featurizer(upstream)
    lengths = [800, 2560, 2561, 4800, 16000, 80000]
    waves = torch.zeros(len(lengths), max(lengths))
    for row, samples in zip(waves, lengths, strict=True):
        row[:samples] = 0.1 * torch.randn(samples)
    with torch.no_grad():
        states, steps = upstream(waves, torch.tensor(lengths))
        assert steps[0].tolist() == [1, 1, 2, 2, 7, 32]
        for row, samples in enumerate(lengths):
            alone, own = upstream(waves[row : row + 1, :samples], torch.tensor([samples]))
            for state, one in zip(states, alone, strict=True):
                T = int(own[0])
                torch.testing.assert_close(state[row, :T], one[0, :T], atol=1e-5, rtol=1e-5)
        features, _ = featurizer(states, steps)
    assert features.shape == (len(lengths), 32, 48)
    return (
        f"s3prl {version('s3prl')}: S3PRLUpstream and Featurizer passed for {lengths} samples, "
        "each alone as in the batch"
    )


if __name__ == "__main__":
    if sys.argv[1:] == ["--inside"]:
        print(check())
    else:
        from throwaway import main

        main(__file__, "s3prl")
