# ruff: noqa: T201  (a script: it reports by printing)
"""Build the embedded example corpus from Debian's openclipart packages.

    apt-get install openclipart-svg openclipart-png
    npm pack cldr-annotations-full && tar xzf cldr-annotations-full-*.tgz      # unpacks into ./package
    python resources/example/build_corpus.py --cldr package

Every drawing of openclipart carries its own RDF metadata: title, keywords, creator, licence. Drawings that declare
themselves public domain and have a usable title become image-caption pairs, split into three pools (members,
candidates, control). README.md beside this file says what each pool is for and what was left out.

Everything is a function of --seed and of the two source packages: two runs write the same bytes.
"""

from __future__ import annotations

import argparse
import collections
import csv
import hashlib
import html
import io
import itertools
import json
import pathlib
import re
import shutil
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageChops, ImageOps
from scipy.stats import rankdata
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.pipeline import FeatureUnion, make_pipeline, make_union
from sklearn.preprocessing import StandardScaler

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent.parent

# --------------------------------------------------------------------------------------------------------------------
# Reading and cleaning the metadata
# --------------------------------------------------------------------------------------------------------------------

CC = "{http://web.resource.org/cc/}"
DC = "{http://purl.org/dc/elements/1.1/}"
RDF = "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}"
SVG = "{http://www.w3.org/2000/svg}"
XLINK = "{http://www.w3.org/1999/xlink}"
PUBLIC_DOMAIN = {"http://web.resource.org/cc/PublicDomain", "http://creativecommons.org/licenses/publicdomain/"}

# Icon themes, templated series (one drawing repeated with another letter, colour or number), trademarks, a nude.
LEFT_OUT = (
    "computer/",
    "logos/",
    "people/clothing/pantyhose/",
    "people/sexy_lady",
    "recreation/games/cards/bordered/",
    "recreation/games/cards/ornamental/",
    "recreation/games/cards/simple/",
    "recreation/games/cards/white/",
    "shapes/stars/",
    "signs_and_symbols/led/",
    "special/",
    "unsorted/duplicates/",
)
SERIES_TITLE = 10  # a title shared by this many drawings names the series, not the drawing
NOT_TITLES = {"", "drawing", "image", "new document", "svg", "test", "title", "unknown", "untitled", "unsorted"}
NOT_KEYWORDS = NOT_TITLES | {
    "appicon",
    "clip art",
    "clipart",
    "cut",
    "cv-clip",
    "hash",
    "unchecked",
    "united nations member",
}
SPELL_OUT = {
    "airtravel": "air travel",
    "bodypart": "body part",
    "christmassymbol": "christmas symbol",
    "icecream": "ice cream",
    "latinamerica": "latin america",
    "mapsym": "map symbol",
    "musicsym": "music symbol",
    "religholiday": "religious holiday",
    "roadsign": "road sign",
    "roadtravel": "road travel",
    "signalflag": "signal flag",
    "usmail": "mail",
    "watertravel": "water travel",
}


@dataclass(frozen=True)
class Drawing:
    """One public-domain drawing: where it lies, and what its author says about it (cleaned)."""

    path: str
    title: str
    keywords: tuple[str, ...]
    creator: str
    raw_title: str

    @property
    def category(self) -> str:
        return self.path.split("/")[0]

    @property
    def unit(self) -> tuple[str, str]:
        """(creator, second-level category): drawings of one unit look alike, so no unit is ever split over pools."""
        parts = self.path.split("/")
        return creator_key(self.creator), "/".join(parts[:2]) if len(parts) > 2 else parts[0]


def creator_key(creator: str) -> str:
    """One key for the spellings of a name: 'Rollandin Francesco' and 'Architetto Francesco Rollandin' agree."""
    name = re.sub(r"[(\[<].*|\S+@\S+", " ", creator.lower()).replace(".", "")
    return " ".join(sorted(set(re.findall(r"\w{2,}", name)) - {"architetto"}))


def tidy(text: str) -> str:
    """Plain words: no entities, control characters, underscores, camel case, mail addresses or trailing numbering."""
    text = html.unescape(html.unescape(text))
    text = re.sub(r"[\x00-\x1f\x7f]+", " ", text)
    text = re.sub(r"\S+@\S+|https?://\S+|\.svg\b", " ", text)
    text = re.sub(r"(?<=[a-z])(?=[A-Z][a-z])", " ", text).replace("_", " ")
    text = re.sub(r"(?i)^(clip ?art|drawing|image) by [\w. ]+? - ", "", text)
    text = re.sub(r"(?i)\(b and w\)|\bbw\b", "black and white", text)
    text = re.sub(r"(?i)\b(aiga|RPSWB)\b", " ", text)
    text = re.sub(r"\s+", " ", text).strip(" -.,;:")
    numbering = re.compile(r"(?i)[ \-#]*\b(v\d[\d.]*|no\.?|nr\.?|\d{1,3}[a-z]?)$|(?<=[a-z]{3})\d{1,3}$")
    while (shorter := numbering.sub("", text)) != text:
        text = shorter.strip(" -.,;:#")
    return text


