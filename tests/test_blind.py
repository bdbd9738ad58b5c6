"""What the blind classifiers look at, by hand, and their learners held against slow and obvious ones."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
import scipy.sparse as sp
from PIL import Image

from mia import blind, metrics
from mia.errors import UserError
from mia.pixels import FORMATS, ImageError

WORDS = ["The", "of", "Old", "river", "cat", "ing", "IMG", "2019", "photo,", "(new)", "Å", "'s"]


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(file, "PNG")
    return file.getvalue()


def sentences(n: int, seed: int = 0) -> tuple[list[str], np.ndarray]:
    r = np.random.default_rng(seed)
    return [" ".join(r.choice(WORDS, r.integers(1, 9))) for _ in range(n)], r.permutation(np.arange(n) % 2 == 0)


def counted(counts: blind.Counts) -> dict[str, list[int]]:
    return dict(zip(counts.names, counts.matrix.toarray().T.tolist(), strict=True))


def by_hand(stated: dict[str, float], names: tuple[str, ...]) -> list:
    """All statistics in order: those stated, and 0 for the rest."""
    assert set(stated) <= set(names)
    return [pytest.approx(stated.get(name, 0), abs=1e-12) for name in names]


# ----------------------------------------------------------------------------------------------------- counted parts


def test_characters_are_counted_with_their_place():
    found = counted(blind.characters(["aba", "a"]))
    assert found == {
        "characters 'a'": [2, 1],
        "starts with characters ''": [1, 1],
        "starts with characters 'a'": [1, 1],
        "ends with characters ''": [1, 1],
        "ends with characters 'a'": [1, 1],
    }  # all else stands in one caption alone
    names = set(counted(blind.characters(["It’s  Of ", "It’s  Of "])))
    assert {"characters '’s Of'", "ends with characters ' Of '", "starts with characters 'It’s'"} <= names
    assert "is characters 'a b'" in set(counted(blind.characters(["a b", "a b"])))
    assert 'characters "\'s"' in set(counted(blind.characters(["cat's", "dog's"])))


def test_without_edges_leaves_the_ngrams_of_the_plain_text():
    from sklearn.feature_extraction.text import CountVectorizer

    said, _ = sentences(60)
    plain = CountVectorizer(analyzer="char", lowercase=False, ngram_range=(1, 5), min_df=2)
    matrix = plain.fit_transform(said)
    found = blind.without_edges(blind.characters(said))
    assert [f"characters {gram!r}" for gram in plain.get_feature_names_out()] == found.names.tolist()
    assert (matrix != found.matrix).nnz == 0


def test_words_lose_their_case_and_go_in_pairs():
    assert counted(blind.words(["Red cat's hat", "red CAT"])) == {
        "word 'cat'": [1, 1],
        "word 'red'": [1, 1],
        "word 'red cat'": [1, 1],
    }


@pytest.mark.parametrize("said", [["", ""], ["!!!", "?"], [" ", "\n"]])
def test_captions_without_words_have_no_words_but_can_be_counted(said):
    assert blind.words(said).matrix.shape == (2, 0)
    for view in (blind.characters, blind.shapes, blind.patterns):
        assert view(said).matrix.shape[1] == len(view(said).names) > 0


@pytest.mark.parametrize(
    ("caption", "drawn"),
    [("Of The IMG_2019 – Ärger, 东", "Aa Aaa AAA_0000 – éaaaa, é"), ("", ""), ("x1 Y!", "a0 A!"), ("٣", "٣")],
)
def test_the_shape_of_a_caption(caption, drawn):
    assert blind.shape(caption) == drawn


@pytest.mark.parametrize(
    ("caption", "drawn"),
    [
        ("The old House of 12th, Ärger - by _me", "The x X of 0 , X - by x"),
        ("东 don't", "x x ' x"),
        ("", ""),
        ("!?", "! ?"),
    ],
)
def test_the_pattern_of_a_caption(caption, drawn):
    assert blind.pattern(caption) == drawn


def test_shapes_and_patterns_are_named():
    said = ["The Cat", "The Dog"]
    assert {"is shape 'Aaa '", "shape 'a Aaa'"} & set(blind.shapes(said).names) == {"shape 'a Aaa'"}
    assert {"is pattern 'The X'", "starts with pattern 'The'", "ends with pattern 'X'"} <= set(
        blind.patterns(said).names
    )


def test_features_beside_each_other_keep_their_names():
    said, _ = sentences(20)
    one, two = blind.words(said), blind.shapes(said)
    both = blind.beside(one, two)
    assert both.names.tolist() == [*one.names, *two.names]
    assert (both.matrix.toarray() == np.hstack([one.matrix.toarray(), two.matrix.toarray()])).all()


@pytest.mark.parametrize(
    ("url", "parts"),
    [
        (
            "https://www.Example.co.uk/wp-content/2019/12/A_red-Cat.JPG?w=3&q=#x",
            "scheme = https; host = www.example.co.uk; domain = example.co.uk; domain = co.uk; top = uk; "
            "extension = jpg; path word = wp; path word = content; path word = 2019; path word = red; path word = cat; "
            "parameter = w; parameter = q",
        ),
        (
            "http://my-site.example:8080/photo.jpg!large",
            "scheme = http; host = my-site.example; top = example; extension = jpg!large; path word = photo",
        ),
        (
            "http://user:secret@host.example/x.tar.gz",
            "scheme = http; host = host.example; top = example; extension = gz; path word = tar",
        ),
        (
            "http://EXAMPLE.com./v1.2/picture",
            "scheme = http; host = example.com; top = com; extension = none; path word = picture",
        ),
        (
            "http://[2001:db8::1]:80/i.png",
            "scheme = http; host = 2001:db8::1; top = 2001:db8::1; extension = png",
        ),
        ("file:///data/a.png", "scheme = file; host = none; top = none; extension = png; path word = data"),
        ("http://bücher.example/12345678.jpg", "scheme = http; host = bücher.example; top = example; extension = jpg"),
        ("http://h.example:port/x", "scheme = http; host = h.example; top = example; extension = none"),
        ("", "scheme = ; host = none; top = none; extension = none"),
        ("http://[broken/x.jpg", "unreadable"),
        ("http://a\u2100b.example/x.jpg", "unreadable"),
    ],
)
def test_the_parts_of_a_url(url, parts):
    assert "; ".join(blind.url_parts(url)) == parts
    assert set(blind.urls([url, url]).names) == set(parts.split("; "))


# ------------------------------------------------------------------------------------------------ statistics


def test_statistics_of_a_caption_by_hand():
    said = 'The RED cat (1) - "the cat" at 2019, Å|.'
    wanted = {
        "characters": 40, "words": 9, "mean word length": 23 / 9, "longest word": 4,
        "share of upper-case letters": 5 / 18,  # T, R, E, D, Å
        "share of capitalised words": 3 / 9, "share of all-capital words": 1 / 9, "share of digits": 5 / 40,
        "share of punctuation": 8 / 40, "share of non-ASCII characters": 1 / 40,
        "share of stop words": 3 / 9,  # The, the, at
        "capitalised stop words": 1, "share of repeated words": 2 / 9,  # the, cat
        "share of blanks": 9 / 40, "starts upper-case": 1, "ends with a full stop": 1, "commas": 1, "full stops": 1,
        "hyphens": 1, "quotation marks": 2, "vertical bars": 1, "brackets": 2, "years": 1,
    }  # fmt: skip
    assert len(said) == 40
    assert blind.caption_statistics(said) == by_hand(wanted, blind.CAPTION_STATISTICS)
    plain = dict(zip(blind.CAPTION_STATISTICS, blind.caption_statistics("3 a_b: x/y "), strict=True))
    assert (plain["starts with a digit"], plain["ends with a letter or digit"], plain["underscores"]) == (1, 1, 1)
    assert (plain["colons"], plain["slashes"], plain["starts upper-case"], plain["years"]) == (1, 1, 0, 0)


@pytest.mark.parametrize("said", ["", " ", "…", "\ud800", "東京", "_"])
def test_statistics_of_any_caption_are_numbers(said):
    assert np.isfinite(blind.caption_statistics(said)).all()
    assert len(blind.caption_statistics(said)) == len(blind.CAPTION_STATISTICS)


def test_statistics_of_an_image_of_two_colours_by_hand():
    """Four columns of three rows: two white columns, then two of (255, 0, 51)."""
    pixels = np.full((3, 4, 3), 255)
    pixels[:, 2:] = (255, 0, 51)
    data = png(pixels)
    step = (255 + 0 + 51) / 3 / 255 - 1.0  # grey is the mean of the channels: from 1 to 0.4
    wanted = {
        "width": 4, "height": 3, "aspect": 4 / 3, "megapixels": 12e-6, "file bytes": len(data),
        "bytes per pixel": len(data) / 12,
        "sharpness": np.var([step, -step]),  # inner pixels at columns 1 and 2: one neighbour each has the other colour
        "mean red": 1, "mean green": 0.5, "mean blue": 0.6, "deviation of green": 0.5, "deviation of blue": 0.4,
        "saturation": 0.5, "share of white": 0.5, "format_png": 1,
    }  # fmt: skip
    assert blind.image_statistics(data) == by_hand(wanted, blind.IMAGE_STATISTICS)
    assert wanted["sharpness"] == pytest.approx(0.36)


def named(data: bytes) -> dict[str, float]:
    return dict(zip(blind.IMAGE_STATISTICS, blind.image_statistics(data), strict=True))


def test_statistics_of_a_single_pixel_and_of_a_strip():
    one = named(png(np.zeros((1, 1, 3))))
    assert (one["width"], one["height"], one["aspect"], one["sharpness"]) == (1, 1, 1, 0)
    strip = named(png(np.full((1, 5, 3), 255)))
    assert (strip["mean red"], strip["saturation"], strip["share of white"]) == (1, 0, 1)
    assert len(named(png(np.zeros((2, 7, 3))))) == 20 + len(FORMATS)


@pytest.mark.parametrize(("level", "white"), [(0, 0), (247, 0), (248, 1), (255, 1)])
def test_white_is_what_lies_above_97_percent_in_every_channel(level, white):
    assert named(png(np.full((2, 2, 3), level)))["share of white"] == white
    assert named(png(np.full((2, 2, 3), (255, level, 255))))["share of white"] == white


def test_grey_and_transparent_images_have_the_same_numbers():
    for mode, fill in (("L", 100), ("RGBA", (0, 0, 0, 0)), ("P", 3), ("LA", (0, 0))):
        file = io.BytesIO()
        Image.new(mode, (6, 5), fill).save(file, "PNG")
        assert np.isfinite(blind.image_statistics(file.getvalue())).all()
    with pytest.raises(ImageError, match="not_an_image"):
        blind.image_statistics(b"no image")


def saved(kind: str, **how) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(file, kind, **how)
    return file.getvalue()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF"])
def test_the_format_is_one_of_the_statistics(kind):
    found = {name: value for name, value in named(saved(kind)).items() if name.startswith("format_")}
    assert {name for name, value in found.items() if value} == {f"format_{kind.lower()}"}


def test_signs_of_the_program_that_wrote_a_jpeg():
    coarse, fine = (saved("JPEG", quality=quality) for quality in (20, 90))
    for data in (coarse, fine):
        table = Image.open(io.BytesIO(data)).quantization[0]
        assert named(data)["mean JPEG quantizer"] == pytest.approx(np.mean(table))
    assert named(saved("PNG"))["mean JPEG quantizer"] == 0
    assert named(saved("JPEG", progressive=True))["progressive JPEG"] == 1 and named(fine)["progressive JPEG"] == 0
    exif = Image.Exif()
    exif[271] = "camera"
    rich = named(saved("JPEG", exif=exif, icc_profile=b"any profile", xmp=b"<x/>"))
    plain = named(fine)
    for sign in ("holds Exif", "holds a colour profile", "holds XMP"):
        assert rich[sign] == 1 and plain[sign] == 0


def test_of_a_large_image_the_middle_is_looked_at(monkeypatch):
    monkeypatch.setattr(blind, "IMAGE_SIDE", 2)
    pixels = np.zeros((4, 6, 3))
    pixels[1:3, 2:4] = 255
    assert named(png(pixels))["mean red"] == 1 and named(png(pixels))["width"] == 6


def test_stated_sizes_by_hand():
    stated = np.array([[200, 100], [np.nan, 300], [np.nan, np.nan], [0, 50]])
    wanted = [
        [200, 100, 2, 0.02, 1],
        [np.nan, 300, *[np.nan] * 2, 0],
        [*[np.nan] * 4, 0],
        [np.nan, 50, *[np.nan] * 2, 0],
    ]
    assert np.array_equal(blind.size_statistics(stated), wanted, equal_nan=True)


# ----------------------------------------------------------------------------------------------------- learners


def test_counting_once_equals_the_plain_pipeline_on_the_training_rows_alone():
    """`attacks.md` 4, as one would write it with scikit-learn: nothing of the rows that are asked for gets in."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline, make_union

    said, member = sentences(300)
    train, test = np.arange(300) < 200, np.arange(300) >= 200
    plain = make_pipeline(
        make_union(
            TfidfVectorizer(analyzer="char", lowercase=False, ngram_range=(1, 5), min_df=2, sublinear_tf=True),
            TfidfVectorizer(token_pattern=r"(?u)\b\w+\b", ngram_range=(1, 2), min_df=2, sublinear_tf=True),
        ),
        LogisticRegression(
            C=3.0, class_weight="balanced", solver="liblinear", dual=True, max_iter=1000, random_state=0
        ),
    )
    plain.fit([said[i] for i in np.flatnonzero(train)], member[train])
    wanted = plain.predict_proba([said[i] for i in np.flatnonzero(test)])[:, 1]
    inside, words = blind.without_edges(blind.characters(said)), blind.words(said)
    x = blind.beside(inside, words).matrix
    found = blind.tfidf([len(inside.names), len(words.names)], 0).fit(x[train], member[train]).predict_proba(x[test])
    assert np.abs(found[:, 1] - wanted).max() < 1e-9 and wanted.std() > 0.1


