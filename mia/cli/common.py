"""What every command shares: flags made from a stage's options, provenance, progress, images by sample."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
import sys
import time
import typing
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import click
import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

import mia
from mia import tables
from mia.config import COMMANDS, FeaturesOptions, flag_name, refuse_out_of_range
from mia.errors import UserError

PATH = click.Path(path_type=pathlib.Path)


def one(flag: str, help: str, **settings: Any) -> Callable:
    """A required flag that takes one path."""
    return click.option(flag, type=PATH, help=help, **{"required": True, **settings})


def many(flag: str, name: str, help: str) -> Callable:
    """A flag that takes one path each time it is given, at least once."""
    return click.option(flag, name, type=PATH, multiple=True, required=True, help=help)


def stage_options(stage: str, name: str = "options") -> Callable:
    """Flags for every field of the stage's options; the command gets the frozen dataclass as `name`."""
    kind = COMMANDS[stage]
    hints = typing.get_type_hints(kind)

    def decorate(command: Callable) -> Callable:
        def with_options(**values: Any) -> Any:
            chosen = {f.name: values.pop(f.name) for f in dataclasses.fields(kind)}
            refuse_out_of_range(stage, chosen)
            return command(**{name: kind(**chosen)}, **values)

        with_options.__name__, with_options.__doc__ = command.__name__, command.__doc__
        with_options.__click_params__ = getattr(command, "__click_params__", [])  # type: ignore[attr-defined]
        for field in reversed(dataclasses.fields(kind)):
            with_options = _flag(field, hints[field.name])(with_options)
        return with_options

    return decorate


def _flag(field: dataclasses.Field, hint: Any) -> Callable:
    name = flag_name(field.name)
    if hint is bool:
        return click.option(f"--{name}/--no-{name}", field.name, default=field.default)
    if typing.get_origin(hint) is tuple:
        kind = typing.get_args(hint)[0]
        text = ",".join(str(v) for v in field.default)  # type: ignore[union-attr]
        return click.option(
            f"--{name}", field.name, default=text, callback=listed(kind), metavar=f"{kind.__name__},..."
        )
    return click.option(f"--{name}", field.name, type=hint, default=field.default)


def listed(kind: type) -> Callable:
    """A click callback that reads comma-separated values of one kind as a tuple."""

    def parse(context: click.Context, parameter: click.Parameter, text: str) -> tuple:
        try:
            return tuple(kind(word.strip()) for word in text.split(",") if word.strip())
        except ValueError as problem:
            raise click.BadParameter(f"'{text}' is not a comma-separated list of {kind.__name__}") from problem

    return parse


seed_option = click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, help="Seed of all randomness.")
device_option = click.option("--device", default="cpu", help="Torch device; never falls back in silence.")
workers_option = click.option(
    "--workers", type=click.IntRange(1), default=1, help="Processes to fit in; changes no result."
)
batch_option = click.option(
    "--batch-size", type=click.IntRange(1), default=64, help="Rows per call; changes no result."
)


def made_by(stage: str, options: Any, seed: int | None, inputs: Iterable[object], **more: Any) -> dict[str, Any]:
    """What stands in an output's file metadata. Inputs are named by content, so that no path gets in."""
    return {
        "stage": stage,
        **_chosen(options),
        "seed": seed,
        "inputs": sorted(tables.file_hash(path)[:16] for path in inputs),
        "libraries": {"mia": mia.__version__}
        | tables.library_versions(("numpy", "pyarrow", *more.pop("libraries", ()))),
        **more,
    }


def _chosen(options: Any) -> dict[str, Any]:
    plain = dataclasses.asdict(options) if options is not None else {}
    digest = hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:16]
    return {"version": getattr(options, "version", 1), "options": plain, "config_hash": digest}


def features_options(made: dict[str, Any]) -> FeaturesOptions:
    """The options that a features table's provenance tells of; what it does not tell of stands at its default."""
    names = {field.name for field in dataclasses.fields(FeaturesOptions)}
    said = {name: value for name, value in made.get("options", {}).items() if name in names}
    plain: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in said.items()}
    return FeaturesOptions(**plain)


def refuse_other_options(paths: Iterable[object], options: Any, what: str, fix: str) -> None:
    """Refuse files that were made under other options than these, or by another version."""
    now = _chosen(options)
    for path in paths:
        before = tables.provenance(path)
        if any(before.get(name) != now[name] for name in ("config_hash", "version")):
            raise UserError(f"{what} under other options or by another version", path, fix)


def image_bytes(paths: Iterable[object], ids: Iterable[str]) -> dict[str, bytes]:
    """Original bytes of the named samples, by sample id: all in memory.

    Raises:
        UserError: one of them has no usable image.
    """
    return {name: data for some in images_of(paths, ids) for name, data in zip(*some, strict=True)}


