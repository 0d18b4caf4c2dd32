"""Training, on one page: config -> plan -> groups -> model -> engine -> data -> loop."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megalm import checkpoint
from megalm.checkpoint import CheckpointError, DamagedError, Saver
from megalm.checkpoint.foreign import sources
from megalm.config import Config, ConfigError, load
from megalm.data import DataError, Loader, build_dataset, cache_folder, load_tokenizer
from megalm.data.blend import told
from megalm.data.description import tokenizer_problems
from megalm.data.tokenizer import Tokenizer
from megalm.engine.ds_config import check_deepspeed
from megalm.engine.engine import Engine, build
from megalm.metrics import Logger
from megalm.model import choose_kernels, layers
from megalm.parallel.groups import Groups, start
from megalm.parallel.handshake import shake_hands
from megalm.parallel.random import StepContext
from megalm.parallel.stop import GOING_ON, PREEMPTED, PREEMPTION, StopSignal
from megalm.parallel.world import LaunchError, World, connect
from megalm.plan import Plan, PlanError, make_plan

FAILED, USER_ERROR = 1, 2
EXIT_CODE = "exit_code"
"""A file in train.dir that holds the exit code, for scripts whose launcher doesn't pass it on."""
USER_ERRORS = (ConfigError, PlanError, DataError, CheckpointError, LaunchError)


def run(config_path: str, overrides: Sequence[str] = ()) -> int:
    """Train in this rank process; every rank of the launched world calls it. Returns the exit code.

    0: finished, or stopped politely with a checkpoint; 1: gave up on bad steps; 2: a user's mistake, one line each; 75: stopped
    with a checkpoint because the cluster asked (SIGTERM, SIGUSR1).
    """
    with StopSignal() as stop:
        try:
            return train(load(config_path, overrides), stop)
        except USER_ERRORS as error:
            problems = getattr(error, "problems", [error])  # as every program of megalm says them
            print("\n".join(f"error: {problem}" for problem in problems), file=sys.stderr, flush=True)
            return USER_ERROR


@dataclass
class Run:
    """The pieces of one rank's training run, and how many training samples all ranks have drawn."""

    config: Config
    groups: Groups
    engine: Engine
    loader: Loader
    valid: Loader | None
    logger: Logger
    stop: StopSignal
    saver: Saver
    consumed: int


def train(config: Config, stop: StopSignal) -> int:
    """Join the other ranks, agree with them on what runs where, and run it while no other job has the run's folder."""
    world = connect()
    shake_hands(world, checkpoint.flatten(config.model_dump(mode="json")))
    tokenizer, plan, kernels = world.agreed(lambda: _derive(config, world))
    check_deepspeed(config, plan)
    groups = start(plan, world=world)
    groups.require_shared(Path(config.train.dir), "train.dir")
    with groups.agreed(lambda: checkpoint.hold(config.train.dir) if groups.rank == 0 else contextlib.nullcontext()):
        if groups.rank == 0:
            with contextlib.suppress(OSError):
                Path(config.train.dir, EXIT_CODE).unlink(missing_ok=True)
        try:
            code = _train(config, groups, tokenizer, kernels, stop)
        except Exception as error:  # of any rank: the others may be about to be killed
            _note_code(config, USER_ERROR if isinstance(error, USER_ERRORS) else FAILED)
            raise
        return _leave(config, groups, code)


def _leave(config: Config, groups: Groups, code: int) -> int:
    """All ranks leave together, and the exit code is in train.dir before any launcher sees one of them end."""
    if groups.rank == 0:
        _note_code(config, code)
    groups.leave()
    return code


def _note_code(config: Config, code: int) -> None:
    with contextlib.suppress(OSError):  # a full disk, which the code may be about
        Path(config.train.dir, EXIT_CODE).write_text(f"{code}\n")