def stem_words(path: str, creator: str) -> str:
    """A name from the file name, less the (often cut off) creator name and the numbering that upload scripts added."""
    stem = tidy(pathlib.PurePosixPath(path).stem.replace("-", " "))
    stem = re.sub(r"(?<=[a-z])\d+\b|\b\d+\b", " ", stem)
    names = re.findall(r"\w+", creator.lower())
    words = stem.split()
    for cut in range(1, len(words)):
        tail = words[cut:]
        if all(any(name.startswith(w.lower()) for name in names) for w in tail) and len(tail[0]) > 2:
            words = words[:cut]
            break
    return " ".join(words)


def says_something(text: str) -> bool:
    return text.lower() not in NOT_TITLES and re.search(r"[^\W\d_]{3,}", text) is not None and len(text) <= 80


def clean_keywords(raw: Iterable[str], title: str, creator: str) -> tuple[str, ...]:
    """The keywords that add something to the title, in the author's order, without housekeeping marks and names."""
    kept: dict[str, None] = {}
    names = set(creator_key(creator).split())
    for entry in raw:
        entry = re.sub(r"\s+", " ", html.unescape(entry)).strip().lower().replace("_", " ")
        parts = entry.split(" ") if entry.count(" ") > 2 else [entry]
        for word in (SPELL_OUT.get(p, p) for p in parts):
            usable = 2 < len(word) <= 20 and word not in NOT_KEYWORDS and not re.search(r"[\d@:/()\[\]&;,]", word)
            if usable and word not in title.lower() and not names & set(word.split()):
                kept[word] = None
    return tuple(kept)


def read_rdf(svg: pathlib.Path) -> dict[str, str | list[str]] | None:
    """Title, creator and keywords of one file, or None unless its own metadata says public domain.

    Files that link to an image outside themselves were rendered as "Linked Image Not Found" and count as None, too.
    """
    root = ET.fromstring(svg.read_bytes())
    work = root.find(f".//{CC}Work")
    linked = (image.get(f"{XLINK}href", "") for image in root.iter(f"{SVG}image"))
    if work is None or not all(href.startswith("data:") for href in linked):
        return None
    licences = {element.get(f"{RDF}resource") for element in work.findall(f"{CC}license")}
    if not licences or not licences <= PUBLIC_DOMAIN:
        return None

    def text(tag: str) -> str:
        element = work.find(DC + tag)
        return "" if element is None else "".join(element.itertext()).strip()

    subject = work.find(f"{DC}subject")
    keywords = [] if subject is None else [item.text or "" for item in subject.iter(f"{RDF}li")]
    return {"title": text("title"), "creator": text("creator"), "keywords": keywords}


def read_drawings(openclipart: pathlib.Path) -> list[Drawing]:
    """All public-domain drawings with a usable title, outside the series that LEFT_OUT names."""
    svgs = sorted(p for p in (openclipart / "svg").rglob("*.svg") if not p.is_symlink())
    paths = {p.relative_to(openclipart / "svg").as_posix(): p for p in svgs}
    records = {path: read_rdf(p) for path, p in paths.items() if not path.startswith(LEFT_OUT)}
    shared = collections.Counter(record["title"] for record in records.values() if record)
    drawings = []
    for path, record in records.items():
        if not record or not says_something(raw := str(record["title"])):
            continue
        creator = str(record["creator"])
        stem = stem_words(path, creator)
        names_series = shared[raw] >= SERIES_TITLE or re.match(r"(?i)clip ?art by", raw)
        options = [stem, tidy(raw)] if names_series else [tidy(raw), stem]
        options = [o for o in options if says_something(o) and creator_key(o) != creator_key(creator)]
        if not options or (names_series and options[0].lower() == "various cliparts"):
            continue
        keywords = clean_keywords(record["keywords"], options[0], creator)
        drawings.append(Drawing(path, options[0], keywords, re.sub(r"\s*[(\[<]?\S+@\S+", "", creator).strip(), raw))
    return drawings


# --------------------------------------------------------------------------------------------------------------------
# Images
# --------------------------------------------------------------------------------------------------------------------

SIZE = 96  # longest side of a stored image, pixels
MAX_PIXELS = 16_000_000  # a handful of renders are up to 600 megapixels, mostly empty
MIN_SIDE = 24
MAX_ASPECT = 4.0
MIN_CONTRAST = 8.0  # standard deviation of the grey values: below it the render is blank or nearly so


