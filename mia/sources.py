"""Where rows come from: a file of a dataset on the hub or a local one, read piece by piece, under our column names.

A source is `hf://datasets/OWNER/NAME@COMMIT/FILE`, or the path of a Parquet, CSV, TSV, JSON or JSON Lines file. The hub
is reached through huggingface_hub, so its cache, token and offline mode are where that library looks for them
(`HF_HOME`, `HF_TOKEN`, `HF_HUB_OFFLINE`).
"""

from __future__ import annotations

import contextlib
import errno
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence

import polars as pl

from mia.config import COMMIT_TO_FILL_IN
from mia.errors import UserError

TYPES = {
    "url": pl.String, "caption": pl.String, "language": pl.String, "width": pl.Int32, "height": pl.Int32,
    "aesthetic": pl.Float32, "similarity": pl.Float32, "punsafe": pl.Float32, "pwatermark": pl.Float32,
}  # fmt: skip
COLUMNS = tuple(TYPES)
HUB = "hf://"
# Rows taken at a time from a Parquet file. Left to itself, polars holds several whole row groups, and LAION's are large
# (measured: 650 MB for groups of 500,000 rows, 1.5 GB for one of 5 million).
PIECE_ROWS = 131_072

_SPEC = re.compile(r"hf://datasets/(?P<repo>[^/@]+/[^/@]+)(?:@(?P<revision>[^/]+))?/(?P<file>.+)")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_FORM = "write hf://datasets/OWNER/NAME@COMMIT/FILE"


def fetch(source: str) -> pathlib.Path:
    """The local path of `source`: its own, or that of the hub's file in the cache, downloaded if it is not there yet.

    A download that broke off is taken up again; a cached file is not asked for twice.

    Raises:
        UserError: no such file, a revision that is no commit, or the hub does not give the file; it says which and why.
    """
    if not source.startswith(HUB):
        if not pathlib.Path(source).is_file():
            raise UserError("source does not exist", source, "mend its path")
        return pathlib.Path(source)
    found = _SPEC.fullmatch(source)
    if not found:
        raise UserError("source is no file of a dataset on the hub", source, _FORM)
    repo, revision, file = found["repo"], found["revision"] or "main", found["file"]
    if not _COMMIT.fullmatch(revision):
        known = _commit(repo, "main" if revision == COMMIT_TO_FILL_IN else revision, file)
        fix = f"write hf://datasets/{repo}@{known or COMMIT_TO_FILL_IN}/{file}"
        if not known:
            fix += f" with one of https://huggingface.co/datasets/{repo}/commits/main"
        raise UserError(f"'{revision}' is no commit of 40 hex digits, so the source may change", source, fix)
    return _download(repo, revision, file, source)


def _download(repo: str, revision: str, file: str, source: str) -> pathlib.Path:
    import huggingface_hub
    from huggingface_hub import errors

    try:
        return pathlib.Path(huggingface_hub.hf_hub_download(repo, file, repo_type="dataset", revision=revision))
    except errors.GatedRepoError as problem:
        fix = f"accept its terms at {huggingface_hub.constants.ENDPOINT}/datasets/{repo} and set HF_TOKEN"
        raise UserError("dataset is gated and gives this user nothing", source, fix) from problem
    except errors.RepositoryNotFoundError as problem:
        raise UserError("hub has no such dataset, or it is private", source, "mend it, or set HF_TOKEN") from problem
    except errors.RevisionNotFoundError as problem:
        raise UserError("dataset has no such commit", source, "take one from its history") from problem
    except errors.RemoteEntryNotFoundError as problem:
        raise UserError("dataset has no such file at this commit", source, "see its list of files") from problem
    except errors.LocalEntryNotFoundError as problem:
        offline = huggingface_hub.constants.HF_HUB_OFFLINE
        what = "is not in the cache, and HF_HUB_OFFLINE forbids a download" if offline else "cannot be had from the hub"
        fix = "unset it and run this once" if offline else "see whether the network and HF_ENDPOINT are right"
        raise UserError(f"source {what}", source, fix) from problem
    except errors.HFValidationError as problem:
        raise UserError("source names no dataset", source, _FORM) from problem
    except (errors.HTTPError, OSError) as problem:  # any other answer of the hub, a lost connection, a full disk
        if isinstance(problem, OSError) and problem.errno == errno.ENOSPC:
            raise _unreadable(problem, source) from problem
        fix = "run this again; a download goes on where it broke off"
        raise UserError(f"download failed ({problem})", source, fix) from problem