def _train(config: Config, groups: Groups, tokenizer: Tokenizer, kernels: list[str], stop: StopSignal) -> int:
    """Set everything up, go on from the newest checkpoint if there is one, and run the loop."""
    plan, notes = groups.plan, []
    source = groups.from_first(lambda: _source(config, plan, tokenizer, notes))
    if source.finished:
        return _nothing_to_do(groups, config, source.step, stop)
    with contextlib.ExitStack() as held:
        loaders = _loaders(held, config, groups, tokenizer, source)
        context = StepContext(config.train.seed)
        described = layers(config, plan, groups.tp, context, groups.device, initial=not source.replaces_all)
        engine = build(config, plan, groups, context, described)
        restored = _restore(config, groups, tokenizer, engine, source, notes)
        if restored is not source:
            source, loaders = restored, _loaders(held, config, groups, tokenizer, restored)
        loader, valid = loaders
        notes += [*source.notes, *plan.notes, *kernels, *(f"data: {line}" for line in told(loader.dataset.shares))]
        logger = groups.agreed(lambda: Logger(config, plan, rank=groups.rank, first_step=source.step))
        held.enter_context(contextlib.closing(logger))
        for note in dict.fromkeys(notes):  # whoever looks for a checkpoint again says again what is wrong with one
            logger.note(note)
        saver = Saver(config.train.dir, engine, groups, config, plan, tokenizer.files(), report=logger.note)
        held.enter_context(saver)
        if config.checkpoint.every and config.checkpoint.async_:
            saver.write_in_background(groups.device)
        if source.path is not None and not source.weights_only:
            saver.copies.offer(source.step, earlier=True)  # which the run before may have had to leave here
        return _loop(Run(config, groups, engine, loader, valid, logger, stop, saver, source.consumed), source.step)


def _derive(config: Config, world: World) -> tuple[Tokenizer, Plan, list[str]]:
    """What follows from the config on this rank's machine: tokenizer, plan, and why each kernel was chosen."""
    problems = []
    if config.precision.dtype == "fp16" and world.device.type == "cpu":
        problems.append('precision.dtype: "fp16" needs a GPU; "bf16" and "fp32" run on a CPU')
    tokenizer = load_tokenizer(config.tokenizer)
    if config.data.mask_eod and tokenizer.eod is None:
        problems.append("data.mask_eod: true needs an end-of-document token, which the tokenizer hasn't; tokenizer.eod names it")
    problems += tokenizer_problems([source.path for source in (*config.data.train, *config.data.valid)], config.tokenizer)
    if problems:
        raise ConfigError(problems)
    kernels = [f"{op}: {backend}" for op, backend in choose_kernels(config, world.device).items()]
    return tokenizer, make_plan(config, world.world_size, tokenizer.vocab_size), kernels


@dataclass(frozen=True)
class Source:
    """Where a run's weights come from (None: drawn anew), the step it goes on from, and the samples drawn until then.

    `foreign`: another program's weights, as checkpoint.init_from names them. `notes`: what to say once they are loaded.
    `replaces_all`: loading leaves nothing of the initial weights, so that nobody needs to compute them.
    """

    path: Path | None = None
    step: int = 0
    consumed: int = 0
    weights_only: bool = False
    replaces_all: bool = False
    finished: bool = False
    foreign: str | None = None
    notes: tuple[str, ...] = ()


def _source(config: Config, plan: Plan, tokenizer: Tokenizer, notes: list[str], damaged: Sequence[Path] = ()) -> Source:
    """The run's own newest checkpoint that isn't known to be damaged, else checkpoint.init_from's weights, else nothing."""
    fetched, resume = None, config.checkpoint.resume
    if config.checkpoint.remote is not None:
        fetched = checkpoint.fetch_missing(config.train.dir, config.checkpoint.remote, resume, notes.append, damaged, _tell)
    resumed = fetched or checkpoint.choose(config.train.dir, resume, notes.append, damaged)
    if resumed is None:
        if config.checkpoint.init_from is None:
            return Source()
        if sources.kind_of(config.checkpoint.init_from)[0] is not None:
            sources.open_for(config.checkpoint.init_from, config.model, plan.vocab_size)
            said = f"beginning with the weights of {config.checkpoint.init_from}"
            return Source(foreign=config.checkpoint.init_from, notes=(said,))
        first = checkpoint.find(config.checkpoint.init_from, notes.append)
        changes = checkpoint.check_start(first, config, plan, tokenizer.files())
        said = (f"beginning with the weights of {first}", *(f"changed: {difference}" for difference in changes))
        return Source(first, weights_only=True, replaces_all=checkpoint.replaces_all(first, plan), notes=said)
    manifest = checkpoint.read_manifest(resumed)
    step, consumed = manifest["step"], manifest["consumed_samples"]
    changes = checkpoint.check_resume(resumed, config, plan, tokenizer.files())
    said = (f"going on from step {step}, {resumed}", *(f"changed: {difference}" for difference in changes))
    # Of any that may have to stand in for it, too.
    replaces_all = all(checkpoint.replaces_all(path, plan) for path in checkpoint.whole(config.train.dir))
    return Source(resumed, step, consumed, replaces_all=replaces_all, finished=step >= _last_step(config), notes=said)


