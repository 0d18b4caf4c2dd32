"""What follows from a config on a cluster: degrees, who sits where, layers, batch, bytes on each rank, FLOPs.

It needs no GPU and no torch.

    megalm plan configs/llama3_70b.json --nodes 8 --gpus-per-node 8 [--json] [section.key=value ...]

Without --nodes and --gpus-per-node the plan is for the smallest cluster that the config fits.
"""
from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megalm.config import Config, ConfigError, load
from megalm.data.tokenizer import load_tokenizer
from megalm.plan import Plan, PlanError, flops, make_plan
from megalm.plan.memory import memory
from megalm.plan.parameters import model_size
from megalm.tools._command import Parser, counted, positive, run

USUAL_GPUS_PER_NODE = 8
MANY_ROWS = 16


def main(argv: Sequence[str] | None = None) -> int:
    """The program; returns 0, or 2 with one line a mistake."""
    parser = _Intermixed(prog="megalm plan", description=__doc__.partition("\n\n")[0])
    parser.add_argument("config", help="the JSON file")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="values in place of the file's")
    parser.add_argument("--nodes", type=positive, help="machines of the cluster")
    parser.add_argument("--gpus-per-node", type=positive, help=f"default with --nodes: {USUAL_GPUS_PER_NODE}")
    parser.add_argument("--json", action="store_true", help="everything, every rank's place included, as one JSON object")
    return run(parser, _plan, argv)


class _Intermixed(Parser):
    """Overrides may stand after options."""

    def parse_args(self, args=None, namespace=None):
        return self.parse_intermixed_args(args, namespace)


def _plan(arguments: argparse.Namespace) -> int:
    try:
        config = load(arguments.config, arguments.overrides)
        nodes, gpus = cluster(config, arguments.nodes, arguments.gpus_per_node)
        plan = make_plan(config, nodes * gpus, tokenizer_size(config))
    except (ConfigError, PlanError) as error:
        print("\n".join(f"error: {problem}" for problem in error.problems), file=sys.stderr, flush=True)
        return 2
    facts = describe(config, plan, nodes, gpus)
    print(json.dumps(facts, indent=1) if arguments.json else "\n".join(table(arguments.config, config, plan, facts)))
    return 0


def cluster(config: Config, nodes: int | None, gpus_per_node: int | None) -> tuple[int, int]:
    """(nodes, GPUs a node): as asked for; else the smallest that fits, in nodes of the usual size."""
    if nodes is not None or gpus_per_node is not None:
        return nodes or 1, gpus_per_node or USUAL_GPUS_PER_NODE
    parallel = config.parallel
    ranks = parallel.tp * parallel.pp * (1 if parallel.dp == "auto" else parallel.dp)
    if ranks % USUAL_GPUS_PER_NODE:
        return 1, ranks
    return ranks // USUAL_GPUS_PER_NODE, USUAL_GPUS_PER_NODE


def tokenizer_size(config: Config) -> int | None:
    """The tokenizer's vocabulary; None where its file isn't here. Raises DataError if the file is no such tokenizer."""
    path = config.tokenizer.path
    if path is not None and not Path(path).is_file():
        return None
    return load_tokenizer(config.tokenizer).vocab_size


def describe(config: Config, plan: Plan, nodes: int, gpus_per_node: int) -> dict[str, Any]:
    """All facts as plain JSON values."""
    stages = []
    for pp, held in enumerate(memory(config, plan)):
        layers = plan.stage_layers(pp)
        sizes = dataclasses.asdict(held)
        stages.append({
            "stage": pp, "layers": list(layers), "transformer_layers": sum(name.startswith("layers.") for name in layers),
            "parameters_per_rank": sizes.pop("parameters"), "bytes_per_rank": {**sizes, "total": held.total}})
    notes = list(plan.notes)
    if gpus_per_node % plan.tp:
        notes.append(f"tp groups of {plan.tp} ranks cross nodes of {gpus_per_node} GPUs: slow")
    return {
        "nodes": nodes, "gpus_per_node": gpus_per_node, "plan": {**plan.to_dict(), "notes": notes},
        "parameters": model_size(config, plan), "tokens_per_step": plan.global_batch * config.model.seq_length,
        "flops_per_token": flops.per_token(config, plan.padded_vocab_size),
        "flops_per_token_executed": flops.per_token_executed(config, plan.padded_vocab_size, plan.backends["attention"]),
        "stages": stages, "ranks": [list(plan.place(rank)) for rank in range(plan.world_size)]}


