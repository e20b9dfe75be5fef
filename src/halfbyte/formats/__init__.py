"""What the stored bits mean: nf4, fp4, int4, int8, nested scales. Pure torch, any device, no Triton.

Import from the modules (`halfbyte.formats.quantize`, `halfbyte.formats.packed`): this file stays empty so that
`halfbyte.formats.config` does not import torch.
"""