def _tell(line: str) -> None:
    """At once: it may take long until there is a logger."""
    print(f"megalm: {line}", flush=True)


def _restore(config: Config, groups: Groups, tokenizer: Tokenizer, engine: Engine, source: Source, notes: list[str]) -> Source:
    """Load the source into the engine, or the newest checkpoint before it that isn't damaged; returns the one that was loaded.

    Raises CheckpointError on all ranks when it can't be loaded for another reason, or none is whole.
    """
    damaged: list[Path] = []
    while source.path is not None:
        try:
            notes.extend(checkpoint.load(source.path, engine, groups, weights_only=source.weights_only,
                                         allow_changes=config.checkpoint.allow_changes))
            break
        except DamagedError as error:
            if source.weights_only:
                raise
            damaged.append(source.path)
            if groups.rank == 0:  # at once: the next may be damaged too, and then this is why
                _tell(f"skipped {source.path.name}: {error}")
        source = groups.from_first(lambda: _source(config, groups.plan, tokenizer, notes, damaged))
    if source.foreign is not None:
        sources.load_foreign(source.foreign, engine, groups, config.model, groups.plan.vocab_size)
    return source


def _last_step(config: Config) -> int:
    """The step after which this invocation leaves."""
    return min(config.train.steps, config.train.stop_at or config.train.steps)


def _nothing_to_do(groups: Groups, config: Config, step: int, stop: StopSignal) -> int:
    """Only what an earlier run had to leave uncopied."""
    if config.checkpoint.remote is not None:
        copies = checkpoint.uploads_of(config.train.dir, groups, config, _tell if groups.rank == 0 else lambda line: None)
        with contextlib.closing(copies):
            copies.offer(step, earlier=True)
            copies.finish(lambda: stop.kind != GOING_ON)
    if groups.rank == 0:
        asked, key = _last_step(config), "train.steps"
        if asked < config.train.steps:
            key = "train.stop_at"
        print(f"the run is finished: step {step} is done and {key} is {asked}; a larger one goes on", flush=True)
    return 0


def _loaders(held: contextlib.ExitStack, config: Config, groups: Groups, tokenizer: Tokenizer,
             source: Source) -> tuple[Loader, Loader | None]:
    """Training and validation micro-batches of this rank; the sample indices are built once per filesystem."""
    return groups.agreed(lambda: tuple(held.enter_context(loader) if loader is not None else None
                                       for loader in _new_loaders(config, groups, tokenizer, source)))