def table(name: str, config: Config, plan: Plan, facts: dict[str, Any]) -> Iterator[str]:
    """The facts for people, line by line."""
    model, executed = facts["flops_per_token"], facts["flops_per_token_executed"]
    nodes = f"{facts['nodes']} nodes x " if facts["nodes"] > 1 else ""
    yield f"{name}: {nodes}{facts['gpus_per_node']} GPUs = {counted(plan.world_size, 'rank')}"
    yield ""
    yield f"degrees     tp {plan.tp} x pp {plan.pp} x dp {plan.dp}" + (", sequence parallel" if plan.sequence_parallel else "")
    yield f"model       {facts['parameters']:,} parameters, vocabulary {plan.vocab_size:,} padded to {plan.padded_vocab_size:,}"
    yield f"batch       {plan.global_batch} = micro {plan.micro_batch} x dp {plan.dp} x accumulation {plan.accumulation_steps}"
    yield f"step        {facts['tokens_per_step']:,} tokens, {model * facts['tokens_per_step']:.3g} FLOPs"
    again = f", {executed:.3g} with recompute {config.recompute.mode}" if executed > model else ""
    yield f"token       {model:.3g} FLOPs{again}"
    yield f"pipeline    {config.parallel.schedule}, each stage waits {plan.bubble:.1%} of a step"
    yield f"optimizer   {config.optimizer.name}, {config.precision.dtype}, ZeRO {plan.zero_stage} (DeepSpeed: {plan.wrapper})"
    yield f"kernels     {', '.join(f'{operation} {backend}' for operation, backend in plan.backends.items())}"
    for note in facts["plan"]["notes"]:
        yield f"note        {note}"
    yield ""
    yield from stage_rows(facts["stages"])
    yield ""
    yield from rank_rows(plan, facts["gpus_per_node"])


def stage_rows(stages: list[dict[str, Any]]) -> Iterator[str]:
    """One row a run of stages with equal layers, with the bytes of its first: it keeps the most micro-batches in flight."""
    fullest = max(stage["bytes_per_rank"]["total"] for stage in stages)
    unit, size = ("GiB", 2**30) if fullest >= 2**30 else ("MiB", 2**20)
    yield f"{unit} on each rank of a stage (of several, the first):"
    columns = list(stages[0]["bytes_per_rank"])
    yield f"{'stage':>7} {'layers':>7} {'parameters':>16} " + " ".join(f"{column:>11}" for column in columns)
    for _, same in itertools.groupby(stages, key=lambda stage: (stage["transformer_layers"], stage["parameters_per_rank"])):
        stage, *others = same
        span = f"{stage['stage']}-{others[-1]['stage']}" if others else f"{stage['stage']}"
        sizes = " ".join(f"{stage['bytes_per_rank'][column] / size:>11.2f}" for column in columns)
        yield f"{span:>7} {stage['transformer_layers']:>7} {stage['parameters_per_rank']:>16,} {sizes}"


def rank_rows(plan: Plan, gpus_per_node: int) -> Iterator[str]:
    """Who sits where: a row a tp group, the middle of many left out."""
    yield "who sits where:"
    groups = plan.tp_groups()
    width = len(str(plan.world_size - 1))
    shown = groups if len(groups) <= MANY_ROWS else [*groups[:MANY_ROWS - 2], None, groups[-1]]
    for group in shown:
        if group is None:
            yield f"    ... {len(groups) - MANY_ROWS + 1} more tp groups, all with --json"
            continue
        place = plan.place(group[0])
        first, last = group[0] // gpus_per_node, group[-1] // gpus_per_node
        node = f"node {first}" if first == last else f"nodes {first}-{last}"
        ranks = f"rank  {group[0]:>{width}}" if plan.tp == 1 else f"ranks {group[0]:>{width}}-{group[-1]:<{width}}"
        yield f"    {ranks}  stage {place.pp}, dp {place.dp}, tp {'0' if plan.tp == 1 else f'0-{plan.tp - 1}'}  ({node})"


if __name__ == "__main__":
    raise SystemExit(main())
