"""``bat-export onnx``: onnxruntime's outputs equal torch's, for any batch, length and padding."""

import json

import numpy as np
import pytest
import torch

import bat
from bat import weights
from bat.encoders.bat import BAT
from bat.encoders.eat import EAT
from bat.errors import UserError
from bat.eval.heads import load_head, save_head
from bat.interfaces import export
from bat.interfaces.onnx import Graph
from bat.interfaces.trained import Trained
from bat.probes.base import build_probe
from bat.types import Grid
from tests.interfaces.test_readme_examples import example

SMALL = {"width": 48, "depth": 2, "heads": 2, "grid": Grid(16, 8)}  # chunks of 2.56 s
LABELS = ["ant", "bee", "cat"]
KINDS = {
    "bat": {"encoder": BAT, "depth": 2, "level": "clip", "target": "class", "frames": None},
    "eat": {"encoder": EAT, "depth": 1, "level": "frame", "target": "events", "frames": 208},
}
LENGTHS = [1, 4800, 16_000, 40_960, 130_000]  # to four chunks


def fold(folder, kind, *, head="linear"):
    depth = KINDS[kind]["depth"]
    encoder = KINDS[kind]["encoder"](**{**SMALL, "depth": depth})
    training = {"frames": KINDS[kind]["frames"]}
    meta = {"labels": LABELS, "target": KINDS[kind]["target"], "training": training}
    state = {"student": encoder.state_dict()}
    weights.export(
        folder / "export", backbone=kind, encoder=encoder.config(), weights=state, meta=meta
    )
    shape = {"classes": 3, "width": 48, "depth": depth, "has_cls": True}
    probe = build_probe(head, **shape, level=KINDS[kind]["level"], prototypes=5)
    save_head(folder / "head", probe, name=head, head={"prototypes": 5}, meta=meta)
    return folder


@pytest.fixture(scope="module", params=KINDS)
def made(request, tmp_path_factory):
    """Returns kind, fold and a session of its export; 15 s of a core each."""
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    ort = pytest.importorskip("onnxruntime")
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    source = fold(folder / "fold", request.param)
    out = export("onnx", str(source), folder / "out")
    assert [p.name for p in out.iterdir()] == ["model.onnx"]
    session = ort.InferenceSession(out / "model.onnx", providers=["CPUExecutionProvider"])
    return request.param, source, session


def run(session, padded, lengths):
    found = session.run(None, {"waveform": padded.numpy(), "lengths": lengths.numpy()})
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, map(torch.from_numpy, found), strict=True))


ENCODERS = {
    "bat": BAT(**SMALL),
    "pre": BAT(**SMALL, norm_order="pre", pre_norm=False, layer_scale=0.5, gate=False),
    "waveform": BAT(**SMALL, frontend={"pad": "waveform"}),
    "clip": BAT(**SMALL, frontend={"pad": "clip", "clip_seconds": 1.5}),
    "beats": EAT(**SMALL, frontend={"kind": "beats", "pad": "waveform"}),
}


@pytest.mark.parametrize("frames", [None, 208])
@pytest.mark.parametrize("kind", ENCODERS)
@torch.no_grad()
def test_graph__equals_the_encoder(kind, frames, tmp_path):
    encoder = ENCODERS[kind].eval()
    graph = Graph(Trained(encoder, kind, tmp_path, {}, frames=frames))
    torch.manual_seed(1)
    waves, lengths = 0.1 * torch.randn(len(LENGTHS), max(LENGTHS)), torch.tensor(LENGTHS)
    want = encoder(waves, lengths, frames=frames)
    embedding, _, tokens, mask = graph(waves, lengths)
    torch.testing.assert_close(embedding, want.cls[-1], rtol=0, atol=1e-5)
    torch.testing.assert_close(tokens, want.patches[-1].mean(2), rtol=0, atol=1e-5)
    inside = want.inside()
    assert torch.equal(mask, torch.ones_like(mask) if inside is None else inside)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_readme__example_runs(made):
    _, source, _ = made
    out, code = example("onnx")
    names = {"waves": np.full((2, 9000), 0.1, np.float32), "lengths": np.array([9000, 5000])}
    exec(code.replace(out, str(source.parent / "out")), names)
    assert names["embedding"].shape == (2, 48)


@pytest.mark.parametrize("lengths", [[n] for n in LENGTHS] + [[16_000, 16_000], LENGTHS], ids=str)
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_onnx__outputs_equal_torchs(made, lengths):
    kind, source, session = made
    torch.manual_seed(1)
    waves = [0.1 * torch.randn(n) for n in lengths]
    padded = torch.nn.utils.rnn.pad_sequence(waves, batch_first=True)
    got = run(session, padded, torch.tensor(lengths))
    encoder, head = bat.load_encoder(source), load_head(source / "head")[0]
    for row, wave in enumerate(waves):  # each clip alone
        with torch.no_grad():
            features = encoder(wave[None], frames=KINDS[kind]["frames"])
            logits = head(features)[0]
        frames = features.patches[-1, 0].mean(1)  # (T, D)
        T = len(frames)
        wanted = {
            "embedding": features.cls[-1, 0],
            "mean_embedding": features.patches[-1, 0].mean((0, 1)),
            "frames": frames,
            "scores": logits.softmax(-1) if kind == "bat" else logits.sigmoid(),
        }
        assert got["frame_mask"][row].sum() == T
        for name, want in wanted.items():
            own = got[name][row]
            own = own[:T] if want.dim() == 2 else own
            torch.testing.assert_close(own, want, rtol=0, atol=1e-4, msg=f"{name} of row {row}")
        assert not got["frames"][row, T:].any()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_onnx__samples_beyond_a_length_change_nothing(made):
    _, _, session = made
    waves, lengths = 0.1 * torch.randn(2, 50_000), torch.tensor([50_000, 20_000])
    first = run(session, waves, lengths)
    waves[1, 20_000:] = 7.0
    for name, again in run(session, waves, lengths).items():
        assert torch.equal(first[name], again), name


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_onnx__file_says_what_it_is(made):
    kind, source, session = made
    said = session.get_modelmeta().custom_metadata_map
    encoder = bat.load_encoder(source)
    assert said["sample_rate"] == "16000"
    assert float(said["hop_seconds"]) == encoder.hop_seconds
    assert json.loads(said["labels"]) == LABELS
    assert said["target"] == KINDS[kind]["target"]
    assert said["clip_frames"] == ("" if kind == "bat" else "208")
    inputs = {i.name: i.shape for i in session.get_inputs()}
    assert inputs == {"waveform": ["batch", "samples"], "lengths": ["batch"]}


def test_onnx__head_with_operators_of_our_own_is_refused(tmp_path):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    source = fold(tmp_path / "fold", "bat", head="cgp")
    with pytest.raises(UserError, match=r"cgp.*linear"):
        export("onnx", str(source), tmp_path / "out")