def trim(image: Image.Image) -> Image.Image:
    """Cut the empty page around a drawing down to a margin of 5 %: many drawings are a speck on a white sheet."""
    ink = ImageChops.difference(image, Image.new("RGB", image.size, "white")).convert("L")
    box = ink.point(lambda value: 255 * (value > 12)).getbbox()
    if box is None:
        return image
    margin = round(0.05 * max(box[2] - box[0], box[3] - box[1]))
    left, top = max(box[0] - margin, 0), max(box[1] - margin, 0)
    return image.crop((left, top, min(box[2] + margin, image.width), min(box[3] + margin, image.height)))


def render(png: pathlib.Path, size: int) -> Image.Image | None:
    """The drawing on white, longest side at most `size`; None for missing, oversized, thin or blank renders."""
    Image.MAX_IMAGE_PIXELS = None  # sizes are checked here, before any pixel is decoded
    if not png.is_file():
        return None
    with Image.open(png) as source:
        if source.width * source.height > MAX_PIXELS:
            return None
        rgba = source.convert("RGBA")
    image = trim(Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB"))
    if max(image.size) > MAX_ASPECT * min(image.size):
        return None
    image.thumbnail((size, size), Image.Resampling.LANCZOS)
    too_flat = np.asarray(image.convert("L"), dtype=np.float32).std() < MIN_CONTRAST
    return None if too_flat or min(image.size) < MIN_SIDE else image


def collect(openclipart: pathlib.Path, size: int) -> list[tuple[Drawing, Image.Image]]:
    """All usable drawings with their renders, in path order; of renders equal pixel for pixel the first is kept."""
    seen: set[bytes] = set()
    usable = []
    for drawing in read_drawings(openclipart):
        image = render(openclipart / "png" / f"{drawing.path[:-4]}.png", size)
        if image is None:
            continue
        digest = hashlib.sha256(f"{image.size}".encode() + image.tobytes()).digest()
        if digest not in seen:
            seen.add(digest)
            usable.append((drawing, image))
    return usable


def encode_jpeg(image: Image.Image, quality: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality, optimize=True)
    return buffer.getvalue()


def decode(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data)).convert("RGB")


