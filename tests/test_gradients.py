"""Gradient passes against plain loops, their invariances, their counts, and what they refuse."""

from __future__ import annotations

import copy
import dataclasses
import math

import numpy as np
import pyarrow as pa
import pytest

from mia import gradients, lbfgs, models, noise_optimisation, rng, settings, tables
from mia.cli import passes
from mia.config import FeaturesOptions
from mia.errors import UserError
from mia.gradients import Counts, Denoiser, Options, Samples

SEED = 11
IDS = [tables.sample_id(f"u{i}", f"c{i}") for i in range(5)]
OPTIONS = Options(gsa_timesteps=(99, 401, 999), masking_timesteps=(0, 401))
ALPHA_BAR = settings.alpha_bar(0.00085, 0.012)


class Network:
    """An object that holds a UNet."""

    def __init__(self, unet):
        self.unet = unet

    def __call__(self, z, t, condition):
        return self.unet(z, t, condition).sample


@pytest.fixture(scope="module")
def unet(tiny_target):
    import torch

    return models.unet(tiny_target, torch.device("cpu"), torch.float32)


@pytest.fixture(scope="module")
def data():
    """z0, float32[5, 4, 8, 8], and text states, one for each sample."""
    return rng.noise(1, IDS, [0] * 5, "z0", (4, 8, 8)), rng.noise(1, IDS, [0] * 5, "states", (32, 32))


def denoiser(unet, **others) -> Denoiser:
    return Denoiser(Network(unet), lambda t: math.sqrt(ALPHA_BAR[t]), lambda t: math.sqrt(1 - ALPHA_BAR[t]), **others)


def samples(data, chosen=range(5), dtype="float32") -> Samples:
    import torch

    chosen, kind = list(chosen), models.torch_dtype(dtype)
    z0, states = (torch.from_numpy(x[chosen]).to(kind) for x in data)
    return Samples([IDS[i] for i in chosen], z0, lambda rows: states[torch.from_numpy(rows)], SEED)


def forward_noise(sample: int):
    import torch

    drawn = rng.stream(SEED, IDS[sample], 0, "forward").standard_normal((1, 4, 8, 8), dtype=np.float32)
    return torch.from_numpy(drawn).double()


def oracle(unet, data, sample: int, options: Options) -> tuple[list, list, list]:
    """GSA1, GSA2 and masked scores of one image, in float64: loops, `.backward()`, a mask by counting ranks."""
    import torch

    net = copy.deepcopy(unet).double().requires_grad_(True)
    z0, c = torch.from_numpy(data[0][[sample]]).double(), torch.from_numpy(data[1][[sample]]).double()
    eps = forward_noise(sample)
    sums, means = [0.0] * len(list(net.parameters())), [0.0] * len(list(net.parameters()))
    for t in options.gsa_timesteps:
        net.zero_grad()
        z = ALPHA_BAR[t] ** 0.5 * z0 + (1 - ALPHA_BAR[t]) ** 0.5 * eps
        torch.nn.functional.mse_loss(net(z, t, c).sample, eps).backward()
        for i, p in enumerate(net.parameters()):
            sums[i] = sums[i] + p.grad.clone()
            means[i] += float((p.grad**2).sum()) ** 0.5 / len(options.gsa_timesteps)
    gsa1 = [float(((g / len(options.gsa_timesteps)) ** 2).sum()) ** 0.5 for g in sums]
    masked = []
    for t in options.masking_timesteps:
        clean = z0.clone().requires_grad_(True)
        z = ALPHA_BAR[t] ** 0.5 * clean + (1 - ALPHA_BAR[t]) ** 0.5 * eps
        ((net(z, t, c).sample - eps) ** 2).mean().backward()
        size = clean.grad.abs().flatten().tolist()
        hit = [sum(other > mine for other in size) < round(0.2 * len(size)) for mine in size]
        assert sum(hit) == round(0.2 * 256) == 51
        mixed = z0.clone().flatten()
        for i, masks in enumerate(hit):
            if masks:
                mixed[i] = eps.flatten()[i]
        with torch.no_grad():
            e = net(mixed.reshape(z0.shape), t, c).sample.flatten()
        off = [float(eps.flatten()[i] - z0.flatten()[i] - e[i]) for i, masks in enumerate(hit) if masks]
        masked.append(math.sqrt(sum(x * x for x in off)))
    return gsa1, means, masked


