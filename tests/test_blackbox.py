"""Black-box passes against plain loops, the local service against diffusers' own DDIM, budgets, and a web service."""

from __future__ import annotations

import base64
import dataclasses
import http.server
import io
import json
import math
import threading

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from mia import blackbox, models, pixels, rng, services, settings, ssim, tables
from mia.blackbox import Options
from mia.errors import UserError
from mia.services import Budgeted, Counts, HttpService, LocalService, Sampling
from tests.conftest import ROOT, picture

SEED = 11
IDS = [tables.sample_id(f"u{i}", f"c{i}") for i in range(4)]
CAPTIONS = ["a red dog", "two cats", "snow on a hill", "blue boat"]
SAMPLING = Sampling(steps=5, variation_step=25)


class Schedule:
    """Stable Diffusion's, by hand."""

    def __init__(self):
        self.alpha_bar = settings.alpha_bar(0.00085, 0.012)

    def alpha(self, t):
        return math.sqrt(self.alpha_bar[max(t, 0)])

    def sigma(self, t):
        return math.sqrt(1 - self.alpha_bar[max(t, 0)])

    def to_noise(self, output, z, alpha, sigma):
        return output


class Network:
    """The tiny target behind the interface that `LocalService.of` asks for."""

    latent_shape, side_px, has_null, device = (4, 8, 8), 32, True, "cpu"

    def __init__(self, unet, vae):
        self.unet, self.vae, self.schedule = unet, vae, Schedule()

    def __call__(self, z, t, condition):
        return self.unet(z, t, condition).sample

    def encode(self, shown):
        posterior = self.vae.encode(shown).latent_dist
        return posterior.mean, posterior.logvar

    def scaled(self, mean):
        return mean * 0.7

    def decode(self, z):
        return self.vae.decode(z / 0.7).sample


@pytest.fixture(scope="module")
def parts(tiny_target):
    import torch

    on, dtype = torch.device("cpu"), torch.float32
    network = Network(models.unet(tiny_target, on, dtype), models.vae(tiny_target, on, dtype))
    tokenize, text = models.tokenizer(tiny_target), models.text_encoder(tiny_target, on, dtype)

    def condition(prompts):
        return torch.from_numpy(models.text_states(tokenize, text, prompts, 64)[0])

    return network, condition, tiny_target


@pytest.fixture
def service(parts):
    return LocalService.of(parts[0], parts[1], SAMPLING)


@pytest.fixture(scope="module")
def images():
    return np.stack([pixels.centre_square(pixels.decode(picture(i)), 32) for i in range(4)])


# The local service ----------------------------------------------------------------------------------------------------