def image_statistics(data: bytes) -> dict[str, float]:
    """Simple statistics of a stored image: the material of the scores below and of the shift measurement."""
    rgb = np.asarray(decode(data), dtype=np.float32)
    grey = rgb @ np.array([0.299, 0.587, 0.114], dtype=np.float32)
    step = np.abs(np.diff(grey, axis=0))[:, 1:] + np.abs(np.diff(grey, axis=1))[1:]
    laplace = 4 * grey[1:-1, 1:-1] - grey[:-2, 1:-1] - grey[2:, 1:-1] - grey[1:-1, :-2] - grey[1:-1, 2:]
    rg, yb = rgb[..., 0] - rgb[..., 1], (rgb[..., 0] + rgb[..., 1]) / 2 - rgb[..., 2]
    skin = (rg > 15) & (rgb[..., 1] > rgb[..., 2]) & (rgb[..., 0] > 95) & (rg < 90) & (rgb[..., 2] > 40)
    colourfulness = np.hypot(rg.std(), yb.std()) + 0.3 * np.hypot(rg.mean(), yb.mean())  # Hasler and Suesstrunk, 2003
    return {
        "brightness": float(grey.mean()) / 255,
        "contrast": float(grey.std()) / 255,
        "colourfulness": float(colourfulness) / 100,
        "sharpness": float(np.log1p(laplace.var())),
        "edge_density": float((step > 32).mean()),
        "bottom_edges": float((step[-max(1, len(step) // 7) :] > 32).mean()),
        "skin": float(skin.mean()),
        "bytes_per_pixel": len(data) / grey.size,
        "width": float(rgb.shape[1]),
        "height": float(rgb.shape[0]),
    }


def scores(stats: dict[str, float]) -> dict[str, float]:
    """Stand-ins for LAION's predicted scores, the same formula for every pool (see README.md)."""
    aesthetic = 2.4 + 3.0 * min(stats["colourfulness"], 1.0) + 3.5 * stats["contrast"] + 2.0 * stats["edge_density"]
    return {
        "AESTHETIC_SCORE": round(min(max(aesthetic, 0.0), 10.0), 4),
        "punsafe": round(0.002 + 0.25 * stats["skin"], 5),
        "pwatermark": round(0.03 + 0.3 * stats["bottom_edges"], 5),
    }


# --------------------------------------------------------------------------------------------------------------------
# Captions
# --------------------------------------------------------------------------------------------------------------------

# (weight, pattern, number of keywords the pattern wants); the last ", {k}" falls away where a drawing has none.
TEMPLATES: tuple[tuple[float, str, int], ...] = (
    (0.16, "{T}", 0),
    (0.16, "{T}, {k}", 1),
    (0.14, "{T}, {k}", 2),
    (0.08, "{T}, {k}", 3),
    (0.10, "clip art of {t}", 0),
    (0.08, "clip art of {t}, {k}", 1),
    (0.08, "drawing of {t}, {k}", 1),
    (0.06, "{T} vector illustration", 0),
    (0.06, "{T} - {k} clipart", 1),
    (0.04, "{T} | {k}", 2),
    (0.04, "Illustration: {t}, {k}", 2),
)


def seeded(*key: object) -> np.random.Generator:
    """A generator that depends on the key alone, so that one drawing's draw never disturbs another's."""
    digest = hashlib.sha256("\0".join(map(str, key)).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:8], "little"))


def write_caption(drawing: Drawing, rng: np.random.Generator) -> str:
    """Alt text as people write it: the title, sometimes a few keywords, in one of a few patterns."""
    weights = np.array([weight for weight, _, _ in TEMPLATES])
    _, pattern, wanted = TEMPLATES[rng.choice(len(TEMPLATES), p=weights / weights.sum())]
    chosen = sorted(rng.permutation(len(drawing.keywords))[:wanted])
    words = ", ".join(drawing.keywords[i] for i in chosen)
    if not words:
        pattern = re.sub(r"( [-|]|,) \{k\}", "", pattern)
    title = drawing.title
    return pattern.format(T=title[:1].upper() + title[1:], t=title, k=words)


def other_caption(drawing: Drawing, caption: str, rng: np.random.Generator) -> str:
    """Another plausible caption of the same drawing."""
    tries = (write_caption(drawing, rng) for _ in range(50))
    return next((text for text in tries if text != caption), f"Picture of {drawing.title}")


LANGUAGES = ("fr", "de", "es", "it", "pt", "nl", "pl", "ru", "ja", "zh", "tr", "cs")


@dataclass
class Translator:
    """Short names of emoji in Unicode's CLDR: one code point links the same concept in many languages."""

    folder: pathlib.Path
    names: dict[str, dict[str, str]] = field(default_factory=dict)
    by_english: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for language in ("en", *LANGUAGES):
            file = self.folder / "annotations" / language / "annotations.json"
            table = json.loads(file.read_text(encoding="utf-8"))["annotations"]["annotations"]
            self.names[language] = {char: entry["tts"][0] for char, entry in table.items() if entry.get("tts")}
        for char, name in self.names["en"].items():
            self.by_english.setdefault(name.lower(), char)

    def concepts(self, drawing: Drawing) -> list[str]:
        """Code points whose English short name is the title, a word of the title, or a keyword (best first)."""
        title = re.sub(r"\(.*?\)", "", drawing.title.lower()).strip()
        words = re.findall(r"[a-z]{3,}", title)
        phrases = [title, *(f"{a} {b}" for a, b in itertools.pairwise(words)), *words[::-1], *drawing.keywords]
        phrases += [p[:-1] for p in phrases if p.endswith("s")]
        found = [self.by_english[p] for p in phrases if p in self.by_english]
        return list(dict.fromkeys(found))[:2]

    def caption(self, drawing: Drawing, rng: np.random.Generator) -> tuple[str, str] | None:
        """(language, caption) in a language drawn by `rng`, or None if CLDR has no word for the drawing."""
        chars = self.concepts(drawing)
        if not chars:
            return None
        language = LANGUAGES[rng.integers(len(LANGUAGES))]
        words = [self.names[language][c] for c in chars if c in self.names[language]]
        if not words:
            return None
        joiner = "、" if language in ("ja", "zh") else ", "
        text = joiner.join(words[: 1 + int(rng.random() < 0.7)])
        return language, text[:1].upper() + text[1:] + (" - clipart" if rng.random() < 0.3 else "")


# --------------------------------------------------------------------------------------------------------------------
# Pools
# --------------------------------------------------------------------------------------------------------------------

POOLS = ("members", "candidates", "control")

# P(member | member or candidate) of a unit, by top-level category: the natural shift between the two pools.
PROPENSITY = {
    "animals": 0.60,
    "buildings": 0.45,
    "food": 0.58,
    "geography": 0.40,
    "office": 0.42,
    "people": 0.52,
    "plants": 0.60,
    "recreation": 0.45,
    "shapes": 0.45,
    "signs_and_symbols": 0.44,
    "tools": 0.45,
    "transportation": 0.40,
}
CAPTION_AUC = (0.65, 0.72)
IMAGE_AUC = 0.04


def cap_units(drawings: Sequence[Drawing], cap: int, seed: int) -> list[int]:
    """Indices of at most `cap` drawings of each unit, chosen by seed."""
    units: dict[tuple[str, str], list[int]] = collections.defaultdict(list)
    for index, drawing in enumerate(drawings):
        units[drawing.unit].append(index)
    chosen = [sorted(seeded(seed, "cap", *unit).permutation(members)[:cap]) for unit, members in units.items()]
    return sorted(int(i) for group in chosen for i in group)


def cross_validated_auc(features: object, labels: np.ndarray, model: object) -> float:
    folds = StratifiedKFold(5, shuffle=True, random_state=0)
    predicted = cross_val_predict(model, features, labels, cv=folds, method="decision_function")
    return float(roc_auc_score(labels, predicted))


def caption_features() -> FeatureUnion:
    words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
    chars = TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 4), sublinear_tf=True)
    return make_union(words, chars)


