"""The example of docs/add_a_task.md: a task outside the package, run as the page says."""

import json
import re
from collections.abc import Callable
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
from bat.tasks.base import Row, Task, load_task
from bat.tasks.events import Event
from bat.tasks.synthetic import write_wav

NAME = "my_tasks.FROGS"
WORDS = ["data.root=FROGS", "data.cache=cache", "checkpoint=random", "log.progress=false"]


@pytest.fixture
def _folder(
    docs_example: Callable[[str, str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The task and the recipes of the page, and a few recordings in the layout of the task."""
    page = docs_example("add_a_task.md", "my_tasks")
    monkeypatch.chdir(tmp_path)
    recipes = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    for name, recipe in zip(("frogs", "frogs-finetune"), recipes, strict=True):
        Path(f"{name}.yaml").write_text(recipe)
    for i, split in enumerate(6 * ["train"] + 3 * ["valid"] + 3 * ["test"]):
        wave, events = toy_events.clip(i)
        audio = Path("FROGS") / split / f"{i}.wav"
        write_wav(audio, wave)
        lines = ["\t".join(map(str, event)) for event in events]
        audio.with_suffix(".txt").write_text("\n".join(lines))


@pytest.mark.usefixtures("_folder")
def test_task_outside__is_probed_fine_tuned_and_packed_as_the_page_says() -> None:
    words = [*WORDS, "train.steps=3", "bootstrap=100", "methods=[linear]", "out=run"]
    words += ["diagnostics.encoder=false", "data.workers=0", "hardware=cpu", "protocol.lrs=[0.01]"]
    probe(compose(Probe, "probe", ["recipe=frogs.yaml", *words]))
    summary = json.loads(Path("run/summary.json").read_text())
    said = [summary[name] for name in ("task", "target", "metric")]
    assert said == ["frogs", "events", "event_f1"]
    (entry,) = summary["encoders"].values()
    assert list(entry["results"]["linear"]["mean"])[:3] == ["event_f1", "event_f1_macro", "map"]

    tuned = prepare(compose(Finetune, "finetune", ["recipe=frogs-finetune.yaml", *WORDS]))
    assert tuned.task is load_task(NAME)
    assert tuned.hash == summary["data"]

    found = open_rows(Path("FROGS"), task=NAME)
    write_shards(found.rows, Path("shards"), vocabulary=found.vocabulary)
    packed = compose(Probe, "probe", ["recipe=frogs.yaml", *WORDS[1:], "data.shards=[shards]"])
    from_shards = open_probing(packed)
    assert from_shards.labels == tuned.labels
    assert from_shards.index.events == tuned.index.events
    assert open_index("shards").vocabulary == summary["labels"]


@pytest.mark.usefixtures("_folder")
def test_task_outside__its_own_errors_reach_the_user() -> None:
    Path("FROGS/test/9.txt").unlink()
    with pytest.raises(UserError, match=r"9\.txt"):
        open_probing(compose(Probe, "probe", ["recipe=frogs.yaml", *WORDS]))


@pytest.mark.parametrize("times", [(2.0, 1.0), (-0.5, 0.2), (float("nan"), 1.0), (1.0, 1.0)])
def test_task_open__impossible_times_of_events_name_the_clip(
    tmp_path: Path, times: tuple[float, float]
) -> None:
    row = Row(
        path=tmp_path / "a.wav", key="a", labels=("beep",), events=(Event(*times, ("beep",)),)
    )
    with pytest.raises(UserError, match=r"clip 'a' has an event from .* to .* s"):
        Task(name="scene", rows=lambda root: [row], target="events").open(tmp_path)
