"""Training, on one page: config -> plan -> groups -> model -> engine -> data -> loop."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megalm import checkpoint
from megalm.checkpoint import CheckpointError
from megalm.config import Config, ConfigError, load
from megalm.data import DataError, Loader, build_dataset, cache_folder, load_tokenizer
from megalm.engine.engine import Engine, build
from megalm.metrics import Logger
from megalm.model import layers
from megalm.parallel.groups import Groups, LaunchError, launched_world, start
from megalm.parallel.handshake import shake_hands
from megalm.parallel.random import StepContext
from megalm.parallel.stop import StopSignal
from megalm.plan import PlanError, make_plan

FAILED, USER_ERROR = 1, 2
USER_ERRORS = (ConfigError, PlanError, DataError, CheckpointError, LaunchError)


def run(config_path: str, overrides: Sequence[str] = ()) -> int:
    """Train in this rank process; every rank of the launched world calls it. Returns the exit code.

    0: finished, or stopped politely with a checkpoint; 1: gave up (train.max_bad_steps); 2: a user's mistake, one line each.
    """
    with StopSignal() as stop:
        try:
            return train(load(config_path, overrides), stop)
        except USER_ERRORS as error:
            print(f"megalm: {error}", file=sys.stderr, flush=True)
            return USER_ERROR


@dataclass
class Run:
    """The pieces of one rank's training run."""

    config: Config
    groups: Groups
    engine: Engine
    loader: Loader
    valid: Loader | None
    logger: Logger
    stop: StopSignal
    tokenizer_files: list[Path]


def train(config: Config, stop: StopSignal) -> int:
    """Set everything up, go on from the newest checkpoint if there is one, and run the loop."""
    tokenizer = load_tokenizer(config.tokenizer)
    plan = make_plan(config, launched_world(), tokenizer.vocab_size)
    groups = start(plan)
    shake_hands(groups, checkpoint.flatten(config.model_dump(mode="json")))
    folder = Path(config.train.dir)
    resumed = groups.agreed(lambda: checkpoint.choose(folder, config.checkpoint.resume))
    if resumed is not None:
        done = groups.agreed(lambda: checkpoint.read_manifest(resumed)["step"])
        if done >= config.train.steps:
            return _already_finished(groups, done, config.train.steps)
        groups.agreed(lambda: checkpoint.check_resume(resumed, config, plan))
    loader, valid = _loaders(config, groups, tokenizer.eod)
    context = StepContext(config.train.seed)
    engine = build(config, plan, groups, context, layers(config, plan, groups.tp, context, groups.device))
    first = 0
    if resumed is not None:
        first = checkpoint.load(resumed, engine, groups, allow_changes=config.checkpoint.allow_changes).step
    elif config.checkpoint.init_from is not None:
        checkpoint.load(checkpoint.find(config.checkpoint.init_from), engine, groups, weights_only=True)
    logger = Logger(config, plan, rank=groups.rank, first_step=first)
    for note in (*plan.notes, *(f"data: {share}" for share in loader.dataset.shares)):
        logger.note(note)
    return _loop(Run(config, groups, engine, loader, valid, logger, stop, tokenizer.files()), first)


def _already_finished(groups: Groups, done: int, steps: int) -> int:
    if groups.rank == 0:
        print(f"the run is finished: {done} of {steps} steps are done; a larger train.steps goes on", flush=True)
    return 0


def _loaders(config: Config, groups: Groups, eod: int | None) -> tuple[Loader, Loader | None]:
    """Training and validation micro-batches of this rank; the sample indices are built once per filesystem."""
    plan, data = groups.plan, config.data
    seed = config.train.seed if data.seed is None else data.seed

    def loader(sources: Sequence, samples: int) -> Loader:
        cache = cache_folder(data.cache, [source.path for source in sources], config.train.dir)
        arguments = (sources, config.model.seq_length, samples, seed, cache)
        groups.once_per_filesystem(lambda: build_dataset(*arguments), cache)
        return Loader(build_dataset(*arguments), global_batch=plan.global_batch, micro_batch=plan.micro_batch, dp=plan.dp,
                      dp_rank=groups.place.dp, needs_tokens=groups.place.pp in (0, plan.pp - 1), eod=eod,
                      mask_eod=data.mask_eod, vocab_size=plan.vocab_size)

    training = loader(data.train, config.train.steps * plan.global_batch)
    return training, loader(data.valid, config.train.eval_samples) if data.valid else None


def _loop(run: Run, first: int) -> int:
    """Steps `first`, first + 1, ... until the end, a stop, or too many bad steps in a row."""
    config, last = run.config, run.config.train.steps
    bad, saved = 0, first
    for step in range(first, last):
        result = run.engine.train_step(step, run.loader.step(step))
        done = step + 1
        bad = bad + 1 if result.skipped and not result.rescaled else 0
        run.logger.step(done, result)
        if bad == config.train.max_bad_steps:
            kept = f"the newest checkpoint is that of step {saved}" if saved else "there is no checkpoint yet"
            run.logger.note(f"stopped: {bad} steps in a row with non-finite loss or gradients; {kept}")
            run.logger.close()
            return FAILED
        if _due(done, config.train.eval_every) or (done == last and config.train.eval_every):
            _evaluate(run, done)
        leaving = done == last or done == config.train.stop_at or run.stop.agreed(run.groups)
        if leaving or _due(done, config.checkpoint.every):
            checkpoint.save(config.train.dir, done, run.engine, run.groups, config, run.groups.plan, run.tokenizer_files)
            saved = done
        if leaving:
            break
    if done < last:
        run.logger.note(f"stopped after step {done} of {last}: the same command goes on from here")
    run.logger.close()
    run.loader.close()
    return 0


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _evaluate(run: Run, step: int) -> None:
    """Token-mean loss over train.eval_samples validation samples, the same ones each time."""
    if run.valid is None:
        return
    loss, tokens = 0.0, 0
    for index in range(run.valid.num_steps):
        more_loss, more_tokens = run.engine.evaluate(run.valid.step(index))
        loss, tokens = loss + more_loss, tokens + more_tokens
    run.logger.evaluation(step, loss / max(tokens, 1))