def ddim_oracle(parts, z, prompt: str, timesteps: list[int], step: int):
    """diffusers' own DDIM from latent z, guidance 7.5, networks called on 16 copies as the service's batches are."""
    import torch
    from diffusers import DDIMScheduler

    network, condition, folder = parts
    scheduler = DDIMScheduler.from_pretrained(folder, subfolder="scheduler")
    scheduler.alphas_cumprod = torch.from_numpy(network.schedule.alpha_bar)
    scheduler.final_alpha_cumprod = scheduler.alphas_cumprod[0]
    scheduler.set_timesteps(1000 // step)
    with torch.no_grad():
        cond, null = condition([prompt]), condition([""])
        for t in timesteps:
            e, u = (
                network.unet(z.float().expand(16, -1, -1, -1), t, c.expand(16, -1, -1)).sample[:1] for c in (cond, null)
            )
            z = scheduler.step((u + 7.5 * (e - u)).double(), t, z.double(), eta=0.0).prev_sample
        return z.float()


def shown_latents(parts, sampling=SAMPLING):
    """A service whose decoded pictures are blank, and the list into which their latents go."""
    import torch

    kept: list = []
    service = LocalService.of(parts[0], parts[1], sampling)

    def decode(z):
        kept.append(z.clone())
        return np.zeros((len(z), 32, 32, 3), np.uint8)

    service.decode = decode
    return service, kept, torch


def test_a_generation_is_diffusers_ddim(parts, service):
    plain, kept, torch = shown_latents(parts)
    plain.generate(CAPTIONS[:2], [5, 9])
    drawn = rng.stream(9, "service", 0, "generate").standard_normal((1, 4, 8, 8), dtype=np.float32)
    wanted = ddim_oracle(parts, torch.from_numpy(drawn), CAPTIONS[1], [801, 601, 401, 201, 1], 200)
    assert kept[0][1:2].numpy() == pytest.approx(wanted.numpy(), rel=1e-4, abs=1e-4)
    got = service.generate(CAPTIONS[:2], [5, 9])
    with torch.no_grad():
        decoded = parts[0].vae.decode(wanted / 0.7).sample[0].permute(1, 2, 0)
    by_hand = np.clip(np.round((decoded.numpy() / 2 + 0.5) * 255), 0, 255)
    assert got.shape == (2, 32, 32, 3) and np.abs(got[1].astype(int) - by_hand).max() <= 1


def test_a_variation_is_noised_to_its_strength_and_walked_back_to_0(parts, images):
    plain, kept, torch = shown_latents(parts)
    plain.vary(images[:1], 0.05, [3], [CAPTIONS[0]])
    shown = torch.from_numpy(images[:1].transpose(0, 3, 1, 2)).float() / 127.5 - 1
    with torch.no_grad():
        z0 = 0.7 * parts[0].vae.encode(shown).latent_dist.mean
    eps = torch.from_numpy(rng.stream(3, "service", 0, "vary").standard_normal((1, 4, 8, 8), dtype=np.float32))
    a = parts[0].schedule.alpha_bar
    z = a[50] ** 0.5 * z0 + (1 - a[50]) ** 0.5 * eps
    wanted = ddim_oracle(parts, z, CAPTIONS[0], [50, 25], 25)
    assert kept[0][:1].numpy() == pytest.approx(wanted.numpy(), rel=1e-4, abs=1e-4)


def test_company_order_and_batch_size_change_no_pixel(parts, service, images):
    whole = service.generate(CAPTIONS, [1, 2, 3, 4])
    varied = service.vary(images, 0.3, [1, 2, 3, 4], CAPTIONS)
    small = LocalService.of(parts[0], parts[1], Sampling(5, variation_step=25, batch_size=1))
    for order in ([2], [3, 1, 0]):
        some = [CAPTIONS[i] for i in order]
        drawn = [i + 1 for i in order]
        assert np.array_equal(small.generate(some, drawn), whole[order])
        assert np.array_equal(small.vary(images[order], 0.3, drawn, some), varied[order])
    assert not np.array_equal(service.generate([CAPTIONS[0]], [2])[0], whole[0])


def test_a_weak_variation_stays_nearer_to_the_image(service, images):
    import torch

    with torch.no_grad():
        plain = service.decode(service.encode(images)).astype(int)
    off = [
        np.abs(service.vary(images, strength, [1, 2, 3, 4], CAPTIONS).astype(int) - plain).mean()
        for strength in (0.002, 0.1, 0.7)
    ]
    assert off[0] < off[1] < off[2]


def test_work_is_counted_and_planned(parts, images):
    service = LocalService.of(parts[0], parts[1], SAMPLING)
    service.generate(CAPTIONS[:3], [1, 2, 3])
    assert service.counts == services.planned(SAMPLING, generations=3) == Counts(3 * 5 * 2, 3, 0)
    service.vary(images[:2], 0.06, [1, 2], CAPTIONS[:2])
    assert service.counts == services.planned(SAMPLING, 3, 2, 0.06) == Counts(3 * 5 * 2 + 2 * 3 * 2, 5, 2)
    assert services.planned(Sampling(), variations=10) == Counts(20, 10, 10)  # ReDiffuse's
    assert services.planned(Sampling(), generations=64) == Counts(6400, 64, 0)  # FSCA's


def test_pictures_that_do_not_fit_are_drawn_in_halves_and_counted_once(parts, service, images):
    import torch

    class Small(Network):
        """A network on a device that holds so many rows at a time, and never learns it twice."""

        refused, rows = 0, 16

        def __call__(self, z, t, condition):
            if len(z) > self.rows:
                self.refused += 1
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().__call__(z, t, condition)

    network = Small(parts[0].unet, parts[0].vae)
    small = LocalService.of(network, parts[1], dataclasses.replace(SAMPLING, batch_size=64))
    asked = (np.tile(images, (5, 1, 1, 1)), 0.4, list(range(20)), ["a dog", "two cats"] * 10)
    for _ in range(2):
        shown = small.vary(*asked)
    assert network.refused == 1  # of 20 rows; then 16, and 4 that are filled up
    assert small.counts == services.planned(SAMPLING, variations=40, strength=0.4)
    assert np.array_equal(shown, service.vary(*asked))
    network.rows = 15
    with pytest.raises(UserError, match="memory does not hold 16 rows at a time, cpu, use a larger one"):
        small.vary(*asked)


def test_a_model_without_a_null_condition_is_not_guided(parts):
    class Plain(Network):
        has_null = False

    network = Plain(parts[0].unet, parts[0].vae)
    service = LocalService.of(network, parts[1], SAMPLING)
    service.generate(CAPTIONS[:1], [1])
    assert service.counts.unet_rows == 5 and service.sampling.guidance_scale == 0


def test_a_model_that_knows_one_latent_draws_it(images):
    """The ideal denoiser of a single point x: e = (z - alpha x) / sigma; every walk to alpha = 1 ends at x."""
    import torch

    point = torch.from_numpy(rng.noise(0, ["x"], [0], "", (4, 8, 8)))

    class Flow:
        def alpha(self, t):
            return 1 - max(t, 0) / 1000

        def sigma(self, t):
            return max(t, 0) / 1000

        def to_noise(self, output, z, alpha, sigma):
            return z + alpha * output

    class Memory:
        latent_shape, side_px, has_null, device, schedule = (4, 8, 8), 32, False, "cpu", Flow()

        def __call__(self, z, t, condition):
            s = (t / 1000)[:, None, None, None]
            return (z - point) / s  # eps - x

        def encode(self, pixels):
            return torch.zeros(len(pixels), 4, 8, 8), None

        def scaled(self, mean):
            return mean

        def decode(self, z):
            assert (z - point).abs().max() < 1e-4
            return torch.zeros(len(z), 3, 32, 32)

    service = LocalService.of(Memory(), lambda prompts: None, SAMPLING)
    assert (service.generate(CAPTIONS, [1, 2, 3, 4]) == 128).all()
    assert (service.vary(images, 0.4, [1, 2, 3, 4], CAPTIONS) == 128).all()


@pytest.mark.parametrize(
    ("shape", "dtype", "strength", "message"),
    [
        ((1, 16, 16, 3), np.uint8, 0.1, r"images are uint8\[1, 16, 16, 3\].*make them uint8\[n, 32, 32, 3\]"),
        ((1, 32, 32, 3), np.float32, 0.1, "images are float32"),
        ((1, 32, 32, 3), np.uint8, 0.0, "strength 0.0"),
        ((1, 32, 32, 3), np.uint8, 1.5, "strength 1.5"),
        ((1, 32, 32, 3), np.uint8, 0.0004, "strength 0.0004"),
    ],
)
def test_a_request_that_makes_no_sense_is_refused(service, shape, dtype, strength, message):
    with pytest.raises(UserError, match=message):
        service.vary(np.zeros(shape, dtype), strength, [1], ["x"])


# Budgets --------------------------------------------------------------------------------------------------------------


class Fake:
    """A service that keeps what it was asked; variations are the images, brighter by the seed's last bits."""

    def __init__(self, side=32):
        self.side, self.asked = side, []

    def generate(self, prompts, seeds):
        self.asked.append(len(prompts))
        return np.stack([np.full((self.side, self.side, 3), seed % 251, np.uint8) for seed in seeds])

    def vary(self, images, strength, seeds, prompts):
        self.asked.append(len(images))
        return np.stack([x // 2 + np.uint8(seed % 100) for x, seed in zip(images, seeds, strict=True)])


def test_a_budget_counts_queries_and_images_and_refuses_before_anything_is_sent(images):
    fake = Fake()
    service = Budgeted(fake, 5)
    service.generate(CAPTIONS[:2], [1, 2])
    service.vary(images[:3], 0.1, [1, 2, 3], CAPTIONS[:3])
    assert (service.queries, service.images, fake.asked) == (2, 5, [2, 3])
    with pytest.raises(UserError, match="1 more images would exceed the budget of 5, 5 are used"):
        service.generate(["x"], [1])
    assert (service.queries, service.images, fake.asked) == (2, 5, [2, 3])


def test_a_pass_that_would_exceed_the_budget_sends_nothing(images):
    fake = Fake()
    options = Options(variations=3, images_per_query=5)
    with pytest.raises(UserError, match="12 more images would exceed the budget of 11"):
        blackbox.variations(Budgeted(fake, 11), IDS, images, CAPTIONS, options, SEED, 5)
    assert fake.asked == []
    service = Budgeted(fake, 12)
    blackbox.variations(service, IDS, images, CAPTIONS, options, SEED, 5)
    assert fake.asked == [5, 5, 2] and service.queries == 3
    assert service.images == blackbox.planned_images(options, 4, ["variations"]) == 12
    assert blackbox.planned_images(Options(), 10) == 130


# Structural similarity ------------------------------------------------------------------------------------------------


def ssim_oracle(x: np.ndarray, y: np.ndarray) -> float:
    """Wang et al. 2004, equation 13, window by window."""
    weights = [[math.exp(-(a * a + b * b) / 4.5) for b in range(-5, 6)] for a in range(-5, 6)]
    whole = sum(map(sum, weights))
    found = []
    for i in range(5, x.shape[0] - 5):
        for j in range(5, x.shape[1] - 5):
            cells = [(weights[a][b] / whole, x[i + a - 5, j + b - 5], y[i + a - 5, j + b - 5])
                     for a in range(11) for b in range(11)]  # fmt: skip
            mx, my = sum(w * p for w, p, _ in cells), sum(w * q for w, _, q in cells)
            vx, vy = sum(w * (p - mx) ** 2 for w, p, _ in cells), sum(w * (q - my) ** 2 for w, _, q in cells)
            both = sum(w * (p - mx) * (q - my) for w, p, q in cells)
            c1, c2 = 2.55**2, 7.65**2
            found.append((2 * mx * my + c1) * (2 * both + c2) / (mx * mx + my * my + c1) / (vx + vy + c2))
    return sum(found) / len(found)


def test_ssim_equals_the_windows_one_by_one():
    generator = np.random.default_rng(0)
    x = generator.uniform(0, 255, (15, 13))
    for y in (generator.uniform(0, 255, (15, 13)), np.clip(x + generator.normal(0, 20, x.shape), 0, 255), 255 - x):
        assert ssim.ssim(x, y) == pytest.approx(ssim_oracle(x, y), rel=1e-9)
        assert ssim.ssim(x, y) == pytest.approx(ssim.ssim(y, x), rel=1e-12)


def test_ssim_by_hand():
    """Flat pictures have no variance: (2 mx my + c1) / (mx^2 + my^2 + c1)."""
    flat = [np.full((12, 12), level) for level in (100.0, 200.0)]
    assert ssim.ssim(*flat) == pytest.approx((40000 + 6.5025) / (50000 + 6.5025), rel=1e-12)
    assert ssim.ssim(flat[0], flat[0]) == pytest.approx(1, rel=1e-12)
    assert ssim.grey(np.array([[[255, 0, 0], [10, 20, 30]]])) == pytest.approx(np.array([[76.245, 18.15]]))


@pytest.mark.parametrize("shape", [(10, 40), (12, 13)])
def test_ssim_refuses_pictures_that_are_too_small_or_unlike(shape):
    with pytest.raises(UserError, match="give equal sides of 11 or more"):
        ssim.ssim(np.zeros(shape), np.zeros((shape[0], 40)))


# Variations -----------------------------------------------------------------------------------------------------------


def vectors(table: pa.Table) -> np.ndarray:
    return np.array(table["vector"].to_pylist(), np.float64)


def test_variations_equal_the_plain_loop(service, images):
    options = Options(variations=3, strength=0.1, images_per_query=4)
    table = blackbox.variations(service, IDS, images, CAPTIONS, options, SEED, 5)
    assert table["timestep"].to_pylist() == [100] * 4 and table["draw"].to_pylist() == [0] * 4
    for i in (0, 3):
        total = np.zeros((32, 32, 3))
        for draw in range(3):
            chosen = int(rng.stream(SEED, IDS[i], draw, "variation").integers(2**31))
            total += service.vary(images[[i]], 0.1, [chosen], [CAPTIONS[i]])[0]
        grey = [p[..., 0] * 0.299 + p[..., 1] * 0.587 + p[..., 2] * 0.114 for p in (images[i].astype(float), total / 3)]
        l2 = math.sqrt(((images[i] - total / 3) ** 2).sum() / 3072) / 255
        assert vectors(table)[i] == pytest.approx([ssim_oracle(*grey), l2], rel=1e-5)


def test_variations_do_not_depend_on_requests_order_or_company(images):
    options = [Options(variations=4, images_per_query=k) for k in (1, 3, 16)]
    whole = blackbox.variations(Fake(), IDS, images, CAPTIONS, options[2], SEED, 5)
    for some in options:
        got = blackbox.variations(Fake(), IDS[::-1], images[::-1], CAPTIONS[::-1], some, SEED, 5)
        assert tables.check(got, "features").equals(tables.check(whole, "features"))
        assert got.sort_by("sample_id").equals(whole.sort_by("sample_id"))
    part = blackbox.variations(Fake(), IDS[1:2], images[1:2], CAPTIONS[1:2], options[1], SEED, 5)
    assert part.equals(whole.slice(1, 1))


def test_a_model_that_returns_the_image_scores_highest(images):
    class Memory(Fake):
        def vary(self, images, strength, seeds, prompts):
            return images if prompts[0] == "known" else super().vary(images, strength, seeds, prompts)

    options = Options(variations=2, images_per_query=2)
    got = vectors(blackbox.variations(Memory(), IDS, images, ["known", "a", "b", "c"], options, SEED, 5))
    assert got[0] == pytest.approx([1, 0], abs=1e-6) and got[1:, 0].max() < 0.99 and got[1:, 1].min() > 0.01


def test_an_answer_of_the_wrong_size_is_refused(images):
    class Smaller(Fake):
        def vary(self, images, strength, seeds, prompts):
            return images[:, ::2, ::2]

        def generate(self, prompts, seeds):
            return super().generate(prompts, seeds)[1:]

    options = Options(variations=1, generations=1, images_per_query=2)
    with pytest.raises(UserError, match=r"gives uint8\[2, 16, 16, 3\], not uint8\[2, 32, 32, 3\], request 0"):
        blackbox.variations(Smaller(), IDS, images, CAPTIONS, options, SEED, 5)
    with pytest.raises(UserError, match=r"gives uint8\[1, 32, 32, 3\], not uint8\[2, 32, 32, 3\], request 0"):
        blackbox.generations(Smaller(), IDS, images, CAPTIONS, encoder_of(None), options, SEED, 5)


# Generations ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clip():
    import torch

    return models.encoder(f"local-dir:{ROOT / 'resources/example/encoders/clip'}", torch.device("cpu"))[:3]


def encoder_of(clip, batch_size=64):
    if clip is None:
        return type("None", (), {"has_tokens": True})()
    return blackbox.Encoder(*clip, batch_size)


def hand_embedded(clip, shown: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The embedding by open_clip's own call, and the tokens as they leave the last norm, without the first."""
    import torch

    model, preprocess, _ = clip
    kept = []
    hook = model.visual.ln_post.register_forward_hook(lambda module, inputs, output: kept.append(output))
    with torch.no_grad():
        vector = model.encode_image(preprocess(Image.fromarray(shown))[None])[0]
    hook.remove()
    return vector.double().numpy(), kept[0][0, 1:].double().numpy()


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float((a * b).sum() / math.sqrt((a * a).sum()) / math.sqrt((b * b).sum()))


def test_generations_equal_the_plain_loop(clip, service):
    import torch

    originals = [np.array(pixels.decode(picture(i, 50 + i))) for i in range(4)]
    options = Options(generations=3, keep_tokens=True, images_per_query=5)
    table = blackbox.generations(service, IDS, originals, CAPTIONS, encoder_of(clip), options, SEED, 5)
    assert table.num_rows == 12 and set(table["block"].to_pylist()) == {"generations"}
    assert table["sample_id"].to_pylist()[3:6] == [IDS[1]] * 3 and table["draw"].to_pylist()[3:6] == [0, 1, 2]
    got = vectors(table)
    for i, draw in ((0, 0), (1, 2), (3, 1)):
        chosen = int(rng.stream(SEED, IDS[i], draw, "generation").integers(2**31))
        drawn, drawn_tokens = hand_embedded(clip, service.generate([CAPTIONS[i]], [chosen])[0])
        clean, clean_tokens = hand_embedded(clip, originals[i])
        with torch.no_grad():
            text = clip[0].encode_text(clip[2]([CAPTIONS[i]]))[0].double().numpy()
        each = [cosine(a, b) for a, b in zip(drawn_tokens, clean_tokens, strict=True)]
        wanted = [cosine(drawn, clean), cosine(text, drawn), cosine(text, clean), np.mean(each), max(each), *each]
        assert got[3 * i + draw] == pytest.approx(wanted, rel=1e-5, abs=1e-6)
        names = blackbox.generation_names(len(each))
        assert len(names) == len(wanted) and names[:3] == (
            "cos_generation_image",
            "cos_text_generation",
            "cos_text_image",
        )
    assert clip[0].visual.output_tokens is False


def test_generations_do_not_depend_on_requests_order_or_company(clip, images):
    whole = blackbox.generations(Fake(), IDS, images, CAPTIONS, encoder_of(clip), Options(), SEED, 5)
    assert vectors(whole).shape == (12, len(blackbox.GENERATION_NAMES))
    for k, size in ((1, 1), (5, 2), (12, 64)):
        options = Options(images_per_query=k)
        got = blackbox.generations(
            Fake(), IDS[::-1], images[::-1], CAPTIONS[::-1], encoder_of(clip, size), options, SEED, 5
        )
        assert got.sort_by([("sample_id", "ascending"), ("draw", "ascending")]).equals(
            whole.sort_by([("sample_id", "ascending"), ("draw", "ascending")])
        )
    assert tables.check(whole, "features").num_rows == 12


def test_the_model_free_part_is_the_same_whatever_the_service_draws(clip, service, images):
    at = blackbox.GENERATION_NAMES.index("cos_text_image")
    assert blackbox.MODEL_FREE == ("cos_text_image",)
    got = [
        vectors(blackbox.generations(asked, IDS, images, CAPTIONS, encoder_of(clip), Options(generations=1), SEED, 5))
        for asked in (Fake(), service)
    ]
    assert np.array_equal(got[0][:, at], got[1][:, at]) and not np.array_equal(got[0][:, 0], got[1][:, 0])


def test_a_model_that_draws_the_image_itself_scores_highest(clip, images):
    class Memory(Fake):
        def generate(self, prompts, seeds):
            return np.stack([images[0] if p == CAPTIONS[0] else np.full((32, 32, 3), 9, np.uint8) for p in prompts])

    got = vectors(
        blackbox.generations(Memory(), IDS, images, CAPTIONS, encoder_of(clip), Options(generations=1), SEED, 5)
    )
    for name in ("cos_generation_image", "tokens_mean"):
        column = got[:, blackbox.GENERATION_NAMES.index(name)]
        assert column[0] == pytest.approx(1, abs=1e-5) and column[1:].max() < 0.999


def test_an_encoder_without_tokens_leaves_them_empty_and_cannot_keep_them(clip, images):
    import torch

    class Tower(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = clip[0]
            self.visual = clip[0].encode_image

        def encode_text(self, tokens):
            return self.inner.encode_text(tokens)

    bare = blackbox.Encoder(Tower(), *clip[1:])
    table = blackbox.generations(Fake(), IDS[:1], images, CAPTIONS, bare, Options(generations=1), SEED, 5)
    vector = table["vector"].to_pylist()[0]
    assert None not in vector[:3] and vector[3:] == [None, None]
    with pytest.raises(UserError, match="shows no image tokens"):
        blackbox.generations(Fake(), IDS, images, CAPTIONS, bare, Options(keep_tokens=True), SEED, 5)


def test_no_samples_give_no_rows(clip):
    empty = np.empty((0, 32, 32, 3), np.uint8)
    assert blackbox.variations(Fake(), [], empty, [], Options(), SEED, 5).num_rows == 0
    assert blackbox.generations(Fake(), [], [], [], encoder_of(clip), Options(), SEED, 5).num_rows == 0


# A service on the web -------------------------------------------------------------------------------------------------


@pytest.fixture
def web():
    """The address of a server that answers as `Fake`, and of what it was asked; `broken` prompts get nonsense."""
    fake, log = Fake(), []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):  # noqa: N802
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            log.append((self.path, self.headers.get("Authorization"), asked))
            broken = next((p for p in asked["prompts"] if p in ("500", "text", "few", "none", "junk")), None)
            if self.path == "/vary":
                given = [np.asarray(Image.open(io.BytesIO(base64.b64decode(x)))) for x in asked["images"]]
                pictures = fake.vary(np.stack(given), asked["strength"], asked["seeds"], asked["prompts"])
            else:
                pictures = fake.generate(asked["prompts"], asked["seeds"])
            coded = [services._png(p) for p in pictures]
            body = {
                "text": b"<html>",
                "junk": json.dumps({"images": ["aGVsbG8="] * 2}).encode(),
                "few": json.dumps({"images": coded[1:]}).encode(),
                "none": b"{}",
            }
            self.send_response(500 if broken == "500" else 200)
            self.end_headers()
            self.wfile.write(body.get(broken or "", json.dumps({"images": coded}).encode()))

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", log
    server.shutdown()
    server.server_close()


def test_a_remote_service_gives_what_a_local_one_gives(web, images):
    address, log = web
    remote = HttpService(address + "/", headers={"Authorization": "Bearer x"})
    assert np.array_equal(remote.generate(CAPTIONS, [1, 2, 3, 4]), Fake().generate(CAPTIONS, [1, 2, 3, 4]))
    assert np.array_equal(remote.vary(images, 0.1, [1] * 4, CAPTIONS), Fake().vary(images, 0.1, [1] * 4, CAPTIONS))
    assert [(path, key) for path, key, _ in log] == [("/generate", "Bearer x"), ("/vary", "Bearer x")]
    assert log[1][2]["strength"] == 0.1 and log[0][2]["seeds"] == [1, 2, 3, 4]
    table = blackbox.variations(Budgeted(remote, 40), IDS, images, CAPTIONS, Options(), SEED, 5)
    assert table.equals(blackbox.variations(Fake(), IDS, images, CAPTIONS, Options(), SEED, 5))


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("500", "HTTP Error 500"),
        ("text", "gives no images"),
        ("none", "gives no images"),
        ("few", "gives 1 images of"),
        ("junk", "no known image format"),
    ],
)
def test_a_remote_service_that_fails_is_named_and_asked_once(web, prompt, message):
    address, log = web
    with pytest.raises(UserError, match=f"{message}.*{address}/generate"):
        HttpService(address).generate([prompt, "x"], [1, 2])
    assert len(log) == 1


def test_an_address_that_is_none_is_refused():
    with pytest.raises(UserError, match="begins with https"):
        HttpService("file:///etc/passwd")
    with pytest.raises(UserError, match="gives no images"):
        HttpService("http://127.0.0.1:9", timeout_s=1).generate(["x"], [1])
