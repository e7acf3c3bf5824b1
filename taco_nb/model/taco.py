"""TACO (Lee et al., ICML 2024, arXiv:2403.02944): ELIC whose encoder reads the caption."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from taco_nb.errors import CheckpointError, DamagedFileError
from taco_nb.model import rans
from taco_nb.model.config import ModelConfig
from taco_nb.model.entropy import SCALE_TABLE, SpaceChannelModel, Step, squeeze, ste_round, unsqueeze
from taco_nb.model.repeatable import repeatable
from taco_nb.model.transforms import AnalysisTransform, HyperAnalysis, HyperSynthesis, SynthesisTransform

_RENAMED = {f"entropy_bottleneck._{old}": f"entropy_bottleneck.{new}."
            for old, new in (("matrix", "matrices"), ("bias", "biases"), ("factor", "factors"))}  # fmt: skip
_TABLES = ("_offset", "_quantized_cdf", "_cdf_length")


class Symbols(NamedTuple):
    """The integers of one image that are coded, and y_hat (1, M, h, w), which they decode to.

    y's and the numbers of their distributions, `indexes`, are one tensor for each step of the walk; all are int32 and flat.
    """

    y: list[Tensor]
    indexes: list[Tensor]
    z: Tensor
    y_hat: Tensor


class Encoded(NamedTuple):
    """One image, coded: its two rANS streams, and y_hat (1, M, h, w), which they decode to."""

    y_string: bytes
    z_string: bytes
    y_hat: Tensor


@dataclass
class _Tables:
    y: rans.CodingTables
    z: rans.CodingTables


class TACO(SpaceChannelModel):
    """The codec's network: transforms around the entropy model, under the reference's parameter names.

    Inputs are images x (B, 3, H, W) in [0, 1], H and W multiples of 64, and text (B, T, text_dim). mask (B, T) bool, True
    at the tokens to attend to, hides padding; without one the encoder reads padding too, as the reference does.
    """

    def __init__(self, config: ModelConfig | None = None):
        config = config or ModelConfig()
        super().__init__(config.N, config.M, config.groups, config.context_widths)
        self.config = config
        self.g_a = AnalysisTransform(config)
        self.g_s = SynthesisTransform(config.N, config.M)
        self.h_a = HyperAnalysis(config.N, config.M)
        self.h_s = HyperSynthesis(config.N, config.M)
        self._tables: _Tables | None = None

    def forward(self, x: Tensor, text: Tensor, mask: Tensor | None = None) -> dict[str, Any]:
        """Reconstruct x and estimate its bits; differentiable.

        Returns {"x_hat": (B, 3, H, W), unclamped, "likelihoods": {"y": (B, M, h, w), "z": (B, N, h/4, w/4)}}. In
        training mode the likelihoods are those of y and z with uniform noise (Balle et al. 2018), while y_hat is rounded
        with a straight-through gradient; in evaluation mode both are those of the rounded values.
        """
        y = self.g_a(x, text, mask).float()
        with torch.autocast(
            x.device.type, enabled=False
        ):  # probabilities need more than bfloat16's eight bits
            y_hat, likelihoods = self._estimate(y)
        return {"x_hat": self.g_s(y_hat).float(), "likelihoods": likelihoods}

    def _estimate(self, y: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """y_hat and the likelihoods of y and z, without coding them."""
        z = self.h_a(y)
        _, z_likelihoods = self.entropy_bottleneck(z)
        z_hat = ste_round(z - self.medians()) + self.medians()
        halves = {anchor: squeeze(y, anchor) for anchor in (True, False)}
        likelihoods: dict[bool, list[Tensor]] = {True: [], False: []}

        def estimate(step: Step, scales: Tensor, means: Tensor) -> Tensor:
            values = halves[step.anchor][:, step.channels]
            likelihoods[step.anchor].append(self.gaussian_conditional(values, scales, means)[1])
            return ste_round(values - means) + means

        y_hat = self.walk(self.h_s(z_hat), estimate)
        y_likelihoods = unsqueeze(torch.cat(likelihoods[True], 1), torch.cat(likelihoods[False], 1))
        return y_hat, {"y": y_likelihoods, "z": z_likelihoods}

    def aux_loss(self) -> Tensor:
        """The loss of z's quantiles, which only the auxiliary optimizer minimises."""
        return self.entropy_bottleneck.loss()

    @torch.inference_mode()
    def compress(self, x: Tensor, text: Tensor, mask: Tensor | None = None) -> dict[str, Any]:
        """Code every image of the batch, by CompressAI's convention: {"strings": [[y...], [z...]], "shape": z's (h, w)}."""
        coded = [self.encode_latents(y) for y in self.g_a(x, text, mask).float().split(1)]
        shape = (x.shape[2] // 64, x.shape[3] // 64)
        return {"strings": [[c.y_string for c in coded], [c.z_string for c in coded]], "shape": shape}

    @torch.inference_mode()
    def decompress(self, strings: list[list[bytes]], shape: tuple[int, int]) -> dict[str, Tensor]:
        """The inverse of `compress`: {"x_hat": (B, 3, H, W), clamped to [0, 1]}.

        Raises `DamagedFileError` where a stream ends too early; a stream altered otherwise decodes to other latents.
        """
        y_hat = [self.decode_latents(y, z, shape) for y, z in zip(*strings, strict=True)]
        return {"x_hat": self.g_s(torch.cat(y_hat)).float().clamp_(0, 1)}

    @torch.inference_mode()
    def encode_latents(self, y: Tensor) -> Encoded:
        """Code the y of one image, float32 (1, M, h, w).

        Images are coded one by one even in a batch: the parameters of the entropy model must come out the same to the
        last bit at the decoder, and a convolution over a batch need not equal the one over a single image. Raises
        `CheckpointError` where the weights make values that are not finite or too large to be coded.
        """
        symbols, tables = self.quantize(y), self.tables()
        y_string = rans.encode(torch.cat(symbols.y).cpu(), torch.cat(symbols.indexes).cpu(), tables.y)
        z_string = rans.encode(symbols.z.cpu(), self._z_indexes(len(symbols.z)), tables.z)
        return Encoded(y_string, z_string, symbols.y_hat)

    @torch.inference_mode()
    @repeatable()
    def quantize(self, y: Tensor) -> Symbols:
        """What `encode_latents` gives to the coder. Raises `CheckpointError` for values that are not finite."""
        self.tables()  # made here where they are missing, since both ends must make the same
        medians = self.medians()
        z = self.h_a(y)
        halves = {anchor: squeeze(y, anchor) for anchor in (True, False)}
        symbols: list[Tensor] = []
        indexes: list[Tensor] = []

        def visit(step: Step, scales: Tensor, means: Tensor) -> Tensor:
            # by way of a flat tensor, as the decoder has them: the order of the numbers in memory decides how they are summed
            symbols.append((halves[step.anchor][:, step.channels] - means).round().int().flatten())
            indexes.append(self.y_indexes(scales))
            return symbols[-1].reshape(means.shape) + means

        z_symbols = (z - medians).round().int().flatten()
        y_hat = self.walk(self.h_s(z_symbols.reshape(z.shape) + medians), visit)
        if not all(torch.isfinite(values).all() for values in (y, z, y_hat)):
            raise CheckpointError(
                "The encoder produced values that are not finite numbers: the weights are broken."
            )
        return Symbols(symbols, indexes, z_symbols, y_hat)

    @torch.inference_mode()
    @repeatable()
    def decode_latents(self, y_string: bytes, z_string: bytes, shape: tuple[int, int]) -> Tensor:
        """y_hat (1, M, h, w); `shape` is that of z. Any bytes are safe to give.

        Raises `DamagedFileError` for streams that cannot be those of such an image.
        """
        tables, device = self.tables(), self.medians().device
        if shape[0] * shape[1] * float(tables.z.least_bits.sum()) > 8 * len(z_string) + 64:
            raise DamagedFileError(
                f"{len(z_string)} bytes cannot hold the latents of so large an image: forged header."
            )
        z_indexes = self._z_indexes(self.config.N * shape[0] * shape[1])
        z_symbols = rans.Decoder(z_string, tables.z, len(z_indexes)).read(z_indexes)
        decoder = rans.Decoder(y_string, tables.y, 16 * self.config.M * shape[0] * shape[1])

        def read(step: Step, scales: Tensor, means: Tensor) -> Tensor:
            symbols = decoder.read(self.y_indexes(scales).cpu())
            return symbols.to(device).reshape(means.shape) + means

        z_hat = z_symbols.to(device).reshape(1, -1, *shape) + self.medians()
        y_hat = self.walk(self.h_s(z_hat), read)
        if not torch.isfinite(y_hat).all():
            raise DamagedFileError(
                "The compressed latents decode to values that are not finite: damaged or forged."
            )
        return y_hat

    def tables(self) -> _Tables:
        """The coder's tables, those missing made from the weights.

        Raises `CheckpointError` for damaged tables, and names the weights that are not finite numbers.
        """
        if self._tables is None:
            broken = [name for name, weight in self.named_parameters() if not torch.isfinite(weight).all()]
            if broken:
                raise CheckpointError(
                    f"These weights are broken: {len(broken)} of them, {broken[0]} first, hold values that are not finite."
                )
            if not self.gaussian_conditional.offset.numel():
                self.gaussian_conditional.update()
            self.entropy_bottleneck.update()  # does nothing where there are tables
            self._tables = _Tables(
                rans.CodingTables(self.gaussian_conditional, len(SCALE_TABLE)),
                rans.CodingTables(self.entropy_bottleneck, self.config.N),
            )
        return self._tables

    def y_indexes(self, scales: Tensor) -> Tensor:
        """For each scale the number of the smallest that the table has above it: CompressAI's `build_indexes`, flattened."""
        return torch.bucketize(
            scales.contiguous(), self.gaussian_conditional.scale_table[:-1], out_int32=True
        ).flatten()

    def _z_indexes(self, count: int) -> Tensor:
        """The distributions of z's `count` symbols are those of their channels."""
        return torch.arange(self.config.N, dtype=torch.int32).repeat_interleave(count // self.config.N)

    @torch.no_grad()
    def update(self) -> None:
        """Make the coder's tables from the weights as they are now."""
        self.gaussian_conditional.update()
        self.entropy_bottleneck.update(force=True)
        self._tables = None

    def train(self, mode: bool = True) -> TACO:
        """As `nn.Module.train`; entering training drops the coder's tables, which the next step would make stale."""
        if mode:
            for model in (self.entropy_bottleneck, self.gaussian_conditional):
                for name in _TABLES:
                    setattr(model, name, torch.empty(0, dtype=torch.int32, device=self.medians().device))
            self._tables = None
        return super().train(mode)

    def load_state_dict(
        self, state_dict: Mapping[str, Tensor], strict: bool = True, assign: bool = False
    ) -> Any:
        """Load weights under the reference's names: `module.` prefixes and CompressAI's older names are understood.

        The coder's tables are taken as they are, so that files stay decodable; where they are missing or empty they are
        made anew when first needed. Raises `CheckpointError` naming the keys that are missing, unknown or misshapen.
        """
        state = {modern_key(key): value for key, value in state_dict.items()}
        for name in ("entropy_bottleneck", "gaussian_conditional"):
            for table in (f"{name}.{table}" for table in _TABLES):
                if strict or table in state:
                    value = state.setdefault(table, torch.empty(0, dtype=torch.int32))
                    setattr(
                        getattr(self, name),
                        table.rpartition(".")[2],
                        torch.empty_like(value, device=self.medians().device),
                    )
        if not state.get("gaussian_conditional.scale_table", torch.empty(1)).numel():
            del state[
                "gaussian_conditional.scale_table"
            ]  # empty in checkpoints saved before the tables were made
        state.setdefault("gaussian_conditional.scale_table", self.gaussian_conditional.scale_table)
        self._tables = None
        try:
            return super().load_state_dict(state, strict=strict, assign=assign)
        except RuntimeError as error:
            raise CheckpointError(f"These weights do not fit a TACO of {self.config}. {error}") from None


def modern_key(key: str) -> str:
    """The key under which today's CompressAI keeps what a checkpoint calls `key`."""
    key = key.removeprefix("module.")
    for old, new in _RENAMED.items():
        if key.startswith(old) and key[len(old) :].isdigit():
            return new + key[len(old) :]
    return key
