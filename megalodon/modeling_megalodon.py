"""Megalodon in PyTorch: blocks, the model, and the model with the output of a language model.

Ma et al. 2024, "Megalodon: Efficient LLM Pretraining and Inference with Unlimited Context
Length" (arXiv 2404.08801).
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils.generic import can_return_tuple

from .cache import LayerState, MegalodonCache
from .compat import CACHE_NAME, CausalLMOutput, ModelOutput, one_cache
from .configuration_megalodon import MegalodonConfig
from .generation import MegalodonGenerationMixin
from .layout import Layout, mask_labels, packed_positions, read_layout
from .modules import (
    Float32Module,
    MegalodonCEMA,
    MegalodonFFN,
    MegalodonLayerNorm,
    MegalodonQueryKey,
    MegalodonRMSNorm,
    MegalodonTimestepNorm,
    again_in_backward,
    drop,
    swiglu_linear,
)
from .ops.chunk_attention import (
    AttentionState,
    chunk_attention,
    of_one_size,
    rotary_table,
    whole_scores,
)
from .ops.precision import autocast_acts
from .time_parallel import TimeGroup


class MegalodonBlock(GradientCheckpointingLayer):
    """One block: gated chunk attention over a moving average, then a feed-forward network.

    The second hop's residual is the block's input, not the first hop's output (section 3.4).
    The state is an argument and a result, so that a recomputed forward is the same forward.
    """

    def __init__(self, config: MegalodonConfig, layer_idx: int) -> None:
        super().__init__()
        dim, bias = config.model_dim, config.output_ffn_bias
        self.config = config
        self.timestep_norm = MegalodonTimestepNorm(config)
        self.cema = MegalodonCEMA(config)
        self.rms_norm = MegalodonRMSNorm(config)
        self.wz = nn.Linear(dim, config.z_dim)
        self.wv = nn.Linear(dim, config.value_dim)
        self.wr = nn.Linear(dim, config.value_dim)
        self.wh1 = nn.Linear(dim, dim)
        self.wh2 = nn.Linear(config.value_dim, dim, bias=bias)
        self.query_key = MegalodonQueryKey(config)
        self.ffn_norm = MegalodonLayerNorm(config)
        self.ffn = MegalodonFFN(config, layer_idx)

    def forward(
        self, x: Tensor, state: LayerState | None, layout: Layout
    ) -> tuple[Tensor, LayerState | None]:
        """x (B, L, D) and what came before -> (B, L, D) and the state after it, if wanted."""
        config, train = self.config, self.training
        hidden, branch = (config.hidden_dropout, config.dropout) if train else (0.0, 0.0)
        norm_state, cema_state, attention_state = state or (None, None, None)
        x_tn, norm_state = self.timestep_norm(x, norm_state, layout)
        mx, cema_state = self.cema(x_tn, cema_state, layout)
        mx = drop(self.rms_norm(mx), hidden)
        a, attention_state = self._attention(x_tn, mx, attention_state, layout)
        gated = swiglu_linear(self.wr(mx), a, self.wh2, hidden)
        y = x + drop(self.wh1(mx) + gated, branch)
        out = self.second_hop(x, y, hidden, branch)
        if not layout.return_state:
            return out, None
        return out, LayerState(norm_state, cema_state, attention_state)  # type: ignore[arg-type]

    def second_hop(self, x: Tensor, y: Tensor, hidden: float, branch: float) -> Tensor:
        """What the network makes of the first hop's output y, added to the block's input x."""
        return x + drop(self.ffn(self.ffn_norm(y), hidden), branch)

    def _attention(
        self, x_tn: Tensor, mx: Tensor, state: AttentionState | None, layout: Layout
    ) -> tuple[Tensor, AttentionState | None]:
        config, z, v = self.config, self.wz(mx), self.wv(x_tn)
        dropout = config.attention_dropout if self.training else 0.0
        scores = whole_scores(z, min(z.shape[1], config.chunk_size), layout.fused)

        def heads(z: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            q, k = self.query_key(z, layout.rotary)
            v = F.silu(v).view(*q.shape[:3], -1)
            # Filled up before attention would do so: then all that it takes is computed again.
            return (q, k, v) if scores or layout.return_state else of_one_size(q, k, v)

        def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, AttentionState | None]:
            a, new_state = chunk_attention(
                q,
                k,
                v,
                config.chunk_size,
                state=state,
                offset=layout.offset,
                segments=layout.segments,
                dropout=dropout,
                fused=layout.fused,
                return_state=layout.return_state,
            )
            return a[..., : config.value_dim // config.num_heads].flatten(-2), new_state

        if layout.return_state or (scores and dropout):
            return attend(*heads(z, v))
        if scores:
            return again_in_backward(lambda z, v: attend(*heads(z, v))[0], z, v), None
        return attend(*again_in_backward(heads, z, v))


class MegalodonPreTrainedModel(PreTrainedModel):
    """What every Megalodon has in common: configuration, initialisation, what transformers asks."""

    config_class = MegalodonConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    config: MegalodonConfig
    _no_split_modules = ["MegalodonBlock"]  # noqa: RUF012
    _skip_keys_device_placement = ["cache", "past_key_values"]  # noqa: RUF012
    _keep_in_fp32_modules_strict = [  # noqa: RUF012
        "timestep_norm",
        "cema",
        "rms_norm",
        "query_key",
        "ffn_norm",
        "final_norm",
    ]

    def __init__(self, config: MegalodonConfig, *inputs: Any, **kwargs: Any) -> None:
        # from_pretrained and from_config put there what they are told, checked or not.
        _refuse_float16(config.dtype)
        config.validate_architecture()
        super().__init__(config, *inputs, **kwargs)

    def set_time_group(self, group: TimeGroup | None) -> None:
        """Share each sequence with other processes along time, from now on: the process of rank r
        in the group gives the r-th part as `input_ids`, and gets the logits of that part, and
        gradients as if the losses of all were added up. Parts are as long as each other, of whole
        chunks, without padding or borders of documents, and no state goes in or out. ``None``:
        alone again."""
        self.base_model.time_group = group  # type: ignore[assignment]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            self._init_linear(module)
        elif isinstance(module, nn.Embedding):
            self._init_gaussian(module.weight)
        elif isinstance(module, MegalodonCEMA):
            module.reset_parameters()
        elif isinstance(module, MegalodonFFN) and module.alpha is not None:
            init.constant_(module.alpha, 0.1 * 0.5**module.layer_idx)
        elif isinstance(module, Float32Module):
            for parameter in module.parameters(recurse=False):
                init.zeros_(parameter)

    def _init_linear(self, linear: nn.Linear) -> None:
        weight, mode = linear.weight, self.config.init_mode
        if linear is self.get_output_embeddings():
            self._init_gaussian(weight)
        elif mode == "he":
            init.normal_(weight, std=1.0 / math.sqrt(3 * linear.in_features))
        elif mode == "xavier":
            init.xavier_uniform_(weight)
        elif mode == "bert":
            init.normal_(weight, std=0.02)
        elif mode == "gaussian":
            self._init_gaussian(weight)
        else:  # "none": PyTorch's own
            linear.reset_parameters()
            return
        if linear.bias is not None:
            init.zeros_(linear.bias)

    def _init_gaussian(self, weight: Tensor) -> None:
        std = 1.0 / math.sqrt(self.config.model_dim)
        init.trunc_normal_(weight, std=std, a=-3 * std, b=3 * std)


def _refuse_float16(dtype: torch.dtype | str | None) -> None:
    if dtype in (torch.float16, "float16"):
        raise ValueError(
            "Megalodon does not run in float16, whose range its norms overflow; "
            "use bfloat16 or float32"
        )


class MegalodonModel(MegalodonPreTrainedModel):
    """Embedding, blocks and the final TimestepNorm."""

    def __init__(self, config: MegalodonConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.model_dim)
        self.layers = nn.ModuleList(MegalodonBlock(config, i) for i in range(config.num_layers))
        self.final_norm = MegalodonTimestepNorm(config)
        self.gradient_checkpointing = False
        self.time_group: TimeGroup | None = None
        self._rotary_tables: dict[torch.device, Tensor] = {}
        self.post_init()

    @can_return_tuple  # or an object: `return_dict`, by default the config's
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: MegalodonCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        past_key_values: MegalodonCache | None = None,
        **packing: Any,
    ) -> ModelOutput:
        """Hidden states of a piece of text.

        Args:
            input_ids: (B, L) token ids, or `inputs_embeds` (B, L, D) in their place.
            attention_mask: (B, L), or (B, positions in the cache + L): 0 at padding, which may
                stand anywhere. Padding changes nothing for the other tokens; its own final
                hidden states, and so logits, are 0.
            position_ids: (B, L); where they do not count on by one, a new document begins.
                Their absolute value has no other meaning: Megalodon's only positions are those
                inside a chunk.
            cache: the state after the text before, which is then brought up to date.
            use_cache: whether to return the state. Default: the config's `use_cache` when
                evaluating, False when training.
            output_hidden_states: whether to return the input of every block as well, and the
                final hidden states. Default: the config's.
            output_attentions: refused, for attention maps are never whole.
            past_key_values: the old name of `cache`.
            packing: what else says where documents begin, `cu_seq_lens_q` and the like: see
                :func:`megalodon.layout.packed_positions`.

        Raises:
            ValueError: for a cache of another model or batch size, a mask or positions of the
                wrong shape, contradicting ones, ids outside the vocabulary, float16, attention
                maps asked for.
            TypeError: for an unknown keyword.
        """
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if output_attentions or (output_attentions is None and self.config.output_attentions):
            raise ValueError(
                "output_attentions=True: a Megalodon attends chunk by chunk and returns no "
                "attention maps; output_hidden_states is served"
            )
        implementation = self.config._attn_implementation  # no public name says what was chosen
        if implementation not in ("sdpa", "eager"):
            raise ValueError(
                f"attn_implementation={implementation!r}: the attention inside the chunks of a "
                "Megalodon runs with 'sdpa', the default, or 'eager'"
            )
        x = self._embed(input_ids, inputs_embeds)
        position_ids = packed_positions(x, attention_mask, position_ids, packing)
        cache = one_cache(cache, past_key_values)
        if cache is not None:
            if not isinstance(cache, MegalodonCache):
                raise ValueError(
                    f"the cache is a {type(cache).__name__}; Megalodon keeps its state in a "
                    "MegalodonCache"
                )
            cache.check(self.config, x.shape[0])
            cache.leave_inference_mode()
        if self.time_group is not None and (cache is not None or use_cache):
            raise ValueError("use_cache: no state goes in or out where processes share a sequence")
        if use_cache is None:
            wanted = self.config.use_cache and not self.training and self.time_group is None
            use_cache = cache is not None or wanted
        again = 0  # tokens that are read with the new ones
        if cache is not None:
            plain = use_cache and attention_mask is None and position_ids is None
            ids = cache.read_again(self.forward, input_ids if plain else None)
            if ids is not None:
                again, input_ids = ids.shape[1] - x.shape[1], ids
                x = self._embed(ids, None)
        elif use_cache:
            cache = MegalodonCache(self.config)
        layout = read_layout(
            x,
            attention_mask,
            position_ids,
            cache,
            self._rotary(x.device),
            self.config.chunk_size,
            return_state=bool(use_cache),
            fused=implementation == "sdpa",
            time=self.time_group,
        )
        layers = list(self.layers)[: self.config.num_layers]  # fewer in a draft by early exit
        before = cache.states if cache is not None and cache.states else [None] * len(layers)
        norm_state = None if cache is None else cache.final_norm
        hidden_states: list[Tensor] = []
        states: list[LayerState] = []
        for layer, state in zip(layers, before, strict=True):
            if output_hidden_states:
                hidden_states.append(x)
            entry = x
            x, state = layer(entry, state, layout)
            if state is not None:
                states.append(state)
                if entry.requires_grad and torch.is_grad_enabled() and not state.cema.requires_grad:
                    raise ValueError(
                        "checkpoints with use_reentrant=True lose the gradients of a state: train "
                        "with use_cache=False, or with use_reentrant=False"
                    )
        x, norm_state = self.final_norm(x, norm_state, layout)
        if cache is not None and use_cache:
            assert norm_state is not None
            cache.advance(states, norm_state, x.shape[1], layout.segments is None)
            cache.record(
                input_ids=input_ids,
                inputs_embeds=inputs_embeds,
                attention_mask=None if attention_mask is None else attention_mask[:, -x.shape[1] :],
                position_ids=None if position_ids is None else torch.atleast_2d(position_ids),
            )
        if output_hidden_states:
            hidden_states.append(x)
        if again:
            x, *hidden_states = (h[:, again:] for h in (x, *hidden_states))
        named: dict[str, Any] = {CACHE_NAME: cache if use_cache else None}
        return ModelOutput(
            last_hidden_state=x,
            hidden_states=tuple(hidden_states) if output_hidden_states else None,
            **named,
        )

    def _embed(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds, and not both")
        if inputs_embeds is None:
            assert input_ids is not None
            try:
                inputs_embeds = self.embed_tokens(input_ids)
            except IndexError:
                raise ValueError(
                    f"input_ids holds ids from {int(input_ids.min())} to {int(input_ids.max())}, "
                    f"outside the vocabulary of {self.embed_tokens.num_embeddings}"
                ) from None
        x = inputs_embeds
        if x.dim() != 3 or x.shape[1] == 0 or x.shape[2] != self.config.model_dim:
            raise ValueError(
                f"inputs_embeds has shape {tuple(x.shape)}; it must be (batch, length, "
                f"{self.config.model_dim}) with at least one token, and input_ids (batch, length)"
            )
        _refuse_float16(x.dtype)
        if autocast_acts(x.device.type):
            _refuse_float16(torch.get_autocast_dtype(x.device.type))
        if self.config.scale_emb:
            x = x * math.sqrt(self.config.model_dim)
        return F.dropout(x, self.config.dropout, self.training)

    def _rotary(self, device: torch.device) -> Tensor:
        """The rotary table on a device, made once: it is a constant, not a parameter."""
        if device not in self._rotary_tables:
            config = self.config
            sizes = config.chunk_size, config.z_dim // config.num_heads, config.rope_base
            if torch.compiler.is_dynamo_compiling():  # a graph can keep nothing for later calls
                return rotary_table(*sizes, device)
            with torch.inference_mode(False):  # later calls may be in training
                table = rotary_table(*sizes, device)
            if type(table) is not Tensor:  # traced in another way
                return table
            self._rotary_tables[device] = table
        return self._rotary_tables[device]


class MegalodonForCausalLM(MegalodonPreTrainedModel, MegalodonGenerationMixin):
    """A Megalodon with the output matrix of a language model."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    accepts_loss_kwargs = True  # tells Trainer that forward takes num_items_in_batch

    def __init__(self, config: MegalodonConfig) -> None:
        super().__init__(config)
        self.model = MegalodonModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.model_dim, config.vocab_size, bias=False)
        self.register_load_state_dict_post_hook(_forgive_tied_weight)
        self.post_init()

    @can_return_tuple  # or an object: `return_dict`, by default the config's
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: MegalodonCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: int | Tensor | None = None,
        ignore_index: int = -100,
        past_key_values: MegalodonCache | None = None,
        **packing: Any,
    ) -> CausalLMOutput:
        """Next-token logits, and the loss where labels are given.

        Args:
            labels: (B, L), the input ids themselves: the shift by one happens here.
                `ignore_index` is left out, and so are padding and every token that none of its
                document precedes.
            logits_to_keep: how many last positions get logits (0: all), or their indices.
            num_items_in_batch: the labels of all batches whose gradients are accumulated, as
                Trainer counts them, from the second of each row on: the loss of this batch has
                the weight of its share. Default: it has all.
            ignore_index: the label that stands for none.

        The other arguments are those of :meth:`MegalodonModel.forward`.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=one_cache(cache, past_key_values),
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            return_dict=True,
            **packing,
        )
        x = outputs.last_hidden_state
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(x[:, keep])
        loss = None
        if labels is not None:
            if self.model.time_group is not None:
                raise ValueError(
                    "labels: the last of a part is another process's first; where processes share "
                    "a sequence, take the loss from the logits"
                )
            if labels.shape != x.shape[:2] or logits.shape[1] != x.shape[1]:
                raise ValueError(
                    f"labels has shape {tuple(labels.shape)}; it must be {tuple(x.shape[:2])}, and "
                    "a loss needs the logits of all positions: logits_to_keep=0"
                )
            if attention_mask is not None:
                attention_mask = attention_mask[:, -x.shape[1] :]  # without what the cache saw
            positions = packed_positions(x, attention_mask, position_ids, packing)
            given, labels = labels, mask_labels(labels, attention_mask, positions, ignore_index)
            if num_items_in_batch is not None:  # of which Trainer counts those left out as well
                count, counted = (t[:, 1:].ne(ignore_index).sum() for t in (labels, given))
                num_items_in_batch = num_items_in_batch * (count.clamp(min=1) / counted)
            loss = self.loss_function(
                logits=logits,
                labels=labels,
                vocab_size=logits.shape[-1],
                num_items_in_batch=num_items_in_batch,
                ignore_index=ignore_index,
            )
        named: dict[str, Any] = {CACHE_NAME: outputs.cache}
        return CausalLMOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, **named
        )


def _forgive_tied_weight(model: MegalodonForCausalLM, keys: Any) -> None:
    """A checkpoint holds a tied matrix once; the other name is then not missing."""
    tied = model.lm_head.weight is model.model.embed_tokens.weight
    if tied and "model.embed_tokens.weight" not in keys.missing_keys:
        keys.missing_keys[:] = [key for key in keys.missing_keys if key != "lm_head.weight"]
