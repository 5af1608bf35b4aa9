"""Runs a pre-training from a resolved configuration to its export, plots and summary."""

from __future__ import annotations

import logging
import shlex
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from bat import __version__
from bat import weights as checkpoint
from bat.config.compose import to_dict
from bat.config.schema import Pretrain
from bat.data.module import StreamData
from bat.encoders.base import Encoder, SpectrogramEncoder
from bat.eval.hardware import attention_in_words, with_precision
from bat.eval.next_steps import after_pretraining
from bat.eval.run_folder import default_out, run_folder
from bat.io import read_jsonl, write_json
from bat.logs import start_logging
from bat.objectives.base import check_scalars
from bat.redact import redact_tree
from bat.report.plots import plot_curves, plot_masks
from bat.seeding import derive_seed
from bat.train.checkpointing import step_of
from bat.train.fitting import Fitting, dry_step
from bat.train.online import OnlineProbe
from bat.train.pretrain import Pretraining
from bat.train.pretrain_data import PretrainData, open_stream
from bat.train.processes import with_batch
from bat.train.sharding import full_state
from bat.train.start import start_from

log = logging.getLogger("bat")


def pretrain(
    config: Pretrain,
    *,
    dry_run: bool = False,
    force: bool = False,
    say: Callable[[str], None] = tqdm.write,
) -> Path:
    """Pre-trains as ``config`` says and returns the run folder. Resumes an existing run there.

    Raises ``Interrupted`` if the run was asked to end; it is saved and can be resumed.
    ``force``: resume although the settings differ. ``say``: gets the report at the end.
    """
    out = default_out(config)
    start_logging()
    asked = with_precision(config, out)
    config = with_batch(asked)
    source = open_stream(config, out)
    torch.manual_seed(derive_seed(config.seed, "init"))
    module = Pretraining(config)
    if dry_run:
        if config.init:
            start_from(config, module.objective)
        _dry_run(config, module, source)
        return out
    with run_folder(asked, out, force=force) as begin:
        online = partial(OnlineProbe, config, task=source.task, index=source.index, out=out)
        fitting = Fitting(
            config,
            out,
            module=module,
            data=source.data,
            name=f"pretrain-{config.recipe}",
            force=force,
            begin=begin,
            online=online if config.online.every else None,
        )
        _describe(config, out, module, source, fitting)
        if config.init and not fitting.newest:
            module.started_from = redact_tree(start_from(config, module.objective))
        with fitting.running():
            fitting.trainer.fit(module, datamodule=source.data, ckpt_path=fitting.resume_from)
        begin()  # a training that was finished before had no start
        report = _finish(config, out, module, source, fitting)
        if report:
            say(report)
    return out


def _describe(
    config: Pretrain, out: Path, module: Pretraining, source: PretrainData, fitting: Fitting
) -> None:
    """Describes the training in the log."""
    trainer, model, objective = fitting.trainer, config.model, module.objective
    if _is_finished(config, out, fitting):
        log.info("nothing to do: %s is finished", out)
    start = f"continuing from {fitting.newest}" if fitting.newest else "starting"
    log.info("bat %s: pre-training recipe %s in %s, %s", __version__, config.recipe, out, start)
    log.info("  data %s, encoder %d wide, %d blocks", source.describe(), model.width, model.depth)
    log.info("  objective %s", objective.describe())
    batch, accumulate, world = config.data.batch, config.train.accumulate, trainer.world_size
    log.info(
        "  %d clips a step: %d a micro-batch x %d accumulated x %d device(s)",
        batch * accumulate * world,
        batch,
        accumulate,
        world,
    )
    kernel = attention_in_words(objective, config.hardware, trainer.strategy.root_device)
    if kernel:
        log.info("  attention %s: %s", model.attention, kernel)
    for note in config.optim.notes(config.train.steps):
        log.warning("  %s", note)


def _is_finished(config: Pretrain, out: Path, fitting: Fitting) -> bool:
    """Returns True if an earlier start trained to the last step and wrote all outputs."""
    newest = fitting.newest
    trained = newest is not None and step_of(newest) >= config.train.steps
    return trained and (out / "summary.json").is_file() and (out / "export").is_dir()