def caption_auc(members: Sequence[str], candidates: Sequence[str]) -> float:
    """How well captions alone tell the pools apart: TF-IDF of word and character n-grams, logistic regression."""
    labels = np.repeat([1, 0], [len(members), len(candidates)])
    model = make_pipeline(caption_features(), LogisticRegression(C=1.0, max_iter=200, solver="liblinear"))
    return cross_validated_auc([*members, *candidates], labels, model)


def image_aucs(members: Sequence[dict[str, float]], candidates: Sequence[dict[str, float]]) -> dict[str, float]:
    """AUC of each simple statistic alone (0.5 = no difference), and of a logistic regression on all of them."""
    labels = np.repeat([1, 0], [len(members), len(candidates)])
    rows = [*members, *candidates]
    table = np.array([list(row.values()) for row in rows])
    aucs = {name: float(roc_auc_score(labels, table[:, i])) for i, name in enumerate(rows[0])}
    joint = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    return {**aucs, "all_together": cross_validated_auc(table, labels, joint)}


@dataclass
class Shift:
    """Fast stand-ins for `caption_auc` and `image_aucs`, to steer the search for an assignment (see `choose_pools`)."""

    captions: np.ndarray  # (drawing, feature): TF-IDF reduced to its main directions
    images: np.ndarray  # (drawing, statistic): standardised

    @classmethod
    def of(cls, captions: Sequence[str], stats: Sequence[dict[str, float]]) -> Shift:
        table = StandardScaler().fit_transform(np.array([list(row.values()) for row in stats]))
        reduced = TruncatedSVD(120, random_state=0).fit_transform(caption_features().fit_transform(captions))
        return cls(reduced, table)

    def __call__(self, members: np.ndarray, candidates: np.ndarray) -> tuple[float, float, float]:
        """AUC of the captions; furthest an image statistic's AUC lies from 0.5; and what all statistics give."""
        rows = np.concatenate([members, candidates])
        labels = np.repeat([True, False], [len(members), len(candidates)])
        images = self.images[rows]
        singles = [abs(rank_auc(column, labels) - 0.5) for column in images.T]
        return leave_one_out_auc(self.captions[rows], labels), max(singles), leave_one_out_auc(images, labels)


def rank_auc(values: np.ndarray, labels: np.ndarray) -> float:
    positives = int(labels.sum())
    below = rankdata(values)[labels].sum() - positives * (positives + 1) / 2
    return float(below / (positives * (len(labels) - positives)))


def leave_one_out_auc(features: np.ndarray, labels: np.ndarray) -> float:
    """AUC of the leave-one-out scores of a ridge classifier (closed form: a few milliseconds)."""
    x = np.column_stack([features, np.ones(len(features))])
    y = np.where(labels, 1.0, -1.0) - (2 * labels.mean() - 1)
    weights = x @ np.linalg.inv(x.T @ x + np.eye(x.shape[1]))
    leverage = np.einsum("ij,ij->i", weights, x)
    return rank_auc((weights @ (x.T @ y) - leverage * y) / (1 - leverage), labels)


