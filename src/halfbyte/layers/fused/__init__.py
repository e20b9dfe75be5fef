"""The fused decoder layer: one hand-written forward and backward over the groups of `layers.decoder`, with a list of what is kept.

Why by hand: autograd sees a layer as forty operations, each of which keeps its inputs, reads and writes whole activations, and
casts and adds by itself. Here a residual addition runs inside the norm behind it, q/k/v and gate/up are one product each with the
adapter inside (`kernels.augmented`), gradients overwrite the activations they belong to, and what is kept for backward is a choice
(`Keep`) instead of a consequence. The arithmetic is `layers.decoder`'s, which stays the reference.

`prepare` puts it under every adopted layer that it can run and says why not for the others.
"""
