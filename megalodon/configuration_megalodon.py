"""Configuration of a Megalodon model."""

import math
import os
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from .remote_code import CONFIG_AUTO_MAP, CONFIG_FILE, write_imports

InitMode = Literal["he", "xavier", "bert", "gaussian", "none"]
if TYPE_CHECKING:
    RopeBase = float
else:
    RopeBase = float | int | None  # None only until __post_init__

SIZES = (
    "vocab_size", "model_dim", "num_layers", "num_heads", "z_dim", "value_dim",
    "ffn_hidden_dim", "cema_ndim", "chunk_size", "norm_num_groups",
)  # fmt: skip
"""The keys that say what a model's tensors are like."""


@strict
class MegalodonConfig(PreTrainedConfig):
    """Sizes and options of a Megalodon (Ma et al. 2024, arXiv 2404.08801); by default the released
    mega200M.

    Args:
        vocab_size: number of token ids; 256 for bytes.
        model_dim: width D of the residual stream.
        num_layers: number of blocks.
        num_heads: attention heads H.
        z_dim: width Z of the shared query/key representation, over all heads.
        value_dim: width E of the values and the gate, over all heads.
        ffn_hidden_dim: width F inside the feed-forward network.
        cema_ndim: order N of the complex moving average, per channel.
        chunk_size: tokens C of an attention chunk.
        norm_num_groups: groups G of TimestepNorm.
        norm_eps: epsilon of every normalisation.
        rope_base: base of the rotary frequencies; None is 10,000.
        swiglu: whether the feed-forward network is gated.
        rescale_nffn: whether a learned per-channel factor scales the feed-forward branch.
        scale_emb: whether embeddings are multiplied by sqrt(D).
        output_ffn_bias: whether W_h2 and the feed-forward matrices have biases. The released
            models have none there.
        init_mode: initialisation of the matrices: ``he`` (std 1/sqrt(3 fan_in), which is what
            the released code calls he), ``xavier`` (uniform), ``bert`` (std 0.02), ``gaussian``
            (std 1/sqrt(D), truncated at three of them) or ``none`` (PyTorch's own).
        dropout: on the embeddings and on both branches of a block.
        attention_dropout: on the attention map.
        hidden_dropout: on the moving average, the gated attention and inside the FFN.
        tie_word_embeddings: whether the output matrix is the embedding; also `share_emb`.
        use_cache: whether an evaluating model returns its state.
        gradient_checkpointing: whether a model made from this config recomputes its blocks in the
            backward pass; also `layerwise_ckpt`. Making the model uses it up: no file holds it.

    Other names of the released code and its ports (`norm_affine`, `output_size`, `efficient_attn`,
    `max_cache_len`, `cache_unbounded`, `max_positions`) are taken where their value says what
    every model here does, and not kept.

    Raises:
        ValueError: for sizes that no Megalodon can have, for another value of those names, and for
            a name that is unknown, unless it comes from a file (which has a `model_type`): what
            another version of transformers wrote there is none of a model's business.
    """

    model_type = "megalodon"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["cache", "past_key_values"]
    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "model_dim",
        "num_hidden_layers": "num_layers",
        "num_attention_heads": "num_heads",
        "intermediate_size": "ffn_hidden_dim",
        "share_emb": "tie_word_embeddings",
        "layerwise_ckpt": "gradient_checkpointing",
    }

    vocab_size: int = 32000
    model_dim: int = 1024
    num_layers: int = 12
    num_heads: int = 1
    z_dim: int = 256
    value_dim: int = 2048
    ffn_hidden_dim: int = 2560
    cema_ndim: int = 16
    chunk_size: int = 2048
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    rope_base: RopeBase = 10000.0
    swiglu: bool = False
    rescale_nffn: bool = False
    scale_emb: bool = False
    output_ffn_bias: bool = False
    init_mode: InitMode = "he"
    dropout: float | int = 0.0
    attention_dropout: float | int = 0.0
    hidden_dropout: float | int = 0.0
    tie_word_embeddings: bool = False
    use_cache: bool = True
    gradient_checkpointing: bool = False
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        for alias, name in self.attribute_map.items():
            if alias in kwargs:  # under its own name its type is checked
                setattr(self, name, kwargs.pop(alias))
        local = f"attention stays inside chunks of chunk_size={self.chunk_size} tokens"
        output = f"the output has one for each of vocab_size={self.vocab_size} tokens"
        for name, served, reason in (
            ("norm_affine", (True,), "the norms of a Megalodon have weights"),
            ("output_size", (None, -1, self.vocab_size), output),
            ("efficient_attn", (None,), "attn_implementation chooses: 'sdpa' or 'eager'"),
            ("max_cache_len", (None, -1, self.chunk_size), f"{local}, and so does its cache"),
            ("cache_unbounded", (False,), f"{local}, and so does its cache"),
        ):
            value = kwargs.pop(name, served[0])
            if value not in served:
                raise ValueError(f"{name}={value!r}: {reason}")
        positions = kwargs.pop("max_positions", self.chunk_size)
        if not (isinstance(positions, int) and positions >= self.chunk_size):
            raise ValueError(f"max_positions={positions!r}: {local}, and has as many positions")
        known = {"attn_implementation", "experts_implementation", "quantization_config"}
        for name, value in kwargs.items():
            is_known = hasattr(type(self), name) or name in known or name.startswith("_")
            if not (is_known or "model_type" in kwargs):
                raise ValueError(f"{name}={value!r}: MegalodonConfig has no such name")
        super().__post_init__(**kwargs)

    def validate_architecture(self) -> None:
        """Refuse sizes that no Megalodon can have. Raises ValueError naming the key."""
        if cast(float | None, self.rope_base) is None:
            self.rope_base = 10000.0
        for key in SIZES:
            if getattr(self, key) < 1:
                raise ValueError(f"{key}={getattr(self, key)}: must be at least 1")
        for key, divisor in (
            ("model_dim", "norm_num_groups"),
            ("z_dim", "num_heads"),
            ("value_dim", "num_heads"),
        ):
            value, by = getattr(self, key), getattr(self, divisor)
            if value % by:
                raise ValueError(f"{key}={value}: must be a multiple of {divisor}={by}")
        if (self.z_dim // self.num_heads) % 2:
            raise ValueError(
                f"z_dim={self.z_dim}: z_dim / num_heads must be even, for the rotary pairs"
            )
        for key, bound in (("norm_eps", 0), ("rope_base", 1)):
            if not bound < getattr(self, key) < math.inf:
                raise ValueError(f"{key}={getattr(self, key)}: must be greater than {bound}")
        for key in ("dropout", "attention_dropout", "hidden_dropout"):
            if not 0.0 <= getattr(self, key) < 1.0:
                raise ValueError(f"{key}={getattr(self, key)}: must be in [0, 1)")

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any
    ) -> None:
        """transformers' own, with what `trust_remote_code` needs: see ``remote_code``."""
        self.auto_map = CONFIG_AUTO_MAP
        write_imports(save_directory, CONFIG_FILE)
        super().save_pretrained(save_directory, **kwargs)
        if push_to_hub:  # by a fresh folder, all of which is sent
            name = os.path.basename(os.path.normpath(save_directory))
            self.push_to_hub(kwargs.pop("repo_id", name), **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: str | type = "AutoConfig") -> None:
        """Nothing: it would make transformers save a copy of this file where it is loaded by
        `trust_remote_code`."""

    @classmethod
    def mega200m(cls, **overrides: Any) -> "MegalodonConfig":
        """The released mega200M: 220,627,968 parameters. These are the defaults."""
        return cls(**overrides)

    @classmethod
    def mega1_3b(cls, **overrides: Any) -> "MegalodonConfig":
        """The released mega1.3B: 1,342,832,640 parameters."""
        sizes = {"model_dim": 2048, "num_layers": 24, "num_heads": 2, "z_dim": 512}
        sizes |= {"value_dim": 4096, "ffn_hidden_dim": 4864, "norm_num_groups": 64}
        return cls(**{**sizes, **overrides})

    @classmethod
    def mega1_3b_pg19(cls, **overrides: Any) -> "MegalodonConfig":
        """The released mega1.3B_pg19: 1,327,628,288 parameters."""
        options = {"ffn_hidden_dim": 3584, "swiglu": True, "scale_emb": True}
        return cls.mega1_3b(**{**options, "tie_word_embeddings": True, **overrides})

    @classmethod
    def mega7_1b(cls, **overrides: Any) -> "MegalodonConfig":
        """The released mega7.1B: 7,117,381,632 parameters."""
        sizes = {"model_dim": 4096, "num_layers": 32, "num_heads": 4, "z_dim": 1024}
        sizes |= {"value_dim": 8192, "ffn_hidden_dim": 11264, "norm_num_groups": 64}
        return cls(**{**sizes, **overrides})

    @classmethod
    def mega7_3b(cls, **overrides: Any) -> "MegalodonConfig":
        """The released mega7.3B, the 7B of the paper: 7,385,817,088 parameters."""
        options = {"ffn_hidden_dim": 8192, "swiglu": True, "chunk_size": 4096}
        return cls.mega7_1b(**{**options, "rope_base": 100000.0, **overrides})

    @classmethod
    def from_7b_setup(cls, **overrides: Any) -> "MegalodonConfig":
        """The 7B of the paper, by the name that ports give it: `mega7_3b`."""
        return cls.mega7_3b(**overrides)
