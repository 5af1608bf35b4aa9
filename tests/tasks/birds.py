"""A small BirdSet in its published layout: metadata in parquet, Ogg files in ``.tar.gz``."""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from bat.audio.encode import encode
from tests.shard.files import tar_bytes

RATE = 32_000
SPECIES = {"gcrfin": 700.0, "yerwar": 6_000.0, "norfli": 13_000.0}
"""Pitch of the song of each species, in Hz; the last is beyond a 16-kHz front end."""


def song(species: Sequence[str], seconds: float, seed: int) -> np.ndarray:
    """Returns tones of ``species`` in weak noise: (S,) at 32 kHz."""
    t = np.arange(round(seconds * RATE)) / RATE
    wave = 0.01 * np.random.default_rng(seed).standard_normal(len(t))
    return sum((0.3 * np.sin(2 * np.pi * SPECIES[name] * t) for name in species), wave)


def write_set(
    folder: Path,
    clips: Mapping[str, Mapping[str, tuple[Sequence[str] | None, float]]],
    *,
    name: str = "HSN",
    numbers: Sequence[str] = (),
) -> Path:
    """Writes a set of ``{"train": {file: (labels, seconds)}, "test_5s": ...}``, two shards a part.

    ``numbers``: class names; labels are then numbers of a ClassLabel of these.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for part, files in clips.items():
        rows = []
        shards: list[dict[str, bytes]] = [{}, {}]
        for i, (file, (labels, seconds)) in enumerate(files.items()):
            wave = song(labels or (), seconds, i)
            shards[i % 2][f"some/folder{i}/{file}"] = encode(wave, sample_rate=RATE, codec="ogg")
            listed = [numbers.index(x) for x in labels or ()] if numbers else labels
            rows.append(
                {"filepath": f"{name}/{part}/{file}", LABELS: listed, "length": int(seconds)}
            )
        kind = pa.list_(pa.int64() if numbers else pa.string())
        table = pa.Table.from_pylist(
            rows,
            pa.schema([("filepath", pa.string()), (LABELS, kind), ("length", pa.int64())]),
        )
        if numbers:
            table = table.replace_schema_metadata({"huggingface": _class_label(numbers)})
        pyarrow.parquet.write_table(table, folder / f"{name}_metadata_{part}.parquet")
        for number, members in enumerate(shards, start=1):
            path = folder / f"{name}_{part.replace('_', '')}_shard_{number:04d}.tar.gz"
            path.write_bytes(gzip.compress(tar_bytes(members)))
    return folder


def _class_label(names: Sequence[str]) -> str:
    label: dict[str, Any] = {"feature": {"names": list(names), "_type": "ClassLabel"}}
    return json.dumps({"info": {"features": {LABELS: {**label, "_type": "Sequence"}}}})


LABELS = "ebird_code_multilabel"
CLIPS = {
    "train": {
        "XC1.ogg": (("gcrfin",), 7.0),
        "XC2.ogg": (("yerwar", "gcrfin"), 3.0),
        "XC3.ogg": (("norfli",), 5.0),
        "XC4.ogg": (("gcrfin",), 2.0),
        "XC5.ogg": (("yerwar",), 6.0),
        "XC6.ogg": (("gcrfin",), 4.0),
    },
    "test_5s": {
        "HSN_0_5.ogg": ((), 5.0),
        "HSN_5_10.ogg": (("gcrfin",), 5.0),
        "HSN_10_15.ogg": (("yerwar", "norfli"), 5.0),
        "HSN_15_20.ogg": (None, 4.0),
    },
}
