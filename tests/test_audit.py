"""Blind classifiers find a leak, find nothing where nothing is, and never see the label they are asked for."""

from __future__ import annotations

import functools
import io
import re

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from mia import audit, cli, tables
from mia.config import AuditOptions
from mia.errors import UserError
from mia.pixels import ImageError

N = 240
WORDS = [
    "red",
    "green",
    "blue",
    "old",
    "small",
    "large",
    "cat",
    "dog",
    "tree",
    "house",
    "river",
    "bird",
    "stone",
    "road",
]


def area(score: np.ndarray, member: np.ndarray) -> float:
    """AUC by counting every pair."""
    a, b = score[member][:, None], score[~member][None, :]
    return float(((a > b) + 0.5 * (a == b)).mean())


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(file, "PNG")
    return file.getvalue()


def captions(r: np.random.Generator, n: int) -> list[str]:
    return [" ".join(r.choice(WORDS, 5)) for _ in range(n)]


def people(leak: str = "", n: int = N, seed: int = 0) -> tuple[audit.Seen, np.ndarray, np.ndarray, np.ndarray]:
    """Samples, member, group, part. `leak` is the kind of feature by which two thirds of the members can be told."""
    r = np.random.default_rng(seed)
    member = r.permutation(np.arange(n) < n // 2)
    told = member & (r.random(n) < 2 / 3)
    said = [f"{c}, photograph" if leak == "caption" and t else c for c, t in zip(captions(r, n), told, strict=True)]
    shop = told if leak == "metadata" else np.zeros(n, dtype=bool)
    hosts = ["cdn.shop.example" if s else f"host{h}.example" for h, s in zip(r.integers(0, 9, n), shop, strict=True)]
    light = r.integers(0, 120, n) + 120 * (told if leak == "image" else 0)
    images = [png(r.integers(0, 16, (8, 9, 3)) + value) for value in light]
    urls = [f"https://{host}/{i}.jpg" for i, host in enumerate(hosts)]
    seen = audit.Seen(np.array([f"{i:04d}" for i in range(n)]), said, urls, images, None)
    part = np.where(r.permutation(n) < n // 2, "calibration", "test")
    return seen, member, np.array([f"g{i}" for i in range(n)]), part


def scored(seen, member, group, part, features=audit.KINDS, seed=0, folds=3) -> dict[str, np.ndarray]:
    table = audit.blind_scores(seen, member, group, part, AuditOptions(features, folds), seed)
    rows = tables.check(table, "scores").to_pylist()
    assert {row["variant"] for row in rows} == {"all"} and all(0 <= row["score"] <= 1 for row in rows)
    place = {name: i for i, name in enumerate(seen.ids)}
    found = {f"blind_{kind}": np.full(len(seen.ids), np.nan) for kind in features}
    for row in rows:
        found[row["attack"]][place[row["sample_id"]]] = row["score"]
    return found


@functools.cache
def plain(leak: str) -> dict[str, np.ndarray]:
    """Scores of `people(leak)` as they are: several tests hold others against them."""
    return scored(*people(leak))


# ------------------------------------------------------------------------------------------------ leaks


@pytest.mark.parametrize("leak", audit.KINDS)
def test_each_classifier_finds_the_leak_of_its_kind_and_no_other(leak):
    _, member, _, part = people(leak)
    for name, score in plain(leak).items():
        for which in tables.PARTS:
            found = area(score[part == which], member[part == which])
            assert found > 0.75 if name == f"blind_{leak}" else 0.34 < found < 0.66, (name, which, found)


def test_a_leak_in_every_caption_is_found_at_once():
    r = np.random.default_rng(1)
    seen, member, group, part = people()
    said = [f"{c} [{'stock' if m else 'home'}]" for c, m in zip(captions(r, N), member, strict=True)]
    leaking = audit.Seen(seen.ids, said, seen.urls, None, None)
    score = scored(leaking, member, group, part, ("caption",))["blind_caption"]
    assert area(score[part == "test"], member[part == "test"]) > 0.95
    assert score[member].mean() > score[~member].mean()  # high = member


def test_a_leak_in_style_alone_is_found():
    """Punctuation: words alone would not show it, n-grams of characters do."""
    r = np.random.default_rng(2)
    seen, member, group, part = people()
    said = [c.replace(" ", " - " if m else ", ") for c, m in zip(captions(r, N), member, strict=True)]
    score = scored(audit.Seen(seen.ids, said, seen.urls, None, None), member, group, part, ("caption",))[
        "blind_caption"
    ]
    assert area(score[part == "test"], member[part == "test"]) > 0.95


def test_a_leak_in_clip_space_is_found_by_the_image_classifier():
    seen, member, group, part = people()
    embedded = np.random.default_rng(3).normal(size=(N, 6)).astype(np.float32)
    embedded[:, 2] += 3 * member
    with_clip = audit.Seen(seen.ids, seen.captions, seen.urls, seen.images, embedded)
    score = scored(with_clip, member, group, part, ("image",), folds=2)["blind_image"]
    assert area(score[part == "test"], member[part == "test"]) > 0.9


def test_without_a_leak_calibration_scores_are_at_chance():
    """In sample, a forest and n-grams with more columns than rows would reach an AUC of 1 on random labels."""
    found = {kind: [] for kind in ("blind_caption", "blind_metadata")}
    for seed in range(3):
        seen, member, group, _ = people(seed=seed)
        everything = np.repeat("calibration", N)
        for name, score in scored(seen, member, group, everything, ("caption", "metadata"), seed).items():
            assert area(score, member) < 0.65
            found[name].append(area(score, member))
    assert all(0.4 < np.mean(areas) < 0.6 for areas in found.values())


# ------------------------------------------------------------------------------------------------ labels and groups


@pytest.mark.parametrize("kinds", [audit.KINDS, ("caption", "metadata")], ids=["flipped", "constant"])
def test_labels_of_test_rows_are_never_used(kinds):
    seen, member, group, part = people("caption")
    labels = np.where(part == "test", ~member if kinds == audit.KINDS else True, member)
    for name, score in scored(seen, labels, group, part, kinds).items():
        assert (score == plain("caption")[name]).all(), name


def test_labels_of_calibration_rows_are_used():
    seen, member, group, part = people("caption")
    flipped = np.where(part == "calibration", ~member, member)
    score = scored(seen, flipped, group, part, ("caption",))["blind_caption"]
    assert area(score[part == "test"], member[part == "test"]) < 0.3


def naming(kind: str) -> tuple[audit.Seen, np.ndarray, np.ndarray]:
    """Sixty groups of three rows. Every feature names the group and nothing else; a group's rows share their label."""
    r = np.random.default_rng(5)
    group = np.repeat(np.arange(60), 3)
    member = r.permutation(np.repeat([True, False], 30))[group]
    tones = r.permutation(60) * 4
    images = [png(np.full((8, 8, 3), tones[g])) for g in group] if kind == "image" else None
    urls = [f"http://site{g}.example/x" for g in group]
    seen = audit.Seen(np.array([f"{i:03d}" for i in range(180)]), [f"name{g}" for g in group], urls, images, None)
    return seen, member, group


@pytest.mark.parametrize("kind", audit.KINDS)
def test_a_group_is_never_split(kind):
    """Who has seen one row of a group knows the label of the rest: with groups split the AUC is nearly 1."""
    seen, member, group = naming(kind)
    everything = np.repeat("calibration", 180)
    whole = scored(seen, member, group.astype(str), everything, (kind,))[f"blind_{kind}"]
    split = scored(seen, member, np.arange(180).astype(str), everything, (kind,))[f"blind_{kind}"]
    assert area(split, member) > 0.75 and area(whole, member) < 0.65


def test_a_lone_row_of_test_is_scored_as_in_company():
    """A score is computable for one image alone, given frozen calibration (pitfall 3)."""
    seen, member, group, part = people("caption", 120)
    kinds = ("caption", "metadata")
    together = scored(seen, member, group, part, kinds)
    rows = np.flatnonzero((part == "calibration") | (np.arange(120) == np.flatnonzero(part == "test")[0]))
    fewer = audit.Seen(
        seen.ids[rows], *([values[i] for i in rows] for values in (seen.captions, seen.urls, seen.images)), None
    )
    alone = scored(fewer, member[rows], group[rows], part[rows], kinds)
    for name, score in alone.items():
        assert (score == together[name][rows]).all(), name


def test_the_seed_decides():
    seen, member, group, part = people("", 120)
    first, again, other = (scored(seen, member, group, part, ("caption", "metadata"), seed) for seed in (0, 0, 1))
    assert all((first[name] == again[name]).all() and (first[name] != other[name]).any() for name in first)


def test_kinds_are_those_asked_for_in_one_table():
    seen, member, group, part = people("", 120)
    both = scored(seen, member, group, part, ("metadata", "caption"))
    assert list(both) == ["blind_metadata", "blind_caption"]
    alone = scored(seen, member, group, part, ("caption",))
    assert (alone["blind_caption"] == both["blind_caption"]).all()


@pytest.mark.parametrize(
    ("features", "folds", "message"),
    [
        (
            ("caption", "sound"),
            4,
            r"^unknown kind of feature 'sound', audit.features, use \['caption', 'image', 'metadata'\]$",
        ),
        (
            ("image",),
            4,
            "^image features need the column 'image', audit, give image bytes, or drop 'image' from --features$",
        ),
        (("caption",), 90, "^one class has [0-9]+ groups for 90 folds, audit.folds, lower it"),
    ],
)
def test_what_cannot_be_done_is_refused(features, folds, message):
    seen, member, group, part = people("", 120)
    blind = audit.Seen(seen.ids, seen.captions, seen.urls, None, None)
    with pytest.raises(UserError, match=message):
        audit.blind_scores(blind, member, group, part, AuditOptions(features, folds), 0)


# ------------------------------------------------------------------------------------------------ what is seen


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("https://www.Example.co.uk/a/b.JPG?w=3#x", "scheme_https host_www_example_co_uk top_uk extension_jpg"),
        (
            "http://my-site.example:8080/photo.jpg!large",
            "scheme_http host_my_site_example top_example extension_jpg_large",
        ),
        ("http://user:secret@host.example/x.tar.gz", "scheme_http host_host_example top_example extension_gz"),
        ("http://EXAMPLE.com./v1.2/picture", "scheme_http host_example_com top_com extension_none"),
        ("http://[2001:db8::1]:80/i.png", "scheme_http host_2001_db8__1 top_2001_db8__1 extension_png"),
        ("http://10.0.0.1/", "scheme_http host_10_0_0_1 top_1 extension_none"),
        ("file:///data/a.png", "scheme_file host_none top_none extension_png"),
        ("file:images/a.png", "scheme_file host_none top_none extension_png"),
        ("http://bücher.example/ü.jpg", "scheme_http host_bücher_example top_example extension_jpg"),
        ("http://h.example:port/x", "scheme_http host_h_example top_example extension_none"),
        ("no url at all", "scheme_ host_none top_none extension_none"),
        ("", "scheme_ host_none top_none extension_none"),
        ("http://[broken/x.jpg", "unreadable"),
        ("http://a\u2100b.example/x.jpg", "unreadable"),
    ],
)
def test_a_url_becomes_words_that_the_learner_keeps_whole(url, words):
    seen = audit.Seen(np.array(["a"]), ["c"], [url], None, None)
    assert audit.metadata_input(seen) == [words]
    assert re.findall(r"(?u)\b\w+\b", words) == words.split()  # the pattern of the learner's words


