"""The example of docs/add_a_task.md: a task outside the package, run as the page says."""

import json
import os
import re
from pathlib import Path

import pytest

from bat.config.compose import compose
from bat.config.schema import Finetune, Probe
from bat.data.index import open_index
from bat.errors import UserError
from bat.eval.prepare import open_probing, prepare
from bat.eval.probe import probe
from bat.shard.rows import open_rows
from bat.shard.write import write_shards
from bat.tasks import toy_events
from bat.tasks.base import load_task
from bat.tasks.synthetic import write_wav

PAGE = Path(__file__).parents[2] / "docs" / "add_a_task.md"
NAME = "my_tasks.frogs"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the page says to save, and a few recordings in the layout of its task."""
    if not PAGE.is_file():
        pytest.skip("docs/ is not here: only a checkout has it")
    text = PAGE.read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    recipes = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    (tmp_path / "my_tasks").mkdir()
    (tmp_path / "my_tasks/frogs.py").write_text(code)
    for name, recipe in zip(("frogs", "frogs-finetune"), recipes, strict=True):
        (tmp_path / f"{name}.yaml").write_text(recipe)
    for i, split in enumerate(6 * ["train"] + 3 * ["valid"] + 3 * ["test"]):
        wave, events = toy_events.clip(i)
        audio = tmp_path / "FROGS" / split / f"{i}.wav"
        write_wav(audio, wave)
        lines = ["\t".join(map(str, event)) for event in events]
        audio.with_suffix(".txt").write_text("\n".join(lines))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


WORDS = ["data.root=FROGS", "data.cache=cache", "checkpoint=random", "log.progress=false"]


def test_task_outside__is_probed_fine_tuned_and_packed_as_the_page_says(folder: Path) -> None:
    words = [*WORDS, "train.steps=3", "bootstrap=100", "methods=[linear]", "out=run"]
    words += ["insight.encoder=false", "data.workers=0", "hardware=cpu", "protocol.lrs=[0.01]"]
    probe(compose(Probe, "probe", ["recipe=frogs.yaml", *words]))
    summary = json.loads((folder / "run/summary.json").read_text())
    assert (summary["task"], summary["target"], summary["metric"]) == (
        "frogs", "events", "event_f1",
    )  # fmt: skip
    (entry,) = summary["encoders"].values()
    assert list(entry["results"]["linear"]["mean"])[:3] == ["event_f1", "event_f1_macro", "map"]

    tuned = prepare(compose(Finetune, "finetune", ["recipe=frogs-finetune.yaml", *WORDS]))
    assert tuned.task is load_task(NAME)
    assert tuned.hash == summary["data"]

    found = open_rows(Path("FROGS"), task=NAME)
    write_shards(found.rows, Path("shards"), vocabulary=found.vocabulary)
    packed = compose(Probe, "probe", ["recipe=frogs.yaml", *WORDS[1:], "data.shards=[shards]"])
    asked, made = open_probing(packed), tuned
    assert asked.labels == made.labels
    assert asked.index.events == made.index.events
    assert open_index("shards").vocabulary == summary["labels"]


def test_task_outside__its_own_errors_reach_the_user(folder: Path) -> None:
    os.remove("FROGS/test/9.txt")
    with pytest.raises(UserError, match=r"9\.txt"):
        open_probing(compose(Probe, "probe", ["recipe=frogs.yaml", *WORDS]))
