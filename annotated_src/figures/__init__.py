"""The pictures of the book. One module per chapter, in pairs of functions:

`..._data()` computes the numbers, from the annotated modules, and returns them for the
tests; `draw_...(data)` draws them and returns a matplotlib Figure.
"""

import logging

# Every chapter begins with a map from here. What it imports later may import torchao,
# which logs that kernels for GPUs do not load: not what a chapter is about.
for _name in ("torchao", "torch.utils._pytree"):
    logging.getLogger(_name).setLevel(logging.ERROR)
