"""How long a round is, and what is written of a probing beside its results."""

import numpy as np

from bat.config.sections import Optim
from bat.eval.candidates import Plan
from bat.eval.notes import read_note, write_note
from bat.eval.splits import Round
from bat.nn.losses import LOSSES
from bat.probes.base import build_probe


def _plan(**words) -> Plan:
    optim = Optim(lr=1e-3, decay="matrices", warmup_steps=400)
    return Plan(build=build_probe, loss=LOSSES["ce"], optim=optim, steps=50, batch=8,
                multi_label=False, **words)  # fmt: skip


def test_epochs_of_few_clips_come_to_the_least_number_of_steps():
    held = Round("1", np.arange(20), np.arange(20, 25))
    assert _plan().run_steps(held) == (50, 400)
    assert _plan(epochs=4.0).run_steps(held) == (10, 1)
    assert _plan(epochs=4.0, min_steps=300).run_steps(held) == (300, 30)
    assert _plan(epochs=400.0, min_steps=300).run_steps(held) == (1000, 100)


def test_a_note_is_read_back_where_it_still_holds(tmp_path):
    file = tmp_path / "deep" / "note.json"
    write_note(file, {"data": "x"}, {"rank": [1.5]})
    assert read_note(file, {"data": "x"}) == {"rank": [1.5]}
    assert read_note(file, {"data": "y"}) is None
    assert read_note(tmp_path / "none.json", {}) is None
    for damage in ("{", "[]", "{}", '{"made_from": {}, "content": 3}'):
        file.write_text(damage)
        assert read_note(file, {}) is None
