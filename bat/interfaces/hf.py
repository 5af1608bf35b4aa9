"""A folder for transformers: AutoModel and AutoFeatureExtractor load it without bat.

``OUT`` holds ``config.json``, ``model.safetensors``, ``preprocessor_config.json``, the three files
of ``hf_files`` and a model card, ``README.md``, made of what the run recorded. The weights are
those of the checkpoint bit for bit, under the same names. After fine-tuning with a linear head the
folder is also an ``AutoModelForAudioClassification``: encoder under ``encoder.``, head under
``head.``. ``bat.load_encoder(OUT)`` reads it back.
"""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import nn

from bat import __version__
from bat.audio.frontend import KaldiFbank, LogMel
from bat.encoders.bat import BAT
from bat.encoders.eat import EAT
from bat.errors import UserError
from bat.interfaces.trained import Trained, read_trained
from bat.io import write_json
from bat.probes.linear import Linear
from bat.weights import CONFIG, WEIGHTS, read_json

FILES = Path(__file__).parent / "hf_files"
PROBLEM = {"class": "single_label_classification", "tags": "multi_label_classification"}
"""Names of the kinds of task that have scores of a clip."""
MANY = """
A clip may have several labels: `pipeline("audio-classification", "FOLDER", trust_remote_code=True,
function_to_apply="sigmoid")`."""


def write(checkpoint: str, out: Path) -> None:
    """Writes the folder. Raises ``UserError`` for an encoder or a head that it cannot hold."""
    trained = read_trained(checkpoint)
    check(checkpoint, trained)
    encoder, head = trained.encoder, trained.head
    prefix = "" if head is None else "encoder."
    state = {f"{prefix}{name}": tensor for name, tensor in encoder.state_dict().items()}
    if head is not None:
        state |= {f"head.{name}": tensor for name, tensor in head.state_dict().items()}
    state = {name: tensor.detach().contiguous() for name, tensor in state.items()}
    save_file(state, out / WEIGHTS, metadata={"format": "pt"})
    write_json(out / CONFIG, model_config(trained))
    write_json(out / "preprocessor_config.json", extractor_config(trained))
    for file in FILES.glob("*_bat.py"):
        shutil.copyfile(file, out / file.name)
    digest = hashlib.sha256((out / WEIGHTS).read_bytes()).hexdigest()
    (out / "README.md").write_text(model_card(trained, digest), encoding="utf-8")


def check(checkpoint: str, trained: Trained) -> None:
    """Raises ``UserError`` for an encoder or a head that ``hf_files`` do not define."""
    if type(trained.encoder) not in (BAT, EAT):
        raise UserError(
            f"{checkpoint} holds encoder '{trained.name}': hf is written of bat and eat; other "
            "encoders have formats that keep bat installed (bat-export --help)"
        )
    head = trained.head
    if head is None:
        return
    if type(head) is not Linear or head.level != "clip" or trained.target not in PROBLEM:
        raise UserError(
            f"{checkpoint} has a head '{trained.head_name}' (level={head.level}, target="
            f"{trained.target}): hf is written with a linear head of class or tags at clip level. "
            f"For the encoder alone, copy {trained.folder} elsewhere and export the copy"
        )


def model_config(trained: Trained) -> dict[str, Any]:
    """Returns ``config.json``."""
    encoder = trained.encoder
    assert isinstance(encoder, BAT)
    settings, front, grid = encoder.config(), encoder.frontend, encoder.grid
    kaldi = isinstance(front, KaldiFbank)
    config = {
        "model_type": "bat",
        "architectures": ["BatModel" if trained.head is None else "BatForAudioClassification"],
        "auto_map": {
            "AutoConfig": "configuration_bat.BatConfig",
            "AutoModel": "modeling_bat.BatModel",
            "AutoModelForAudioClassification": "modeling_bat.BatForAudioClassification",
        },
        "input_shape": [grid.time * encoder.patch, grid.freq * encoder.patch],
        "patch_size": encoder.patch,
        "hidden_size": encoder.width,
        "num_hidden_layers": encoder.depth,
        "num_attention_heads": encoder.heads,
        "mlp_ratio": settings["mlp_ratio"],
        "qkv_bias": True,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "drop_path_rate": settings["drop_path"],
        "layer_norm_eps": 1e-6,
        "pre_norm": settings["pre_norm"],
        "layer_norm_first": settings["norm_order"] == "pre",
        "init_scale_values": settings["layer_scale"],
        "use_gate": settings["gate"],
        "pos_trainable": False,
        "pos_layout": settings["pos_layout"],
        "chunk_time_patches": grid.time,
        "sample_rate": encoder.sample_rate,
        "n_fft": front.n_fft,
        "hop_length": front.hop_length,
        "n_mels": front.n_mels,
        "f_min": 20.0 if kaldi else 0.0,
        "top_db": None if kaldi else LogMel.TOP_DB,
        "feature_normalization": "statistics" if kaldi else "per_sample_minmax_after_db",
        "frontend": settings["frontend"] or {},
        "dtype": "float32",
    }
    head = trained.head
    if head is None:
        return config
    assert isinstance(head, Linear)
    return config | {
        "id2label": {str(number): label for number, label in enumerate(trained.labels)},
        "label2id": {label: number for number, label in enumerate(trained.labels)},
        "problem_type": PROBLEM[trained.target],
        "head_norm": isinstance(head.norm, nn.LayerNorm),
        "head_dropout": head.dropout.p,
    }


