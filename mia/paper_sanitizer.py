"""Method `paper` of the sanitize stage: the iterative sanitization of LAION-mi as its authors ran it.

Members are dealt into chunks of about 40 000, each used once. A classifier is trained to tell members from all
non-members; the members of fresh chunks that it takes for non-members survive, and a bigger classifier is trained on
them. After three rounds the survivors of the last are the members. What trained a classifier is spent, so this needs
pools of hundreds of thousands; `mia.sanitize` holds the cross-fitted adaptation for smaller ones.

Two things are ours: first weights and dropout are seeded (the authors seed neither), and text states are float16.

Source: arXiv 2306.12983, `laion-mi/iterative_sanitization.py` of its code; `attacks.md` 1.8.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import pathlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mia import rng, tables
from mia.config import SanitizeOptions
from mia.errors import UserError
from mia.sanitize import ROUNDS, Round, network

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

VERSION = 1
CHUNK_SEED, SPLIT_SEED, LOADER_SEED = 123, 42, 123
EVALUATE_EVERY = 2  # epochs
USED = ("chunk", "keep_above", "hidden_scale", "batch_scale", "learning_rate_scale", "max_epochs")  # of the options
BLOCK_ROWS = 1024  # read or scored at a time: 242 MB of float32 at 77 x 768
CACHED_ROWS = 32  # converted at a time by each thread on a CPU, so that the float16 copy stays in its cache

States = Callable[[np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Pools:
    """What every round works on: states by row number, members dealt into chunks, and all non-members, int64[n]."""

    states: States
    chunks: list[np.ndarray]
    nonmembers: np.ndarray


@dataclasses.dataclass(frozen=True)
class Finished:
    """What a round leaves: rows that survived, the first chunk not yet used, a report, and its weights' SHA-256."""

    survivors: list[int]
    next_chunk: int
    report: dict[str, Any]
    weights: str = ""


def keep_members(
    states: np.ndarray | States,
    member: np.ndarray,
    ids: Sequence[str],
    options: SanitizeOptions,
    seed: int,
    folder: pathlib.Path,
    device: str = "cpu",
) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """Which samples stay, bool[n] (every non-member does), and one report for each round.

    A finished round is kept in `folder` (`round-1.json`, `round-1.safetensors`); a later call with the same samples,
    options and seed goes on after it, to the same result.

    Args:
        states: float16[n, tokens * width], memory-mapped as a rule, or a function from row numbers to such rows; a
            function is asked again for rows that are used again, and must answer the same.
        member: bool[n].
        ids: sample ids, in the order of `member`; they tell whether a folder belongs to these samples.
        device: torch device; the training set of a round, float16, lies on a GPU or in a file in `folder`.

    Raises:
        UserError: too few members, a round that nobody survives, another run's folder, or states that are not finite.

    Source: `attacks.md` 1.8.
    """
    read = states if callable(states) else states.__getitem__
    pools = Pools(read, chunks_of(np.flatnonzero(member), options.chunk), np.flatnonzero(~member))
    if not len(pools.nonmembers):
        raise UserError("there are no non-members", "sanitize", "bring some")
    folder.mkdir(parents=True, exist_ok=True)
    run = _run_name(member, ids, options, seed)
    finished: list[Finished] = []
    for number, spec in enumerate(ROUNDS):
        done = _load(folder, number, run)
        if done is None:
            done = _round(pools, finished, spec, options, seed, folder, device)
            _save(folder, number, run, done)
        finished.append(done)
        log.info("round %(round)d: %(members_kept)d of %(members_in)d members kept, AUC %(auc).3f", done.report)
    keep = ~member
    keep[finished[-1].survivors] = True
    return keep, [done.report for done in finished]


