"""`docs/attacks.md` has a card for every attack of the registry, complete, and its costs are the registry's."""

from __future__ import annotations

import re

import pytest

from mia import attacks
from tests.conftest import ROOT

FIELDS = ("Score", "Defaults", "Cost", "Confounder", "Official code", "Published")
CARDS = [
    card for card in re.split(r"\n(?=\*\*`|## )", (ROOT / "docs/attacks.md").read_text()) if card.startswith("**`")
]


def title(card: str) -> list[str]:
    """The names that a card is of."""
    return re.findall(r"`(\w+)`", card[: card.index("**", 2)])


def field(card: str, name: str) -> str:
    """What a card says under one of `FIELDS`, in one line."""
    found = re.search(rf"^- \*{name}:\* (.*?)(?=^- \*|\Z)", card, re.MULTILINE | re.DOTALL)
    return " ".join(found[1].split()) if found else ""


CARD = {name: card for card in CARDS for name in title(card)}


def test_every_attack_has_one_card():
    assert sorted(name for card in CARDS for name in title(card)) == sorted(attacks.REGISTRY)


@pytest.mark.parametrize("name", attacks.REGISTRY)
def test_a_card_is_complete(name):
    assert all(field(CARD[name], part) for part in FIELDS)
    assert "= member" in field(CARD[name], "Score")  # its orientation
    first = CARD[name].partition("- *Score")[0]
    attack = attacks.REGISTRY[name]
    assert attack.paired == bool(re.search(r"\bpaired\b", first))
    assert attack.paired or f"no twin: {attack.no_twin}" in " ".join(first.split())


@pytest.mark.parametrize("name", [name for name, attack in attacks.REGISTRY.items() if attack.unet_rows is not None])
def test_a_cards_cost_is_the_registrys(name):
    """`6400, 6400 and 0 rows, 64 D, 0 E`: rows by name where they differ; one encode where none are stated."""
    attack, said = attacks.REGISTRY[name], field(CARD[name], "Cost")
    rows = [int(n) for n in re.findall(r"\d+", said[: said.index("rows")])]
    assert rows[title(CARD[name]).index(name) % len(rows)] == attack.unet_rows
    if name == "blind_pair":  # pictures are the other two's
        return
    for letter, usual, count in (("D", 0, attack.decodes), ("E", 1, attack.encodes), ("B", 0, attack.backwards)):
        stated = re.search(rf"(\d+) {letter}\b", said)
        assert (int(stated[1]) if stated else usual) == count, letter


def test_where_the_cards_stand_is_said_at_the_head_of_methods():
    head = (ROOT / "docs/methods.md").read_text()[:400]
    assert "card of every attack" in head and "[attacks.md](attacks.md)" in head