def test_log_ratio_equals_its_definition_row_by_row():
    from sklearn.linear_model import LogisticRegression

    said, member = sentences(120, 1)
    x, train = blind.words(said).matrix.toarray() > 0, np.arange(120) < 90
    weights = np.zeros(x.shape[1])
    for j in range(x.shape[1]):
        m, n = x[train & member, j].sum(), x[train & ~member, j].sum()
        if m + n >= 2:
            weights[j] = np.log((m + 1) / ((train & member).sum() + 1) / ((n + 1) / ((train & ~member).sum() + 1)))
    signed = x * weights
    signed /= np.maximum(np.linalg.norm(signed, axis=1, keepdims=True), 1e-300)
    plain = LogisticRegression(C=1.0, class_weight="balanced", solver="liblinear", dual=True, tol=1e-10, max_iter=10**6)
    wanted = plain.fit(signed[train], member[train]).predict_proba(signed[~train])[:, 1]
    learner = blind.log_ratio(0)
    learner[-1].set_params(tol=1e-10, max_iter=10**6)
    counts = blind.words(said).matrix
    found = learner.fit(counts[train], member[train]).predict_proba(counts[~train])[:, 1]
    assert found == pytest.approx(wanted, abs=1e-6)


def test_a_feature_of_one_training_row_is_left_out():
    x = sp.csr_matrix(np.array([[3, 1, 0], [1, 0, 2], [0, 0, 0]]))
    kept = blind.Repeated().fit(x).transform(x)
    assert (kept.toarray() == [[3, 0, 0], [1, 0, 0], [0, 0, 0]]).all() and kept.nnz == 2


