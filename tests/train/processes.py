"""Several processes that run several trainings, as torchrun would start them, at little cost.

One server process imports what a run needs, once; the processes are forked from it with torchrun's
variables set. Each does its jobs in a row in one process group and writes down what it saw.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import traceback
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

IMPORTS = ["bat.train.run_pretrain", "bat.train.finetune"]


@dataclass
class Job:
    """``command``: pretrain or finetune. ``poisoned``: (micro-batch, rank) whose loss is NaN.
    ``killed``: micro-batch before which every process is killed."""

    name: str
    words: list[str]
    command: str = "pretrain"
    poisoned: tuple[int, int] | None = None
    killed: int | None = None


def run(jobs: list[Job], *, world: int, folder: Path, seconds: float = 200, nodes: int = 1) -> None:
    """Do ``jobs`` in ``world`` processes; ``RuntimeError`` with what one said when it failed."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTS)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = [
        context.Process(target=_child, args=(rank, world, nodes, port, jobs, folder))
        for rank in range(world)
    ]
    for child in children:
        child.start()
    try:
        for child in children:
            child.join(seconds)
    finally:
        for child in children:
            child.kill()
    failed = [r for r, child in enumerate(children) if child.exitcode != 0]
    if failed:
        said = [f for r in failed if (f := folder / f"failed-{world}-{r}.txt").is_file()]
        text = "\n".join(f.read_text() for f in said) or "nothing said: did it hang?"
        raise RuntimeError(f"ranks {failed} of {world} failed: {text}")


def seen(folder: Path, name: str, rank: int) -> list[dict[str, Any]]:
    """What ``rank`` saw in job ``name``, a row a micro-batch."""
    return json.loads((folder / f"seen-{name}-{rank}.json").read_text())


def _child(rank: int, world: int, nodes: int, port: int, jobs: list[Job], folder: Path) -> None:
    node, local_rank = divmod(rank, world // nodes)
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(world),
        LOCAL_RANK=str(local_rank), LOCAL_WORLD_SIZE=str(world // nodes), GROUP_RANK=str(node),
        TORCHELASTIC_RUN_ID="test",
    )  # fmt: skip
    import torch
    from lightning.fabric.utilities.rank_zero import rank_zero_only as fabrics
    from lightning.pytorch.utilities import rank_zero_only

    multiprocessing.set_start_method("fork", force=True)  # of loader workers, as in a command
    rank_zero_only.rank = fabrics.rank = rank  # read from the environment when imported
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    try:
        for job in jobs:
            _do(job, rank, folder)
    except BaseException:
        (folder / f"failed-{world}-{rank}.txt").write_text(traceback.format_exc())
        os._exit(1)  # the others would wait for this one in a collective
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _do(job: Job, rank: int, folder: Path) -> None:
    import torch.distributed as dist

    from bat.config.compose import compose
    from bat.config.schema import Finetune, Pretrain
    from bat.train import finetune, run_pretrain
    from bat.train.pretrain import Pretraining
    from bat.train.supervised import Supervised

    rows: list[dict[str, Any]] = []
    scattered = 0
    scatter = dist.reduce_scatter_tensor

    def counting(*args: Any, **keywords: Any) -> Any:
        nonlocal scattered
        scattered += 1
        return scatter(*args, **keywords)

    class Watched:
        def training_step(self, batch, batch_idx):  # type: ignore[no-untyped-def]
            if batch_idx == job.killed:
                os.kill(os.getpid(), signal.SIGKILL)
            loss = super().training_step(batch, batch_idx)  # type: ignore[misc]
            row = {"loss": float(loss), "positions": batch.positions.tolist(), "keys": batch.keys}
            model = self.trainer.strategy.model  # type: ignore[attr-defined]
            row["syncs"] = getattr(model, "require_backward_grad_sync", None)
            row["scattered"] = scattered  # until now
            if isinstance(self, Pretraining):
                views = self.objective.draw_views(batch.positions)
                row["masks"] = views.keep_ids.view(len(batch.keys), -1).tolist()
            rows.append(row)
            return loss * nan if job.poisoned == (batch_idx, rank) else loss

    nan = float("nan")
    run_pretrain.draw = lambda *args: None  # pictures take longer than these trainings
    dist.reduce_scatter_tensor = counting
    run_pretrain.Pretraining = type("Watching", (Watched, Pretraining), {})  # type: ignore[misc]
    finetune.Supervised = type("WatchingToo", (Watched, Supervised), {})  # type: ignore[misc]
    try:
        if job.command == "pretrain":
            run_pretrain.pretrain(compose(Pretrain, "pretrain", job.words))
        else:
            finetune.finetune(compose(Finetune, "finetune", job.words))
    finally:
        dist.reduce_scatter_tensor = scatter
        run_pretrain.Pretraining, finetune.Supervised = Pretraining, Supervised  # type: ignore[misc]
    (folder / f"seen-{job.name}-{rank}.json").write_text(json.dumps(rows))
