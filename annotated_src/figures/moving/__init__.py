"""The numbers behind the figures that move, one module a figure.

The book's pages carry them as JSON; scripts in `book/_static/moving` draw them.
"""

from collections.abc import Callable
from typing import Any

from annotated_src.figures.moving.gqa_groups import gqa_groups_data
from annotated_src.figures.moving.half_angle import half_angle_data
from annotated_src.figures.moving.int8_grid import int8_grid_data
from annotated_src.figures.moving.kv_cache import kv_cache_data
from annotated_src.figures.moving.prefix_mask import prefix_mask_data
from annotated_src.figures.moving.residual_alpha import residual_alpha_data
from annotated_src.figures.moving.rope_pair import rope_pair_data
from annotated_src.figures.moving.top_p import top_p_data

FIGURES: dict[str, Callable[[], dict[str, Any]]] = {
    "rope-pair": rope_pair_data,
    "gqa-groups": gqa_groups_data,
    "kv-cache": kv_cache_data,
    "top-p": top_p_data,
    "int8-grid": int8_grid_data,
    "prefix-mask": prefix_mask_data,
    "half-angle": half_angle_data,
    "residual-alpha": residual_alpha_data,
}