@pytest.fixture(scope="module")
def found(unet, data):
    return gradients.backward(denoiser(unet), samples(data), OPTIONS)


@pytest.mark.parametrize("sample", [0, 3])
def test_norms_and_masked_scores_equal_the_plain_loops(unet, data, found, sample):
    gsa1, gsa2, masked = oracle(unet, data, sample, OPTIONS)
    # The loss does not depend on a bias before a group norm of single channels: that gradient is rounding alone.
    assert found.gsa1[sample] == pytest.approx(gsa1, rel=1e-5, abs=2e-8)
    assert found.gsa2[sample] == pytest.approx(gsa2, rel=1e-5, abs=2e-8)
    assert found.masking[sample] == pytest.approx(masked, rel=1e-5)
    exact = gradients.backward(denoiser(copy.deepcopy(unet).double()), samples(data, [sample], "float64"), OPTIONS)
    assert exact.gsa1[0] == pytest.approx(gsa1, rel=1e-9)
    assert exact.masking[0] == pytest.approx(masked, rel=1e-9)


def test_gsa1_is_at_most_gsa2_and_equal_at_one_timestep(unet, data, found):
    assert (found.gsa1 <= found.gsa2 * (1 + 1e-6)).all() and (found.gsa1 < 0.999 * found.gsa2).any()
    one = gradients.backward(denoiser(unet), samples(data, [0]), Options(gsa_timesteps=(401,)), ["gsa"])
    assert one.gsa1 == pytest.approx(one.gsa2, rel=1e-6)
    assert one.masking.shape == (1, 0) and one.timesteps == ()


def test_a_linear_network_by_hand():
    import torch

    class Scale(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.tensor([2.0]))
            self.unused = torch.nn.Parameter(torch.tensor([1.0]))

        def forward(self, z, t, condition):
            return self.weight * z

    eps = torch.from_numpy(rng.noise(0, ["a"], [0], "forward", (1, 1, 2))).double()
    z0 = torch.tensor([[[[3.0, -1.0]]]])
    plain = Denoiser(Scale(), lambda t: 0.6, lambda t: 0.8)
    options = Options(gsa_timesteps=(7,), masking_timesteps=(7,), masked_share=0.5)
    got = gradients.backward(plain, Samples(["a"], z0, lambda rows: None, 0), options)
    z = (0.6 * z0 + 0.8 * eps).flatten().tolist()
    e = eps.flatten().tolist()
    by_weight = sum(2 * (2 * z[i] - e[i]) * z[i] / 2 for i in (0, 1))  # d/dw mean (e - w z)^2 at w = 2
    assert got.tensors == ("weight", "unused")
    assert got.gsa1[0] == pytest.approx([abs(by_weight), 0.0], rel=1e-6)
    large = 0 if abs(2 * z[0] - e[0]) > abs(2 * z[1] - e[1]) else 1
    assert got.masking[0, 0] == pytest.approx(abs(e[large] - float(z0.flatten()[large]) - 2 * e[large]), rel=1e-6)


def test_order_and_company_change_no_bit(unet, data, found):
    mixed = gradients.backward(denoiser(unet), samples(data, [4, 1, 3]), OPTIONS)
    for name in ("gsa1", "gsa2", "masking"):
        assert np.array_equal(getattr(mixed, name), getattr(found, name)[[4, 1, 3]]), name


def test_a_pass_gives_the_same_alone_and_in_company(unet, data, found):
    norms = gradients.backward(denoiser(unet), samples(data, [2]), OPTIONS, ["gsa"])
    masks = gradients.backward(denoiser(unet), samples(data, [2]), OPTIONS, ["gradient-masking"])
    assert norms.gsa1 == pytest.approx(found.gsa1[[2]], rel=1e-6)
    assert norms.gsa2 == pytest.approx(found.gsa2[[2]], rel=1e-6)
    assert masks.masking == pytest.approx(found.masking[[2]], rel=1e-6)
    assert masks.tensors == () and masks.gsa1.shape == (1, 0)