def extractor_config(trained: Trained) -> dict[str, Any]:
    """Returns ``preprocessor_config.json``."""
    encoder = trained.encoder
    assert isinstance(encoder, BAT)
    front = encoder.frontend
    assert isinstance(front, LogMel | KaldiFbank)
    config = {
        "feature_extractor_type": "BatFeatureExtractor",
        "auto_map": {"AutoFeatureExtractor": "feature_extraction_bat.BatFeatureExtractor"},
        "feature_size": front.n_mels,
        "sampling_rate": front.sample_rate,
        "padding_value": 0.0,
        "kind": front.kind if isinstance(front, KaldiFbank) else "bat",
        "n_fft": front.n_fft,
        "hop_length": front.hop_length,
        "pad_mode": front.pad,
        "clip_seconds": front.clip_samples / front.sample_rate if front.clip_samples else None,
        "patch_size": encoder.patch,
        "frames": trained.frames,
    }
    if isinstance(front, KaldiFbank):
        config |= {"mean": front.mean, "std": front.std}
    return config


def model_card(trained: Trained, digest: str) -> str:
    """Returns ``README.md``: use, what the run recorded, digest of the weights, licence."""
    encoder = trained.encoder
    tuned = trained.head is not None
    size = sum(p.numel() for p in encoder.parameters())
    auto = "AutoModelForAudioClassification" if tuned else "AutoModel"
    result = "logits" if tuned else "last_hidden_state"
    shape = "(B, C)" if tuned else "(B, 1 + N, D), the class token first"
    lines = [
        "---",
        "library_name: transformers",
        f"pipeline_tag: {'audio-classification' if tuned else 'feature-extraction'}",
        "tags: [audio, bat]",
        "license: other  # to fill in",
        "---",
        f"# {encoder.depth}-block audio encoder of width {encoder.width}",
        "",
        f"{size / 1e6:.1f} M parameters, {encoder.sample_rate} Hz, one time patch every "
        f"{encoder.hop_seconds:g} s. Written by bat {__version__} (encoder `{trained.name}`).",
        "",
        "```python",
        f"from transformers import AutoFeatureExtractor, {auto}",
        "",
        'extractor = AutoFeatureExtractor.from_pretrained("FOLDER", trust_remote_code=True)',
        f'model = {auto}.from_pretrained("FOLDER", trust_remote_code=True)',
        f"inputs = extractor(waveforms, sampling_rate={encoder.sample_rate}, "
        'return_tensors="pt")  # a list of (samples,)',
        f"{result} = model(**inputs).{result}  # {shape}",
        "```",
        *([MANY] if trained.target == "tags" else []),
        "",
        "## Training",
        "",
        *_training(trained),
        "",
        "## Results",
        "",
        *(_results(trained) or ["None recorded."]),
        "",
        "## Weights",
        "",
        f"SHA-256 of `{WEIGHTS}`: `{digest}`",
        "",
        "## Licence",
        "",
        "To fill in, here and in the head of this file: the licence of these weights, and the "
        "terms of the data they were trained on.",
        "",
    ]
    return "\n".join(lines)


def _training(trained: Trained) -> list[str]:
    """Returns what the export records of its training, as a list."""
    record, training = trained.record, trained.record.get("training") or {}
    if not training:
        return ["Not recorded: the weights come from another project's file."]
    optim, data = training.get("optim") or {}, training.get("data") or {}
    steps = record.get("steps") or (training.get("train") or {}).get("steps")
    rows = {
        "recipe": training.get("recipe"),
        "objective": (training.get("objective") or {}).get("name"),
        "head": trained.head_name,
        "task": record.get("task") or training.get("task"),
        "labels": len(trained.labels) or None,
        "held out": record.get("held_out"),
        "clips": (record.get("data") or {}).get("clips"),
        "data digest": (record.get("data") or {}).get("hash"),
        "clip seconds": data.get("clip_seconds"),
        "frames of a clip": trained.frames,
        "steps": steps,
        "clips a step and device": data.get("batch"),
        "learning rate": optim.get("lr"),
        "weight decay": optim.get("weight_decay"),
        "seed": training.get("seed"),
        "bat": record.get("bat_version"),
    }
    return [f"- {name}: {value}" for name, value in rows.items() if value not in (None, "")]


def _results(trained: Trained) -> list[str]:
    """Returns the metrics of a fine-tuning, or the last probes of a pre-training, as a list."""
    metrics, title = trained.record.get("metrics"), "held-out clips"
    if not metrics:
        summary = trained.folder.parent / "summary.json"
        rows = read_json(summary).get("online") if summary.is_file() else None
        if not rows:
            return []
        metrics, title = rows[-1], f"frozen, probe {rows[-1]['method']}, step {rows[-1]['step']}"
    shown = {n: v for n, v in metrics.items() if isinstance(v, float) and not n.endswith("_std")}
    return [
        f"- {name} ({title}): {value:.4f}"
        + (f" ± {metrics[f'{name}_std']:.4f}" if f"{name}_std" in metrics else "")
        for name, value in shown.items()
    ]


EXPORT = write