def _finish(
    config: Pretrain, out: Path, module: Pretraining, source: PretrainData, fitting: Fitting
) -> str:
    """Writes export, plots and summary after the last training step; returns the report, empty on
    other processes than the first."""
    data, trainer, probe = source.data, fitting.trainer, fitting.online
    bad_clips_all_ranks = data.bad_clips_all_ranks()
    state = full_state(module)
    if not trainer.is_global_zero:
        return ""
    if not _is_finished(config, out, fitting):
        export(module, out, step=trainer.global_step, data=data, state=state)
        draw(module, data, out)
        rows = [r for r in read_jsonl(out / "metrics.jsonl") if "loss" in r]
        speeds = [r["clips_per_second"] for r in rows if r["clips_per_second"] and r["step"] > 1]
        summary = {
            "steps": trainer.global_step,
            "data": redact_tree(data.facts()),
            "clips_per_second": round(statistics.median(speeds), 2) if speeds else None,
            "bad_clips": data.bad_clips.state_dict(),
            "bad_clips_all_ranks": bad_clips_all_ranks,
            **fitting.facts(),
            **({"init": module.started_from} if module.started_from else {}),
            "last": rows[-1] if rows else {},
            "online": probe.probe_rows if probe else [],
            "version": __version__,
            "device": device_name(trainer.strategy.root_device),
            "precision": config.hardware.precision,
        }
        write_json(out / "summary.json", summary)
        log.info("%s", data.bad_clips.summary())
        if probe and (line := probe.cost(fitting.facts()["seconds"])):
            log.info("%s", line)
    return _report(module, out, source, probe)


def device_name(device: torch.device) -> str:
    """Returns the device's name for a summary."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def export(
    module: Pretraining, out: Path, *, step: int, data: StreamData, state: dict[str, Tensor]
) -> Path:
    """Writes ``out/export``: the objective's encoders from the ``full_state`` of ``module``, and
    their provenance."""
    encoders = module.objective.encoders()
    prefixes = {part: f"{name}." for name, part in module.named_modules()}

    def weights(encoder: Encoder) -> dict[str, Tensor]:
        prefix = prefixes[encoder]
        return {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}

    return checkpoint.export(
        out / "export",
        backbone=module.config.model.backbone,
        encoder=encoders["student"].config(),
        weights={name: weights(encoder) for name, encoder in encoders.items()},
        meta={
            "bat_version": __version__,
            "steps": step,
            "training": redact_tree(to_dict(module.config)),
            "data": redact_tree(data.facts()),
            **({"init": module.started_from} if module.started_from else {}),
        },
    )


def draw(module: Pretraining, data: StreamData, out: Path) -> None:
    """Writes ``plots/``: a few spectrograms with their masks, if the objective has any, and the
    curves of losses and learning rate."""
    plots = out / "plots"
    plots.mkdir(exist_ok=True)
    plot_curves(read_jsonl(out / "metrics.jsonl"), plots / "curves.png")
    batch = data.first_batch().first(4).to(module.device)
    if not batch.keys:  # none of its clips is readable
        return
    # the trainer has moved the module to the CPU: do not compile for it there
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        spectrogram = module.objective.spectrogram(batch)
        masks = module.objective.example_masks(batch)
    encoder = module.objective.encoders()["student"]
    if masks is not None and isinstance(encoder, SpectrogramEncoder):
        plot_masks(
            spectrogram.cpu(),
            masks.cpu(),
            plots / "masks.png",
            grid=encoder.grid,
            hop_ms=1000 * encoder.hop_seconds / encoder.patch,
            names=batch.keys,
        )


def _dry_run(config: Pretrain, module: Pretraining, source: PretrainData) -> None:
    """Builds everything and computes the loss of one batch without training."""
    with dry_step(config, module, source.data) as batch:
        spectrogram = module.objective.spectrogram(batch)
        loss = check_scalars(module.objective, module.objective(batch))["loss"]
    if loss.is_cuda:
        loss.backward()
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    print(f"data      {source.describe()}, {source.data.clip_samples} samples each")
    print(f"input     {tuple(spectrogram.shape)}")
    print(f"objective {module.objective.describe()}, {trained / 1e6:.1f} M trainable parameters")
    print(
        f"step      {config.data.batch} clips x {config.train.accumulate} micro-batches a device, "
        f"devices={config.hardware.devices}, {config.train.steps} steps"
    )
    print(f"loss      {loss.item():.4f} on {len(batch.keys)} clip(s), {loss.device}")
    if loss.is_cuda:
        print(f"memory    {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB at its peak")
    print("dry run: nothing was trained, nothing was written but shards and their index")


def _report(module: Pretraining, out: Path, source: PretrainData, probe: OnlineProbe | None) -> str:
    config, names = module.config, " and ".join(module.objective.encoders())
    lines = [
        "",
        "done. Where everything is:",
        f"  encoder   {out}/export      ({names}; bat.load_encoder('{out}'))",
        f"  metrics   {out}/metrics.jsonl, {out}/summary.json",
        f"  pictures  {out}/plots/",
        f"  one page  bat runs report {shlex.quote(str(out))}",
        f"  resume    {out}/checkpoints/last.ckpt (had it been interrupted: the same command)",
    ]
    task, index = source.task, source.index
    if probe is not None:
        lines += ["", probe.report(), f"(computed in {config.hardware.precision})"]
        task, index = probe.task, probe.index
    lines += ["", "Next:", *(f"  {c}" for c in after_pretraining(config, out, task, index))]
    return "\n".join(lines)
