"""From deduplicated pools to a dataset whose members and non-members cannot be told apart by their captions.

Method `matched`, ours, stands in `mia/matching.py`; method `paper` (arXiv 2306.12983, `laion-mi/`), which spends fresh
chunks of 40 000 members on every classifier, in `mia/paper_sanitizer.py`. Here is `crossfitted`: the paper's three
rounds, in each of which a bigger classifier learns members from non-members on the text encoder's states and only
members it takes for non-members stay, but each round cross-fitted (a member is judged by a classifier that never saw
it), so that pools of thousands do as well as pools of millions.
"""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import numpy as np
import pyarrow as pa

from mia import rng
from mia.config import SanitizeOptions
from mia.errors import UserError

log = logging.getLogger(__name__)

METHODS = ("matched", "crossfitted", "paper", "none")
MIN_BATCH = 64  # however small `batch_scale`


@dataclasses.dataclass(frozen=True)
class Round:
    """One round's classifier. Hidden widths, Adam's learning rate, batch size. Source: `attacks.md` 1.8."""

    hidden: tuple[int, ...]
    learning_rate: float
    batch_size: int


ROUNDS = (Round((), 1e-3, 10_000), Round((4096,), 1e-5, 2_000), Round((8192, 512), 1e-5, 128))


def keep_members(
    states: np.ndarray, member: np.ndarray, group: np.ndarray, options: SanitizeOptions, seed: int
) -> tuple[np.ndarray, list[dict]]:
    """Which samples stay, bool[n] (every non-member does), and one report for each round.

    Args:
        states: text states, float32[n, tokens * width].
        member: bool[n].
        group: near-duplicate groups, str[n]; a group is never split between folds.
    """
    keep, reports = np.ones(len(member), dtype=bool), []
    for number, spec in enumerate(ROUNDS):
        rows = np.flatnonzero(keep)
        looks = cross_fitted(states[rows], ~member[rows], group[rows], spec, options, seed, number)
        gone = rows[member[rows] & (looks <= options.keep_above)]
        keep[gone] = False
        reports.append({
            "round": number + 1, "members_in": int(member[rows].sum()), "members_kept": int((keep & member).sum()),
            "nonmembers": int((~member[rows]).sum()), "auc": _auc(looks, ~member[rows]),
        })  # fmt: skip
        log.info(
            "round %(round)d: %(members_kept)d of %(members_in)d members kept, classifier AUC %(auc).3f", reports[-1]
        )
        if not (keep & member).any():
            raise UserError(
                f"no members are left after round {number + 1}",
                "sanitize.keep_above",
                "lower it, or bring more members",
            )
    return keep, reports


def _auc(score: np.ndarray, positive: np.ndarray) -> float:
    from mia.metrics import auc

    return auc(score, positive)


def cross_fitted(
    x: np.ndarray,
    positive: np.ndarray,
    group: np.ndarray,
    spec: Round,
    options: SanitizeOptions,
    seed: int,
    number: int,
) -> np.ndarray:
    """Probability of `positive` for each row by a classifier that saw neither it nor its group, float64[n]."""
    import torch

    out = np.empty(len(x))
    for fold, (train, test) in enumerate(rng.folds(options.folds, positive, group, seed + number, "sanitize.folds")):
        network_seed = int(rng.stream(seed, f"round {number} fold {fold}", purpose="sanitize").integers(2**31))
        with torch.random.fork_rng(devices=[]):  # dropout takes no generator of its own
            out[test] = fit_predict(x[train], positive[train], x[test], spec, options, network_seed)
    return out


