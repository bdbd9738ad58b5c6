"""The authors' sanitization against a slow oracle, and that a kill between rounds changes nothing."""

from __future__ import annotations

import json
import pathlib
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch

from mia import paper_sanitizer as paper
from mia.config import SanitizeOptions
from mia.errors import UserError
from mia.sanitize import ROUNDS

CHUNK, WIDTH = 40, 16  # 2 x 8 states
TINY = SanitizeOptions(chunk=CHUNK, hidden_scale=1 / 256, batch_scale=1 / 16, learning_rate_scale=100, max_epochs=20)


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def population(members: int = 845, others: int = 70, seed: int = 0) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """States float16[n, 16], labels and ids; half of the members are like the non-members, in mixed order."""
    r = np.random.default_rng(seed)
    member = r.permutation(np.arange(members + others) < members)
    states = r.normal(size=(len(member), WIDTH))
    states[member & (r.random(len(member)) < 0.5)] += 1.0
    return states.astype(np.float16), member, [f"{i:04d}" for i in range(len(member))]


def sanitized(folder: pathlib.Path, options: SanitizeOptions = TINY, seed: int = 0, **changes) -> tuple:
    states, member, ids = population(**changes)
    return paper.keep_members(states, member, ids, options, seed, folder)


# ------------------------------------------------------------------------------------------------ the oracle


def network(width: int, number: int, options: SanitizeOptions) -> torch.nn.Module:
    """The three classifiers, layer by layer, as attacks.md 1.8 lists them."""
    from torch.nn import Dropout, LayerNorm, Linear, ReLU, Sequential, Sigmoid

    a, b, c = (max(8, int(h * options.hidden_scale)) for h in (4096, 8192, 512))
    if number == 0:
        return Sequential(Linear(width, 1), Sigmoid())
    if number == 1:
        return Sequential(Linear(width, a), LayerNorm(a), Dropout(0.5), ReLU(), Linear(a, 1), Sigmoid())
    return Sequential(
        Linear(width, b), LayerNorm(b), Dropout(0.5), ReLU(), Linear(b, c), LayerNorm(c), Dropout(0.5), ReLU(),
        Linear(c, 1), Sigmoid(),
    )  # fmt: skip