@pytest.mark.parametrize(
    ("passes", "options", "unet_rows", "backwards"),
    [  # for each image, by hand
        (["gsa"], OPTIONS, 3, 3),
        (["gradient-masking"], OPTIONS, 2 + 2, 2),
        (["gsa", "gradient-masking"], OPTIONS, 4 + 2, 4),  # 401 is shared
        (["gsa", "gradient-masking"], Options((1, 101), (1, 101)), 2 + 2, 2),
        ([], OPTIONS, 0, 0),
    ],
)
def test_work_is_counted_and_planned(unet, data, passes, options, unet_rows, backwards):
    got = gradients.backward(denoiser(unet), samples(data, [0, 1]), options, passes)
    assert got.counts == gradients.planned(passes, options, 2) == Counts(2 * unet_rows, 2 * backwards)


def test_default_work_is_that_of_the_papers():
    assert gradients.planned(["gsa"], Options(), 1) == Counts(10, 10)
    assert gradients.planned(["gradient-masking"], Options(), 1) == Counts(20, 10)
    assert gradients.planned(gradients.PASSES, Options(), 1) == Counts(36, 25)
    tens = tuple(range(1, 1000, 100))
    shared = Options(tens, tens)
    assert gradients.planned(gradients.PASSES[:2], shared, 1) == Counts(20, 10)


def test_a_model_that_fits_the_image_has_smaller_norms_and_scores(unet, data):
    """Orientation: low = member, on the image that the network was trained on."""
    import torch

    net = copy.deepcopy(unet).requires_grad_(True)
    optimiser = torch.optim.Adam(net.parameters(), lr=2e-3)
    z0, c = torch.from_numpy(data[0][:1]), torch.from_numpy(data[1][:1])
    torch.manual_seed(0)
    a = torch.from_numpy(ALPHA_BAR).float()
    for _ in range(150):
        t, eps = torch.randint(1000, (16,)), torch.randn(16, 4, 8, 8)
        z = a[t, None, None, None].sqrt() * z0 + (1 - a[t, None, None, None]).sqrt() * eps
        loss = torch.nn.functional.mse_loss(net(z, t, c.expand(16, -1, -1)).sample, eps)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    got = gradients.backward(denoiser(net), samples(data), Options((401,), (401,)))
    total = np.sqrt((got.gsa2**2).sum(1))
    assert total[0] < 0.8 * total[1:].min()
    tuned = noise_optimisation.optimise(denoiser(net), samples(data), OPTIONS, 16)
    assert tuned.norm[0] < 0.5 * tuned.norm[1:].min()


def test_gradients_stay_off_afterwards_also_after_a_failure(unet, data):
    unet.conv_in.weight.requires_grad_(True)
    try:
        gradients.backward(denoiser(unet), samples(data, [0]), OPTIONS, ["gsa"])
        assert [n for n, p in unet.named_parameters() if p.requires_grad] == ["conv_in.weight"]
        broken = dataclasses.replace(denoiser(unet), alpha=lambda t: float("nan"))
        with pytest.raises(UserError):
            gradients.backward(broken, samples(data, [0]), OPTIONS, ["gsa"])
        assert [n for n, p in unet.named_parameters() if p.requires_grad] == ["conv_in.weight"]
        assert all(p.grad is None for p in unet.parameters())
    finally:
        unet.conv_in.weight.requires_grad_(False)


def test_bfloat16_gradients_are_close_and_masters_stay_float32(unet, data, found):
    options = dataclasses.replace(OPTIONS, dtype="bfloat16")
    rough = gradients.backward(denoiser(unet), samples(data, [0]), options)
    total, exact = (np.sqrt((x**2).sum()) for x in (rough.gsa2[0], found.gsa2[0]))
    assert total == pytest.approx(exact, rel=0.05) and total != exact
    halved = gradients.backward(denoiser(copy.deepcopy(unet).bfloat16()), cast_samples(data), options)
    assert np.sqrt((halved.gsa2**2).sum()) == pytest.approx(exact, rel=0.05)


