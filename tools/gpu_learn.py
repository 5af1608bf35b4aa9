"""Pre-trains a small encoder for some minutes of a GPU and shows whether it learns.

    python tools/gpu_learn.py --data DIR --minutes 8 --out learn      DIR holds fsdd/ and esc10/
    python tools/gpu_learn.py --data DIR --sets fsdd --seeds 1 data.batch=256 fsdd:optim.lr=1e-3

Each run is a recipe of ``bat-pretrain`` with ``GPU``'s values and those of the command line over it
(``SET:key=value``: for that set alone), stretched to the minutes that it has: after a few timed
steps ``train.steps`` is set to what fits (unless given), warm-up and EMA in proportion. Every
``--every`` seconds the last of the objective's encoders (the teacher, if there is one) is evaluated
on held-out folds, speakers in FSDD, against its own random initial weights; no step or rate is
selected on them:

    x      = mean of the last block's patch tokens within the clip, standardised over the
             training clips
    knn    = vote of the 10 nearest training clips by cosine
    linear = argmax of a ridge regression of x on the labels

The waves are decoded once and lie on the device; batches are made there, in the order of
``bat.data.plan``. Everything else is bat's: the objective, the step of ``Pretraining``, optimiser,
schedule, NaN guard. Only the loop is not Lightning's: a step of a small model takes milliseconds,
less than a loader needs to decode, roll and copy hundreds of clips for it.

Written to ``--out``: ``learn.json`` after every evaluation (``complete`` is false if cut off),
``learn-SET.png``, and each run's encoders as an export folder for ``bat-probe checkpoint=``.
"""

from __future__ import annotations