def _new_loaders(config: Config, groups: Groups, tokenizer: Tokenizer, source: Source) -> tuple[Loader, Loader | None]:
    plan, data = groups.plan, config.data

    def loader(sources: Sequence, samples: int, global_batch: int) -> Loader:
        cache = groups.agreed(lambda: cache_folder(data.cache, [source.path for source in sources], config.train.dir))
        arguments = (sources, config.model.seq_length, samples, data_seed(config), cache)
        groups.once_per_filesystem(lambda: build_dataset(*arguments), cache)
        dataset = groups.agreed(lambda: build_dataset(*arguments))
        return Loader(dataset, global_batch=global_batch, micro_batch=plan.micro_batch, dp=plan.dp,
                      dp_rank=groups.place.dp, needs_tokens=groups.place.pp in (0, plan.pp - 1), eod=tokenizer.eod,
                      mask_eod=data.mask_eod, documents=data.document_mask or data.reset_positions,
                      vocab_size=tokenizer.vocab_size)

    samples = source.consumed + (config.train.steps - source.step) * plan.global_batch
    training = loader(data.train, samples, plan.global_batch)
    if not data.valid:
        return training, None
    # An evaluation takes as many micro-batches as its samples fill, at most a step's.
    samples, row = config.train.eval_samples, plan.micro_batch * plan.dp
    return training, loader(data.valid, samples, min(plan.global_batch, -(-samples // row) * row))


def data_seed(config: Config) -> int:
    """The seed of the order of samples."""
    return config.train.seed if config.data.seed is None else config.data.seed


def _loop(run: Run, first: int) -> int:
    """Steps `first`, first + 1, ... until the end, a stop, a checkpoint that can't be written, or too many bad steps in a row."""
    try:
        return _steps(run, first)
    except CheckpointError as error:
        run.saver.copies.finish(lambda: run.stop.kind != GOING_ON)  # of one that is whole
        return _give_up(run, str(error), USER_ERROR)


def _steps(run: Run, first: int) -> int:
    config, last = run.config, run.config.train.steps
    bad, asked = 0, GOING_ON
    for step in range(first, last):
        result = run.engine.train_step(step, run.loader.batch(run.consumed))
        done = step + 1
        run.consumed += run.groups.plan.global_batch
        bad = bad + 1 if result.bad else 0
        run.logger.step(done, result, run.consumed)
        if result.bad and not result.skipped:
            return _stopped(run, f"step {done} changed the weights with a loss or gradients that are not finite", first)
        if bad == config.train.max_bad_steps:
            return _stopped(run, f"{bad} steps in a row with non-finite loss or gradients", first)
        asked, copying, saving = run.groups.highest(run.stop.kind, run.saver.copies.state, run.saver.state)
        run.saver.copies.progress(copying)  # before a checkpoint that is whole now begins to be copied
        run.saver.progress(saving)
        eval_loss = None
        if asked == GOING_ON and config.train.eval_every and (_due(done, config.train.eval_every) or done == last):
            eval_loss, asked = _evaluate(run, done)
        leaving = done == _last_step(config) or asked != GOING_ON
        if leaving:
            _last_save(run, done, eval_loss, asked)
            break
        if _due(done, config.checkpoint.every):
            run.saver.save(done, run.consumed, eval_loss)
    for line in told(run.loader.dataset.taken(run.consumed)):
        run.logger.note(f"data until step {done}: {line}")
    if done < last:
        run.logger.note(f"stopped after step {done} of {last}: the same command without train.stop_at goes on from here"
                        if config.train.stop_at else f"stopped after step {done} of {last}: the same command goes on from here")
    return PREEMPTED if asked == PREEMPTION and done < _last_step(config) else 0


def _last_save(run: Run, done: int, eval_loss: float | None, asked: int) -> None:
    """Save what nothing would save later: a failure (a writer that was killed, a full disk) is met with a second attempt. Then
    wait for copies elsewhere, unless the ranks must leave at once, or are asked to stop, or once more, meanwhile.

    Raises CheckpointError when the second attempt fails too.
    """
    try:
        run.saver.finish()  # the one before: its failure is none of this one's attempts
    except CheckpointError as error:
        run.logger.note(str(error))
    for last in (False, True):
        try:
            run.saver.save(done, run.consumed, eval_loss)
            run.saver.finish()
        except CheckpointError as error:
            if last and run.saver.saved != done:
                raise
            run.logger.note(str(error))
        if run.saver.saved == done:
            break
    run.saver.copies.finish(lambda: asked == PREEMPTION or run.stop.kind > asked or run.stop.insisted)


def _stopped(run: Run, why: str, first: int) -> int:
    """Give up on the training, not because of the user. A checkpoint on its way is of better times."""
    try:
        run.saver.finish()
    except CheckpointError as error:
        run.logger.note(str(error))
    run.saver.copies.finish(lambda: run.stop.kind != GOING_ON)
    saved = run.saver.saved or first
    kept = f"the newest checkpoint is that of step {saved}" if saved else "there is no checkpoint yet"
    return _give_up(run, f"stopped: {why}; {kept}", FAILED)


def _give_up(run: Run, why: str, code: int) -> int:
    """Every rank says why, since a launcher shows the log of whichever leaves first; none leaves before rank 0 has closed."""
    print(f"error: {why}", file=sys.stderr, flush=True)
    run.logger.close()
    return code


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _evaluate(run: Run, step: int) -> tuple[float | None, int]:
    """Token-mean loss over train.eval_samples validation samples, the same ones each time, and what the ranks were asked
    meanwhile: whoever asks for a stop doesn't wait for the rest, and there is no loss then."""
    loss, tokens, asked = 0.0, 0, GOING_ON
    if run.valid is None:
        return None, asked
    for number, first in enumerate(run.valid.starts, 1):
        more_loss, more_tokens = run.engine.evaluate(run.valid.batch(first))
        loss, tokens = loss + more_loss, tokens + more_tokens
        [asked] = run.groups.highest(run.stop.kind)
        if asked != GOING_ON and number < len(run.valid.starts):
            return None, asked
    mean = loss / max(tokens, 1)
    run.logger.evaluation(step, mean)
    return mean, asked