def oracle_training(x: np.ndarray, y: np.ndarray, number: int, options: SanitizeOptions, seed: int) -> tuple:
    """One classifier, with torch's own DataLoader and a row at a time; the network, and the losses of validation."""
    rate = [1e-3, 1e-5, 1e-5][number] * options.learning_rate_scale
    batch = max(1, int([10_000, 2_000, 128][number] * options.batch_scale))
    torch.manual_seed(int(paper.rng.stream(seed, f"round {number + 1}", purpose="sanitize").integers(2**31)))
    net = network(x.shape[1], number, options)
    dropout_state = torch.get_rng_state()
    optimiser = torch.optim.Adam(net.parameters(), lr=rate)
    np.random.seed(42)
    shuffled = np.random.permutation(len(x))
    learn, valid = shuffled[: int(len(x) * 0.8)].tolist(), shuffled[int(len(x) * 0.8) :].tolist()
    torch.manual_seed(123)
    learners = torch.utils.data.DataLoader(learn, batch, shuffle=True)
    judges = torch.utils.data.DataLoader(valid, batch, shuffle=True)

    def rows(indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        chosen = [torch.tensor(x[i].astype(np.float32)) for i in indices.tolist()]
        return torch.stack(chosen), torch.tensor([[float(y[i])] for i in indices.tolist()])

    def bce(p: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
        return -(truth * torch.log(p) + (1 - truth) * torch.log(1 - p)).mean()

    net.train()
    losses: list[float] = []
    for epoch in range(options.max_epochs):
        for indices in list(learners):
            loader_state = torch.get_rng_state()
            torch.set_rng_state(dropout_state)
            inputs, truth = rows(indices)
            loss = bce(net(inputs), truth)
            dropout_state = torch.get_rng_state()
            torch.set_rng_state(loader_state)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        if epoch % 2 == 1:
            net.eval()  # and never back to train
            total = 0.0
            for indices in judges:
                inputs, truth = rows(indices)
                total += bce(net(inputs), truth).item()
            losses.append(total / len(valid))
            if len(losses) > 1 and losses[-1] > losses[-2]:
                break
    return net.eval(), losses


def oracle(states: np.ndarray, member: np.ndarray, options: SanitizeOptions, seed: int) -> tuple[list, list, list]:
    """The procedure of attacks.md 1.8 in plain loops: survivors of each round, validation losses, chunks used."""
    members = [i for i in range(len(member)) if member[i]]
    others = [i for i in range(len(member)) if not member[i]]
    np.random.seed(123)
    order = np.random.permutation(len(members))
    chunks = iter(np.array_split(order, len(members) // options.chunk))
    training = [members[i] for i in next(chunks)]
    nets, survivors_of, losses_of, used = [], [], [], []
    for number in range(3):
        rows = training + others
        net, losses = oracle_training(
            states[rows], np.array([0] * len(training) + [1] * len(others)), number, options, seed
        )
        nets.append(net)
        survivors: list[int] = []
        count = 0
        for chunk in chunks:
            count += 1
            for i in chunk:
                row = members[i]
                x = torch.tensor(states[row].astype(np.float32))[None]
                with torch.no_grad():
                    if all(net(x).item() > options.keep_above for net in nets):
                        survivors.append(row)
            if len(survivors) > options.chunk:
                break
        survivors_of.append(survivors)
        losses_of.append(losses)
        used.append(count)
        training = survivors
    return survivors_of, losses_of, used


@pytest.mark.parametrize("seed", [0, 3])
def test_every_round_is_the_oracles(tmp_path, seed):
    states, member, ids = population(seed=seed)
    keep, reports = paper.keep_members(states, member, ids, TINY, seed, tmp_path)
    with torch.random.fork_rng(devices=[]):
        survivors, losses, used = oracle(states, member, TINY, seed)
    for number, report in enumerate(reports):
        assert json.loads((tmp_path / f"round-{number + 1}.json").read_text())["survivors"] == survivors[number]
        assert report["validation_losses"] == pytest.approx(losses[number], rel=1e-4)
        assert report["epochs"] == 2 * len(losses[number]) and report["chunks"] == used[number]
    assert sorted(np.flatnonzero(keep & member)) == sorted(survivors[-1])
    assert keep[~member].all() and keep.dtype == bool


def test_the_published_sizes_seeds_and_networks():
    assert (paper.CHUNK_SEED, paper.SPLIT_SEED, paper.LOADER_SEED, paper.EVALUATE_EVERY) == (123, 42, 123, 2)
    options = SanitizeOptions()
    assert (options.chunk, options.keep_above, options.max_epochs) == (40_000, 0.5, 100)
    assert (options.hidden_scale, options.batch_scale, options.learning_rate_scale) == (1, 1, 1)
    for number, spec in enumerate(ROUNDS):
        assert str(paper.classifier(59_136 // 64, spec, 1.0)) == str(network(59_136 // 64, number, options))


def test_the_order_is_the_dataloaders():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(123)
        loader = torch.utils.data.DataLoader(list(range(50)), 7, shuffle=True)
        theirs = [torch.cat(list(loader)).tolist() for _ in range(3)]
    generator = torch.Generator().manual_seed(123)
    assert [paper.shuffled(50, generator).tolist() for _ in range(3)] == theirs


def test_dropout_ends_with_the_first_evaluation(monkeypatch, tmp_path):
    modes: list[bool] = []

    class Spy(torch.nn.Dropout):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            modes.append(self.training)
            return super().forward(x)

    monkeypatch.setattr(torch.nn, "Dropout", Spy)
    x = np.random.default_rng(0).normal(size=(100, WIDTH)).astype(np.float16)
    held = paper.hold(x.__getitem__, np.arange(100), torch.device("cpu"), tmp_path)
    options = SanitizeOptions(hidden_scale=1 / 512, max_epochs=6)  # batch 2000: one step an epoch
    found = paper.train(paper.classifier(WIDTH, ROUNDS[1], 1 / 512), held, np.arange(100) >= 50, ROUNDS[1], options)
    learning = [True, True] + [False] * (found["epochs"] - 2)
    assert sum(modes) == 2 and modes[:2] == learning[:2] and not any(modes[2:])


def test_feed_brings_each_row_once_as_float32(tmp_path):
    x = np.random.default_rng(0).normal(size=(100, WIDTH)).astype(np.float16)
    held = paper.hold(x.__getitem__, np.arange(100)[::-1], torch.device("cpu"), tmp_path)
    assert held.dtype == torch.float16 and not list(tmp_path.iterdir())
    order = torch.randperm(100)
    parts = [(rows.clone(), batch.clone()) for rows, batch in paper.feed(held, order, 33)]
    assert [len(rows) for rows, _ in parts] == [33, 33, 33, 1]
    assert torch.equal(torch.cat([rows for rows, _ in parts]), order)
    found = torch.cat([batch for _, batch in parts])
    assert found.dtype == torch.float32 and np.array_equal(found.numpy(), x[::-1][order.numpy()].astype(np.float32))


# ------------------------------------------------------------------------------------------------ resuming


def test_a_function_gives_what_an_array_gives_and_blocks_change_nothing(tmp_path, monkeypatch):
    states, member, ids = population()
    np.save(tmp_path / "states.npy", states)
    mapped = np.load(tmp_path / "states.npy", mmap_mode="r")
    whole, reports = paper.keep_members(states, member, ids, TINY, 0, tmp_path / "a")
    monkeypatch.setattr(paper, "BLOCK_ROWS", 7)
    largest = 0

    def read(rows: np.ndarray) -> np.ndarray:
        nonlocal largest
        largest = max(largest, len(rows))
        return mapped[rows]

    pieces, again = paper.keep_members(read, member, ids, TINY, 0, tmp_path / "b")
    assert np.array_equal(whole, pieces) and reports == again and largest == 7
    other, _ = paper.keep_members(mapped, member, ids, TINY, 1, tmp_path / "c")
    assert not np.array_equal(whole, other)  # the seed of the weights
    assert not list(tmp_path.glob("*/*.part"))


def test_torchs_and_numpys_generators_are_left_alone(tmp_path):
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
    sanitized(tmp_path)
    assert torch.equal(torch.get_rng_state(), before) and np.array_equal(np.random.get_state()[1], numpy_before)


def test_killed_between_rounds_it_goes_on_with_the_next(tmp_path):
    """SIGKILL as soon as round 2 reads its first states; then a rerun, beside one that was never killed."""
    script = textwrap.dedent(f"""
        import os, pathlib, signal, torch
        from mia import paper_sanitizer as paper
        from tests.test_paper_sanitizer import TINY, population
        torch.set_num_threads(1)
        states, member, ids = population()
        folder = pathlib.Path({str(tmp_path / "killed")!r})
        def read(rows):
            if (folder / "round-1.json").exists():
                os.kill(os.getpid(), signal.SIGKILL)
            return states[rows]
        paper.keep_members(read, member, ids, TINY, 0, folder)
    """)
    killed = subprocess.run([sys.executable, "-c", script], cwd=pathlib.Path(__file__).parent.parent)
    assert killed.returncode == -signal.SIGKILL
    assert sorted(p.name for p in (tmp_path / "killed").iterdir()) == ["round-1.json", "round-1.safetensors"]
    first = (tmp_path / "killed" / "round-1.safetensors").stat().st_mtime_ns
    keep, reports = sanitized(tmp_path / "killed")
    wanted, whole = sanitized(tmp_path / "whole")
    assert np.array_equal(keep, wanted) and reports == whole
    assert (tmp_path / "killed" / "round-1.safetensors").stat().st_mtime_ns == first
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "killed" / path.name).read_bytes()


def test_a_finished_run_asks_for_no_state(tmp_path):
    keep, reports = sanitized(tmp_path)

    def never(rows: np.ndarray) -> np.ndarray:
        raise AssertionError("asked")

    _, member, ids = population()
    again, same = paper.keep_members(never, member, ids, TINY, 0, tmp_path)
    assert np.array_equal(keep, again) and reports == same


@pytest.mark.parametrize("change", [{"seed": 1}, {"options": SanitizeOptions(chunk=41)}])
def test_a_folder_of_another_run_is_refused(change, tmp_path):
    sanitized(tmp_path)
    with pytest.raises(UserError, match="^the folder holds rounds of other samples, options or seed, .*round-1.json"):
        sanitized(tmp_path, **change)


def test_damaged_rounds_are_refused(tmp_path):
    sanitized(tmp_path)
    (tmp_path / "round-2.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="weights are missing or damaged, .*delete round-2.json"):
        sanitized(tmp_path)
    (tmp_path / "round-1.json").write_text("{")
    with pytest.raises(UserError, match="^a finished round cannot be read .*delete it to run it again"):
        sanitized(tmp_path)


# ------------------------------------------------------------------------------------------------ too few


def test_reports_say_what_each_round_did(tmp_path):
    _, reports = sanitized(tmp_path)
    assert [r["round"] for r in reports] == [1, 2, 3]
    assert [r["trained_on"] for r in reports[1:]] == [r["members_kept"] for r in reports[:-1]]
    assert all(r["members_kept"] > CHUNK and r["nonmembers"] == 70 and not r["out_of_members"] for r in reports[:2])
    assert sum(r["chunks"] for r in reports) <= 845 // CHUNK - 1  # the first trained on
    json.dumps(reports)


def test_chunks_are_disjoint_and_none_is_smaller():
    members = np.arange(1000, 1845)
    chunks = paper.chunks_of(members, CHUNK)
    assert sorted(np.concatenate(chunks)) == members.tolist() and min(map(len, chunks)) >= CHUNK
    assert len(chunks) == 845 // CHUNK


def test_fewer_than_four_chunks_is_an_error(tmp_path):
    message = (
        "^159 members for chunks of 40, sanitize.chunk, method `paper` needs at least 160 members; use method `cros"
    )
    with pytest.raises(UserError, match=message):
        sanitized(tmp_path / "none", members=159)
    assert not (tmp_path / "none").exists()


def test_a_round_that_runs_out_says_how_many_are_needed(tmp_path):
    with pytest.raises(
        UserError, match=r"^round \d ran out of members with \d+ survivors of 170, .* use method"
    ) as caught:
        sanitized(tmp_path, members=170)
    assert int(str(caught.value).split("at least ")[1].split()[0]) >= 170 + CHUNK


def test_the_last_round_may_end_with_fewer(tmp_path):
    """As in the authors' code: whatever was found when chunks end is the result."""
    for members in range(240, 840, 40):
        try:
            keep, reports = sanitized(tmp_path / str(members), members=members)
        except UserError:
            continue
        if reports[-1]["out_of_members"]:
            assert 0 < reports[-1]["members_kept"] <= CHUNK
            return
    raise AssertionError("no size ended early")


def test_states_that_are_not_finite_or_not_float16_are_refused(tmp_path):
    states, member, ids = population()
    with pytest.raises(UserError, match="^text states are float32"):
        paper.keep_members(states.astype(np.float32), member, ids, TINY, 0, tmp_path)
    states[:] = np.nan
    with pytest.raises(UserError, match="^text states hold NaN or infinity, row "):
        paper.keep_members(states, member, ids, TINY, 0, tmp_path)
    with pytest.raises(UserError, match="^there are no non-members"):
        paper.keep_members(states, np.ones_like(member), ids, TINY, 0, tmp_path)