def test_greedy_on_five_captions_by_hand():
    """Of three members and two non-members; worth = m / (m + n + 2)."""
    columns = ["of", "cat", "Of", "the"]
    captions = [["Of", "cat"], ["Of"], ["cat", "the"], ["cat", "of", "the"], ["the"]]
    x = sp.csr_matrix([[said.count(c) for c in columns] for said in captions])
    member = np.array([True, True, True, False, False])
    greedy = blind.Greedy().fit(x, member)
    assert greedy.worth_ == pytest.approx([0 / 3, 2 / 5, 2 / 4, 1 / 5])
    assert [columns[j] for j in greedy.order_] == ["Of", "cat", "the", "of"]
    unseen = sp.csr_matrix([[1, 2, 3, 1], [0, 5, 0, 1], [1, 0, 0, 1], [1, 0, 0, 0], [0, 0, 0, 0]])
    assert greedy.predict_proba(unseen)[:, 1] == pytest.approx([1 / 2, 2 / 5, 1 / 5, 0, 0])
    assert greedy.predict_proba(unseen).sum(1) == pytest.approx(1)
    assert greedy.predict_proba(x)[:, 1] == pytest.approx([1 / 2, 1 / 2, 2 / 5, 2 / 5, 1 / 5])


def test_every_threshold_of_greedy_is_a_number_of_features():
    said, member = sentences(150, 2)
    counts = blind.words(said)
    greedy = blind.Greedy().fit(counts.matrix, member)
    score, held = greedy.predict_proba(counts.matrix)[:, 1], counts.matrix.toarray() > 0
    for threshold in np.unique(score[score > 0]):
        taken = greedy.order_[: (greedy.worth_ >= threshold).sum()]
        assert (held[:, taken].any(1) == (score >= threshold)).all()


