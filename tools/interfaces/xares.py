"""Checks ``bat-export xares`` with the package xares, in a throwaway environment.

    python tools/interfaces/xares.py

Its own search for the class and ``check_audio_encoder``, then a task with audio of several lengths:
clips are read from a tar, encoded in padded batches, and each encoding is held to the clip's own.
xares reads with ``torchaudio.load``, which from torchaudio 2.9 on needs torchcodec and FFmpeg's
libraries: soundfile stands in.
"""

import gc
import io
import os
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path


def check() -> str:
    import numpy as np
    import soundfile
    import torch
    import torchaudio
    from xares.audio_encoder_checker import check_audio_encoder
    from xares.task import TaskConfig, XaresTask
    from xares.utils import attr_from_py_path

    from bat.encoders.bat import BAT
    from bat.interfaces import export
    from bat.weights import export as save

    def load(path: str) -> tuple[torch.Tensor, int]:
        wave, rate = soundfile.read(path, dtype="float32", always_2d=True)
        return torch.from_numpy(wave.T), rate

    torchaudio.load = load
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    clips = {f"clip{i}": rng.normal(0, 0.1, 4000 * (i + 1)) for i in range(6)}
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        model = BAT(width=48, depth=2, heads=2)
        weights = {"student": model.state_dict()}
        run = save(
            Path(folder) / "run", backbone="bat", encoder=model.config(), weights=weights, meta={}
        )
        (file,) = export("xares", str(run), Path(folder) / "out").glob("*.py")
        sys.path.insert(0, folder)
        encoder = attr_from_py_path(f"out/{file.name}", endswith="Encoder")()
        assert check_audio_encoder(encoder)

        home = Path(folder) / "env" / "trial"
        home.mkdir(parents=True)
        with tarfile.open(home / "wds-audio-train-0.tar", "w") as tar:
            for key, wave in clips.items():
                flac = io.BytesIO()
                soundfile.write(flac, wave, 16000, format="FLAC", subtype="PCM_16")
                for suffix, data in (("flac", flac.getvalue()), ("json", b'{"label": 0}')):
                    entry = tarfile.TarInfo(f"{key}.{suffix}")
                    entry.size = len(data)
                    tar.addfile(entry, io.BytesIO(data))
        (home / ".audio_tar_ready").touch()
        config = TaskConfig(
            name="trial", formal_name="trial", encoder=encoder, output_dim=2, train_split="train",
            valid_split=None, test_split=None, zenodo_id="0", batch_size_encode=4,
            num_encoder_workers=0, label_processor=lambda x: x["label"],
        )  # fmt: skip
        config.audio_tar_name_of_split = {"train": "wds-audio-train-0.tar"}
        config.encoded_tar_name_of_split = {"train": "wds-encoded-train-*.tar"}
        XaresTask(config=config).make_encoded_tar()
        gc.collect()  # xares leaves its writer open
        found = 0
        for path in Path(folder).glob(f"env/**/{type(encoder).__name__}/**/*.tar"):
            with tarfile.open(path) as tar:
                for entry in tar:
                    if not entry.name.endswith(".npy"):
                        continue
                    made = np.load(io.BytesIO(tar.extractfile(entry).read()))
                    wave = np.round(clips[entry.name[:5]] * 32768) / 32768
                    alone = encoder(torch.from_numpy(wave).float())[0].numpy()
                    np.testing.assert_allclose(made[: len(alone)], alone, atol=1e-4)
                    found += 1
        assert found == len(clips), found
    name = type(encoder).__name__
    return (
        f"xares {version('xares')}: check_audio_encoder passed for {name}; a task's encodings of "
        f"{found} clips in padded batches equal each clip's own"
    )


if __name__ == "__main__":
    if sys.argv[1:] == ["--inside"]:
        print(check())
    else:
        from throwaway import main

        main(__file__, "xares")