def cast_samples(data):
    import torch

    one = samples(data, [0])
    return dataclasses.replace(one, condition=lambda rows: one.condition(rows).to(torch.bfloat16))


def test_weights_of_the_wrong_precision_are_refused(unet, data):
    for net, dtype in ((copy.deepcopy(unet).half(), "bfloat16"), (copy.deepcopy(unet).bfloat16(), "float32")):
        with pytest.raises(UserError, match="load the weights in float32"):
            gradients.backward(denoiser(net), samples(data, [0]), dataclasses.replace(OPTIONS, dtype=dtype))
    with pytest.raises(UserError, match="use one of float32, bfloat16"):
        gradients.backward(denoiser(unet), samples(data, [0]), dataclasses.replace(OPTIONS, dtype="float16"))


def test_a_gradient_that_is_not_finite_is_counted_named_and_refused(unet, data):
    """Only the gradient of one tensor is infinite, at one timestep; loss and prediction are fine."""
    import torch

    class Spoiled(Network):
        def __call__(self, z, t, condition):
            out = super().__call__(z, t, condition)
            bias = self.unet.conv_out.bias
            if int(t[0]) == 401 and bias.requires_grad:
                spoil = (bias - bias.detach()).reshape(1, -1, 1, 1)
                out = out + torch.where(spoil == 0, spoil.abs().add(0).pow(0.5), 0.0)  # slope of the root at 0
            return out

    plain = dataclasses.replace(denoiser(unet), network=Spoiled(unet))
    where = rf"not finite \(1 of \d+ values.*sample {IDS[2]}, timestep 401, tensor conv_out.bias"
    with pytest.raises(UserError, match=where):
        gradients.backward(plain, samples(data, [2]), OPTIONS, ["gsa"])


def test_masking_refuses_what_is_not_finite(unet, data):
    broken = copy.deepcopy(unet)
    broken.conv_out.bias.data[0] = float("inf")
    with pytest.raises(UserError, match=rf"masked score is not finite.*sample {IDS[1]}, timestep 0, tensor latent"):
        gradients.backward(denoiser(broken), samples(data, [1]), OPTIONS, ["gradient-masking"])


def test_weights_are_found_wherever_they_are_held(unet):
    import torch

    names = [name for name, _ in unet.named_parameters()]
    assert list(denoiser(unet).weights()) == names

    class Two:
        def __init__(self):
            self.a, self.b = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
            self.b.bias = self.a.bias

    pair = dataclasses.replace(denoiser(unet), network=Two())
    assert list(pair.weights()) == ["a.weight", "a.bias", "b.weight"]
    with pytest.raises(TypeError, match="holds no torch module"):
        dataclasses.replace(denoiser(unet), network=lambda z, t, c: z).weights()


def flow(unet) -> Denoiser:
    """The same network read as a flow-matching one: output eps - z0 at z = (1 - s) z0 + s eps."""
    return Denoiser(
        Network(unet), lambda t: 1 - t / 1000, lambda t: t / 1000, target=lambda z0, eps, t: eps - z0,
        noise=lambda output, z, t: z + (1 - t / 1000) * output,
    )  # fmt: skip


def test_another_training_target_and_schedule(unet, data):
    import torch

    net = copy.deepcopy(unet).requires_grad_(True)
    z0, c, eps = torch.from_numpy(data[0][:1]), torch.from_numpy(data[1][:1]), forward_noise(0).float()
    z = (0.6 * z0 + 0.4 * eps).requires_grad_(True)
    loss = ((eps - z0 - net(z, 400, c).sample) ** 2).mean()
    loss.backward()
    got = gradients.backward(flow(unet), samples(data, [0]), Options((400,), (400,)))
    assert got.gsa1[0] == pytest.approx([float(p.grad.norm()) for p in net.parameters()], rel=1e-5)
    keep = z.grad.abs() >= z.grad.abs().flatten().sort().values[-51]
    mixed = torch.where(keep, eps, z0)
    with torch.no_grad():
        e = mixed + 0.6 * net(mixed, 400, c).sample
    assert got.masking[0, 0] == pytest.approx(float((eps - z0 - e)[keep].double().norm()), rel=1e-5)