def image_statistics(paths: Iterable[object], ids: Sequence[str]) -> np.ndarray:
    """`blind.of_images` of the named samples in the order of `ids`, float64[n, k]; the bytes leave batch by batch.

    Raises:
        UserError: one of them has no usable image.
    """
    from mia import blind

    place = {name: row for row, name in enumerate(ids)}
    found = np.empty((len(ids), len(blind.IMAGE_STATISTICS)))
    for names, data in images_of(paths, ids):
        found[[place[name] for name in names]] = blind.of_images(names, data)
    return found


def images_of(paths: Iterable[object], ids: Iterable[str]) -> Iterator[tuple[list[str], list[bytes]]]:
    """Ids and original bytes of the named samples, of a batch at a time; an error at the end if one did not come."""
    absent = dict.fromkeys(ids)
    asked = pa.array(absent, pa.string())
    for batch in tables.batches(paths, "images", 16):  # a batch is in memory several times over
        mine = batch.filter(pc.and_(pc.is_in(batch["sample_id"], asked), pc.equal(batch["status"], "ok")))
        names = mine["sample_id"].to_pylist()
        for name in names:
            absent.pop(name, None)
        if names:
            yield names, mine["bytes"].to_pylist()
    if absent:
        what = f"{len(absent)} samples have no image, the first is {next(iter(absent))}"
        raise UserError(what, "--images", "give the shards that hold them")


def frame(path: pathlib.Path, name: str, columns: tuple[str, ...] | None = None) -> pl.DataFrame:
    """Table `name` as a data frame."""
    return pl.DataFrame(pl.from_arrow(tables.read(path, name, columns)))


def column_names(pairs: Iterable[str]) -> dict[str, str]:
    """Our name -> the source's, of words such as `caption=TEXT`; without any, url and caption are called so.

    Raises:
        UserError: a word without `=`.
    """
    wrong = [pair for pair in pairs if "=" not in pair]
    if wrong:
        raise UserError(f"'{wrong[0]}' names no column", "--column", "write OURS=THEIRS, as in caption=TEXT")
    return dict(pair.split("=", 1) for pair in pairs) or {c: c for c in ("url", "caption")}


def embeddings_of(paths: Iterable[object], rows: pa.Table) -> pa.Table:
    """The embeddings of the samples of `rows`, in the same order; of the others one shard is in memory at a time."""
    wanted, parts = rows["sample_id"].combine_chunks(), []
    for path in paths:
        shard = tables.read(path, "embeddings")
        parts.append(shard.filter(pc.is_in(shard["sample_id"], wanted)))
    found = pa.concat_tables(parts).sort_by("sample_id")
    if found["sample_id"].to_pylist() != wanted.to_pylist():
        raise UserError("embeddings lack samples of the dataset", "--embeddings", "give every shard")
    return found


def manifest(path: pathlib.Path) -> dict:
    """The content of a target's manifest."""
    try:
        return json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as problem:
        raise UserError(f"target manifest cannot be read ({problem})", path, "run `mia target`") from problem


def target_folder(path: pathlib.Path) -> tuple[pathlib.Path, dict]:
    """The model folder that a target's manifest names, and the manifest."""
    from mia import models

    about = manifest(path)
    return models.locate(about["source"], about["revision"]), about


def write_json(path: pathlib.Path, content: Any) -> None:
    """Put `content` at `path` at once, as sorted, indented JSON."""
    with tables.replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n")


def plain(schema: pa.Schema) -> pa.Schema:
    """A schema without its fields' nullability, which data frames do not know."""
    return pa.schema([pa.field(f.name, f.type) for f in schema])


def write_dropped(path: Any, counts: list[tuple], made: dict, rows_in: int, rows_out: int) -> None:
    """Write the dropped table, holding rows in = rows out + rows dropped."""
    total = sum(count for *_, count in counts)
    if rows_in != rows_out + total:
        raise AssertionError(f"{rows_in} rows in, {rows_out} out, {total} dropped")
    schema = tables.SCHEMAS["dropped"]
    table = pa.Table.from_pylist([dict(zip(schema.names, count, strict=True)) for count in counts], schema=schema)
    tables.write(path, table, "dropped", made)


def say(line: str) -> None:
    """One line for the person who runs the command, on stderr."""
    click.echo(line, err=True)


def progress(what: str) -> Callable[[Iterable], Iterator]:
    """A wrapper for an iterable: a bar on a terminal, else one line at most every 30 seconds."""

    def wrap(items: Iterable) -> Iterator:
        from tqdm import tqdm

        if sys.stderr.isatty():
            return iter(tqdm(items, desc=what))
        return _lines(items, what)

    return wrap


def _lines(items: Iterable, what: str) -> Iterator:
    total = len(items) if hasattr(items, "__len__") else None  # type: ignore[arg-type]
    start = said = time.monotonic()
    for done, item in enumerate(items):
        now = time.monotonic()
        if done and now - said >= 30:
            rate = done / (now - start)
            left = f", {(total - done) / rate:.0f} s left" if total else ""
            click.echo(f"{what}: {done} of {total or '?'}, {rate:.2f}/s{left}", err=True)
            said = now
        yield item