def chunks_of(members: np.ndarray, chunk: int) -> list[np.ndarray]:
    """Members in a fixed random order, dealt into n // chunk chunks of nearly equal size, each at least `chunk`.

    Raises:
        UserError: there are fewer than four chunks: one to train on, and one to choose from in each of three rounds.
    """
    if len(members) < (len(ROUNDS) + 1) * chunk:
        raise _too_few(f"{len(members)} members for chunks of {chunk}", (len(ROUNDS) + 1) * chunk)
    return np.array_split(members[np.random.RandomState(CHUNK_SEED).permutation(len(members))], len(members) // chunk)


def _too_few(what: str, needed: int) -> UserError:
    fix = f"method `paper` needs at least {needed} members; use method `crossfitted` or a smaller chunk"
    return UserError(what, "sanitize.chunk", fix)


# ------------------------------------------------------------------------------------------------ one round


def _round(
    pools: Pools,
    earlier: list[Finished],
    spec: Round,
    options: SanitizeOptions,
    seed: int,
    folder: pathlib.Path,
    device: str,
) -> Finished:
    """Train this round's classifier, then collect survivors from fresh chunks until there are more than `chunk`."""
    import torch

    number, where = len(earlier), torch.device(device)
    start = earlier[-1].next_chunk if earlier else 1
    if start == len(pools.chunks):
        raise _ran_out(pools, number, 0, options.chunk)
    members = np.array(earlier[-1].survivors, dtype=np.int64) if earlier else pools.chunks[0]
    rows = np.concatenate([members, pools.nonmembers])
    positive = np.arange(len(rows)) >= len(members)
    weights_seed = int(rng.stream(seed, f"round {number + 1}", purpose="sanitize").integers(2**31))
    with torch.random.fork_rng(devices=[where] if where.type == "cuda" else []):  # dropout takes no generator
        torch.manual_seed(weights_seed)
        held = hold(pools.states, rows, where, folder)
        net = classifier(held.shape[1], spec, options.hidden_scale).to(where)
        trained = train(net, held, positive, spec, options)
    del held
    _write_weights(folder, number, net)
    nets = [_read_weights(folder, i, net[0].in_features, options).to(where) for i in range(number)] + [net.eval()]
    survivors, next_chunk = _collect(pools, nets, start, number, options, where)
    report = {
        "round": number + 1, "members_in": sum(map(len, pools.chunks[start:next_chunk])),
        "members_kept": len(survivors),
        "nonmembers": len(pools.nonmembers), "trained_on": len(members), "chunks": next_chunk - start,
        "out_of_members": len(survivors) <= options.chunk, **trained,
    }  # fmt: skip
    return Finished(survivors, next_chunk, report)


def _collect(
    pools: Pools, nets: list[torch.nn.Module], start: int, number: int, options: SanitizeOptions, device: torch.device
) -> tuple[list[int], int]:
    """Rows that every classifier takes for non-members, from chunk `start` on, and the first chunk not used.

    The last round may run out of chunks, as in the authors' code: it ends with what there is.
    """
    survivors: list[int] = []
    for position in range(start, len(pools.chunks)):
        survivors += passing(pools.states, pools.chunks[position], nets, options.keep_above, device)
        log.info(
            "round %d: %d survivors after chunk %d of %d", number + 1, len(survivors), position + 1, len(pools.chunks)
        )
        if len(survivors) > options.chunk:
            return survivors, position + 1
    if not survivors or number + 1 < len(ROUNDS):
        raise _ran_out(pools, number, len(survivors), options.chunk)
    return survivors, len(pools.chunks)


def _ran_out(pools: Pools, number: int, found: int, chunk: int) -> UserError:
    """An error with a floor for the members needed: what there are, what this round lacks, a chunk for each to come."""
    lacking = max(chunk - found, 0) + chunk * (len(ROUNDS) - 1 - number)
    have = sum(map(len, pools.chunks))
    return _too_few(f"round {number + 1} ran out of members with {found} survivors of {have}", have + lacking)


def passing(
    states: States, rows: np.ndarray, nets: Sequence[torch.nn.Module], above: float, device: torch.device
) -> list[int]:
    """Those of `rows` that each of `nets` in turn gives a probability above `above`, in their order."""
    import torch

    passed: list[int] = []
    for some in _blocks(rows):
        x = torch.from_numpy(_read(states, some)).to(device).float()
        for net in nets:
            likes_nonmember = (_probability(net, x) > above).cpu()
            x, some = x[likes_nonmember.to(device)], some[likes_nonmember.numpy()]
        passed += some.tolist()
    return passed


def _probability(net: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Of being a non-member, float32[n]."""
    import torch

    with torch.inference_mode():
        return net(x).squeeze(1)


def _blocks(rows: np.ndarray) -> Iterator[np.ndarray]:
    return (rows[first : first + BLOCK_ROWS] for first in range(0, len(rows), BLOCK_ROWS))


def _read(states: States, rows: np.ndarray) -> np.ndarray:
    found = states(rows)
    if found.dtype != np.float16 or found.ndim != 2 or len(found) != len(rows):
        raise UserError(
            f"text states are {found.dtype}{list(found.shape)}", "sanitize", f"give float16[{len(rows)}, width]"
        )
    if not np.isfinite(found).all():
        at = rows[~np.isfinite(found).all(axis=1)][0]
        raise UserError("text states hold NaN or infinity", f"row {at}", "drop the row, or look into the text encoder")
    return found


# ------------------------------------------------------------------------------------------------ training


def classifier(width: int, spec: Round, scale: float) -> Any:
    """The round's network: float32[n, width] to a probability of being a non-member, float32[n, 1]."""
    import torch

    return torch.nn.Sequential(*network(width, spec, scale), torch.nn.Sigmoid())


def hold(states: States, rows: np.ndarray, device: torch.device, folder: pathlib.Path) -> torch.Tensor:
    """States of `rows`, float16[n, width]: on a GPU in its memory, else in an unnamed file, mapped, in `folder`.

    Raises:
        UserError: no room for the file.
    """
    import torch

    shape = (len(rows), _read(states, rows[:1]).shape[1])
    if device.type == "cpu":
        held = torch.from_numpy(_mapped(shape, folder))
    else:
        held = torch.empty(shape, dtype=torch.float16, device=device)
    for number, some in enumerate(_blocks(rows)):
        first = number * BLOCK_ROWS
        held[first : first + len(some)] = torch.from_numpy(_read(states, some)).to(device)
    return held


def _mapped(shape: tuple[int, int], folder: pathlib.Path) -> np.ndarray:
    size = 2 * shape[0] * shape[1]
    with tempfile.TemporaryFile(dir=folder) as file:  # without a name: nothing is left of it when the process is killed
        try:
            os.posix_fallocate(file.fileno(), 0, size)  # a full disk would otherwise kill the process while it writes
        except OSError as problem:
            raise UserError(
                f"no room for {size / 1e9:.1f} GB of text states ({problem})", folder, "free some"
            ) from problem
        return np.memmap(file, np.float16, "r+", shape=shape)


def train(
    net: torch.nn.Module, held: torch.Tensor, positive: np.ndarray, spec: Round, options: SanitizeOptions
) -> dict[str, Any]:
    """Train `net` in place until the validation loss rises; returns epochs, validation losses, and validation AUC.

    The authors' quirks are kept: the classes are not weighted; training mode is set once and evaluation, after two
    epochs, ends it, so dropout is off from then on; the weights are those after the rise; the validation loss is the
    sum of batch means divided by rows, and its rows are shuffled too.

    Args:
        held: states, float16[n, width].
        positive: bool[n], non-members.
    """
    import torch

    batch_size = max(1, int(spec.batch_size * options.batch_scale))
    optimiser = torch.optim.Adam(net.parameters(), lr=spec.learning_rate * options.learning_rate_scale)
    y = torch.from_numpy(positive.astype(np.float32)).unsqueeze(1).to(held.device)
    order = torch.from_numpy(np.random.RandomState(SPLIT_SEED).permutation(len(positive)))
    learn, valid = order[: int(len(order) * 0.8)], order[int(len(order) * 0.8) :]
    loader = torch.Generator().manual_seed(LOADER_SEED)
    losses: list[float] = []
    net.train()
    for epoch in range(1, options.max_epochs + 1):
        for rows, x in feed(held, learn[shuffled(len(learn), loader)], batch_size):
            loss = torch.nn.functional.binary_cross_entropy(net(x), y[rows])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        if epoch % EVALUATE_EVERY == 0:
            net.eval()
            losses.append(validation_loss(net, held, y, valid[shuffled(len(valid), loader)], batch_size))
            if len(losses) > 1 and losses[-1] > losses[-2]:
                break
    return {"epochs": epoch, "validation_losses": losses, "auc": _auc(net.eval(), held, positive, valid, batch_size)}


def shuffled(count: int, generator: torch.Generator) -> torch.Tensor:
    """Row numbers in the order in which torch's DataLoader would shuffle them, int64[count].

    A loader without a generator of its own draws two numbers from the global one: a seed for its workers, then the seed
    of the permutation. Drawing from `generator` gives the authors' order, and leaves dropout out of it.
    """
    import torch

    def draw() -> int:
        return int(torch.empty((), dtype=torch.int64).random_(generator=generator).item())

    draw()
    return torch.randperm(count, generator=torch.Generator().manual_seed(draw()))


def feed(held: torch.Tensor, rows: torch.Tensor, batch_size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Batches of row numbers and their states, float32[batch, width], in one buffer: use it before asking for the next.

    Fresh memory for every batch would cost more than the copy. On a CPU rows are converted a few at a time.
    """
    import torch

    rows = rows.to(held.device)
    size = min(batch_size, len(rows))
    step = min(size, CACHED_ROWS * torch.get_num_threads()) if held.device.type == "cpu" else size
    half = held.new_empty((step, held.shape[1]))
    single = half.new_empty((size, held.shape[1]), dtype=torch.float32)
    for some in rows.split(batch_size):
        for part, out in zip(some.split(step), single[: len(some)].split(step), strict=True):
            out.copy_(torch.index_select(held, 0, part, out=half[: len(part)]))
        yield some, single[: len(some)]


def validation_loss(
    net: torch.nn.Module, held: torch.Tensor, y: torch.Tensor, rows: torch.Tensor, batch_size: int
) -> float:
    """The sum of the batches' mean binary cross-entropies divided by the number of rows."""
    import torch

    total = 0.0
    with torch.inference_mode():
        for some, x in feed(held, rows, batch_size):
            total += float(torch.nn.functional.binary_cross_entropy(net(x), y[some]))
    return total / len(rows)


def _auc(net: torch.nn.Module, held: torch.Tensor, positive: np.ndarray, rows: torch.Tensor, batch_size: int) -> float:
    from mia.metrics import auc

    found = [_probability(net, x).cpu().numpy() for _, x in feed(held, rows, batch_size)]
    return auc(np.concatenate(found).astype(np.float64), positive[rows.numpy()])


# ------------------------------------------------------------------------------------------------ between rounds


def _run_name(member: np.ndarray, ids: Sequence[str], options: SanitizeOptions, seed: int) -> str:
    """What a folder's rounds belong to: 16 hex digits of version, samples, labels, options and seed."""
    words = [str(VERSION), *(f"{name} {getattr(options, name)}" for name in USED), str(seed)]
    words += [f"{name} {int(side)}" for name, side in zip(ids, member, strict=True)]
    return hashlib.sha256("\n".join(words).encode()).hexdigest()[:16]


def _files(folder: pathlib.Path, number: int) -> tuple[pathlib.Path, pathlib.Path]:
    return folder / f"round-{number + 1}.json", folder / f"round-{number + 1}.safetensors"


def _save(folder: pathlib.Path, number: int, run: str, done: Finished) -> None:
    """The JSON goes last: where it stands, the round is finished and its weights are complete."""
    about, weights = _files(folder, number)
    done = dataclasses.replace(done, weights=tables.file_hash(weights))
    with tables.replacing(about) as path:
        path.write_text(json.dumps({"run": run, **dataclasses.asdict(done)}, sort_keys=True) + "\n")


def _load(folder: pathlib.Path, number: int, run: str) -> Finished | None:
    """A finished round of this run, or None.

    Raises:
        UserError: the folder holds another run's, or weights that are not those of the JSON.
    """
    about, weights = _files(folder, number)
    if not about.is_file():
        return None
    try:
        found = json.loads(about.read_text())
        other, done = found.pop("run"), Finished(**found)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as problem:
        raise UserError(f"a finished round cannot be read ({problem})", about, "delete it to run it again") from problem
    if other != run:
        raise UserError("the folder holds rounds of other samples, options or seed", about, "give an empty folder")
    if not weights.is_file() or tables.file_hash(weights) != done.weights:
        raise UserError(
            "a finished round's weights are missing or damaged", weights, f"delete {about.name} to run it again"
        )
    return done


def _write_weights(folder: pathlib.Path, number: int, net: torch.nn.Module) -> None:
    from safetensors.torch import save_file

    with tables.replacing(_files(folder, number)[1]) as path:
        save_file({name: value.cpu().contiguous() for name, value in net.state_dict().items()}, path)


def _read_weights(folder: pathlib.Path, number: int, width: int, options: SanitizeOptions) -> torch.nn.Module:
    import torch
    from safetensors.torch import load_file

    with torch.device("meta"):  # draws no first weights
        net = classifier(width, ROUNDS[number], options.hidden_scale)
    net.load_state_dict(load_file(_files(folder, number)[1]), assign=True)
    return net.eval()