def _commit(repo: str, revision: str, file: str) -> str:
    """The commit that a branch or tag now stands for, by the hub, else by the cache, else empty."""
    import huggingface_hub
    from huggingface_hub import errors

    failures = errors.HTTPError, OSError, ValueError  # this only completes a message
    with contextlib.suppress(*failures):
        return huggingface_hub.HfApi().dataset_info(repo, revision=revision).sha or ""
    with contextlib.suppress(*failures):
        cached = huggingface_hub.try_to_load_from_cache(repo, file, revision=revision, repo_type="dataset")
        if isinstance(cached, str):
            return pathlib.Path(cached).parts[-1 - len(pathlib.PurePosixPath(file).parts)]
    return ""


def scan(path: pathlib.Path) -> list[pl.LazyFrame]:
    """The rows at `path` in pieces, by its ending: .csv, .tsv, .jsonl, .ndjson (each also .gz), .json, else Parquet.

    A piece is what may be in memory at a time. Formats but Parquet are one piece, which polars streams by itself; only
    .json is read whole. Columns of CSV are String.

    Raises:
        UserError: the file is missing or is not what its ending says; the rest of it is read when the rows are.
    """
    kind = pathlib.Path(path.name.removesuffix(".gz")).suffix
    with reading(path):
        if not path.is_file():
            raise UserError("source does not exist", path, "mend its path")
        if kind in (".csv", ".tsv"):
            found = [pl.scan_csv(path, separator="," if kind == ".csv" else "\t", infer_schema=False)]
        elif kind in (".jsonl", ".ndjson"):
            found = [pl.scan_ndjson(path, infer_schema_length=None)]
        elif kind == ".json":
            found = [pl.read_json(path, infer_schema_length=None).lazy()]
        else:
            rows = pl.scan_parquet(path)
            total = rows.select(pl.len()).collect().item()  # from the footer
            found = [rows.slice(start, PIECE_ROWS) for start in range(0, max(total, 1), PIECE_ROWS)]
        found[0].collect_schema()
        return found


def named(pieces: Sequence[pl.LazyFrame], columns: Mapping[str, str], where: object) -> list[pl.LazyFrame]:
    """`pieces` with the columns of `TYPES`, in that order: named, cast, NaN made null; absent optional ones all null.

    Args:
        columns: our name -> the source's name.

    Raises:
        UserError: a name that is none of ours, no url or no caption, or a mapped column that the source lacks. A value
            that cannot be read as its type shows only when the rows are read; see `reading`.
    """
    for name in (*(set(columns) - set(TYPES)), *({"url", "caption"} - set(columns))):
        problem = "has no source's column" if name in TYPES else "is no column of ours"
        raise UserError(
            f"'{name}' {problem}", "metadata.columns or --column", f"map url, caption and any of {COLUMNS[2:]}"
        )
    schema = pieces[0].collect_schema()
    for ours, theirs in columns.items():
        if theirs not in schema:
            there = f"map it in metadata.columns or by --column; it has {schema.names()}"
            raise UserError(f"source has no column '{theirs}' for '{ours}'", where, there)
    wanted = [
        _cast(pl.col(columns[name]), schema[columns[name]], kind).alias(name)
        if name in columns
        else pl.lit(None, kind).alias(name)
        for name, kind in TYPES.items()
    ]
    return [piece.select(wanted) for piece in pieces]


def _cast(column: pl.Expr, found: pl.DataType, wanted: type[pl.DataType]) -> pl.Expr:
    if found == pl.String and wanted != pl.String:
        column, found = column.cast(pl.Float64), pl.Float64()  # "640.0" is a width, too
    if found.is_float():
        column = column.fill_nan(None)
    return column.cast(wanted)


def clean_caption(caption: pl.Expr) -> pl.Expr:
    """Control and format characters become spaces, runs of white space one space, and none stands at the ends."""
    return caption.str.replace_all(r"[\p{Cc}\p{Cf}\p{Zl}\p{Zp}]", " ").str.replace_all(r"\s+", " ").str.strip_chars()


@contextlib.contextmanager
def reading(where: object) -> Iterator[None]:
    """Turns what polars says of a source that it cannot read, or of a disk that is full, into a `UserError`."""
    try:
        yield
    except pl.exceptions.InvalidOperationError as problem:
        raise UserError(f"a column cannot be read as its type ({problem})", where, "mend the source") from problem
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException, OSError) as problem:
        raise _unreadable(problem, where) from problem


def _unreadable(problem: BaseException, where: object) -> UserError:
    if getattr(problem, "errno", None) == errno.ENOSPC or "No space left on device" in str(problem):
        return UserError("disk is full", where, "make room and run this again")
    return UserError(f"source cannot be read ({problem})", where, "fetch it anew")