def test_greedy_breaks_ties_by_members_then_by_place():
    x = sp.csr_matrix(np.array([[1, 1, 1, 1]] + [[0, 0, 1, 1]] * 2 + [[0, 0, 0, 1]] * 0 + [[0, 0, 1, 0]] * 2))
    member = np.array([True, True, True, False, False])
    greedy = blind.Greedy().fit(x, member)  # worth 1/3, 1/3, 3/7, 3/5
    assert greedy.order_.tolist() == [3, 2, 0, 1]
    equal = blind.Greedy().fit(sp.csr_matrix([[1, 0, 1], [0, 0, 1], [0, 1, 1], [0, 0, 1]]), np.array([1, 1, 0, 0]) > 0)
    assert equal.worth_ == pytest.approx([1 / 3, 0, 1 / 3]) and equal.order_.tolist() == [2, 0, 1]


def test_a_learner_for_counts_needs_no_feature_that_repeats():
    x, member = sp.csr_matrix(np.eye(8, dtype=np.int32)), np.arange(8) < 4
    for learner in (blind.tfidf([3, 5], 0), blind.tfidf([8, 0], 0), blind.log_ratio(0), blind.Greedy()):
        assert np.isfinite(learner.fit(x, member).predict_proba(x)).all()


def test_a_small_tree_finds_what_no_threshold_does():
    r = np.random.default_rng(0)
    value, member = r.normal(size=(2000, 1)), np.arange(2000) < 1000
    value[member] *= 3
    assert abs(metrics.auc(value.ravel(), member) - 0.5) < 0.03
    tree = blind.small_tree().fit(value[::2], member[::2])
    assert metrics.auc(tree.predict_proba(value[1::2])[:, 1], member[1::2]) > 0.7


