"""From files to packed rows: sources, shapes, chat templates and loss masks, packing, the loader."""
