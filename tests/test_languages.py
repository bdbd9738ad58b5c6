"""Languages of captions: ten of them by hand, what cannot be told, and nothing that depends on the batch."""

from __future__ import annotations

import random

import polars as pl
import pytest

from mia import languages

SENTENCES = {
    "en": ["A red bicycle leaning against an old brick wall", "Two children playing on the beach at sunset",
           "Vintage wooden kitchen table with four chairs", "The cat is sleeping on the sofa"],
    "de": ["Ein rotes Fahrrad lehnt an einer alten Mauer", "Zwei Kinder spielen am Strand bei Sonnenuntergang",
           "Die Katze schläft auf dem Sofa"],
    "fr": ["Un vélo rouge appuyé contre un vieux mur", "Deux enfants jouent sur la plage au coucher du soleil",
           "Le chat dort sur le canapé"],
    "es": ["Una bicicleta roja apoyada en una vieja pared", "Dos niños juegan en la playa al atardecer",
           "El gato duerme en el sofá"],
    "it": ["Una bicicletta rossa appoggiata a un vecchio muro", "Due bambini giocano sulla spiaggia al tramonto"],
    "pt": ["Uma bicicleta vermelha encostada a uma parede antiga", "Duas crianças brincam na praia ao pôr do sol"],
    "nl": ["Een rode fiets tegen een oude muur", "Twee kinderen spelen op het strand bij zonsondergang"],
    "pl": ["Czerwony rower oparty o stary mur", "Dwoje dzieci bawi się na plaży o zachodzie słońca"],
    "ru": ["Красный велосипед у старой кирпичной стены", "Двое детей играют на пляже на закате"],
    "ja": ["古い壁に立てかけられた赤い自転車", "夕暮れのビーチで遊んでいる二人の子供"],
    "zh": ["一辆红色的自行车靠在旧墙上", "两个孩子在日落时的海滩上玩耍"],
    "ar": ["دراجة حمراء متكئة على جدار قديم", "طفلان يلعبان على الشاطئ عند غروب الشمس"],
}  # fmt: skip


def detected(captions: list[str | None]) -> list[str | None]:
    return languages.detect(pl.Series("caption", captions, dtype=pl.String)).to_list()


@pytest.mark.parametrize("language", SENTENCES)
def test_sentences_by_hand_are_told_right(language):
    assert detected(SENTENCES[language]) == [language] * len(SENTENCES[language])


def test_what_has_no_language_has_none():
    assert detected([None, "", " ", "1234", "***", "\x00", "🙂"]) == [None] * 7


def test_an_answer_depends_on_the_text_alone():
    captions = [text for texts in SENTENCES.values() for text in texts]
    wanted = dict(zip(captions, detected(captions), strict=True))
    mixed = random.Random(0).choices(captions, k=500)
    assert detected(mixed) == [wanted[text] for text in mixed]
    assert [detected([text])[0] for text in captions] == list(wanted.values())


def test_no_text_brings_the_detector_down():
    """It is C, and captions are whatever the web holds: any code points, in any length."""
    r = random.Random(0)
    points = [*range(0, 0x250), *range(0x300, 0x310), *range(0x600, 0x620), 0x200D, 0xFFFD, 0x1F600, 0xE0001, 0x10FFFF]
    texts = ["".join(map(chr, r.choices(points, k=r.choice([1, 2, 5, 30, 300])))) for _ in range(3000)]
    texts += ["a" * 10**6, "\u0301" * 10**5, "the cat sat " * 10**5]
    found = detected(texts)
    assert len(found) == len(texts) and found == detected(texts) and found[-1] == "en"


def test_a_series_keeps_its_name_and_type_when_empty():
    assert languages.detect(pl.Series("caption", [], dtype=pl.String)).equals(pl.Series("caption", [], dtype=pl.String))