def test_statistics_of_an_image_of_two_colours_by_hand():
    """Four columns of three rows: two white columns, then two of (255, 0, 51)."""
    pixels = np.full((3, 4, 3), 255)
    pixels[:, 2:] = (255, 0, 51)
    data = png(pixels)
    white, colour = 1.0, (255 + 0 + 51) / 3 / 255  # grey is the mean of the channels: 0.4
    step = colour - white
    laplacians = [step, -step]  # inner pixels at columns 1 and 2: one neighbour each is of the other colour
    wanted = [4, 3, 4 / 3, len(data) / 12, np.var(laplacians), 1, 0.5, 0.6, 0, 0.5, 0.4, 0.5, 0.5]
    assert audit.image_statistics(data) == pytest.approx(wanted, abs=1e-12)
    assert np.var(laplacians) == pytest.approx(0.36)


def test_statistics_of_a_single_pixel_and_of_a_strip():
    assert audit.image_statistics(png(np.zeros((1, 1, 3))))[:5] == pytest.approx(
        [1, 1, 1, len(png(np.zeros((1, 1, 3)))), 0]
    )
    assert audit.image_statistics(png(np.full((1, 5, 3), 255)))[5:] == pytest.approx([1, 1, 1, 0, 0, 0, 0, 1])
    assert len(audit.image_statistics(png(np.zeros((2, 7, 3))))) == 13


