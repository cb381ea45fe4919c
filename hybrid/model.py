"""`HybridModel`: backbone, adapter, reasoner and decoder wired together; save, load, forward."""

from __future__ import annotations

import re
import threading
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import ModelOutput

from hybrid import __version__
from hybrid.adapter import Adapter
from hybrid.backbone import Backbone, load_backbone, native_dtype, one_text, quiet_transformers, warn_caller
from hybrid.config import SMOLLM2, SMOLLM2_HUB_ID, AdapterConfig, HybridConfig, ReasonerConfig, TextConfig
from hybrid.decoder import Field, FieldBatch, FieldDecoder, TextDecoder, named
from hybrid.hub import check_head_folder, write_card
from hybrid.layers import init_linear_
from hybrid.losses import refinement_loss
from hybrid.reasoner import ReasonerState, RecursiveReasoner
from hybrid.soft_prompt import check_writes

if TYPE_CHECKING:
    from hybrid.inference import Answer


MAX_TEXTS = 1 << 15  # texts of options and names whose vectors are kept


@dataclass
class Encoded:
    """A batch as the reasoner reads it: slots (x), projected memory, and which slots exist."""

    slots: Tensor  # (batch, slots, dim)
    slot_mask: Tensor  # (batch, slots)
    memory: list  # ProjectedMemory for each network

    def select(self, rows: Tensor) -> Encoded:
        """Some rows of the batch."""
        return Encoded(self.slots[rows], self.slot_mask[rows], [memory.select(rows) for memory in self.memory])


@dataclass
class HybridOutput(ModelOutput):
    """Output of one refinement step.

    Attributes:
        loss: Scalar, when labels were given.
        scores: Float32 logits of the options, (batch, fields, options).
        halt_logits: The q head, (batch,).
        state: State for the next step.
        y: The answer latent with its gradient, (batch, slots, dim).
        slot_mask: Which slots exist, (batch, slots).
        metrics: Detached parts of the loss.
    """

    loss: Tensor | None = None
    scores: Tensor | None = None
    halt_logits: Tensor | None = None
    state: Any = None
    y: Tensor | None = None
    slot_mask: Tensor | None = None
    metrics: dict[str, Tensor] | None = None


