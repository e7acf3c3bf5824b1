"""TACO (Lee et al., ICML 2024, arXiv:2403.02944) is ELIC with an encoder that reads the caption.

The network in floating point, with CompressAI's convention for training and for coding: `forward`, `compress`,
`decompress`, `update`. Its strings are the reference's byte for byte, and decode where the arithmetic is the encoder's.
A `.taco` file, which decodes everywhere, is coded by `integer_model` instead (`taco_nb.model.integer`).
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from itertools import product
from typing import Any

import torch
from compressai.models.utils import conv, deconv
from compressai.ops import quantize_ste
from torch import Tensor

from taco_nb.errors import CheckpointError, SettingError
from taco_nb.model import rans
from taco_nb.model.config import ModelConfig
from taco_nb.model.entropy import SCALE_TABLE, SpaceChannelModel, Step, squeeze, unsqueeze
from taco_nb.model.integer import IntegerModel
from taco_nb.model.latents import LatentCoder, Tables
from taco_nb.model.layers import relu_stack
from taco_nb.model.precision import full_float32
from taco_nb.model.transforms import AnalysisTransform, SynthesisTransform

_RENAMED = {f"entropy_bottleneck._{old}": f"entropy_bottleneck.{new}."
            for old, new in (("matrix", "matrices"), ("bias", "biases"), ("factor", "factors"))}  # fmt: skip
CODER_TABLES = ("_offset", "_quantized_cdf", "_cdf_length")
"""The names of the coder's tables in each of CompressAI's two entropy models."""


class TACO(SpaceChannelModel, LatentCoder):
    """The codec's network has transforms around the entropy model, under the reference's parameter names.

    Inputs are images x (B, 3, H, W) in [0, 1], H and W multiples of 64, and text (B, T, text_dim). mask (B, T) bool, True
    at the tokens to attend to, hides padding; without one the encoder reads padding too, as the reference does.
    """

    def __init__(self, config: ModelConfig | None = None):
        config = config or ModelConfig()
        super().__init__(config.N, config.M, config.groups, config.context_widths)
        self.config = config
        N, M, wide = config.N, config.M, 3 * config.M // 2
        self.g_a = AnalysisTransform(config)
        self.g_s = SynthesisTransform(N, M)
        # y (B, M, h, w) -> z (B, N, h/4, w/4), and z_hat -> hyper parameters (B, 2M, h, w)
        self.h_a = relu_stack("reduction", conv(M, N, 3, 1), conv(N, N), conv(N, N))
        self.h_s = relu_stack("increase", deconv(N, M), deconv(M, wide), deconv(wide, 2 * M, 3, 1))
        self._tables: Tables | None = None
        self._integer_model: tuple[IntegerModel, list[int]] | None = None

    @classmethod
    def from_state_dict(cls, state_dict: Mapping[str, Tensor], heads: int = 8) -> TACO:
        """Return a network of the sizes and with the weights of a state dict, as CompressAI's models do.

        Raises `CheckpointError` for a state dict that is not TACO's.
        """
        state = {modern_key(key): value for key, value in state_dict.items()}
        net = cls(ModelConfig.of_state_dict(state, heads))
        net.load_state_dict(state)
        return net

    def forward(
        self,
        x: Tensor,
        text: Tensor | None = None,
        mask: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> dict[str, Any]:
        """Reconstruct x and estimate its bits; differentiable.

        Returns {"x_hat": (B, 3, H, W), unclamped, "likelihoods": {"y": (B, M, h, w), "z": (B, N, h/4, w/4)}}. In
        training mode the likelihoods are those of y and z with uniform noise (Balle et al. 2018), while y_hat is rounded
        with a straight-through gradient; in evaluation mode both are those of the rounded values. `noise`, of the shape that
        `noise_shape` gives, is to be used in place of new noise.
        """
        self.check_float32()
        y = self.g_a(x, self._text(x, text), mask).float()
        # probabilities need more than bfloat16's eight bits
        with torch.autocast(x.device.type, enabled=False):
            y_hat, likelihoods = self._estimate(y, noise)
        return {"x_hat": self.g_s(y_hat).float(), "likelihoods": likelihoods}

    def noise_shape(self, x: Tensor) -> tuple[int, int]:
        """Return the shape of the noise for images x (B, 3, H, W): a row for each, of z's noise and y's by half group."""
        positions = x.shape[2] * x.shape[3]
        return len(x), self.config.N * positions // 64**2 + self.config.M * positions // 16**2

    def _estimate(self, y: Tensor, noise: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Return y_hat and the likelihoods of y and z, without coding them."""
        z = self.h_a(y)
        of_z = of_y = None
        if noise is not None:
            of_z, of_y = noise.split([z[0].numel(), y[0].numel()], 1)
            of_z, of_y = of_z.reshape(z.shape), of_y.reshape(y.shape)
        z_likelihoods = self.likelihoods_of_z(z, of_z)
        z_hat = quantize_ste(z - self.medians()) + self.medians()
        halves = {anchor: squeeze(y, anchor) for anchor in (True, False)}
        likelihoods: dict[bool, list[Tensor]] = {True: [], False: []}

        def estimate(step: Step, scales: Tensor, means: Tensor) -> Tensor:
            values = halves[step.anchor][:, step.channels]
            drawn = None
            if of_y is not None:  # a group's anchors have the first half of its noise
                drawn = of_y[:, step.channels].reshape(len(y), 2, *values.shape[1:])[:, 1 - step.anchor]
            likelihoods[step.anchor].append(self.likelihoods_of_y(values, scales, means, drawn))
            return quantize_ste(values - means) + means

        y_hat = self.walk(self.h_s(z_hat), estimate)
        y_likelihoods = unsqueeze(torch.cat(likelihoods[True], 1), torch.cat(likelihoods[False], 1))
        return y_hat, {"y": y_likelihoods, "z": z_likelihoods}

    def aux_loss(self) -> Tensor:
        """Return the loss of z's quantiles, which only the auxiliary optimizer minimises."""
        return self.entropy_bottleneck.loss()

    @torch.inference_mode()
    def compress(self, x: Tensor, text: Tensor | None = None, mask: Tensor | None = None) -> dict[str, Any]:
        """Code every image of the batch, by CompressAI's convention: {"strings": [[y...], [z...]], "shape": z's (h, w)}.

        Without text, as CompressAI's programs call it, the encoder reads a single token of zeros. Raises
        `CheckpointError` where the weights make values that are not finite or too large to be coded.
        """
        self.check_float32()
        ys = self.g_a(x, self._text(x, text), mask).float().split(1)
        with full_float32(x.device.type):
            coded = [self.encode_latents(y, self.h_a(y)) for y in ys]
        shape = (x.shape[2] // 64, x.shape[3] // 64)
        return {"strings": [[c.y_string for c in coded], [c.z_string for c in coded]], "shape": shape}

    @torch.inference_mode()
    def decompress(self, strings: list[list[bytes]], shape: tuple[int, int]) -> dict[str, Tensor]:
        """Undo `compress`: return {"x_hat": (B, 3, H, W), clamped to [0, 1]}.

        Raises `DamagedFileError` where a stream ends too early. A stream altered otherwise, or written where sums are
        taken in another order, decodes to other latents.
        """
        self.check_float32()
        y_hat = [self.decode_latents(y, z, shape) for y, z in zip(*strings, strict=True)]
        return {"x_hat": self.g_s(torch.cat(y_hat)).float().clamp_(0, 1)}

    def _text(self, x: Tensor, text: Tensor | None) -> Tensor:
        return x.new_zeros(len(x), 1, self.config.text_dim) if text is None else text

    def check_float32(self) -> None:
        """Raise `SettingError` if the weights have another precision, after `half()` for instance."""
        if self.medians().dtype != torch.float32:
            raise SettingError(
                f"This network's weights are {self.medians().dtype}, but its entropy model needs float32. Call float() on "
                "it; for speed use mode='fast' of a codec, or autocast in training."
            )

    # CompressAI's AttentionBlock holds a class that cannot be pickled: what is pickled are sizes and weights.

    def __reduce__(self) -> tuple[Any, ...]:
        kept = None if self._integer_model is None else self.integer_model().state()
        return _restored, (type(self), self.config, self.state_dict(), self.training, kept)

    def __deepcopy__(self, memo: dict[int, Any]) -> TACO:
        copy = type(self).__new__(type(self))
        memo[id(self)] = copy
        copy.__dict__ = deepcopy(self.__dict__, memo)
        return copy

    # What `LatentCoder` asks for

    def scale_thresholds(self) -> Tensor:
        return self.gaussian_conditional.scale_table[:-1]

    def tables(self) -> Tables:
        """Return the coder's tables, those missing made from the weights.

        Raises `CheckpointError` for damaged tables, and names the weights that are not finite numbers.
        """
        if self._tables is None:
            self.check_finite()
            with full_float32(self.medians().device.type):
                if not self.gaussian_conditional.offset.numel():
                    self.gaussian_conditional.update()
                self.entropy_bottleneck.update()  # does nothing where there are tables
            self._tables = Tables(
                rans.CodingTables.of_model(self.gaussian_conditional, len(SCALE_TABLE)),
                rans.CodingTables.of_model(self.entropy_bottleneck, self.config.N),
            )
        return self._tables

    def check_finite(self) -> None:
        """Raise `CheckpointError` naming the weights that are not finite numbers."""
        broken = [name for name, weight in self.named_parameters() if not torch.isfinite(weight).all()]
        if broken:
            first = f"{len(broken)} of them, {broken[0]} first"
            raise CheckpointError(f"These weights are broken: {first}, hold values that are not finite.")

    # The integer form

    def integer_model(self) -> IntegerModel:
        """Return the exact integer form of all that a decoder repeats, for the weights as they are now.

        It is derived when first asked for and after every change of the weights, however they were changed: through
        `load_state_dict`, by an optimizer, or through `.data`. Raises `CheckpointError` for weights that are not finite.
        """
        stamp = self.decoder_stamp()
        if self._integer_model is None or self._integer_model[1] != stamp:
            self.check_finite()
            self._integer_model = IntegerModel(self), stamp
        return self._integer_model[0]

    def keep_integer_model(self, state: bytes) -> None:
        """Take the integer form that was saved with these very weights. Raises `CheckpointError` if it does not fit."""
        self._integer_model = IntegerModel(self, state), self.decoder_stamp()

    def decoder_weights(self) -> dict[str, Tensor]:
        """Return the weights that a decoder uses under the names of a state dict, whether compiled or not."""
        named = {modern_key(name): weight for name, weight in self.named_parameters()}
        return {name: named[name] for name in sorted(named) if not name.startswith(("g_a.", "h_a."))}

    def decoder_stamp(self) -> list[int]:
        """Return numbers that change when a weight of the decoder does: the sum of its bits, for each tensor.

        A tenth of a second of hashing would say it with certainty; this takes a few milliseconds at every file.
        """
        kinds = {2: torch.int16, 4: torch.int32, 8: torch.int64}
        weights = self.decoder_weights().values()
        bits = [weight.detach().view(kinds[weight.element_size()]) for weight in weights]
        # modulo 2^32 for float32, since sums in 64 bits take five times as long
        sums = [of.sum(dtype=torch.int64 if of.element_size() == 8 else torch.int32).long() for of in bits]
        return [weight.element_size() for weight in weights] + torch.stack(sums).tolist()

    # Weights and tables

    @torch.no_grad()
    def update(self, force: bool = True, update_quantiles: bool = False) -> bool:
        """Make the coder's tables from the weights as they are now; with CompressAI's arguments, True like its own.

        The integer form needs no such call, since it follows the weights by itself.
        """
        self.gaussian_conditional.update()
        self.entropy_bottleneck.update(force=True, update_quantiles=update_quantiles)
        self._tables = None
        return True

    def train(self, mode: bool = True) -> TACO:
        """Switch as `nn.Module.train` does; entering training drops the tables, which the next step would make stale."""
        if mode:
            for model in (self.entropy_bottleneck, self.gaussian_conditional):
                for name in CODER_TABLES:
                    setattr(model, name, torch.empty(0, dtype=torch.int32, device=self.medians().device))
            self._tables = None
        return super().train(mode)

    def load_state_dict(
        self, state_dict: Mapping[str, Tensor], strict: bool = True, assign: bool = False
    ) -> Any:
        """Load weights under the reference's names; wrappers' prefixes and CompressAI's older names are understood.

        The coder's tables are taken as they are, so that files stay decodable; where they are missing or empty they are
        made anew when first needed. Raises `CheckpointError` naming the keys that are missing, unknown or misshapen.
        """
        state = {modern_key(key): value for key, value in state_dict.items()}
        for model, table in product(("entropy_bottleneck", "gaussian_conditional"), CODER_TABLES):
            if strict or f"{model}.{table}" in state:
                value = state.setdefault(f"{model}.{table}", torch.empty(0, dtype=torch.int32))
                # PyTorch loads only into tensors of the same shape
                setattr(getattr(self, model), table, torch.empty_like(value, device=self.medians().device))
        # empty in checkpoints saved before the tables were made
        if not state.get("gaussian_conditional.scale_table", torch.empty(1)).numel():
            del state["gaussian_conditional.scale_table"]
        state.setdefault("gaussian_conditional.scale_table", self.gaussian_conditional.scale_table)
        self._tables = None
        try:
            return super().load_state_dict(state, strict=strict, assign=assign)
        except RuntimeError as error:
            raise CheckpointError(f"These weights do not fit a TACO of {self.config}. {error}") from None


def _restored(
    cls: type[TACO], config: ModelConfig, state: dict[str, Tensor], training: bool, integers: bytes | None
) -> TACO:
    """Undo `TACO.__reduce__`."""
    device, dtype = state["entropy_bottleneck.quantiles"].device, state["entropy_bottleneck.quantiles"].dtype
    net = cls(config).to(device, dtype)
    net.load_state_dict(state)
    if integers is not None:
        net.keep_integer_model(integers)
    return net.train() if training else net.eval()


def modern_key(key: str) -> str:
    """Return the key under which today's CompressAI keeps what a checkpoint calls `key`.

    Wrappers leave their own names in keys: "module." of several GPUs, "_orig_mod." of `torch.compile`.
    """
    key = key.replace("_orig_mod.", "").removeprefix("module.")
    for old, new in _RENAMED.items():
        if key.startswith(old) and key[len(old) :].isdigit():
            return new + key[len(old) :]
    return key
