"""Hugging Face transformers' RoBERTa, the peer of whole steps, and our model with the same weights.

A peer gets a padded batch: input_ids (B, S), and attention_mask if there is padding (without a mask SDPA may use its flash kernel).
"""
from typing import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rt.deltas import Base, attach
from rt.formats.hf import CLASSIFIERS, HEADS, encoder_state, head_state
from rt.kinds import DeltaConfig
from rt.model import Batch, Classifier, EncoderConfig, MaskedLM, new_masked_lm

LABELS = 13     # ChemProt's


class StandIn:
    """The parts of a tokenizer that masking and bases need."""
    bos_id, pad_id, eos_id, mask_id = 0, 1, 2, 4
    special_ids = [0, 1, 2, 3, 4]
    fingerprint = vocabulary = "stand-in"

    def __init__(self, vocab_size: int):
        self.vocab_size = vocab_size


def stand_in_base(config: EncoderConfig, seed: int, state: dict[str, Tensor] | None = None) -> Base:
    """A base with random weights, or with the encoder weights in `state`, under our names or Hugging Face's."""
    model = new_masked_lm(config, seed)
    if state is not None:
        model.encoder.load_state_dict(encoder_state(state, config))
    return Base(model.encoder, model.head, StandIn(config.vocab_size), {"name": "stand-in"}, "stand-in")


def peer(name: str, config: EncoderConfig, attention: str = "sdpa", state: dict[str, Tensor] | None = None) -> nn.Module:
    """RobertaForMaskedLM or RobertaForSequenceClassification with the sizes and dropout of `config`, on the CPU."""
    import transformers  # a peer, and slow to import
    transformers.logging.set_verbosity_error()
    theirs = transformers.RobertaConfig(
        vocab_size=config.vocab_size, hidden_size=config.hidden_size, num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads, intermediate_size=config.ffn_size, type_vocab_size=1,
        max_position_embeddings=config.max_len + config.pad_id + 1, pad_token_id=config.pad_id, bos_token_id=StandIn.bos_id,
        eos_token_id=StandIn.eos_id, layer_norm_eps=config.layer_norm_eps, hidden_dropout_prob=config.dropout,
        attention_probs_dropout_prob=config.attention_dropout, num_labels=LABELS)
    model = getattr(transformers, name)._from_config(theirs, attn_implementation=attention)
    if state is not None:
        model.load_state_dict(state)
    return model


def peer_state(name: str, config: EncoderConfig) -> dict[str, Tensor] | None:
    """Weights for all implementations of a case; None if transformers is missing."""
    try:
        torch.manual_seed(0)
        return peer(name, config).state_dict()
    except ImportError:
        return None


def our_masked_lm(config: EncoderConfig, state: dict[str, Tensor] | None) -> MaskedLM:
    """Our model on the CPU, with the weights of a RobertaForMaskedLM."""
    model = new_masked_lm(config, seed=0)
    if state is not None:
        model.encoder.load_state_dict(encoder_state(state, config))
        model.head.load_state_dict(head_state(state, config, HEADS))
    return model


def our_classifier(config: EncoderConfig, state: dict[str, Tensor] | None, delta: DeltaConfig, device: torch.device) -> Classifier:
    """A fresh delta on the weights of a RobertaForSequenceClassification."""
    base = stand_in_base(config, 0, state).to(device)
    model = attach(base, delta, LABELS, seed=0)
    if state is not None:
        model.head.load_state_dict(head_state(state, config, CLASSIFIERS))
    return model


# ---------------------------------------------------------------- one batch, two layouts

def padded(flat: Tensor, lengths: list[int], fill: int) -> Tensor:
    """(N,) to (B, S), with S the longest of `lengths`."""
    return nn.utils.rnn.pad_sequence(flat.split(lengths), batch_first=True, padding_value=fill)


def padded_inputs(batch: Batch, pad_id: int) -> dict[str, Tensor]:
    """input_ids (B, S), and attention_mask (B, S) if there is padding; on the batch's device."""
    lengths = batch.cu_seqlens.diff().tolist()
    out = {"input_ids": padded(batch.ids, lengths, pad_id)}
    if min(lengths) < max(lengths):
        out["attention_mask"] = padded(torch.ones_like(batch.ids), lengths, 0)
    return out


def masked_lm_losses(model: nn.Module, batch: Batch, pad_id: int) -> dict[str, Callable[[], Tensor]]:
    """The peer's masked-LM loss as the library computes it (scores of every token), and with the head on predicted rows only."""
    inputs, lengths = padded_inputs(batch, pad_id), batch.cu_seqlens.diff().tolist()
    flat = torch.full_like(batch.ids, -100)
    flat[batch.predict] = batch.labels
    labels = padded(flat, lengths, -100)
    rows = (labels.view(-1) != -100).nonzero().squeeze(-1)

    def full() -> Tensor:
        return model(**inputs, labels=labels).loss

    def predicted() -> Tensor:
        h = model.roberta(**inputs)[0]
        return F.cross_entropy(model.lm_head(h.view(-1, h.shape[-1])[rows]).float(), batch.labels)

    return {"": full, " predicted rows": predicted}


def classifier_loss(model: nn.Module, batch: Batch, pad_id: int) -> Callable[[], Tensor]:
    """The peer's mean cross-entropy on the padded batch."""
    inputs = padded_inputs(batch, pad_id)
    return lambda: model(**inputs, labels=batch.labels).loss