def test_a_denoiser_reads_the_schedule_of_its_network(unet, data):
    class Schedule:
        """v-prediction."""

        def alpha(self, t):
            return np.sqrt(ALPHA_BAR[t])

        def sigma(self, t):
            return np.sqrt(1 - ALPHA_BAR[t])

        def target(self, z0, eps, alpha, sigma):
            return alpha * eps - sigma * z0

        def to_noise(self, output, z, alpha, sigma):
            return alpha * output + sigma * z

    network = Network(unet)
    network.schedule = Schedule()
    a, s = (lambda t: ALPHA_BAR[t] ** 0.5), (lambda t: (1 - ALPHA_BAR[t]) ** 0.5)
    wanted = denoiser(
        unet, target=lambda z0, eps, t: a(t) * eps - s(t) * z0, noise=lambda output, z, t: a(t) * output + s(t) * z
    )
    got = [gradients.backward(one, samples(data, [0]), OPTIONS) for one in (Denoiser.of(network), wanted)]
    for name in ("gsa1", "gsa2", "masking"):
        assert np.array_equal(getattr(got[0], name), getattr(got[1], name)), name
    assert not np.allclose(got[0].gsa1, gradients.backward(denoiser(unet), samples(data, [0]), OPTIONS).gsa1, rtol=0.01)


# Noise optimisation ---------------------------------------------------------------------------------------------------


def scipy_oracle(unet, data, sample: int, iterations: int = 5):
    """CDI's optimiser, for one sample, on the loss at z_t + delta in float64; final loss, norm, evaluations."""
    import scipy.optimize
    import torch

    net = copy.deepcopy(unet).double()
    z0, c = torch.from_numpy(data[0][[sample]]).double(), torch.from_numpy(data[1][[sample]]).double()
    eps = forward_noise(sample)
    z = ALPHA_BAR[101] ** 0.5 * z0 + (1 - ALPHA_BAR[101]) ** 0.5 * eps

    def loss(delta):
        moved = (z + torch.from_numpy(delta).reshape(z.shape)).requires_grad_(True)
        value = ((net(moved, 101, c).sample - eps) ** 2).mean()
        value.backward()
        return value.item(), moved.grad.flatten().numpy()

    done = scipy.optimize.minimize(
        loss, np.zeros(256), jac=True, method="L-BFGS-B", options={"maxiter": iterations, "maxcor": 10}
    )
    return loss(np.zeros(256))[0], done.fun, np.linalg.norm(done.x), done.nfev


def test_optimised_noise_equals_scipy_where_its_line_search_took_one_point_each(unet, data):
    got = noise_optimisation.optimise(denoiser(unet), samples(data), OPTIONS, 16)
    plain = 0
    for sample in range(5):
        start, loss, norm, evaluations = scipy_oracle(unet, data, sample)
        assert got.loss[sample] < start
        if evaluations == 6:
            plain += 1
            assert got.loss[sample] == pytest.approx(loss, rel=1e-5)
            assert got.norm[sample] == pytest.approx(norm, rel=1e-4)
    assert plain >= 3


def test_optimised_noise_is_the_same_for_every_batch_size_order_and_company(unet, data):
    whole = noise_optimisation.optimise(denoiser(unet), samples(data), OPTIONS, 16)
    for chosen, size in (([0, 1, 2, 3, 4], 1), ([3, 0], 2), ([4, 3, 2, 1, 0], 3)):
        part = noise_optimisation.optimise(denoiser(unet), samples(data, chosen), OPTIONS, size)
        assert np.array_equal(part.loss, whole.loss[chosen]) and np.array_equal(part.norm, whole.norm[chosen])
    assert whole.counts == gradients.planned(["noise-optimisation"], OPTIONS, 5) == Counts(30, 25)


class Small(Network):
    """A network on a device that holds only so many rows at a time, and from call `fails` on none."""

    def __init__(self, unet, rows: int, fails: int = 10**9):
        super().__init__(unet)
        self.rows, self.fails, self.called = rows, fails, []

    def __call__(self, z, t, condition):
        import torch

        self.called.append(len(z))
        if len(z) > self.rows or len(self.called) == self.fails:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().__call__(z, t, condition)