@dataclass
class Assignment:
    """Whole units to pools: `pool[u]` is unit u's index in POOLS, `unit_of[i]` the unit of drawing `indices[i]`."""

    indices: np.ndarray
    unit_of: np.ndarray
    pool: np.ndarray

    @classmethod
    def draw(cls, drawings: Sequence[Drawing], indices: Sequence[int], share: float, rng: np.random.Generator):
        """A random assignment: `share` of the units to control, the others by the propensity of their category."""
        units = sorted({drawings[i].unit for i in indices})
        propensity = np.array([PROPENSITY.get(category.split("/")[0], 0.48) for _, category in units])
        dice = rng.random((2, len(units)))
        number = {unit: u for u, unit in enumerate(units)}
        unit_of = np.array([number[drawings[i].unit] for i in indices])
        pool = np.where(dice[0] < share, 2, np.where(dice[1] < propensity, 0, 1))
        return cls(np.asarray(indices), unit_of, pool)

    def drawings(self, pool: int) -> np.ndarray:
        return self.indices[self.pool[self.unit_of] == pool]

    def swapped(self, rng: np.random.Generator) -> Assignment:
        """A neighbour: one unit moves to another pool; mostly, units of together about its size come back."""
        sizes = np.bincount(self.unit_of)
        weights = sizes if rng.random() < 0.5 else np.ones(len(sizes))
        unit = rng.choice(len(sizes), p=weights / weights.sum())
        here, there = self.pool[unit], (self.pool[unit] + rng.integers(1, 3)) % 3
        pool, owed = self.pool.copy(), sizes[unit] if rng.random() < 0.8 else 0
        pool[unit] = there
        for other in rng.permutation(np.flatnonzero(self.pool == there)):
            if sizes[other] <= owed:
                pool[other] = here
                owed -= sizes[other]
        return Assignment(self.indices, self.unit_of, pool)


def choose_pools(
    drawings: Sequence[Drawing],
    captions: Sequence[str],
    stats: Sequence[dict[str, float]],
    sizes: dict[str, int],
    args: argparse.Namespace,
) -> dict[str, list[int]]:
    """Assign whole units to pools so that captions tell members from candidates moderately, and images hardly.

    A purely random draw of whole units tells the pools apart far too well (caption AUC about 0.83): half of all
    drawings belong to units of more than ten, which share words. So start from a random draw by PROPENSITY and swap
    units while that lowers the shift, and stop as soon as the caption AUC is inside CAPTION_AUC and every image
    statistic inside IMAGE_AUC. Pools are then thinned at random to the wanted sizes.
    """
    rng = seeded(args.seed, "pools")
    shift = Shift.of(captions, stats)
    share = sizes["control"] / sum(sizes.values())
    indices = cap_units(drawings, args.unit_cap, args.seed)
    current = Assignment.draw(drawings, indices, share, rng)

    def cost(assignment: Assignment) -> float:
        parts = [assignment.drawings(pool) for pool in range(3)]
        text, image, images = shift(parts[0], parts[1])
        short = sum(max(0, sizes[name] + 15 - len(part)) for name, part in zip(POOLS, parts, strict=True))
        return text + 4 * max(0.0, image - 0.75 * IMAGE_AUC) + 2 * max(0.0, images - 0.5) + 0.01 * short

    lowest = cost(current)
    for step in range(args.max_swaps):
        neighbour = current.swapped(rng)
        if (value := cost(neighbour)) <= lowest:
            current, lowest = neighbour, value
        if step % 100 == 99:
            pools = {name: thin(current.drawings(p), sizes[name], rng) for p, name in enumerate(POOLS)}
            if accept(pools, captions, stats, sizes, step):
                return pools
    raise SystemExit(f"no assignment within {args.max_swaps} swaps met the wanted shift; change PROPENSITY or --seed")


def thin(indices: np.ndarray, size: int, rng: np.random.Generator) -> list[int]:
    return sorted(int(i) for i in rng.permutation(indices)[:size])


def accept(
    pools: dict[str, list[int]],
    captions: Sequence[str],
    stats: Sequence[dict[str, float]],
    sizes: dict[str, int],
    step: int,
) -> bool:
    """Whether the pools have their sizes and the shift, measured in earnest, lies in the wanted range."""
    members, candidates = pools["members"], pools["candidates"]
    text = caption_auc([captions[i] for i in members], [captions[i] for i in candidates])
    images = image_aucs([stats[i] for i in members], [stats[i] for i in candidates])
    joint = images.pop("all_together")
    worst = max(images, key=lambda name: abs(images[name] - 0.5))
    print(f"{step} swaps: caption AUC {text:.3f}, image AUC {images[worst]:.3f} ({worst}), {joint:.3f} (all together)")
    full = all(len(pools[name]) == sizes[name] for name in POOLS)
    return full and CAPTION_AUC[0] <= text <= CAPTION_AUC[1] and abs(images[worst] - 0.5) <= IMAGE_AUC


# --------------------------------------------------------------------------------------------------------------------
# Planted near-duplicates
# --------------------------------------------------------------------------------------------------------------------


