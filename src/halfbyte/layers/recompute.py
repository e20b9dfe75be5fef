"""Recompute per decoder layer: keep each layer's input, run its forward again in backward.

Why transformers' own switch: every decoder layer, adopted or not, derives from `GradientCheckpointingLayer`, and the
non-reentrant form replays random numbers and works with frozen inputs: the gradient of the embedding's output, which the switch
asks for too, is wanted by nobody. It acts in training mode only. Cost: one more forward pass; saves all activations inside a layer.
"""

from __future__ import annotations

from transformers import PreTrainedModel


def set_recompute(model: PreTrainedModel, on: bool) -> None:
    """Switches recompute of every decoder layer on or off."""
    options = {"use_reentrant": False}
    # transformers 5.2x renames the pair; the old names warn there and are the only ones before.
    renamed = "activation_checkpointing_enable" in dir(PreTrainedModel)
    if on:
        model.activation_checkpointing_enable(options) if renamed else model.gradient_checkpointing_enable(options)  # type: ignore[no-untyped-call]
        model.disable_input_require_grads()  # type: ignore[no-untyped-call]
    else:
        model.activation_checkpointing_disable() if renamed else model.gradient_checkpointing_disable()  # type: ignore[no-untyped-call]