@pytest.mark.parametrize(("level", "white"), [(0, 0), (247, 0), (248, 1), (255, 1)])
def test_white_is_what_lies_above_97_percent_in_every_channel(level, white):
    assert audit.image_statistics(png(np.full((2, 2, 3), level)))[-1] == white
    assert audit.image_statistics(png(np.full((2, 2, 3), (255, level, 255))))[-1] == white


def test_grey_and_transparent_images_have_the_same_thirteen_numbers():
    for mode, fill in (("L", 100), ("RGBA", (0, 0, 0, 0)), ("P", 3), ("LA", (0, 0))):
        file = io.BytesIO()
        Image.new(mode, (6, 5), fill).save(file, "PNG")
        assert np.isfinite(audit.image_statistics(file.getvalue())).all()
    with pytest.raises(ImageError, match="not_an_image"):
        audit.image_statistics(b"no image")


def test_image_input_is_statistics_then_embedding():
    seen, *_ = people("", 60)
    embedded = np.arange(120.0).reshape(60, 2)
    both = audit.image_input(audit.Seen(seen.ids, seen.captions, seen.urls, seen.images, embedded))
    assert both.shape == (60, 15) and (both[:, 13:] == embedded).all()
    assert (both[:, :13] == audit.image_input(seen)).all()
    assert audit.caption_input(seen) == list(seen.captions)