def alter(image: Image.Image, transform: str, rng: np.random.Generator) -> Image.Image:
    """A copy as the web makes them: rescaled, re-encoded, cropped, recoloured or padded."""
    width, height = image.size
    if transform == "rescale":
        factor = rng.uniform(0.5, 0.85)
        return image.resize((round(width * factor), round(height * factor)), Image.Resampling.BICUBIC)
    if transform == "jpeg":
        return decode(encode_jpeg(image, int(rng.integers(12, 35))))
    if transform == "crop":
        left, top, right, bottom = rng.uniform(0.02, 0.05, 4) * (width, height, width, height)
        return image.crop((round(left), round(top), round(width - right), round(height - bottom)))
    if transform == "pad":
        return ImageOps.expand(image, (int(rng.integers(2, 7)), 0, int(rng.integers(2, 7)), 0), "white")
    hsv = np.asarray(image.convert("HSV"), dtype=np.float32).copy()
    if transform == "hue":
        hsv[..., 0] = (hsv[..., 0] + rng.choice([-1, 1]) * rng.uniform(10, 24)) % 256
    elif transform == "brightness":
        hsv[..., 2] *= rng.uniform(0.75, 0.92)
    else:
        raise ValueError(transform)
    return Image.fromarray(hsv.clip(0, 255).astype(np.uint8), "HSV").convert("RGB")


TRANSFORMS = ("rescale", "jpeg", "crop", "pad", "hue", "brightness", "crop+jpeg", "rescale+hue")


def alter_all(image: Image.Image, transform: str, size: int, rng: np.random.Generator) -> Image.Image:
    for part in transform.split("+"):
        image = alter(image, part, rng)
    image.thumbnail((size, size), Image.Resampling.LANCZOS)
    return image


# --------------------------------------------------------------------------------------------------------------------
# Writing
# --------------------------------------------------------------------------------------------------------------------

SCHEMA = pa.schema(
    [
        ("URL", pa.string()),
        ("TEXT", pa.string()),
        ("LANGUAGE", pa.string()),
        ("WIDTH", pa.int64()),
        ("HEIGHT", pa.int64()),
        ("AESTHETIC_SCORE", pa.float64()),
        ("similarity", pa.float64()),
        ("punsafe", pa.float64()),
        ("pwatermark", pa.float64()),
    ]
)


@dataclass
class Pair:
    """One image-caption pair about to be written."""

    drawing: Drawing
    data: bytes
    caption: str
    language: str = "en"
    copy: int = 0  # 0 for the drawing itself, else the number of an altered copy

    def slug(self, seed: int) -> str:
        """A file name from the title and a hash; it shows neither the pool nor whether the image is a copy."""
        words = re.sub(r"[^a-z0-9]+", "-", self.drawing.title.lower()).strip("-")[:40].strip("-")
        return f"{words}-{hashlib.sha256(f'{seed}/{self.drawing.path}/{self.copy}'.encode()).hexdigest()[:6]}"

    def url(self, seed: int) -> str:
        """One folder holds every pool's images: a URL must not tell the pool."""
        return f"file:{(HERE / 'images').relative_to(ROOT).as_posix()}/{self.slug(seed)}.jpg"


def plant(members: Sequence[Pair], args: argparse.Namespace) -> list[tuple[Pair, dict[str, object]]]:
    """Altered copies of randomly drawn members, half of them with another caption, and the truth about each."""
    rng = seeded(args.seed, "plant")
    planted = []
    for number, index in enumerate(rng.permutation(len(members))[: args.planted]):
        original, transform = members[index], TRANSFORMS[number % len(TRANSFORMS)]
        image = alter_all(decode(original.data), transform, args.size, rng)
        same = (number // len(TRANSFORMS)) % 2 == 0
        caption = original.caption if same else other_caption(original.drawing, original.caption, rng)
        copy = Pair(original.drawing, encode_jpeg(image, args.quality), caption, copy=1)
        truth = {
            "candidate_url": copy.url(args.seed),
            "member_url": original.url(args.seed),
            "transform": transform,
            "same_caption": same,
        }
        planted.append((copy, truth))
    return planted


def translate_some(pairs: Sequence[Pair], translator: Translator, share: float, seed: int) -> None:
    """Give a share of the pairs a caption in another language (in place), where CLDR has the words."""
    wanted = round(share * len(pairs))
    for index in seeded(seed, "translate").permutation(len(pairs)):
        pair = pairs[index]
        translated = translator.caption(pair.drawing, seeded(seed, "language", pair.drawing.path))
        if wanted and translated:
            pair.language, pair.caption = translated
            wanted -= 1


def write_pool(pool: str, pairs: Sequence[Pair], seed: int) -> list[tuple[str, Drawing]]:
    """Write one pool's images and LAION-style parquet in a shuffled row order; return (file, drawing) of each row."""
    rows, credits = [], []
    for index in seeded(seed, "order", pool).permutation(len(pairs)):
        pair = pairs[index]
        (HERE / "images" / f"{pair.slug(seed)}.jpg").write_bytes(pair.data)
        width, height = decode(pair.data).size
        head = {"URL": pair.url(seed), "TEXT": pair.caption, "LANGUAGE": pair.language}
        size = {"WIDTH": width, "HEIGHT": height, "similarity": None}  # train_encoders.py fills the last one
        rows.append({**head, **size, **scores(image_statistics(pair.data))})
        credits.append((f"images/{pair.slug(seed)}.jpg", pair.drawing))
    if len({row["URL"] for row in rows}) != len(rows):
        raise SystemExit(f"two images of {pool} got the same file name; change --seed")
    pq.write_table(pa.Table.from_pylist(rows, SCHEMA), HERE / f"{pool}.parquet", compression="zstd")
    return credits


def write_attribution(credits: Iterable[tuple[str, Drawing]]) -> None:
    with (HERE / "ATTRIBUTION.tsv").open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file, delimiter="\t", lineterminator="\n", quoting=csv.QUOTE_NONE, quotechar=None)
        table.writerow(["file", "title", "creator", "original"])
        for name, drawing in sorted(credits, key=lambda credit: credit[0]):
            title, creator = (re.sub(r"\s+", " ", text) for text in (drawing.raw_title, drawing.creator))
            table.writerow([name, title, creator, drawing.path])