def test_a_batch_whose_noise_does_not_fit_is_halved_and_counted_once(unet, data):
    whole = noise_optimisation.optimise(denoiser(unet), samples(data), OPTIONS, 16)
    small = Small(unet, 5)
    got = noise_optimisation.optimise(dataclasses.replace(denoiser(unet), network=small), samples(data), OPTIONS, 16)
    # 5 samples and 11 rows of padding; of the halves the first 4 and then the fifth one's count
    assert small.called[:3] == [16, 8, 4] and set(small.called[3:]) == {4} and len(small.called) == 2 + 6 + 6
    assert got.counts == whole.counts == Counts(30, 25)
    np.testing.assert_allclose(got.loss, whole.loss, rtol=1e-5)
    np.testing.assert_allclose(got.norm, whole.norm, rtol=1e-4)
    for name in ("loss", "norm"):
        assert np.isfinite(getattr(got, name)).all()
    with pytest.raises(UserError, match="memory does not hold one image, cpu, use a larger one"):
        noise_optimisation.optimise(
            dataclasses.replace(denoiser(unet), network=Small(unet, 0)), samples(data), OPTIONS, 16
        )


def test_rows_of_an_optimisation_that_runs_out_of_memory_half_way_are_not_counted(unet, data):
    small = Small(unet, 16, fails=4)  # three evaluations of the whole batch, then no more of it
    got = noise_optimisation.optimise(dataclasses.replace(denoiser(unet), network=small), samples(data), OPTIONS, 16)
    assert small.called == [16] * 4 + [8] * 6
    assert got.counts == Counts(30, 25)


def test_masked_rows_that_do_not_fit_are_halved_and_counted_once(unet, data, found):
    tens = tuple(range(0, 1000, 100))
    options = Options((), tens)
    whole = gradients.backward(denoiser(unet), samples(data, [0, 1]), options, ["gradient-masking"])
    small = Small(unet, 3)
    got = gradients.backward(
        dataclasses.replace(denoiser(unet), network=small), samples(data, [0, 1]), options, ["gradient-masking"]
    )
    assert [n for n in small.called if n > 1] == [10, 5] + [2] * 10  # five pairs of each image
    assert got.counts == whole.counts == Counts(40, 20)
    np.testing.assert_allclose(got.masking, whole.masking, rtol=1e-5)
    with pytest.raises(UserError, match="memory does not hold one image, cpu"):
        gradients.backward(dataclasses.replace(denoiser(unet), network=Small(unet, 0)), samples(data), OPTIONS)


def test_no_iterations_give_the_plain_loss(unet, data):
    options = dataclasses.replace(OPTIONS, noise_iterations=0)
    got = noise_optimisation.optimise(denoiser(unet), samples(data, [1]), options, 4)
    assert got.loss[0] == pytest.approx(scipy_oracle(unet, data, 1, 1)[0], rel=1e-5)
    assert got.norm[0] == 0 and got.counts == gradients.planned(["noise-optimisation"], options, 1) == Counts(1, 0)


def test_noise_optimisation_refuses_what_is_not_finite(unet, data):
    broken = copy.deepcopy(unet)
    broken.conv_out.bias.data[0] = float("nan")
    with pytest.raises(UserError, match=rf"not finite \(2 of 2 images\), sample {IDS[0]}, timestep 101"):
        noise_optimisation.optimise(denoiser(broken), samples(data, [0, 1]), OPTIONS, 4)


