"""Loads exported folders in a throwaway environment with transformers and torch, without bat.

    python tools/interfaces/hf.py 4.57      # a version of transformers; or: newest

Writes small random encoders (BAT gated and pre-norm, EAT) and a fine-tuned one with ``bat-export
hf``, and their features with bat. The other environment compares features, scores of the pipeline,
weights bit for bit, and the bytes of saving, loading and saving again. Prints one line. Needs uv.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

SECONDS = (0.3, 1.0, 5.0)
"""Clips of one padded batch; the last is longer than a chunk."""
LABELS = ["ant", "bee", "cat"]
TOLERANCE = 1e-5


def main(version: str) -> int:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(folder)
        python = folder / "env/bin/python"
        wanted = "transformers" if version == "newest" else f"transformers=={version}.*"
        run("uv", "venv", "-q", "--python", "3.11", str(folder / "env"))
        run("uv", "pip", "install", "-q", "--python", str(python), wanted, "torch==2.11.*", "numpy")
        alone = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        alone |= {"HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(
            [python, "-W", "ignore", Path(__file__).resolve(), "--inside", folder],
            env=alone,
            cwd=folder,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            print(done.stderr[-4000:], file=sys.stderr)
            return done.returncode
        print(done.stdout.strip().splitlines()[-1])
    return 0


def run(*command: str) -> None:
    subprocess.run(command, check=True)


def write(folder: Path) -> None:
    """Writes ``folder/hf/NAME`` and, with bat, ``folder/NAME.npz`` of waves and features."""
    import torch

    from bat import load_encoder, weights
    from bat.encoders.base import Encoder
    from bat.encoders.bat import BAT
    from bat.encoders.eat import EAT
    from bat.eval.heads import load_head, save_head
    from bat.interfaces import export
    from bat.probes.linear import Linear
    from bat.types import Grid

    torch.manual_seed(0)
    small: dict[str, Any] = {"width": 48, "depth": 2, "heads": 2, "grid": Grid(16, 8)}
    front = {"kind": "bat", "pad": "waveform"}
    encoders: dict[str, Encoder] = {
        "bat": BAT(**small),
        "pre": BAT(**small, norm_order="pre", pre_norm=False, layer_scale=0.5, frontend=front),
        "eat": EAT(**small),
        "tuned": BAT(**small, gate=False, pos_layout="grid"),
    }
    waves = [0.1 * torch.randn(int(16_000 * s)) for s in SECONDS]
    lengths = torch.tensor([len(w) for w in waves])
    padded = torch.nn.utils.rnn.pad_sequence(waves, batch_first=True)
    for name, encoder in encoders.items():
        fold = folder / "runs" / name
        meta = {"labels": LABELS, "target": "class", "training": {"frames": None}}
        weights.export(
            fold / "export",
            backbone="eat" if name == "eat" else "bat",
            encoder=encoder.config(),
            weights={"student": encoder.state_dict()},
            meta=meta,
        )
        if name == "tuned":
            head = Linear(classes=len(LABELS), width=48, depth=2, has_cls=True)
            save_head(fold / "head", head, name="linear", head={"norm": True}, meta=meta)
        export("hf", str(fold), folder / "hf" / name)
        with torch.no_grad():
            features = load_encoder(fold)(padded, lengths)
            found = {"cls": features.cls, "patches": features.patches}
            if name == "tuned":
                found["logits"] = load_head(fold / "head")[0](features)
        np.savez(
            folder / f"{name}.npz",
            padded=padded,
            **{n: t.numpy() for n, t in found.items() if t is not None},
            **{f"weights.{n}": t.numpy() for n, t in encoder.state_dict().items()},
        )


def inside(folder: Path) -> None:
    """Loads and compares the folders; runs where bat is not installed."""
    import importlib.util

    import torch
    import transformers
    from transformers import (
        AutoFeatureExtractor,
        AutoModel,
        AutoModelForAudioClassification,
        pipeline,
    )

    assert importlib.util.find_spec("bat") is None, "bat is installed here"
    worst = 0.0
    lengths = [int(16_000 * s) for s in SECONDS]
    for path in sorted((folder / "hf").iterdir()):
        held = np.load(folder / f"{path.name}.npz")
        clips = [row[:n] for row, n in zip(held["padded"], lengths, strict=True)]
        extractor = AutoFeatureExtractor.from_pretrained(path, trust_remote_code=True)
        model = AutoModel.from_pretrained(path, trust_remote_code=True).eval()
        inputs = extractor(clips, sampling_rate=16_000, return_tensors="pt")
        with torch.no_grad():
            out = model(**inputs, output_hidden_states=True)
        states = torch.stack(out.hidden_states).numpy()  # a tuple of (B, 1 + N, D)
        assert isinstance(out.hidden_states, tuple)
        patches = held["patches"].reshape(*states.shape[:2], -1, states.shape[-1])
        worst = max(worst, abs(states[:, :, 0] - held["cls"]).max())
        worst = max(worst, abs(states[:, :, 1:] - patches).max())
        state = model.state_dict()
        names = {n.removeprefix("weights.") for n in held if n.startswith("weights.")}
        assert names == set(state), f"{path.name}: other weights: {names ^ set(state)}"
        for name in names:
            assert (state[name].numpy() == held[f"weights.{name}"]).all(), name
        fresh = AutoModel.from_config(model.config, trust_remote_code=True)
        assert torch.equal(fresh.pos_embed, model.pos_embed)
        assert all(p.isfinite().all() for p in fresh.parameters())
        started = AutoModelForAudioClassification.from_pretrained(path, trust_remote_code=True)
        kept = started.encoder.state_dict()  # an encoder's folder has no head: that is random
        assert all(torch.equal(kept[n], state[n]) for n in names), f"{path.name}: not loaded"
        assert all(p.isfinite().all() for p in started.parameters())
        saved = [path]
        for name in ("first", "second"):
            model.save_pretrained(folder / "saved" / path.name / name)
            saved.append(folder / "saved" / path.name / name)
            model = AutoModel.from_pretrained(saved[-1], trust_remote_code=True)
        found = [(s / "model.safetensors").read_bytes() for s in saved[1:]]
        assert found[0] == found[1], f"{path.name}: saved again, the file differs"
        if "logits" not in held:
            continue
        tuned = AutoModelForAudioClassification.from_pretrained(path, trust_remote_code=True)
        with torch.no_grad():
            logits = tuned.eval()(**inputs).logits
        worst = max(worst, abs(logits.numpy() - held["logits"]).max())
        classify = pipeline("audio-classification", str(path), trust_remote_code=True)
        scores = {row["label"]: row["score"] for row in classify(clips[1], top_k=None)}
        wanted = torch.from_numpy(held["logits"][1]).softmax(-1)
        assert list(tuned.config.id2label.values()) == LABELS
        worst = max(worst, abs(np.array([scores[n] for n in LABELS]) - wanted.numpy()).max())
    assert worst <= TOLERANCE, f"largest difference {worst:.1e}"
    count = len(list((folder / "hf").iterdir()))
    print(
        f"transformers {transformers.__version__}, torch {torch.__version__}, no bat: {count} "
        f"folders, largest difference {worst:.1e} of at most {TOLERANCE:.0e}, weights equal"
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--inside"]:
        inside(Path(sys.argv[2]))
    elif len(sys.argv) == 2:
        sys.exit(main(sys.argv[1]))
    else:
        sys.exit(str(__doc__))