def report(pools: dict[str, list[Pair]], planted: int) -> None:
    """Print what README.md states: counts, sizes and the measured shift between members and natural candidates."""
    for pool, pairs in pools.items():
        size = sum(len(pair.data) for pair in pairs)
        units, captions = {p.drawing.unit for p in pairs}, {p.caption for p in pairs}
        foreign = sum(p.language != "en" for p in pairs)
        print(
            f"{pool}: {len(pairs)} pairs, {len(units)} units, {len(captions)} captions, {foreign} not en, {size} bytes"
        )
        print("  ", dict(collections.Counter(p.drawing.category for p in pairs).most_common()))
    members, natural = pools["members"], pools["candidates"][: len(pools["candidates"]) - planted]
    english = [p.caption for p in natural if p.language == "en"]
    texts = [p.caption for p in members]
    print(f"caption AUC, English natural candidates: {caption_auc(texts, english):.3f}")
    print(f"caption AUC, all candidates: {caption_auc(texts, [p.caption for p in pools['candidates']]):.3f}")
    aucs = image_aucs(*([image_statistics(p.data) for p in pairs] for pairs in (members, natural)))
    print("image AUCs:", {name: round(value, 3) for name, value in aucs.items()})


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--openclipart", type=pathlib.Path, default=pathlib.Path("/usr/share/openclipart"))
    parser.add_argument("--cldr", type=pathlib.Path, required=True, help="unpacked npm package cldr-annotations-full")
    parser.add_argument("--size", type=int, default=SIZE, help="longest side of a stored image, pixels")
    parser.add_argument("--quality", type=int, default=82, help="JPEG quality, the same for every image")
    parser.add_argument("--members", type=int, default=500)
    parser.add_argument("--candidates", type=int, default=1500, help="natural candidates; planted copies come on top")
    parser.add_argument("--control", type=int, default=600)
    parser.add_argument("--planted", type=int, default=120)
    parser.add_argument("--translated", type=float, default=0.06, help="share of candidates not in English")
    parser.add_argument("--unit-cap", type=int, default=60)
    parser.add_argument("--max-swaps", type=int, default=6000)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    usable = collect(args.openclipart, args.size)
    drawings = [drawing for drawing, _ in usable]
    data = [encode_jpeg(image, args.quality) for _, image in usable]
    captions = [write_caption(d, seeded(args.seed, "caption", d.path)) for d in drawings]
    print(f"{len(drawings)} usable drawings in {len({d.unit for d in drawings})} units")

    sizes = {pool: getattr(args, pool) for pool in POOLS}
    chosen = choose_pools(drawings, captions, [image_statistics(d) for d in data], sizes, args)
    pools = {pool: [Pair(drawings[i], data[i], captions[i]) for i in chosen[pool]] for pool in POOLS}
    translate_some(pools["candidates"], Translator(args.cldr), args.translated, args.seed)
    planted = plant(pools["members"], args)
    pools["candidates"] += [pair for pair, _ in planted]

    shutil.rmtree(HERE / "images", ignore_errors=True)
    (HERE / "images").mkdir()
    credits = [credit for pool in POOLS for credit in write_pool(pool, pools[pool], args.seed)]
    truth = sorted((row for _, row in planted), key=lambda row: str(row["candidate_url"]))
    pq.write_table(pa.Table.from_pylist(truth), HERE / "planted.parquet", compression="zstd")
    write_attribution(credits)
    report(pools, len(planted))


if __name__ == "__main__":
    main()