class HybridModel(PreTrainedModel):
    """A recursive reasoner on a frozen language model.

    The module tree holds the trained parts only. The backbone is a plain attribute, attached after loading, so it is
    never saved, never optimised, and several heads can share one.
    """

    config_class = HybridConfig
    base_model_prefix = "hybrid"
    main_input_name = "hidden_states"

    def __init__(self, config: HybridConfig):
        super().__init__(config)
        if config.backbone.layers is None:
            raise ValueError("config.backbone.layers is null: use HybridModel.from_backbone, which resolves it")
        reasoner, adapter = config.reasoner, config.adapter
        if config.places is not None and adapter.kind == "resampler":
            raise ValueError(
                "adapter.kind='resampler' keeps no tokens for fields to start from: use 'linear' or 'mlp', or set "
                "data.places=false"
            )
        if config.text.enabled and (template := config.backbone.template) in ("question_first", "apart"):
            raise ValueError(
                f"backbone.template={template!r} with text.enabled: the model writes after a prompt that it has read "
                "from its beginning; use 'echo' or 'plain'"
            )
        if config.places is not None and config.text.enabled:
            raise ValueError(
                "text.enabled with fields that stand at a place (at): in other text the place means nothing, so such "
                "a head does not write; set text.enabled=false or data.places=false"
            )
        self.adapter = Adapter(
            kind=adapter.kind,
            layer_mix=adapter.layer_mix,
            whiten=adapter.whiten,
            num_layers=len(config.backbone.layers),
            backbone_dim=config.backbone_dim,
            dim=reasoner.dim,
            num_heads=reasoner.num_heads,
            num_vectors=adapter.num_vectors,
            dropout=adapter.dropout,
        )
        self.reasoner = RecursiveReasoner(
            dim=reasoner.dim,
            num_heads=reasoner.num_heads,
            intermediate_size=reasoner.intermediate_size,
            num_layers=reasoner.num_layers,
            num_latent_passes=reasoner.num_latent_passes,
            num_cycles=reasoner.num_cycles,
            num_gradient_cycles=reasoner.num_gradient_cycles,
            tie_levels=reasoner.tie_levels,
            rotary=reasoner.rotary,
            dropout=reasoner.dropout,
        )
        known = config.known_options or []
        self.decoder = FieldDecoder(
            dim=reasoner.dim,
            backbone_dim=config.backbone_dim,
            num_tape_slots=reasoner.num_tape_slots,
            num_known=len(known),
        )
        text = TextDecoder(dim=reasoner.dim, backbone_dim=config.backbone_dim) if config.text.enabled else None
        self.text_decoder = text
        self._known = {option: row for row, option in enumerate(known)}
        self._backbone: Backbone | None = None
        self._texts = _TextTable()
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            init_linear_(module)
        if module is self.decoder.halt_head:  # start by believing nothing is right yet, as TRM does
            nn.init.zeros_(module.weight)
            nn.init.constant_(module.bias, -5.0)
        if self.text_decoder is not None and module is self.text_decoder.gate:  # start by saying nothing
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)

    # -- the backbone ----------------------------------------------------------------------------------------------

    @classmethod
    def from_backbone(
        cls,
        backbone: Backbone,
        *,
        backbone_config: Any,
        adapter: AdapterConfig | None = None,
        reasoner: ReasonerConfig | None = None,
        text: TextConfig | None = None,
        known_options: Sequence[str] = (),
        choices: Sequence[str] | None = None,
        options: Sequence[str] | None = None,
        fields: Mapping[str, Sequence[str]] | None = None,
        places: Mapping[str, int] | None = None,
        find_names: bool = False,
        license: str | None = None,
    ) -> HybridModel:
        """A new, untrained head for a backbone.

        Args:
            backbone: The frozen model.
            backbone_config: The `BackboneConfig` it was loaded with, recorded so that the head can find it again.
            adapter: Numbers of the adapter.
            reasoner: Numbers of the reasoner.
            text: Whether it writes text, and how it is asked to.
            known_options: Options that get a learned residual.
            choices: Options of a question asked without any.
            options: Options of fields that are asked by name alone.
            fields: What such a question asks, if it is several fields: name to options.
            places: Where fields stand in the text, as in `HybridConfig`; an empty mapping if each says so itself.
            find_names: Whether others stand where the text has their names.
            license: Licence of the head, for its card.
        """
        config = HybridConfig(
            backbone=replace(
                backbone_config, layers=backbone.layers, template=backbone.template, memory=backbone.memory
            ),
            adapter=adapter or AdapterConfig(),
            reasoner=reasoner or ReasonerConfig(),
            text=text or TextConfig(),
            backbone_dim=backbone.dim,
            known_options=list(known_options),
            choices=list(choices) if choices is not None else None,
            options=list(options) if options is not None else None,
            fields={name: list(options) for name, options in fields.items()} if fields is not None else None,
            places=dict(places) if places is not None else None,
            find_names=find_names,
            license=license,
            hybrid_version=__version__,
        )
        model = cls(config).attach_backbone(backbone)
        if model.text_decoder is not None:
            embed = backbone.model.get_input_embeddings()  # which may scale its weight
            vectors = embed(torch.arange(min(4096, embed.weight.shape[0]), device=backbone.device))
            model.text_decoder.embedding_scale.copy_(vectors.detach().float().pow(2).mean().sqrt())
        return model

    @property
    def backbone(self) -> Backbone:
        """The frozen model.

        Raises:
            ValueError: None is attached.
        """
        if self._backbone is None:
            raise ValueError("no backbone is attached: call model.attach_backbone(Backbone.from_pretrained(...))")
        return self._backbone

    def attach_backbone(self, backbone: Backbone) -> HybridModel:
        """Use a backbone (shared, not copied) with this head's own layers and template.

        Raises:
            ValueError: Its hidden size or number of layers does not fit the head.
        """
        settings = self.config.backbone
        if backbone.dim != self.config.backbone_dim:
            raise ValueError(
                f"this head was trained on hidden size {self.config.backbone_dim} "
                f"({self.config.backbone.name_or_path}), and {backbone.name} has {backbone.dim}: "
                "attach the backbone it was trained on"
            )
        if self.text_decoder is not None:
            check_writes(backbone)
        recorded = self.config.backbone.name_or_path
        if backbone.name != recorded and not backbone.name.startswith((f"{recorded} ", f"{recorded}/")):
            warnings.warn(f"this head was trained on {recorded}, and gets {backbone.name}", stacklevel=2)
        elif settings.revision not in (None, backbone.revision):
            given = f"{settings.revision!r}, and gets {backbone.revision!r}"
            warnings.warn(f"this head was trained on {recorded} at revision {given}", stacklevel=2)
        self._backbone = backbone.with_settings(settings.layers, settings.template, settings.memory)
        self._texts = _TextTable()
        return self

    def to(self, *args: Any, **kwargs: Any) -> HybridModel:
        """As `torch.nn.Module.to`; the frozen model follows to the device, and keeps its dtype."""
        super().to(*args, **kwargs)
        if self._backbone is not None and self._backbone.device != self.device:
            self._backbone.model.to(self.device)
        return self

    # -- save and load ---------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(  # ty: ignore[incompatible-method-override]
        cls,
        folder_or_hub_id: str | Path,
        backbone: Backbone | None = None,
        *,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device | None = None,
        **kwargs: Any,
    ) -> HybridModel:
        """Load a head, then attach the recorded backbone, or the one handed in.

        Args:
            folder_or_hub_id: A folder written by `save_pretrained`, or a Hub id.
            backbone: A loaded backbone to share.
            dtype: Type of the head's weights; `auto` is bfloat16 where the device multiplies it natively.
            device: `cuda` if there is one, else `cpu`.
            **kwargs: Passed to `PreTrainedModel.from_pretrained` (`revision`, `token`, `cache_dir`, …).

        Raises:
            ValueError: The folder is no saved head, holds a pickle, or does not fit the backbone.
        """
        folder = Path(folder_or_hub_id)
        if folder.is_dir():
            check_head_folder(folder)
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        dtype = kwargs.pop("torch_dtype", dtype)  # its name in earlier versions of transformers
        if dtype == "auto":
            dtype = native_dtype(device)
        try:
            with quiet_transformers():
                model, info = super().from_pretrained(  # ty: ignore[not-iterable]  a pair, with output_loading_info
                    str(folder_or_hub_id), dtype=dtype, use_safetensors=True, output_loading_info=True, **kwargs
                )
        except OSError as error:
            reason = str(error).strip().splitlines()[0]
            raise ValueError(
                f"no head at {str(folder_or_hub_id)!r}: give a saved folder or a Hub id ({reason})"
            ) from error
        if problem := sorted(info["missing_keys"]) + sorted(info["unexpected_keys"]):
            raise ValueError(f"{folder_or_hub_id}: weights do not fit its config.json, first at {problem[0]!r}")
        if backbone is None:
            backbone = load_backbone(model.config.backbone, device)
        return model.to(device).eval().attach_backbone(backbone)

    def save_pretrained(self, folder: str | Path, **kwargs: Any) -> None:  # ty: ignore[incompatible-method-override]
        """Write `config.json`, `model.safetensors` (trained tensors only) and the model card."""
        with quiet_transformers():
            super().save_pretrained(folder, **kwargs)
        self.write_card(Path(folder))

    def write_card(self, folder: Path) -> None:
        """Write the model card, with what the folder's result files and `run.yaml` say, if they are there."""
        write_card(folder, self.card_facts(), self.config.license)

    def card_facts(self) -> dict[str, Any]:
        """What the model card says of this head."""
        reasoner, backbone = self.config.reasoner, self.config.backbone
        asks_itself = self.config.choices is not None or self.config.fields is not None
        asks_places = self.config.places is not None and not asks_itself and not self.config.find_names
        if self.config.find_names or self.config.asks_by_name:
            asked = ', context="...", ' + (
                'fields=["..."]' if self.config.options else 'fields={"...": ["yes", "no"]}'
            )
        elif asks_itself:
            asked = ', context="..."' if any(at >= 0 for at in (self.config.places or {}).values()) else ""
        else:
            asked = ', fields=[Field("...", ["yes", "no"], at=0)]' if asks_places else ', choices=["yes", "no"]'
        return {
            "backbone": backbone.name_or_path,
            "base_model": _hub_id(backbone.name_or_path),
            "layers": backbone.layers,
            "template": backbone.template,
            "memory": backbone.memory,
            "num_parameters": sum(self.parameter_groups().values()),
            "imports": "Field, HybridModel" if asks_places else "HybridModel",
            "arguments": asked,
            "num_cycles": reasoner.num_cycles,
            "num_latent_passes": reasoner.num_latent_passes,
            "max_steps": reasoner.max_steps,
            "halting": reasoner.halting,
            "version": self.config.hybrid_version,
            "writes": self.text_decoder is not None,
        }

    # -- parameters ------------------------------------------------------------------------------------------------

    def parameter_groups(self) -> dict[str, int]:
        """Parameters by part; they add up to all of them."""
        groups = {name: sum(p.numel() for p in part.parameters()) for name, part in self.named_children()}
        total = sum(p.numel() for p in self.parameters())
        assert sum(groups.values()) == total, f"groups {groups} do not add up to {total}"
        return groups

    def print_trainable_parameters(self) -> None:
        """Print counts in PEFT's format, then by part."""
        trainable = sum(p.numel() for p in self.parameters() if p.requires_grad)
        total = sum(p.numel() for p in (*self.parameters(), *self.backbone.model.parameters()))
        print(f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {100 * trainable / total:.4f}")
        print(" || ".join(f"{name}: {count:,}" for name, count in self.parameter_groups().items()))

    # -- inputs ----------------------------------------------------------------------------------------------------

    def embed(self, texts: Sequence[tuple[str | None, str]]) -> tuple[Tensor, Tensor]:
        """Live hidden states of (context, question) pairs, in one pass.

        Returns:
            Hidden states (batch, tokens, layers, backbone_dim), right-padded with zeros, and their mask.
        """
        prompts = self.backbone.prompts(texts)
        states = self.backbone.hidden_states(prompts)
        return self.pad_states([prompt.memory_ids for prompt in prompts], states)

    def pad_states(self, token_ids: Sequence[Sequence[int]], states: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Hidden states of each text as one batch, and their mask; shapes as in `embed`.

        Args:
            token_ids: The tokens of each text.
            states: Their states at the stored layers, (tokens, stored_layers, backbone_dim) each.
        """
        ids = [torch.tensor(row) for row in token_ids]
        lengths = torch.tensor([len(row) for row in ids])
        mask = torch.arange(int(lengths.max())) < lengths[:, None]
        pad = nn.utils.rnn.pad_sequence
        return self.all_layers(pad(ids, batch_first=True), pad(list(states), batch_first=True)), mask.to(self.device)

    def all_layers(self, token_ids: Tensor, stored: Tensor) -> Tensor:
        """Stored states, and the looked-up embedding layer if it is not stored, on the head's device and in its dtype.

        Args:
            token_ids: (batch, tokens).
            stored: (batch, tokens, stored_layers, backbone_dim).
        """
        stored = stored.to(self.device, self.dtype)
        if stored.shape[2] == len(self.config.backbone.layers):
            return stored
        embedding = self.backbone.embed_tokens(token_ids).to(self.device, self.dtype)
        return torch.cat([embedding.unsqueeze(2), stored], dim=2)

    def num_answer_slots(self, fields: FieldBatch) -> int:
        """Field and tape slots; tokens that are slots come behind them."""
        return fields.name_index.shape[1] + self.config.reasoner.num_tape_slots

    def field_batch(
        self,
        rows: Sequence[Sequence[Field]],
        num_fields: int | None = None,
        starts: Sequence[Sequence[int]] | None = None,
    ) -> FieldBatch:
        """Fields as tensors.

        Warns, once, of options or names that are one vector to this head.

        Args:
            rows: The fields of each question.
            num_fields: Pad to this number, or to the longest row.
            starts: The memory vectors that the fields of each start from (`field_starts`).
        """
        if self._texts.is_full():
            self._texts = _TextTable(self._texts.told_of_alike)
        texts = self._texts
        for fields in rows:
            if not texts.told_of_alike and not texts.has(tuple(fields)):
                self._warn_of_alike(fields)
        encoded = [texts.encode(tuple(fields)) for fields in rows]
        num_fields = num_fields or max(len(names) for names, _ in encoded)
        num_options = max(options.shape[1] for _, options in encoded)
        names = np.full((len(rows), num_fields), -1)
        options = np.full((len(rows), num_fields, num_options), -1)
        for row, (name_index, option_index) in enumerate(encoded):
            names[row, : len(name_index)] = name_index
            options[row, : option_index.shape[0], : option_index.shape[1]] = option_index
        used, inverse = np.unique(np.concatenate([names.ravel(), options.ravel()]), return_inverse=True)
        padding = int(used[0] == -1)  # number texts within the batch; -1 stays -1
        inverse = torch.from_numpy(inverse.ravel() - padding)
        numbers = used[padding:]
        known = torch.tensor([self._known.get(texts.names[number], -1) for number in numbers])
        batch = FieldBatch(
            texts.vectors(self.backbone)[numbers],
            known,
            inverse[: names.size].view(names.shape),
            inverse[names.size :].view(options.shape),
        )
        if starts is not None:
            batch.starts = torch.full(names.shape, -1)
            for row, found in enumerate(starts):
                batch.starts[row, : len(found)] = torch.tensor(found)
        return batch.to(self.device, self.dtype)

    def _warn_of_alike(self, fields: Sequence[Field]) -> None:
        """The vector of a text is a mean over its tokens; only a learned residual tells `12` from `21`."""
        names = [field.name for field in fields if field.at is None]
        for kind, texts in [("names", names), *(("options", field.options) for field in fields)]:
            same: dict[frozenset[tuple[int, float]], list[str]] = {}
            for text in (text for text in texts if text not in self._known):
                same.setdefault(self.backbone.token_shares(text), []).append(text)
            if alike := [group for group in same.values() if len(group) > 1]:
                self._texts.told_of_alike = True
                warn_caller(
                    f"{kind} {alike[0][:3]} have the same tokens, and are none that this head knows from training: it"
                    " cannot tell them apart"
                )
                return

    def field_starts(self, fields: Sequence[Field], text: str) -> list[int]:
        """Number of the memory vector that each field starts from, -1 for none.

        Args:
            fields: What is asked.
            text: Context, a space and question.

        Raises:
            ValueError: A field stands behind the end of the text.
        """
        own = self.config.places or {}
        at = [own.get(field.name) if field.at is None else field.at for field in fields]
        if self.config.find_names:
            at = [
                named(field.name, text) if place is None and field.name != "answer" else place
                for field, place in zip(fields, at, strict=True)
            ]
        standing = [character for character in at if character is not None]
        tokens = iter(self.backbone.tokens_at(text, standing) if standing else ())
        return [-1 if character is None else next(tokens) for character in at]

    def starts_of(
        self, rows: Sequence[Sequence[Field]], texts: Sequence[tuple[str | None, str]]
    ) -> list[list[int]] | None:
        """`field_starts` of each row, for (context, question) pairs; `None` for a head that knows no places.

        Warns of fields that stand nowhere.
        """
        if self.config.places is None:
            return None
        starts = [self.field_starts(fields, one_text(*text)) for fields, text in zip(rows, texts, strict=True)]
        pairs = [pair for fields, row in zip(rows, starts, strict=True) for pair in zip(fields, row, strict=True)]
        if lost := list(dict.fromkeys(field.name for field, start in pairs if start < 0)):
            unfound = ", nor does the text have such names" if self.config.find_names else ""
            more = f" and {len(lost) - 3} more" if len(lost) > 3 else ""
            warn_caller(f"fields {lost[:3]}{more} do not say where they stand (at){unfound}: expect guesses")
        return starts

    # -- forward ---------------------------------------------------------------------------------------------------

    def encode(self, hidden_states: Tensor, memory_mask: Tensor, fields: FieldBatch) -> Encoded:
        """Adapter, slots, and the memory's keys and values: once per example at inference, once per training step."""
        positions = memory_mask.sum(1, keepdim=True)  # field and tape slots stand behind the last token
        memory, memory_mask = self.adapter(hidden_states, memory_mask)
        slots, slot_mask = self.decoder.slots(fields)
        positions = positions.expand(slots.shape[:2])
        if fields.starts is not None:
            slots, positions = self._start_at(fields.starts, slots, positions, memory)
        if self.config.reasoner.refine_memory:
            slots, slot_mask = torch.cat([slots, memory], dim=1), torch.cat([slot_mask, memory_mask], dim=1)
            places = torch.arange(memory.shape[1], device=memory.device).expand(memory.shape[:2])
            positions = torch.cat([positions, places], dim=1)
            memory, memory_mask = memory[:, :0], memory_mask[:, :0]  # nothing is left that is read only
        return Encoded(slots, slot_mask, self.reasoner.project_memory(memory, memory_mask, slot_mask, positions))

    def _start_at(self, starts: Tensor, slots: Tensor, positions: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Slots that hold the memory vectors they start from, too, and stand at the positions of those."""
        starts = F.pad(starts, (0, slots.shape[1] - starts.shape[1]), value=-1)  # tape slots start from none
        stands, starts = starts >= 0, starts.clamp(min=0)
        there = memory.gather(1, starts.unsqueeze(-1).expand(*starts.shape, memory.shape[-1]))
        return slots + there * stands.unsqueeze(-1), torch.where(stands, starts, positions)

    def forward(
        self,
        hidden_states: Tensor,
        memory_mask: Tensor,
        fields: FieldBatch,
        labels: Tensor | None = None,
        due_labels: Tensor | None = None,
        state: ReasonerState | None = None,
        fresh: Tensor | None = None,
        num_latent_passes: int | None = None,
        num_cycles: int | None = None,
        halt_loss_weight: float = 0.5,
        answer_loss_weight: float = 1.0,
    ) -> HybridOutput:
        """One refinement step for every row.

        Args:
            hidden_states: (batch, tokens, layers, backbone_dim), from `embed` or the feature cache.
            memory_mask: (batch, tokens), true where a token exists.
            fields: What is asked.
            labels: (batch, fields), number of the right option; -100 where a field does not exist.
            due_labels: (batch, fields), what is asked of this step if that is less than `labels`.
            state: State of the step before; `None` starts anew. Slots at its end that this batch lacks are ignored.
            fresh: (batch,), rows of `state` to start anew.
            num_latent_passes: Overrides the configuration (n).
            num_cycles: Overrides the configuration (T).
            halt_loss_weight: Weight of the halting loss.
            answer_loss_weight: Weight of the cross-entropy of the fields.
        """
        encoded = self.encode(hidden_states, memory_mask, fields)
        noise = self.config.reasoner.state_noise if self.training else 0.0
        start = self.reasoner.initial_state(encoded.slots.detach(), noise)
        if state is not None:
            num_slots = encoded.slots.shape[1]
            state = ReasonerState(state.y[:, :num_slots], state.z[:, :num_slots])
        if state is not None and fresh is not None:
            keep = ~fresh[:, None, None]
            start = ReasonerState(torch.where(keep, state.y, start.y), torch.where(keep, state.z, start.z))
        elif state is not None:
            start = state
        state, y = self.reasoner.refinement_step(encoded.slots, encoded.memory, start, num_latent_passes, num_cycles)
        scores, halt_logits = self.decoder(y, fields)
        weights = halt_loss_weight, answer_loss_weight
        metrics = refinement_loss(scores, halt_logits, labels, *weights, due_labels) if labels is not None else {}
        return HybridOutput(
            loss=metrics.pop("loss", None),
            scores=scores,
            halt_logits=halt_logits,
            state=state,
            y=y,
            slot_mask=encoded.slot_mask,
            metrics=metrics,
        )

    def answer(self, question: str, **kwargs: Any) -> Answer:
        """Answer one question; see `hybrid.inference.answer`, where this is written."""
        from hybrid.inference import answer

        return answer(self, question, **kwargs)

    def generate(
        self, inputs: Tensor | None = None, generation_config: GenerationConfig | None = None, **kwargs: Any
    ) -> Any:
        """Go on from tokenised prompts; see `hybrid.generation.generate`, where this is written."""
        from hybrid.generation import generate

        return generate(self, inputs, generation_config, **kwargs)

    def generate_text(self, question: str, **kwargs: Any) -> str:
        """Text in, text out; see `hybrid.generation.generate_text`, where this is written."""
        from hybrid.generation import generate_text

        return generate_text(self, question, **kwargs)


def _hub_id(name_or_path: str) -> str | None:
    """Where a backbone is published; the Hub refuses a card that names a folder of one's own."""
    if name_or_path == SMOLLM2:
        return SMOLLM2_HUB_ID
    is_id = re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", name_or_path)
    return name_or_path if is_id and not Path(name_or_path).exists() else None


class _TextTable:
    """Numbers and static vectors of the texts that fields are made of, so that each is embedded once."""

    def __init__(self, told_of_alike: bool = False):
        self.names: list[str] = []
        self._numbers: dict[str, int] = {}
        self._encoded: dict[tuple[Field, ...], tuple[np.ndarray, np.ndarray]] = {}
        self._vectors: Tensor | None = None  # longer than what it holds, so that it need not grow with each text
        self._num_embedded = 0
        self.told_of_alike = told_of_alike

    def _number(self, text: str) -> int:
        if text not in self._numbers:
            self._numbers[text] = len(self.names)
            self.names.append(text)
        return self._numbers[text]

    def is_full(self) -> bool:
        """Whether it holds so much that one starts anew; fields that stand at other places are others."""
        return max(len(self.names), len(self._encoded)) > MAX_TEXTS

    def has(self, fields: tuple[Field, ...]) -> bool:
        """Whether they were encoded before."""
        return fields in self._encoded

    def encode(self, fields: tuple[Field, ...]) -> tuple[np.ndarray, np.ndarray]:
        """Numbers of the names (fields,) and of the options (fields, options), -1 for padding."""
        with _text_lock:
            if fields not in self._encoded:
                names = np.array([self._number(field.name) for field in fields])
                options = np.full((len(fields), max(len(field.options) for field in fields)), -1)
                for row, field in enumerate(fields):
                    options[row, : len(field.options)] = [self._number(option) for option in field.options]
                self._encoded[fields] = (names, options)
            return self._encoded[fields]

    def vectors(self, backbone: Backbone) -> Tensor:
        """Vectors of all texts so far (texts, backbone_dim), float32."""
        with _text_lock, torch.inference_mode(False), torch.no_grad():  # training goes on with what inference put here
            have, need = self._num_embedded, len(self.names)
            if have < need:
                new = backbone.text_vectors(self.names[have:]).cpu()
                if self._vectors is None or need > len(self._vectors):
                    longer = new.new_empty(2 * need, new.shape[1])
                    if self._vectors is not None:
                        longer[:have] = self._vectors[:have]
                    self._vectors = longer
                self._vectors[have:need] = new
                self._num_embedded = need
            assert self._vectors is not None
            return self._vectors[:need]


_text_lock = threading.Lock()  # threads number texts and embed them; a lock inside the table could not be copied
