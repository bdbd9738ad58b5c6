"""One target's networks on one device: real diffusers classes behind one call, whatever the family."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mia.models import Schedule

if TYPE_CHECKING:
    import torch

# Elements of an autoencoder's widest activation (256 channels at full size) in one call: kernels count them in 32 bits.
WIDEST = 2**30
NO_SPREAD = -30.0  # log-variance of a code that is certain: the floor to which AutoencoderKL clamps its own


class Autoencoder:
    """Between pixels in [-1, 1] and the latents that a denoiser sees.

    Attributes:
        net: the diffusers module.
        latent_shape: channels, height, width.
        side_px: the side of the square images.
    """

    def __init__(self, net: Any, latent_shape: tuple[int, int, int], side_px: int):
        self.net, self.latent_shape, self.side_px = net, latent_shape, side_px
        self.scaling = float(net.config.scaling_factor)
        self.shift = float(getattr(net.config, "shift_factor", None) or 0.0)
        self.dtype, self.device = net.dtype, net.device

    @classmethod
    def of(cls, net: Any) -> Autoencoder:
        """An autoencoder at the size that its own configuration states."""
        side, factor = net.config.sample_size, 2 ** (len(net.config.block_out_channels) - 1)
        return cls(net, (net.config.latent_channels, side // factor, side // factor), side)

    def scaled(self, mean: torch.Tensor) -> torch.Tensor:
        """What the denoiser was trained on, of an unscaled code of the same shape."""
        return (mean - self.shift) * self.scaling

    def encode(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and log-variance of the posterior, unscaled, float32[n, *latent_shape], of pixels [n, 3, side, side]."""
        import torch

        found = [self.net.encode(part.to(self.device, self.dtype)).latent_dist for part in self._parts(pixels)]
        return torch.cat([p.mean.float() for p in found]), torch.cat([p.logvar.float() for p in found])

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """Pixels in [-1, 1], not clamped, float32[n, 3, side, side], of scaled latents."""
        import torch

        codes = self._parts((z / self.scaling + self.shift).to(self.dtype))
        return torch.cat([self.net.decode(code, return_dict=False)[0].float() for code in codes])

    def _parts(self, rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The rows in as few calls as kernels and memory bear: 16 at 512 pixels."""
        return rows.split(max(1, WIDEST // (256 * self.side_px**2)))


class VqAutoencoder(Autoencoder):
    """A VQModel: the code before quantisation stands for the mean, and is certain; decoding quantises it."""

    def encode(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The code, and a log-variance that says so."""
        code = self.net.encode(pixels.to(self.device, self.dtype)).latents.float()
        return code, code.new_full(code.shape, NO_SPREAD)


class Pixels(Autoencoder):
    """No autoencoder: pixels are their own latents, and so is their number of channels and side."""

    def __init__(self, side_px: int, channels: int, on: torch.device):
        import torch

        self.net, self.latent_shape, self.side_px = None, (channels, side_px, side_px), side_px
        self.scaling, self.shift, self.dtype, self.device = 1.0, 0.0, torch.float32, on

    def scaled(self, mean: torch.Tensor) -> torch.Tensor:
        """The pixels, to the last bit: half precision, in which tables keep them, is finer than their 256 steps."""
        return ((mean + 1) * 127.5).round() / 127.5 - 1

    def encode(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The pixels as they are, and a log-variance that says so."""
        pixels = pixels.to(self.device).float()
        return pixels, pixels.new_full(pixels.shape, NO_SPREAD)

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """The pixels as they are."""
        return z.float()


class Network:
    """One target's denoiser with its autoencoder and schedule.

    The parameters ask for no gradient, but nothing here forbids one: who wants gradients turns them on. `denoiser` and
    `autoencoder.net` may be replaced by their compiled selves.

    Attributes:
        denoiser: the diffusers module.
        autoencoder: see `Autoencoder`; its `latent_shape` and `side_px` stand here, too.
        schedule: alpha, sigma, prediction type, and the conversions between what is predicted.
        has_null: whether a null condition exists, so that guidance is possible.
        dtype, device: of the denoiser.
    """

    def __init__(self, denoiser: Any, autoencoder: Autoencoder, schedule: Schedule, has_null: bool):
        self.denoiser, self.autoencoder, self.schedule, self.has_null = denoiser, autoencoder, schedule, has_null
        self.latent_shape, self.side_px = autoencoder.latent_shape, autoencoder.side_px
        self.dtype, self.device = denoiser.dtype, denoiser.device

    def __call__(self, z: torch.Tensor, t: torch.Tensor, condition: dict[str, torch.Tensor]) -> torch.Tensor:
        """The network's own output, float32[n, *latent_shape], without the variance that some predict beside.

        Args:
            z: noised latents, float32[n, *latent_shape].
            t: the model's own timesteps, int64[n].
            condition: n rows of each tensor that the family's condition has: `states` [n, tokens, width], `pooled`
                [n, width], `label` [n].
        """
        rows = {name: self._placed(value) for name, value in condition.items()}
        output = self._output(z.to(self.device, self.dtype), t.to(self.device), rows)
        return output[:, : z.shape[1]].float()

    def _placed(self, value: torch.Tensor) -> torch.Tensor:
        return value.to(self.device, self.dtype if value.is_floating_point() else None)

    def _output(self, z: Any, t: Any, condition: dict[str, Any]) -> Any:
        """Stable Diffusion: text states through cross-attention."""
        return self.denoiser(z, t, encoder_hidden_states=condition["states"], return_dict=False)[0]

    def scaled(self, mean: torch.Tensor) -> torch.Tensor:
        """See `Autoencoder.scaled`."""
        return self.autoencoder.scaled(mean)

    def encode(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Autoencoder.encode`."""
        return self.autoencoder.encode(pixels)

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """See `Autoencoder.decode`."""
        return self.autoencoder.decode(z)


class SdxlNetwork(Network):
    """SDXL: text states, pooled text, and six numbers about size and crop.

    The numbers are those of diffusers' own pipeline for a square image of the model's size that was not cropped.
    Source: diffusers 0.42, `StableDiffusionXLPipeline._get_add_time_ids`.
    """

    def _output(self, z: Any, t: Any, condition: dict[str, Any]) -> Any:
        import torch

        side = float(self.side_px)
        sizes = torch.tensor([side, side, 0, 0, side, side], device=self.device).expand(len(z), -1)
        added = {"text_embeds": condition["pooled"], "time_ids": sizes}
        states = condition["states"]
        return self.denoiser(z, t, encoder_hidden_states=states, added_cond_kwargs=added, return_dict=False)[0]


class UnconditionalNetwork(Network):
    """A UNet that is told nothing but the timestep."""

    def _output(self, z: Any, t: Any, condition: dict[str, Any]) -> Any:
        return self.denoiser(z, t, return_dict=False)[0]


class ClassNetwork(Network):
    """A transformer (DiT) that is told the class."""

    def _output(self, z: Any, t: Any, condition: dict[str, Any]) -> Any:
        return self.denoiser(z, timestep=t, class_labels=condition["label"], return_dict=False)[0]


class Sd3Network(Network):
    """Stable Diffusion 3: a transformer that is told text states and pooled text, and timesteps as real numbers.

    Those stay in single precision whatever the network's: bfloat16 knows no 451.
    """

    def _output(self, z: Any, t: Any, condition: dict[str, Any]) -> Any:
        return self.denoiser(
            hidden_states=z, timestep=t.float(), encoder_hidden_states=condition["states"],
            pooled_projections=condition["pooled"], return_dict=False,
        )[0]  # fmt: skip