import argparse
import datetime
import logging
import signal
import statistics
import sys
import time
import traceback
from pathlib import Path
from types import FrameType
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))  # also where bat is only checked out
sys.path.insert(1, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
import torch.nn.functional as F
from bench import device_name, versions
from torch import Tensor

from bat.config.compose import compose, to_dict
from bat.config.schema import Pretrain
from bat.data.plan import Plan
from bat.data.stream import eval_loader
from bat.eval.encoding import encode, evaluating
from bat.eval.hardware import attention_in_words
from bat.eval.run_folder import open_data
from bat.eval.splits import Split, make_splits
from bat.io import write_json
from bat.nn.optim import set_lr
from bat.report.plots import plot_probe_curve
from bat.seeding import derive_seed
from bat.train.guard import spread_nan
from bat.train.pretrain import Pretraining
from bat.types import Needs, WaveBatch
from bat.weights import export

GPU = ["data.batch=512", "hardware.precision=bf16-mixed", "hardware.compile=blocks"]
"""Over the recipe where there is a GPU."""
CPU = ["hardware.precision=32-true", "hardware.compile=off"]
"""Over the recipe where there is none."""
SETS: dict[str, list[str]] = {
    "fsdd": ["recipe=fsdd", "data.csv={}/labels.csv"],
    "esc10": ["recipe=esc10", "data.root={}"],
}
"""Recipe and place in ``--data`` of each set."""
PATHS = ("data.csv=", "data.root=", "data.cache=")
NEIGHBOURS = 10
RIDGE = 0.01
"""Weight of the regression's penalty, as a share of the variance of a feature."""
WARM_UP, TIMED = 5, 10
"""Steps before those that are timed, and those."""
AT_ONCE = 512
"""Clips encoded at a time for an evaluation."""


class Bank:
    """A labelled set, decoded, on the device."""

    def __init__(self, config: Pretrain, device: torch.device) -> None:
        _, index = open_data(config.task, config.data, progress=False)
        loader = eval_loader(
            index,
            batch=64,
            sample_rate=config.frontend.sample_rate,
            clip_seconds=config.data.clip_seconds,
        )
        parts = list(loader)
        if any(part.skipped for part in parts):
            raise SystemExit(f"unreadable clips: {[s for part in parts for s in part.skipped][:3]}")
        self.waves = torch.cat([p.waves for p in parts]).to(device)  # (n, S)
        self.lengths = torch.cat([p.lengths for p in parts]).to(device)
        self.labels = torch.cat([p.targets for p in parts]).argmax(1).to(device)
        self.classes, self.splits = index.classes, make_splits(index)

    def batch(self, plan: Plan, step: int, *, clips: int, roll: bool, seed: int) -> WaveBatch:
        """The clips of a step in the plan's order, each rolled by an offset of its own."""
        places = np.arange(step * clips, (step + 1) * clips)
        device = self.waves.device
        ids = torch.from_numpy(plan.clips(places)).to(device)
        waves, lengths = self.waves[ids], self.lengths[ids]
        if roll:
            g = torch.Generator(device).manual_seed(derive_seed(seed, "roll", step))
            offset = (torch.rand(clips, generator=g, device=device) * lengths).long()
            waves = rolled(waves, lengths, offset)
        return self._of(waves, lengths, torch.from_numpy(places))

    def part(self, start: int) -> WaveBatch:
        """The next clips from ``start`` on, as they are."""
        rows = slice(start, start + AT_ONCE)
        waves = self.waves[rows]
        return self._of(waves, self.lengths[rows], torch.arange(len(waves)))

    @staticmethod
    def _of(waves: Tensor, lengths: Tensor, places: Tensor) -> WaveBatch:
        keys = [str(i) for i in places.tolist()]
        return WaveBatch(waves, lengths, waves.new_zeros(len(waves), 0), keys, places, [])


def rolled(waves: Tensor, lengths: Tensor, offset: Tensor) -> Tensor:
    """Rolls the first ``lengths`` (B,) samples of each row of (B, S) to the right by ``offset``."""
    at = torch.arange(waves.shape[1], device=waves.device)
    source = (at - offset[:, None]).remainder(lengths[:, None])
    return waves.gather(1, source).where(at < lengths[:, None], 0.0)


class Learner:
    """``Pretraining`` and its optimiser, without the trainer around them."""

    def __init__(self, config: Pretrain, bank: Bank, device: torch.device) -> None:
        torch.manual_seed(derive_seed(config.seed, "init"))
        self.config, self.bank, self.device = config, bank, device
        self.module = Pretraining(config).to(device).train()
        self.plan = Plan(len(bank.waves), seed=config.seed)
        self.bf16 = torch.bfloat16 if config.hardware.precision == "bf16-mixed" else None
        self.start = {name: t.clone() for name, t in self.module.state_dict().items()}
        self.restart()

    def restart(self) -> None:
        """Puts weights and optimiser back to the start; what was compiled stays."""
        self.module.load_state_dict(self.start)
        self.optimizer: Any = self.module.configure_optimizers()
        self.sums: dict[str, Tensor] = {}

    def step(self, done: int) -> None:
        config, objective, guard = self.config, self.module.objective, self.module.guard
        batch = self.bank.batch(
            self.plan, done, clips=config.data.batch, roll=config.data.roll, seed=config.seed
        )
        torch.manual_seed(derive_seed(config.seed, "step", done, 0))
        if config.hardware.compile == "cudagraphs":
            torch.compiler.cudagraph_mark_step_begin()
        set_lr(
            self.optimizer,
            done,
            lr=config.optim.lr,
            warmup_steps=config.optim.warmup_steps,
            total_steps=config.train.steps,
            min_lr=config.optim.min_lr,
        )
        with torch.autocast(self.device.type, self.bf16, enabled=self.bf16 is not None):
            scalars = objective(batch)
        spread_nan(scalars["loss"]).backward()
        guard.inspect(self.optimizer, self.module.parameters())
        self.optimizer.step()
        self.optimizer.zero_grad()
        assert guard.skip is not None
        objective.after_step(done, skip=guard.skip)
        for name, value in {**scalars, "steps": torch.ones_like(guard.skip)}.items():
            self.sums[name] = self.sums.get(name, 0) + value.detach()

    def means(self) -> dict[str, float]:
        """The means of the step's scalars since the last call."""
        sums, self.sums = {k: float(v) for k, v in self.sums.items()}, {}
        return {k: v / sums["steps"] for k, v in sums.items() if k != "steps"}

    def evaluate(self) -> dict[str, float]:
        """Held-out accuracies, mean over folds, of the objective's last encoder."""
        *_, encoder = self.module.objective.encoders().values()
        frames, parts = self.config.frontend.frames, []
        with evaluating(encoder), torch.compiler.set_stance("force_eager"):
            for start in range(0, len(self.bank.waves), AT_ONCE):
                how = {"frames": frames, "autocast": self.bf16, "needs": Needs("last")}
                batch = self.bank.part(start)
                patches = encode(encoder, batch, **how).patches[-1].float().mean(2)  # (B, T, D)
                at = torch.arange(patches.shape[1], device=self.device)
                inside = (at < encoder.time_patches(batch.lengths)[:, None]).float()[..., None]
                parts.append((patches * inside).sum(1) / inside.sum(1))  # (B, D)
        return accuracies(torch.cat(parts), self.bank.labels, self.bank.splits, self.bank.classes)

    def save(self, folder: Path, steps: int) -> None:
        encoders = self.module.objective.encoders()
        export(
            folder,
            backbone=self.config.model.backbone,
            encoder=encoders["student"].config(),
            weights={name: encoder.state_dict() for name, encoder in encoders.items()},
            meta={"steps": steps, "training": to_dict(self.config)},
        )


def accuracies(x: Tensor, labels: Tensor, splits: list[Split], classes: int) -> dict[str, float]:
    """kNN and ridge accuracy of features (n, D) on held-out folds: means and deviations."""
    found: dict[str, list[float]] = {"knn": [], "linear": []}
    for split in splits:
        train, test = (torch.from_numpy(ids).to(x.device) for ids in (split.train, split.test))
        mean, std = x[train].mean(0), x[train].std(0) + 1e-6
        a, b = ((x[rows] - mean) / std for rows in (train, test))
        truth = F.one_hot(labels[train], classes).float()  # (n, C)
        near = (F.normalize(b) @ F.normalize(a).T).topk(min(NEIGHBOURS, len(a)))
        votes = (truth[near.indices] * near.values[..., None]).sum(1)  # (m, C)
        penalty = RIDGE * len(a) * torch.eye(a.shape[1], device=a.device)
        centred = truth - truth.mean(0)
        weights = torch.linalg.solve(a.T @ a + penalty, a.T @ centred)  # (D, C)
        for name, scores in (("knn", votes), ("linear", b @ weights + truth.mean(0))):
            found[name].append(float((scores.argmax(1) == labels[test]).float().mean()))
    row = {name: statistics.fmean(values) for name, values in found.items()}
    return row | {f"{name}_std": statistics.pstdev(values) for name, values in found.items()}


def latest(words: list[str]) -> list[str]:
    """``words`` with the last value of each key."""
    return list({word.partition("=")[0]: word for word in words}.values())


def stretch(config: Pretrain, steps: int) -> None:
    """Sets the steps of ``config``, and warm-up and EMA in proportion; the objective sees it."""
    factor = steps / config.train.steps
    config.train.steps = steps
    config.optim.warmup_steps = min(steps - 1, round(factor * config.optim.warmup_steps))
    if hasattr(config.objective, "ema"):
        config.objective.ema.steps = max(1, round(factor * config.objective.ema.steps))


class Study:
    """The report, the clock and the runs."""

    def __init__(self, args: argparse.Namespace, device: torch.device) -> None:
        self.args, self.device = args, device
        self.deadline = time.monotonic() + 60 * args.minutes
        self.report: dict[str, Any] = {
            "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
            "device": device_name() if device.type == "cuda" else "CPU",
            "versions": versions() | {"cuda": torch.version.cuda},
            "minutes": args.minutes,
            "complete": False,
            "cut_off": None,
            "failed": {},
            "runs": [],
        }
        self.banks: dict[str, Bank] = {}

    def write(self) -> None:
        write_json(self.args.out / "learn.json", self.report)

    def words(self, name: str, seed: int) -> list[str]:
        recipe, place = SETS[name]
        own = [w for w in self.args.words if ":" not in w.partition("=")[0]]
        own += [w.partition(":")[2] for w in self.args.words if w.startswith(f"{name}:")]
        here = GPU if self.device.type == "cuda" else CPU
        fixed = [place.format(self.args.data / name), f"seed={seed}"]
        fixed += [f"data.cache={self.args.out / 'cache'}"]
        return latest([recipe, *here, *fixed, *own])

    def all(self) -> None:
        runs = [(name, seed) for seed in range(self.args.seeds) for name in self.args.sets]
        self.write()
        try:
            for number, (name, seed) in enumerate(runs):
                left = self.deadline - time.monotonic()
                try:
                    self.one(name, seed, left / (len(runs) - number))
                except Exception as error:  # of any kind: the other runs still count
                    traceback.print_exc()
                    self.report["failed"][f"{name}, seed {seed}"] = (
                        f"{type(error).__name__}: {error}"
                    )
            done = [run["complete"] for run in self.report["runs"]]
            self.report["complete"] = all(done) and len(done) == len(runs)
        except (KeyboardInterrupt, SystemExit) as stopped:
            self.report["cut_off"] = str(stopped) or "interrupted"
        finally:
            self.write()
            plot(self.report, self.args.out)

    def one(self, name: str, seed: int, seconds: float) -> None:
        """One run of so many seconds, setting up included."""
        began = time.monotonic()
        words = self.words(name, seed)
        config = compose(Pretrain, "pretrain", words)
        bank = self.banks.get(name) or Bank(config, self.device)
        self.banks[name] = bank
        learner, of_step = self._timed(words, bank)
        config = learner.config
        learner.restart()
        tried = time.monotonic()
        baseline = learner.evaluate()
        of_evaluation = time.monotonic() - tried
        left = seconds - (time.monotonic() - began)
        left -= (1 + left / self.args.every) * of_evaluation
        if not any(word.startswith("train.steps=") for word in words):
            stretch(config, max(1, int(0.97 * left / of_step)))
        run: dict[str, Any] = {
            "set": name,
            "seed": seed,
            "words": [w for w in words if not w.startswith(PATHS)],
            "kernel": attention_in_words(learner.module.objective, config.hardware, self.device),
            "clips": len(bank.waves),
            "chance": 1 / bank.classes,
            "seconds_a_step": of_step,
            "clips_per_second": config.data.batch / of_step,
            "steps": config.train.steps,
            "compile": config.hardware.compile,
            "complete": False,
            "evaluations": [{"step": 0, "seconds": 0.0, **baseline}],
        }
        self.report["runs"].append(run)
        self.write()
        print(f"{name}, seed {seed}: {config.train.steps} steps, baseline "
              f"{shown(run['evaluations'][0])}", flush=True)  # fmt: skip
        begin = last = time.monotonic()
        for step in range(1, config.train.steps + 1):
            learner.step(step - 1)
            now = time.monotonic()
            over = now > self.deadline
            if step < config.train.steps and now - last < self.args.every and not over:
                continue
            self._wait()
            row = {"step": step, "seconds": round(time.monotonic() - begin, 1)}
            run["evaluations"].append(row | learner.evaluate() | learner.means())
            self.write()
            print(f"{name}, seed {seed}, step {step}: {shown(run['evaluations'][-1])}", flush=True)
            last = time.monotonic()
            if over:
                break
        run["complete"] = step == config.train.steps
        learner.save(self.args.out / f"{name}-{seed}", step)
        self.write()

    def _timed(self, words: list[str], bank: Bank) -> tuple[Learner, float]:
        """A learner after a few steps, and the seconds of one."""
        config = compose(Pretrain, "pretrain", words)
        if config.hardware.compile != "off":
            torch.compiler.reset()  # graphs of earlier runs count towards a limit
        try:
            learner = Learner(config, bank, self.device)
            for k in range(WARM_UP):
                learner.step(k)
            self._wait()
        except Exception as error:
            if config.hardware.compile == "off":
                raise
            print(f"not compiled: {type(error).__name__}: {error}"[:400], flush=True)
            return self._timed(latest([*words, "hardware.compile=off"]), bank)
        began = time.monotonic()
        for k in range(WARM_UP, WARM_UP + TIMED):
            learner.step(k)
        self._wait()
        return learner, (time.monotonic() - began) / TIMED

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def shown(row: dict[str, float]) -> str:
    losses = [f", loss {row['loss']:.3f}"] if "loss" in row else []
    return f"knn {100 * row['knn']:.1f} %, linear {100 * row['linear']:.1f} %" + "".join(losses)


def plot(report: dict[str, Any], out: Path) -> None:
    """Writes ``learn-SET.png``: held-out accuracy by step; dashed: random weights."""
    for of_set in {run["set"]: run for run in report["runs"]}.values():
        rows = [
            {
                "step": row["step"],
                "method": f"{title}, seed {run['seed']}",
                "accuracy": row[name],
                "accuracy_std": row[f"{name}_std"],
            }
            for run in report["runs"]
            if run["set"] == of_set["set"]
            for row in run["evaluations"]
            for name, title in {"knn": "kNN", "linear": "ridge"}.items()
        ]
        plot_probe_curve(rows, out / f"learn-{of_set['set']}.png", chance=of_set["chance"])


def _stop(number: int, frame: FrameType | None) -> None:
    raise SystemExit(signal.Signals(number).name)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("words", nargs="*", metavar="[SET:]key=value", help="over the recipes")
    parser.add_argument("--data", type=Path, required=True, metavar="DIR")
    parser.add_argument("--out", type=Path, default=Path("gpu_learn"), metavar="DIR")
    parser.add_argument("--minutes", type=float, default=8.0, help="for all runs together (8)")
    parser.add_argument("--sets", default=",".join(SETS), help=f"of {', '.join(SETS)}")
    parser.add_argument("--seeds", type=int, default=2, metavar="N", help="runs of each set (2)")
    parser.add_argument("--every", type=float, default=30.0, help="seconds between evaluations")
    parser.add_argument("--device", choices=("auto", "cpu"), default="auto")
    args = parser.parse_args(argv)
    args.sets = args.sets.split(",")
    if unknown := [name for name in args.sets if name not in SETS]:
        parser.error(f"unknown set '{unknown[0]}': one of {', '.join(SETS)}")
    if args.minutes <= 0 or args.every <= 0 or args.seeds < 1:
        parser.error("--minutes, --every and --seeds: more than nothing")
    logging.getLogger("bat").addHandler(logging.StreamHandler())
    args.out.mkdir(parents=True, exist_ok=True)
    gpu = torch.cuda.is_available() and args.device == "auto"
    signal.signal(signal.SIGTERM, _stop)
    study = Study(args, torch.device("cuda" if gpu else "cpu"))
    study.all()
    why = study.report["cut_off"] or study.report["failed"] or "all ran"
    done = study.report["complete"]
    print(f"written: {args.out}/learn.json, learn-*.png; complete: {done} ({why})", flush=True)
    return 0 if done else 1


if __name__ == "__main__":
    sys.exit(main())
