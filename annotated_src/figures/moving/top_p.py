"""Numbers of a moving figure: what top-p keeps of SmolLM2's next tokens.

They need the real model, so they are kept in a file, which `top_p_table` made.
"""

import json
from pathlib import Path
from typing import Any

SAVED = Path(__file__).parents[2] / "data" / "moving" / "top_p.json"


def top_p_data() -> dict[str, Any]:
    """Read what each p keeps after two prompts, at six temperatures."""
    return json.loads(SAVED.read_text("utf-8"))
