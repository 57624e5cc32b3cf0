"""`linerate train RECIPE --dry-run`: the plan on the screen; nothing is read but the catalog."""

from __future__ import annotations

import dataclasses

from rich.console import Console
from rich.table import Table

from linerate.pipeline.cache import (
    CacheOptions,
    ShardCache,
    cache_need,
    lanes_here,
    open_shards,
    require_room,
)
from linerate.pipeline.host_memory import SampleSize, largest_sample
from linerate.pipeline.order import DEFAULT_WINDOW_SHARDS
from linerate.shards.catalog import Catalog
from linerate.shards.errors import UserError, show_bytes
from linerate.shards.terminal import emit_json
from linerate.train.config import TrainConfig
from linerate.train.config_json import to_plain
from linerate.train.memory import estimate_host_memory, estimate_memory
from linerate.train.monitor_memory import add_monitor, has_monitor
from linerate.train.plan import ShardTable, memory_rows, plan_rows, plan_run
from linerate.train.recipes import Recipe
from linerate.train.switches import resolve_precision, resolve_switches


def dry_run(
    config: TrainConfig,
    *,
    recipe: Recipe,
    shards: str | None,
    cache: CacheOptions,
    world_size: int,
    json: bool,
) -> int:
    """Print the plan of a run over the shards, or over the recipe's own data set; the exit code."""
    catalog = open_shards(shards, cache) if shards else None
    if catalog is None and recipe.num_images is None:
        raise UserError(f"{config.recipe} is for no particular data set; name one with --shards")
    table = ShardTable.of(catalog) if catalog else ShardTable.nominal(recipe.num_images or 0, recipe.sample)
    plan = plan_run(config, table, world_size=world_size)
    memory = estimate_memory(config, rank_batch=plan.rank_batch, num_samples=plan.num_images)
    sample = largest_sample(catalog) if catalog else recipe.sample
    host = estimate_host_memory(config, sample, table, world_size=world_size)
    if has_monitor(config.watch, catalog):
        memory, host = add_monitor(memory, host, config, sample, num_samples=plan.num_images)
    switches = resolve_switches(config, world_size=world_size).words()
    cached = cache_plan(catalog, config, world_size=world_size) if catalog and catalog.bring else None
    if json:
        result = {
            "plan": dataclasses.asdict(plan),
            "memory_bytes": memory,
            "host_memory_bytes": host,
            "host_memory_of": dataclasses.asdict(sample),
            "chance_loss": config.chance_loss,
            "idle_fields": config.idle_fields(),
            "switches": switches,
            "config": to_plain(config),
        }
        emit_json({**result, "cache": cached} if cached else result)
        return 0
    shown = Table(title=f"{config.recipe}: the plan", title_justify="left", show_header=False)
    device = [*memory_rows(memory, of="device"), ("device is", _precision_note(config))]
    for name, value in [*plan_rows(plan), *device, *_host_rows(host, catalog, sample)]:
        shown.add_row(name, value)
    if cached:
        need, budget = show_bytes(cached["need_bytes"]), show_bytes(cached["budget_bytes"])
        shown.add_row("shard cache", f"{need} at a time on this machine, --cache-bytes {budget}")
    for name, state in switches.items():
        shown.add_row(name, state)
    for line in config.idle_fields():
        shown.add_row("does nothing here", line)
    Console().print(shown)
    return 0


def _precision_note(config: TrainConfig) -> str:
    """What the activations were counted in: a plan is often made where there is no GPU."""
    told = f"a rank's, activations in {resolve_precision(config.speed)}"
    if config.speed.precision == "auto":
        told += ", as on this machine; --precision fp32 or bf16 (what a GPU takes) plans for another"
    return told


def _host_rows(
    host: dict[str, int] | None, catalog: Catalog | None, sample: SampleSize
) -> list[tuple[str, str]]:
    """What the loader takes of a rank's host memory, and what was assumed."""
    if host is None:
        return [("host", "not foreseen: the backend has a pipeline of its own")]
    if catalog is None:
        each = f"{sample.pixels:,} pixels in {show_bytes(sample.num_bytes)}"
        assumed = f"if every image had {each}, the mean of the recipe's own data set"
    else:
        height, width, size = catalog.max_height, catalog.max_width, show_bytes(catalog.max_sample_bytes)
        assumed = f"at most: batches of nothing but {width} x {height} pixels in {size}, the catalog's maxima"
    return [*memory_rows(host, of="host"), ("host is", f"a rank's loader, {assumed}")]


def cache_plan(catalog: Catalog, config: TrainConfig, *, world_size: int) -> dict[str, int]:
    """What this machine's ranks read at a time and what the cache may hold, which must not be less."""
    lanes = lanes_here(config.lanes, world_size=world_size)
    require_room(catalog, num_lanes=lanes, window_shards=DEFAULT_WINDOW_SHARDS)
    assert isinstance(catalog.bring, ShardCache)
    need = cache_need(catalog, num_lanes=lanes, window_shards=DEFAULT_WINDOW_SHARDS)
    return {"need_bytes": need, "budget_bytes": catalog.bring.budget}