# ------------------------------------------------------------------------------------------------ sentence encoder


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A BERT with random weights and a vocabulary of a few words."""
    from mia.compat import ensure_torchvision

    ensure_torchvision()
    import torch
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = tmp_path_factory.mktemp("encoder")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "cat", "house", "old", "the"]
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(vocab_file=str(folder / "vocab.txt"), model_max_length=12).save_pretrained(folder)
    torch.manual_seed(0)
    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=len(words), max_position_embeddings=16, **size)).save_pretrained(folder)
    return folder


def test_sentences_are_unit_means_over_their_own_tokens(encoder):
    import torch
    from transformers import AutoModel, AutoTokenizer

    said = ["red cat", "the old old house", "", "cat " * 50, "dog"]
    found = blind.sentence_embeddings(encoder, said, batch_size=2)
    assert found.dtype == np.float32 and found.shape == (5, 16)
    assert np.linalg.norm(found, axis=1) == pytest.approx(1, abs=1e-6)
    model, tokenizer = AutoModel.from_pretrained(encoder).eval(), AutoTokenizer.from_pretrained(encoder)
    for text, vector in zip(said, found, strict=True):
        with torch.no_grad():
            states = model(**tokenizer(text, truncation=True, max_length=12, return_tensors="pt")).last_hidden_state
        mean = states[0].mean(0).numpy()
        assert vector == pytest.approx(mean / np.linalg.norm(mean), abs=1e-5)
    assert blind.sentence_embeddings(encoder, said[::-1])[::-1] == pytest.approx(found, abs=1e-5)


def test_what_is_no_sentence_encoder_is_refused(encoder, tmp_path):
    with pytest.raises(UserError, match="^sentence encoder is no folder, .*none, give a folder with a transformers"):
        blind.sentence_embeddings(tmp_path / "none", ["a"])
    with pytest.raises(UserError, match="^sentence encoder cannot be loaded"):
        blind.sentence_embeddings(tmp_path, ["a"])
    for file in encoder.iterdir():
        if file.name != "model.safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    import torch

    torch.save({}, tmp_path / "pytorch_model.bin")  # a pickle is not read
    with pytest.raises(UserError, match="^sentence encoder cannot be loaded"):
        blind.sentence_embeddings(tmp_path, ["a"])
    assert json.loads((tmp_path / "config.json").read_text())["hidden_size"] == 16
