"""Recompute per decoder layer: keep each layer's input, run its forward again in backward.

Why transformers' own switch: every decoder layer, adopted or not, derives from `GradientCheckpointingLayer`, and the
non-reentrant form replays random numbers and works with frozen inputs. It acts in training mode only. Cost: one more
forward pass; saves all activations inside a layer.
"""

from __future__ import annotations

from transformers import PreTrainedModel


def set_recompute(model: PreTrainedModel, on: bool) -> None:
    """Switches recompute of every decoder layer on or off."""
    if on:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    else:
        model.gradient_checkpointing_disable()