@pytest.mark.parametrize("iterations", [1, 3, 6])
def test_lbfgs_is_scipys_on_a_quadratic_and_never_goes_up(iterations):
    import scipy.optimize
    import torch

    generator = np.random.default_rng(0)
    half = generator.standard_normal((6, 20, 20))
    matrix, vector = half @ half.transpose(0, 2, 1) / 20 + 0.1 * np.eye(20), generator.standard_normal((6, 20))
    a, b = torch.from_numpy(matrix), torch.from_numpy(vector)

    def evaluate(x, gradient):
        slope = (a @ x[:, :, None])[:, :, 0]
        return 0.5 * (x * slope).sum(1) - (b * x).sum(1), slope - b if gradient else None

    value, x = lbfgs.minimise(evaluate, torch.zeros(6, 20, dtype=torch.float64), iterations)
    equal = 0
    for i in range(6):
        done = scipy.optimize.minimize(
            lambda p, i=i: (0.5 * p @ matrix[i] @ p - vector[i] @ p, matrix[i] @ p - vector[i]),
            np.zeros(20), jac=True, method="L-BFGS-B", options={"maxiter": iterations, "maxcor": 20},
        )  # fmt: skip
        if done.nfev == iterations + 1:
            equal += 1
            assert float(value[i]) == pytest.approx(done.fun, rel=1e-9)
            assert x[i].numpy() == pytest.approx(done.x, rel=1e-6, abs=1e-8)
        assert float(value[i]) <= 0
    assert equal >= 3
    again, _ = lbfgs.minimise(evaluate, x, 1)
    assert (again <= value).all()


def test_lbfgs_keeps_its_place_when_a_step_goes_up_or_leaves_the_numbers():
    import torch

    def wall(x, gradient):
        """(x - 0.01)^2 below 0.1, then NaN: the first step, of length 1, lands beyond."""
        value = torch.where(x[:, 0] < 0.1, (x[:, 0] - 0.01) ** 2, float("nan"))
        return value, 2 * (x - 0.01) + torch.where(x < 0.1, 0.0, float("nan")) if gradient else None

    value, x = lbfgs.minimise(wall, torch.zeros(2, 1, dtype=torch.float64), 3)
    assert x.tolist() == [[0.0], [0.0]] and value.tolist() == [0.0001, 0.0001]
    value, x = lbfgs.minimise(wall, torch.zeros(2, 1, dtype=torch.float64), 12)
    assert x[0, 0] == pytest.approx(0.01, abs=1e-4)


# Rows -----------------------------------------------------------------------------------------------------------------


def test_rows_of_all_blocks_lie_in_one_table(unet, data, found):
    blocks = gradients.backward_rows(found, IDS, 5)
    tuned = noise_optimisation.optimise(denoiser(unet), samples(data), OPTIONS, 16)
    blocks["noise-optimisation"] = noise_optimisation.optimised_rows(tuned, IDS, 101, 5)
    assert sorted(blocks) == ["gradient-masking", "gsa1", "gsa2", "noise-optimisation"]
    whole = pa.concat_tables(blocks.values())
    assert whole.num_rows == 5 + 5 + 10 + 5 and tables.check(whole, "features").num_rows == 25
    rows = blocks["gradient-masking"].to_pylist()
    assert [(r["sample_id"], r["timestep"], r["draw"]) for r in rows[:3]] == [
        (IDS[0], 0, 0), (IDS[0], 401, 0), (IDS[1], 0, 0)
    ]  # fmt: skip
    assert [r["model_loss"] for r in rows] == found.masking.reshape(-1).astype(np.float32).tolist()
    assert rows[0]["vector"] is None
    first = blocks["gsa1"].to_pylist()[0]
    assert first["vector"] == found.gsa1[0].astype(np.float32).tolist() and first["model_loss"] is None
    last = blocks["noise-optimisation"].to_pylist()[4]["vector"]
    assert last == [np.float32(tuned.loss[4]), np.float32(tuned.norm[4])]


def test_rows_of_no_samples(unet, data):
    empty = gradients.backward(denoiser(unet), samples(data, []), OPTIONS)
    assert empty.counts == Counts() and empty.gsa1.shape[0] == 0
    assert [t.num_rows for t in gradients.backward_rows(empty, [], 5).values()] == [0, 0, 0]
    assert noise_optimisation.optimise(denoiser(unet), samples(data, []), OPTIONS, 4).loss.shape == (0,)


def test_half_precision_gradients_are_bfloat16():
    """Of the features' options float16 overflows in a backward pass (pitfall 17); of ours it is none."""
    wanted = {"float64": "float32", "float32": "float32", "bfloat16": "bfloat16", "float16": "bfloat16"}
    assert {dtype: passes._gradients(FeaturesOptions(dtype=dtype)).dtype for dtype in wanted} == wanted