def fit_predict(
    x: np.ndarray, y: np.ndarray, query: np.ndarray, spec: Round, options: SanitizeOptions, seed: int
) -> np.ndarray:
    """Train one round's network with binary cross-entropy, both classes of equal weight, and apply it to `query`.

    80/20 split of the training rows; stops when the validation loss rises, evaluated every 2 epochs; the best weights
    are used (the authors score with the weights after the rise).
    """
    import torch

    torch.manual_seed(seed)
    net = network(x.shape[1], spec, options.hidden_scale)
    optimiser = torch.optim.Adam(net.parameters(), lr=spec.learning_rate * options.learning_rate_scale)
    batch_size = max(MIN_BATCH, int(spec.batch_size * options.batch_scale))
    weight = torch.tensor(np.where(y, 0.5 / y.mean(), 0.5 / (1 - y.mean())), dtype=torch.float32)
    x_all, y_all = torch.from_numpy(x), torch.from_numpy(y.astype(np.float32))
    order = torch.randperm(len(x))
    valid, train = order[: len(x) // 5], order[len(x) // 5 :]

    def loss(rows: torch.Tensor) -> torch.Tensor:
        logits = net(x_all[rows]).squeeze(1)
        return torch.nn.functional.binary_cross_entropy_with_logits(logits, y_all[rows], weight[rows])

    best, best_weights = float("inf"), net.state_dict()
    for epoch in range(options.max_epochs):
        net.train()
        for rows in train[torch.randperm(len(train))].split(batch_size):
            optimiser.zero_grad()
            loss(rows).backward()
            optimiser.step()
        if epoch % 2 == 1:
            net.eval()
            with torch.inference_mode():
                now = float(loss(valid))
            if now > best:
                break
            best, best_weights = now, {name: value.clone() for name, value in net.state_dict().items()}
    net.load_state_dict(best_weights)
    net.eval()
    with torch.inference_mode():
        return torch.sigmoid(net(torch.from_numpy(query)).squeeze(1)).double().numpy()


def network(width: int, spec: Round, scale: float) -> Any:
    """A round's classifier: float32[n, width] to the log-odds of its positive class, float32[n, 1]."""
    import torch

    layers: list[torch.nn.Module] = []
    for hidden in (max(8, int(h * scale)) for h in spec.hidden):
        layers += [torch.nn.Linear(width, hidden), torch.nn.LayerNorm(hidden), torch.nn.Dropout(0.5), torch.nn.ReLU()]
        width = hidden
    return torch.nn.Sequential(*layers, torch.nn.Linear(width, 1))


def finish(rows: pa.Table, options: SanitizeOptions, seed: int) -> pa.Table:
    """The dataset table: `rows` by sample id, cut by group into calibration and test.

    Args:
        rows: sample_id, url, caption, sha256, member, group.

    Raises:
        UserError: every group is too large for the calibration part.
    """
    rows = rows.sort_by("sample_id")
    member, group = rows["member"].to_numpy(zero_copy_only=False), np.array(rows["group"].to_pylist())
    part = np.full(len(member), "test", dtype=object)
    part[_calibration(_shuffled_groups(group, seed), member, group, options.calibration_fraction)] = "calibration"
    table = rows.append_column("part", pa.array(part, pa.string()))
    return table.append_column("weight", pa.array(np.ones(len(member))))


def to_attack(dataset: pa.Table, options: SanitizeOptions, seed: int) -> pa.Table:
    """The part of a dataset worth the cost of an attack: at most `max_per_side` samples a side, parts as they are."""
    if not options.max_per_side:
        return dataset
    member, group = dataset["member"].to_numpy(zero_copy_only=False), np.array(dataset["group"].to_pylist())
    part = np.array(dataset["part"].to_pylist())
    order, chosen = _shuffled_groups(group, seed), np.zeros(len(member), dtype=bool)
    share = {"calibration": round(options.max_per_side * options.calibration_fraction)}
    share["test"] = options.max_per_side - share["calibration"]
    for side in (True, False):
        for name, count in share.items():
            chosen[order[(member[order] == side) & (part[order] == name)][:count]] = True
    return dataset.filter(pa.array(chosen))


def _shuffled_groups(group: np.ndarray, seed: int) -> np.ndarray:
    """Row numbers with groups in a seeded order of their names' hashes, each group's rows together."""
    place = {name: rng.stream(seed, name, purpose="split").random() for name in np.unique(group)}
    return np.array(sorted(range(len(group)), key=lambda i: (place[group[i]], group[i], i)), dtype=np.int64)


def _calibration(order: np.ndarray, member: np.ndarray, group: np.ndarray, fraction: float) -> np.ndarray:
    """Rows of whole groups, in `order`, dealt so that both sides come as near to `fraction` as groups allow."""
    wanted = {side: fraction * (member[order] == side).sum() for side in (True, False)}
    taken = {True: 0, False: 0}
    picked = []
    for rows in np.split(order, np.flatnonzero(group[order][1:] != group[order][:-1]) + 1):
        counts = {side: int((member[rows] == side).sum()) for side in (True, False)}
        if all(taken[side] + counts[side] <= np.ceil(wanted[side]) for side in (True, False)):
            picked.append(rows)
            taken = {side: taken[side] + counts[side] for side in (True, False)}
    if not picked:
        raise UserError(
            "every group is larger than the calibration part", "dedup", "lower its limits, or bring more rows"
        )
    return np.concatenate(picked)