# ------------------------------------------------------------------------------------------------ the command


def prepared(tmp_path) -> tuple[list[str], dict]:
    seen, member, group, part = people("caption", 120)
    ids = [tables.sample_id(u, c) for u, c in zip(seen.urls, seen.captions, strict=True)]
    dataset = [
        {"sample_id": i, "url": u, "caption": c, "sha256": "0", "member": bool(m), "group": g, "part": p, "weight": 1.0}
        for i, u, c, m, g, p in zip(ids, seen.urls, seen.captions, member, group, part, strict=True)
    ]
    images = [
        {
            "sample_id": i,
            "status": "ok",
            "detail": "",
            "bytes": data,
            **dict.fromkeys(("sha256", "format", "width", "height", "phash")),
        }
        for i, data in zip(ids, seen.images, strict=True)
    ]
    vectors = tables.vector_column(np.random.default_rng(0).normal(size=(120, 3)).astype(np.float16))
    for name, table in (
        ("dataset", pa.Table.from_pylist(dataset, schema=tables.SCHEMAS["dataset"])),
        ("images", pa.Table.from_pylist(images, schema=tables.SCHEMAS["images"])),
        ("embeddings", pa.table({"sample_id": ids, "image": vectors, "text": vectors})),
    ):
        tables.write(tmp_path / name, table, name, {})
    words = ["audit", "--folds", "3", "--output", str(tmp_path / "scores")]
    for name in ("dataset", "images", "embeddings"):
        words += [f"--{name}", str(tmp_path / name)]
    return words, {row["sample_id"]: row for row in dataset}


def test_the_command_scores_every_sample_by_every_kind(tmp_path):
    words, rows = prepared(tmp_path)
    cli.commands.main(words, standalone_mode=False)
    found = tables.read(tmp_path / "scores", "scores").to_pylist()
    assert {(row["sample_id"], row["attack"]) for row in found} == {
        (i, f"blind_{k}") for i in rows for k in audit.KINDS
    }
    caption = [row for row in found if row["attack"] == "blind_caption" and rows[row["sample_id"]]["part"] == "test"]
    score, member = (
        np.array(x) for x in zip(*((r["score"], rows[r["sample_id"]]["member"]) for r in caption), strict=True)
    )
    assert area(score, member) > 0.6


def test_a_second_run_gives_the_same_bytes(tmp_path):
    words, _ = prepared(tmp_path)
    cli.commands.main([*words, "--features", "caption,metadata"], standalone_mode=False)
    first = (tmp_path / "scores").read_bytes()
    cli.commands.main([*words, "--features", "caption,metadata"], standalone_mode=False)
    assert (tmp_path / "scores").read_bytes() == first


def test_the_command_refuses_a_sample_without_an_image(tmp_path):
    words, _ = prepared(tmp_path)
    images = tables.read(tmp_path / "images", "images").to_pylist()
    gone = images.pop()["sample_id"]
    tables.write(tmp_path / "images", pa.Table.from_pylist(images, schema=tables.SCHEMAS["images"]), "images", {})
    with pytest.raises(UserError, match=f"^1 samples have no image, the first is {gone}, --images, give the shards"):
        cli.commands.main(words, standalone_mode=False)
    assert not (tmp_path / "scores").exists()
